"Heads that read moments in their order, from clips to bundle."
import numpy as np
import polars as pl
import pytest
from PIL import Image

from visrec_nb.core.errors import ParameterError
from visrec_nb.media.render import write_video
from visrec_nb.data.catalog import read_catalog
from visrec_nb.vision import video_learner

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    "Clips of two pictures, one after the other: which comes first is the label."
    folder, draw = tmp_path_factory.mktemp("swapped") / "clips", np.random.default_rng(0)
    first, second = (Image.fromarray(draw.integers(40, 220, (4, 4, 3), dtype=np.uint8)).resize((64, 64)) for _ in range(2))
    for split, count in (("train", 16), ("valid", 6), ("test", 10)):
        for n in range(2 * count):
            warm, cold = (np.asarray(picture) + draw.integers(0, 30, 3, dtype=np.uint8) for picture in (first, second))
            label = ("warm_first", "cold_first")[n % 2]
            halves = (warm, cold) if label == "warm_first" else (cold, warm)
            path = folder / split / label / f"{n}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = np.repeat(np.stack(halves), 12, 0)
            write_video(path, frames // 2 + draw.integers(0, 60, frames.shape, dtype=np.uint8))
    return folder


@pytest.mark.parametrize("head", ["gru", "transformer"])
def test_the_order_of_moments_is_learnt_and_leaves_in_the_bundle(swapped, tmp_path, head):
    catalog = read_catalog(swapped).filter(pl.col("split") != "valid") # then nothing is set aside
    learn = video_learner(catalog, head=head, streams=("plain",), num_segments=6, store=swapped.parent / "store").fit_head()
    assert {row["motion"] for row in learn.history} == {0.1, 0.5, 0.9}
    assert learn.train_rows.all() and (learn.left_out.argmax(1) == learn.truth).mean() == max(row["accuracy"] for row in learn.history)
    bundle = learn.to_bundle(tmp_path / "order.bundle")
    assert bundle.manifest["head_gap"] < 1e-4 and bundle.manifest["calibrated_on"] == "cross-validation"
    test = bundle.evaluate(swapped, store=swapped.parent / "store")
    assert test.metrics["accuracy"] >= 0.9
    backwards = bundle.probabilities(test.features[:, ::-1].copy()).argmax(1)
    assert (backwards != test.targets).mean() >= 0.9


def test_a_pooled_head_cannot_know_the_order(swapped, tmp_path):
    learn = video_learner(swapped, streams=("plain",), num_segments=6, store=swapped.parent / "store").fit_head()
    test = learn.to_bundle(tmp_path / "pooled.bundle").evaluate(swapped, store=swapped.parent / "store")
    assert test.metrics["accuracy"] <= 0.75


def test_an_unknown_head_is_refused_before_any_clip_is_read(tmp_path):
    for arch, head in (("efficientnet_lite0", "lstm"), ("tsm/efficientnet_lite0", "gru")):
        with pytest.raises(ParameterError, match="pooled, gru, transformer"): video_learner(tmp_path / "nowhere", arch, head=head)
