"Clip networks from end to end: graphs against torch, training, bundles, broken clips, a killed run, memory over epochs."

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from visrec_nb.core.errors import CatalogError, DataWarning, ParameterError
from visrec_nb.data.catalog import with_hashes
from visrec_nb.media.render import render_move, write_video
from visrec_nb.vision.clips import clip_network_preprocessing, frame_side, read_views

torch = pytest.importorskip("torch")
pytest.importorskip("fastai")
pytest.importorskip("timm")

from fastai.callback.core import Callback # noqa: E402
from fastai.learner import Learner # noqa: E402
from fastai.losses import CrossEntropyLossFlat # noqa: E402
from torch import nn # noqa: E402

from visrec_nb.vision.clip_learners import clip_learner # noqa: E402
from visrec_nb.vision.clip_loaders import clip_loaders # noqa: E402
from visrec_nb.vision.clip_networks import clip_backbone, onnx_clip_backbone, torch_clip_backbone # noqa: E402
from visrec_nb.vision.export import check_onnx # noqa: E402
from visrec_nb.vision.frame_cache import FrameCache # noqa: E402
from visrec_nb.vision.training import fit_network, latest_name # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
PANS = ("pan_left", "pan_right")


@pytest.fixture(scope="module", autouse=True)
def no_trace():
    "torch tells each step of an export to the log, which pytest would write out: that takes longer than the export."
    logging.disable(logging.DEBUG)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    "Networks, embeddings and frames of this file's own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISREC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_pans(folder, train=12, valid=4):
    "The same pictures, seen from a camera that goes to the left or to the right."
    draw = np.random.default_rng(0)
    for n in range(train + valid):
        photo = np.asarray(Image.fromarray(draw.integers(0, 256, (10, 14, 3), np.uint8)).resize((280, 200), Image.Resampling.BICUBIC))
        for label in PANS:
            path = folder / ("train" if n < train else "valid") / label / f"{n:02d}.mp4"
            render_move(photo, label, path, seed=n, speed=0.25, size=64, fps=12, seconds=1, shake=0.1)
    return folder


@pytest.fixture(scope="module")
def pans(tmp_path_factory): return make_pans(tmp_path_factory.mktemp("clips") / "pans")


def seen_by(row, pixels):
    return ((torch.from_numpy(pixels).float() - torch.tensor(row.mean)) / torch.tensor(row.std)).movedim(-1, -3)


LONG = pytest.mark.skipif(not os.environ.get("VISREC_LONG_TESTS"), reason="half a minute each: set VISREC_LONG_TESTS=1")


@pytest.mark.parametrize("name, size, frames", [
    ("torchvision/r3d_18", 32, 4), pytest.param("tsn/mobilenetv3_small_050", 64, 3, marks=pytest.mark.slow),
    pytest.param("tsm/efficientnet_lite0", 64, 3, marks=pytest.mark.slow), pytest.param("tsm/resnet50", 64, 3, marks=LONG),
    pytest.param("torchvision/r2plus1d_18", 32, 4, marks=LONG),
    pytest.param("torchvision/s3d", 64, 16, marks=LONG),
    pytest.param("torchvision/swin3d_t", 64, 4, marks=LONG)])
def test_graph_answers_as_torch_does(name, size, frames):
    row = clip_backbone(name, size, frames)
    net = torch_clip_backbone(row, pretrained=False).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, frames, size, size, 3), np.uint8)
    with torch.no_grad(): expected = net(seen_by(row, pixels)).numpy()
    assert expected.shape == (3, row.dim) and np.ptp(expected, axis=0).max() > 0
    gap = check_onnx(onnx_clip_backbone(row, pretrained=False, net=net), {"pixels": pixels}, expected, 1e-3 * np.abs(expected).max())
    assert gap <= 1e-3 * np.abs(expected).max()


def test_mvit_is_for_one_size_only():
    assert (clip_backbone("torchvision/mvit_v2_s").size, clip_backbone("torchvision/mvit_v2_s").num_frames) == (224, 16)
    with pytest.raises(ParameterError, match="16 frames of 224 pixels"): clip_backbone("torchvision/mvit_v2_s", 64)


def test_kinetics_network_is_torchvisions():
    "With the classifier put back on our embedding the answer is that of torchvision's own network."
    from torchvision.models.video import r3d_18
    pixels = torch.rand(1, 3, 4, 32, 32)
    torch.manual_seed(0)
    whole = r3d_18(weights=None).eval()
    ours = torch_clip_backbone(clip_backbone("torchvision/r3d_18", 32, 4), pretrained=False).eval()
    with torch.no_grad(): assert torch.allclose(whole.fc(ours(pixels.transpose(1, 2))), whole(pixels), atol=1e-5)


@pytest.mark.slow
def test_s3d_is_torchvisions():
    "At its own size; at others the mean over the last map stands where torchvision has none."
    from torchvision.models.video import s3d
    torch.manual_seed(0)
    whole, pixels = s3d(weights=None).eval(), torch.rand(1, 3, 16, 224, 224)
    ours = torch_clip_backbone(clip_backbone("torchvision/s3d"), pretrained=False).eval()
    with torch.no_grad():
        assert torch.allclose(whole.classifier(ours(pixels.transpose(1, 2))[..., None, None, None]).flatten(1), whole(pixels), atol=1e-4)


def test_no_network_is_told_at_once(monkeypatch):
    import visrec_nb.vision.backbones as backbones
    monkeypatch.setattr(backbones, "_answers", lambda url, seconds=4.0: False)
    with pytest.warns(DataWarning, match="could not be fetched .*download.pytorch.org does not answer.* random weights"):
        net = torch_clip_backbone(clip_backbone("torchvision/mc3_18", 32, 4))
    assert net.fetched is False


@pytest.fixture(scope="module")
def learned(pans, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("learned")
    learn = clip_learner(pans, "tsm/resnet10t", size=64, num_frames=4, num_clips=2, pretrained=False, store=tmp / "store",
                         cache=tmp / "frames", bs=8, augment="none")
    losses = []
    class Losses(Callback):
        def after_batch(self): losses.append((self.epoch, float(self.loss.detach()))) if self.training else None
    log = learn.fit_network(10, 0.001, label_smoothing=0.0, cbs=[Losses()])
    return learn, (log, losses), learn.to_bundle(tmp / "pans.bundle")


def test_training_learns_the_direction_of_motion(learned):
    _, (log, losses), _ = learned
    first, last = (np.mean([loss for epoch, loss in losses if epoch == n]) for n in (0, 9))
    assert log.stopped == "finished" and last < 0.8 * first


def test_bundle_answers_as_torch_does(learned, pans):
    learn, _, bundle = learned
    files = sorted((pans / "valid").rglob("*.mp4"))
    model = learn.model.eval()
    with torch.no_grad():
        logits = torch.cat([model(seen_by(learn.row, read_views(f, learn.preprocessings[0]))).mean(0, keepdim=True) for f in files]).numpy()
    scaled = np.exp(logits / bundle.temperature)
    expected = (scaled / scaled.sum(1, keepdims=True)).max(1)
    assert bundle.manifest["network_gap"] < 1e-4 and bundle.manifest["head_gap"] < 1e-4
    assert np.allclose(bundle.predict(files)["score"], expected, atol=1e-4)
    assert learn.preprocessings[0]["num_clips"] == 2 and bundle.preprocessings[0] == learn.preprocessings[0]


def test_bundle_takes_frames_and_any_number_of_views(learned, pans):
    from visrec_nb.media.video import read_clip
    _, _, bundle = learned
    file = sorted((pans / "valid").rglob("*.mp4"))[0]
    frames = read_clip(file, 12, size=frame_side(64)).frames
    [a], [b] = (bundle.predict([source])["score"].to_list() for source in (file, frames))
    assert abs(a - b) < 1e-4
    before = dict(bundle.preprocessings[0])
    scores = {}
    try:
        for clips, crops in ((1, 1), (3, 3)):
            bundle.preprocessings[0].update(num_clips=clips, num_crops=crops)
            scores[clips, crops] = bundle.predict([file])["score"][0]
    finally: bundle.preprocessings[0].update(before)
    assert len({a, *scores.values()}) == 3
    assert "frames are uint8" in bundle.predict([frames[0]])["error"][0]


def test_frozen_network_with_a_fitted_head(pans, tmp_path):
    "The head alone, on embeddings that are cached; the second learner computes none."
    options = {"size": 64, "num_frames": 4, "pretrained": False, "store": tmp_path / "store", "cache": tmp_path / "frames"}
    learn = clip_learner(pans, "tsm/resnet10t", **options).fit_head(folds=3)
    bundle = learn.to_bundle(tmp_path / "frozen.bundle")
    files = sorted((pans / "valid").rglob("*.mp4"))
    assert bundle.predict(files)["error"].null_count() == len(files) and bundle.manifest["network_gap"] < 1e-4
    again = bundle.embed(learn.catalog, tmp_path / "store")
    assert again.computed == 0 and np.array_equal(again.features, learn._features)


def audio_file(path):
    import av
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for n in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * n
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


class Tiny(nn.Module):
    "A network of clips, small and with a normalisation."
    def __init__(self, classes=2):
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(3, 8, 3, (1, 2, 2)), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, classes))
    def forward(self, x): return self.head(self.body(x.transpose(1, 2)))


def catalog_of(folder):
    files = sorted(folder.rglob("*.mp4"))
    frame = pl.DataFrame({"item_id": [f"{f.parent.name}-{f.stem}" for f in files], "path": [f"{f}" for f in files], "media": "video"})
    return frame, np.array([PANS.index(f.parent.name) for f in files]), np.array(["train" in f.parts for f in files])


def tiny_learner(folder, frames, hashes=True, **more):
    torch.manual_seed(0)
    catalog, targets, train = catalog_of(folder)
    if hashes:
        with warnings.catch_warnings(action="ignore", category=DataWarning): catalog = with_hashes(catalog)
    how = clip_network_preprocessing(48, 4, 2)
    dls = clip_loaders(catalog, targets, train, how, (127,) * 3, (64,) * 3, labels=PANS, cache=frames, device="cpu", **{"bs": 8} | more)
    return Learner(dls, Tiny(), loss_func=CrossEntropyLossFlat(), splitter=lambda m: [list(m.body.parameters()), list(m.head.parameters())])


def test_broken_clips_are_counted_and_listed(tmp_path):
    "One frame is a clip; a truncated one and one without pictures are not, and nothing stands in for them."
    folder = make_pans(tmp_path / "pans", 6, 2)
    write_video(folder / "train" / "pan_left" / "one.mp4", np.full((1, 64, 64, 3), 90, np.uint8), 12)
    audio_file(folder / "train" / "pan_left" / "audio.mp4")
    cut = folder / "train" / "pan_right" / "cut.mp4"
    cut.write_bytes((folder / "train" / "pan_right" / "00.mp4").read_bytes()[:-2000])
    learn = tiny_learner(folder, tmp_path / "frames", max_failed=0.2)
    drawn = []
    class Count(Callback):
        def before_batch(self): drawn.append(len(self.xb[0])) if self.training else None
    log = fit_network(learn, 2, 0.01, cbs=[Count()])
    assert sum(drawn) == 2 * 13 and log.stopped == "finished"
    assert {Path(p).stem: (part, times) for p, part, times in log.failed.select("path", "part", "times").rows()} == {
        "audio": ("train", 2), "cut": ("train", 2)}
    strict = tiny_learner(folder, tmp_path / "frames", max_failed=0.05)
    with pytest.raises(CatalogError, match="2 of 15 clips could not be read"): fit_network(strict, 1)


def test_parts_of_a_file_are_clips(tmp_path):
    "Rows with `start` and `seconds` are cut from their file, in training and by the bundle's reader alike."
    film = np.empty((48, 64, 64, 3), np.uint8)
    film[:] = (5 * np.arange(48, dtype=np.uint8))[:, None, None, None]
    write_video(tmp_path / "long.mp4", film, 12)
    catalog = pl.DataFrame({"item_id": list("abcd"), "path": [str(tmp_path / "long.mp4")] * 4})
    catalog = catalog.with_columns(start=pl.Series([0.0, 1.0, 2.0, 3.0]), seconds=1.0)
    how = clip_network_preprocessing(32, 3)
    dls = clip_loaders(catalog, [0, 1, 0, 1], [True, True, False, False], how, (0,) * 3, (1,) * 3, cache=tmp_path / "frames", device="cpu")
    x, _ = dls.valid.one_batch()
    expected = [read_views(tmp_path / "long.mp4", how, start, 1.0)[0].mean((1, 2, 3)) for start in (2.0, 3.0)]
    assert np.allclose(x.mean((2, 3, 4)), expected, atol=0.01) and np.allclose(np.round(expected[0] / 5), [26, 30, 34])


def test_from_the_second_epoch_no_video_is_read(tmp_path):
    folder = make_pans(tmp_path / "pans", 6, 2)
    learn = tiny_learner(folder, tmp_path / "frames")
    class Remove(Callback):
        def after_epoch(self):
            for file in folder.rglob("*.mp4"): file.unlink()
    log = fit_network(learn, 3, 0.01, cbs=[Remove()])
    assert not list(folder.rglob("*.mp4")) and log.stopped == "finished" and log.failed.is_empty() and len(log.rows) == 3


def test_cutmix_is_refused_for_clips(pans, tmp_path):
    with pytest.raises(ParameterError, match="mixup works on clips"): fit_network(tiny_learner(pans, tmp_path), 1, cutmix=1.0)
    fit_network(tiny_learner(pans, tmp_path), 1, mixup=0.4)


HARD = {"epochs": 3, "lr": slice(0.003, 0.03), "mixup": 0.4, "ema": 0.9}


def child(*args): # PYTHONPATH stays: the installed package
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VISREC_PROGRESS": "0"}
    return subprocess.run([sys.executable, __file__, *map(str, args)], env=env, capture_output=True, text=True, timeout=300, check=False)


def killed_in_child(folder, frames, checkpoints):
    "Training that dies in the middle of its second epoch."
    class Die(Callback):
        order = 300
        def after_batch(self):
            if self.training and (self.epoch, self.dls.train.batch) == (1, 1): os._exit(9)
    torch.set_num_threads(1)
    fit_network(tiny_learner(Path(folder), frames), **HARD, checkpoint=checkpoints, minutes=0, cbs=[Die()])


def test_a_killed_run_goes_on_to_the_same_weights(pans, tmp_path):
    whole = tiny_learner(pans, tmp_path / "frames")
    fit_network(whole, **HARD)
    assert child("killed", pans, tmp_path / "other", tmp_path / "checkpoints").returncode == 9
    assert latest_name(tmp_path / "checkpoints") == "checkpoint-1-00001-0000002"
    again = tiny_learner(pans, tmp_path / "third", workers=2)
    log = fit_network(again, **HARD, checkpoint=tmp_path / "checkpoints", resume=True)
    a, b = whole.model.state_dict(), again.model.state_dict()
    assert log.resumed_from and all(torch.equal(a[name], b[name]) for name in a)


def memory_in_child(folder, frames, kept):
    "Resident megabytes after each epoch."
    class Watch(Callback):
        def after_epoch(self):
            text = Path("/proc/self/status").read_text()
            print(int(text.partition("VmRSS:")[2].split()[0]) / 1024, flush=True)
    torch.set_num_threads(1)
    cache = FrameCache(54, frames) if kept == "kept" else FrameCache(54, frames, max_bytes=1)
    with warnings.catch_warnings(action="ignore"): fit_network(tiny_learner(Path(folder), cache), 20, 0.01, cbs=[Watch()])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's memory there")
@pytest.mark.parametrize("kept", ["kept", "decoded in every epoch"])
def test_memory_stays_flat_over_twenty_epochs(pans, tmp_path, kept):
    done = child("memory", pans, tmp_path, kept)
    megabytes = [float(line) for line in done.stdout.split()]
    assert done.returncode == 0 and len(megabytes) == 20, done.stderr[-2000:]
    slope = np.polyfit(np.arange(15), megabytes[5:], 1)[0]
    assert slope < 1, megabytes


@pytest.mark.slow
def test_command_trains_a_clip_network(pans, tmp_path):
    from typer.testing import CliRunner

    from visrec_nb.cli import app
    out = tmp_path / "moves.bundle"
    asked = ["--arch", "tsm/efficientnet_lite0", "--size", "32", "--frames", "3", "--epochs", "1"]
    done = CliRunner().invoke(app, ["train", "video", str(pans), "--out", str(out), *asked])
    assert done.exit_code == 0, done.output
    assert "whole network" in done.output and (out / "encoder.onnx").is_file() and not (tmp_path / "moves.bundle.checkpoints").exists()
    refused = CliRunner().invoke(app, ["train", "video", str(pans), "--out", str(tmp_path / "b"), "--frames", "3"])
    assert refused.exit_code and "clip networks" in str(refused.exception)
    refused = CliRunner().invoke(app, ["train", "video", str(pans), "--out", str(tmp_path / "b"), "--head", "lstm"])
    assert refused.exit_code and "pooled, gru, transformer" in str(refused.exception)


if __name__ == "__main__": {"killed": killed_in_child, "memory": memory_in_child}[sys.argv[1]](*sys.argv[2:])
