"""Clip classifiers on clips whose truth is known: what moves, how fast, and in which direction of time."""
import numpy as np
import polars as pl
import pytest

SIZE = 96


def write_clip(path, place, frames=30, fps=24):
    "A grey wall with a dark square whose corner is at `place(i)` in frame i."
    from visrec_nb.media.render import write_video

    wall = np.random.default_rng(7).integers(120, 200, (SIZE // 8, SIZE // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    pictures = np.repeat(wall[None], frames, 0)
    for i, picture in enumerate(pictures):
        y, x = (round(v) % (SIZE - 12) for v in place(i))
        picture[y:y + 12, x:x + 12] = 10
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, pictures, fps)


@pytest.fixture(scope="module")
def speeds(tmp_path_factory):
    "A small square that creeps or rushes, anywhere and in any direction: no frame tells which."
    folder, draw = tmp_path_factory.mktemp("speeds"), np.random.default_rng(0)
    for part, count in (("train", 12), ("valid", 4), ("test", 6)):
        for label, step in (("slow", 0.5), ("fast", 4.0)):
            for n in range(count):
                start, angle = draw.uniform(0, SIZE, 2), draw.uniform(0, 2 * np.pi)
                way = step * np.array([np.sin(angle), np.cos(angle)])
                write_clip(folder / part / label / f"{n}.mp4", lambda i, start=start, way=way: start + way * i)
    return folder


@pytest.fixture(scope="module")
def bundle(speeds, tmp_path_factory):
    from visrec_nb.vision import video_learner

    work = tmp_path_factory.mktemp("bundle")
    learn = video_learner(speeds, store=work / "store", num_segments=6).fit_head()
    assert sorted({round(row["motion"], 2) for row in learn.history}) == [0.15, 0.5, 0.9, 1.0]
    return learn.to_bundle(work / "speeds.bundle")


@pytest.mark.slow
def test_speed_is_told_whatever_the_direction(bundle, speeds):
    from visrec_nb.vision.time_use import answers_by_order, moment_evidence, time_use

    test = bundle.evaluate(speeds)
    assert test.metrics["accuracy"] == 1 and bundle.manifest["head_gap"] < 1e-4
    assert bundle.manifest["encoders"][0]["preprocessing"]["streams"] == ["plain", "moving", "change"]
    told = {row["order"]: row for row in time_use(answers_by_order(bundle, test), test.targets).to_dicts()}
    assert told["backward"]["accuracy"] == 1, "backwards a fast clip is as fast"
    evidence = moment_evidence(bundle, test.features)
    assert evidence.shape == (12, 6) and np.isfinite(evidence).all()
    found = bundle.predict(test.catalog["path"])
    assert np.allclose(found["score"], test.probs.max(1), atol=1e-5) and found["label"].to_list() == test.catalog["label"].to_list()


@pytest.mark.slow
def test_backwards_the_direction_turns(tmp_path):
    from visrec_nb.vision import video_learner
    from visrec_nb.vision.time_use import answers_by_order, opposites, time_use

    for part, count in (("train", 8), ("valid", 3), ("test", 4)):
        for label, way in (("left", -3), ("right", 3)):
            for n in range(count):
                write_clip(tmp_path / "clips" / part / label / f"{n}.mp4", lambda i, n=n, way=way: (9 * n, 40 + 5 * n + way * i))
    learn = video_learner(tmp_path / "clips", store=tmp_path / "store", num_segments=6, streams=("plain",)).fit_head()
    bundle = learn.to_bundle(tmp_path / "b")
    test = bundle.evaluate(tmp_path / "clips")
    answers = answers_by_order(bundle, test)
    told = {row["order"]: row["accuracy"] for row in time_use(answers, test.targets).to_dicts()}
    assert told["forward"] == 1 and told["backward"] == 0
    assert opposites(answers, test.targets, bundle.labels).select("label", "opposite").rows() == [("left", "right"), ("right", "left")]


def test_streams_that_are_not_known_are_refused(tmp_path):
    from visrec_nb.core.errors import ParameterError
    from visrec_nb.vision.features import clip_preprocessing

    for streams in ((), ("plain", "depth")):
        with pytest.raises(ParameterError, match="plain, moving, change"): clip_preprocessing(streams=streams)


def test_scenes_stay_on_one_side_of_a_split():
    from visrec_nb.data.splits import fold_catalog, group_alike, leaks

    draw = np.random.default_rng(3)
    scene = draw.permutation(np.repeat(np.arange(20), 4))
    vectors = draw.normal(size=(20, 64))[scene][:, None] + 0.3 * draw.normal(size=(80, 3, 64))
    table = pl.DataFrame({"path": [f"{n:02}.mp4" for n in range(80)], "label": ["a", "b"] * 40})
    grouped = group_alike(table, vectors)
    pairs = {(g, int(s)) for g, s in zip(grouped["group"], scene, strict=True)}
    assert grouped["group"].n_unique() == len(pairs) == 20
    assert leaks(fold_catalog(grouped, 5), side="fold").is_empty()
