"""Parts of videos as items, and long videos window by window: against predict, with damage, and with a kill."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import av
import numpy as np
import polars as pl
import pytest

from visrec_nb.core.errors import CatalogError

MOVES = ("pan_right", "tilt_up", "static")


def draw(move, seed, seconds):
    "A camera move over noise in patches: motion without any photo."
    from visrec_nb.media.render import render_frames

    patches = np.random.default_rng(seed).integers(30, 226, (24, 24, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    return render_frames(patches, move, seed=seed, seconds=seconds, speed=0.15, size=64)


def write(path, frames, gop=1):
    "H.264 with a key frame every `gop`, at 24 frames a second."
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "20"})
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.gop_size = *frames.shape[1:3], "yuv420p", gop
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "A bundle that tells the three moves apart, trained on clips of 1.5 s."
    from visrec_nb.vision.learners import video_learner

    folder, rows = tmp_path_factory.mktemp("moves"), []
    for n in range(30):
        path = write(folder / f"{n}.mp4", draw(MOVES[n % 3], n, 1.5))
        rows.append({"item_id": str(n), "path": str(path), "label": MOVES[n % 3], "split": "valid" if n < 6 else "train"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn = video_learner(pl.DataFrame(rows), store=folder / "store", num_segments=4, streams=["plain"])
        return learn.fit_head().to_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    "Four seconds to the right, then four up; a key frame every 2 seconds."
    folder = tmp_path_factory.mktemp("film")
    return write(folder / "film.mp4", np.concatenate([draw(move, 100 + n, 4) for n, move in enumerate(MOVES[:2])]), gop=48)


def windows(scores, path):
    return scores.select(path=pl.lit(str(path)), start="start", seconds=pl.col("end") - pl.col("start"))


def test_two_moves_are_two_events(bundle, film):
    from visrec_nb.vision.timeline import events, timeline

    scores = timeline(bundle, film)
    assert bundle.manifest["data"]["clip_seconds"] == 1.5 and scores["end"][0] == 1.5 and scores["start"][1] == 0.375
    found = events(scores, min_seconds=1)
    assert found["label"].to_list() == ["pan_right", "tilt_up"]
    assert np.abs(found.select("start", "end").to_numpy() - [[0, 4], [4, 8]]).max() < 0.5
    assert (found["score"] > 0.6).all() and (found["peak"] >= found["score"]).all()


def test_a_row_is_what_predict_says_of_that_part(bundle, film):
    from visrec_nb.vision.timeline import timeline

    for seconds, step in ((1.5, 0.75), (2.0, 2.0), (2.0, 3.0), (100.0, None)):
        scores = timeline(bundle, film, seconds, step)
        answers = bundle.predict(windows(scores, film))
        assert answers["label"].to_list() == scores["label"].to_list() and answers["start"].to_list() == scores["start"].to_list()
        assert np.abs(answers["score"].to_numpy() - scores["score"].to_numpy()).max() < 1e-6
    assert len(scores) == 1 and bundle.predict(film)["score"][0] == pytest.approx(scores["score"][0], abs=1e-6)


def test_segments_are_items_like_others(bundle, film, tmp_path):
    "Embedded once under keys of their own, evaluated, and never on two sides of a split."
    from visrec_nb.data import leaks, read_catalog, segment_videos, split_catalog, write_catalog

    (tmp_path / "broken.mp4").write_bytes(b"no film")
    films = [write(tmp_path / f"{n}.mp4", draw(MOVES[n % 2], 200 + n, 3)) for n in range(6)]
    paths = [*films, tmp_path / "broken.mp4"]
    rows = [{"item_id": f"film {p.stem}", "path": str(p), "label": MOVES[n % 2]} for n, p in enumerate(paths)]
    found = segment_videos(pl.DataFrame(rows), 1.0)
    assert found.skipped["item_id"].to_list() == ["film broken"] and found.left_out == 0 and found.catalog.height == 18
    parts = split_catalog(found.catalog, 0.3, 0.3, seed=1)
    assert leaks(parts).is_empty() and parts["split"].n_unique() == 3 and leaks(parts.drop("group", "sha256")).is_empty()
    torn = parts.with_columns(split=pl.Series(["train", "test"] * 9))
    assert set(leaks(torn)["kind"]) == {"group", "content"}
    write_catalog(parts, tmp_path / "parts.csv")
    assert read_catalog(tmp_path / "parts.csv").select(parts.columns).equals(parts)
    result = bundle.evaluate(parts, "test", tmp_path / "store")
    assert result.metrics["accuracy"] > 0.8 and result.catalog.height == (parts["split"] == "test").sum()
    again = bundle.embed(parts, tmp_path / "store")
    assert again.computed == parts.height - result.catalog.height and bundle.embed(parts, tmp_path / "store").computed == 0
    assert np.abs(bundle.probabilities(again.features).max(1) - bundle.predict(parts)["score"].to_numpy()).max() < 1e-6


@pytest.mark.parametrize(("columns", "said"), [
    ({"start": ["a"]}, "'start' is not a number"), ({"start": [-1]}, "0 or more"), ({"start": [0], "seconds": [0.0]}, "above 0"),
    ({"start": [0], "seconds": [float("inf")]}, "above 0"), ({"start": [[1]]}, "not seconds"),
])
def test_windows_are_checked(columns, said):
    from visrec_nb.data import read_catalog

    with pytest.raises(CatalogError, match=said):
        read_catalog(pl.DataFrame({"path": ["a.mp4"], **columns}))


def test_a_part_behind_the_end_is_skipped_and_its_neighbours_are_not(bundle, film):
    rows = pl.DataFrame({"item_id": ["a", "b"], "path": [str(film)] * 2, "start": [1.0, 99.0], "seconds": [1.0, 1.0]})
    found = bundle.embed(rows)
    assert found.catalog["item_id"].to_list() == ["a"] and "ends at 8.00 s" in found.skipped["reason"][0]
    answers = bundle.predict(rows)
    assert answers["error"].is_null().to_list() == [True, False] and answers["start"].to_list() == [1, 99]


def damaged(film, out, first, last):
    "The same film with the packets of some seconds overwritten."
    data = bytearray(film.read_bytes())
    with av.open(str(film)) as container:
        for packet in container.demux(video=0):
            if packet.size and first <= packet.pts * packet.time_base < last:
                noise = np.random.default_rng(packet.pos).integers(0, 256, packet.size - 4, np.uint8)
                data[packet.pos + 4 : packet.pos + packet.size] = noise.tobytes()
    out.write_bytes(data)
    return out


def test_a_hole_and_a_cut_cost_only_what_they_hit(bundle, film, tmp_path):
    from visrec_nb.vision.timeline import timeline, unreadable

    whole = timeline(bundle, film)
    holed = timeline(bundle, damaged(film, tmp_path / "hole.mp4", 2.05, 3.9))
    outside = ((holed["end"] <= 2) | (holed["start"] >= 4)).to_numpy()
    assert holed.filter(outside).equals(whole.filter(outside)) and outside.sum() > 8
    lost = unreadable(holed)
    assert len(lost) == 1 and 0.5 < lost["start"][0] < 2.5 and 3.5 < lost["end"][0] < 5.5 and "damaged" in lost["reason"][0]

    with av.open(str(film)) as container:
        position = next(p.pos for p in container.demux(video=0) if p.size and p.pts * p.time_base >= 5)
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[:position])
    cut = timeline(bundle, tmp_path / "cut.mp4")
    before = (cut["end"] <= 4.5).to_numpy()
    assert cut.filter(before).equals(whole.filter(before)) and len(cut) == len(whole)
    assert "truncated" in cut["error"][-1] and cut["score"][-1] is None


CHILD = """
import sys
from visrec_nb.vision import timeline as module
from visrec_nb.vision.timeline import timeline
module.PART = 4
timeline(sys.argv[1], sys.argv[2], step=0.375, work=sys.argv[3])
"""


def test_a_killed_run_goes_on(bundle, film, tmp_path, monkeypatch):
    from visrec_nb.vision import timeline as module

    work = tmp_path / "work"
    run = subprocess.Popen([sys.executable, "-c", CHILD, str(bundle.path), str(film), str(work)])
    deadline = time.monotonic() + 60
    while not (work / "part-000001.parquet").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = sorted(work.glob("part-*.parquet"))
    assert len(kept) >= 2
    before = {path: os.stat(path).st_mtime_ns for path in kept}
    read = []
    moments = module._moments

    def counted(model, path, times, *rest):
        return moments(model, path, (read.append(t) or t for t in times), *rest)

    monkeypatch.setattr(module, "_moments", counted)
    scores = module.timeline(bundle, film, step=0.375, work=work)
    assert scores.equals(module.timeline(bundle, film, step=0.375)) or np.abs(
        scores["score"].to_numpy() - module.timeline(bundle, film, step=0.375)["score"].to_numpy()).max() < 1e-6
    assert {path: os.stat(path).st_mtime_ns for path in kept} == before
    if len(kept) < 5:  # it was killed before the end: only the rest is read, from the first window that is missing
        assert read[0] == pytest.approx((4 * len(kept) + 0.5) * 0.375)


def test_memory_does_not_hold_the_video(bundle, film, monkeypatch):
    "However long the video, only a few pairs of frames have been read and not yet turned into features."
    from visrec_nb.media import video
    from visrec_nb.vision import timeline as module

    given, taken, most = 0, 0, 0
    stream_pairs, pair_features = video.stream_pairs, module.pair_features

    def giving(*arguments, **options):
        nonlocal given, most
        for pair in stream_pairs(*arguments, **options):
            given += 1
            most = max(most, given - taken)
            yield pair

    def taking(first, *rest):
        nonlocal taken
        taken += len(first)
        return pair_features(first, *rest)

    monkeypatch.setattr(video, "stream_pairs", giving)
    monkeypatch.setattr(module, "pair_features", taking)
    monkeypatch.setattr(module, "AT_ONCE", 2)
    scores = module.timeline(bundle, film, 0.5, threads=1)
    assert given == taken == 64 and most <= 4 * 2 and len(scores) == 61


def test_the_command_writes_events_and_a_picture(bundle, film, tmp_path):
    def visrec(*arguments):
        command = [sys.executable, "-c", "from visrec_nb.cli import main; main()", "timeline", str(bundle.path), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    out, picture, scores = tmp_path / "events.parquet", tmp_path / "timeline.png", tmp_path / "scores.csv"
    run = visrec(film, "--out", out, "--picture", picture, "--scores", scores, "--min-seconds", 1, "--json")
    assert run.returncode == 0, run.stderr
    events = pl.read_parquet(out)
    assert json.loads(run.stdout)["events"] == events.to_dicts() and events["label"].to_list() == ["pan_right", "tilt_up"]
    assert picture.read_bytes().startswith(b"\x89PNG") and pl.read_csv(scores).height == json.loads(run.stdout)["windows"]
    assert not list(tmp_path.glob("*.parts"))
    for arguments, said in (((film, "--out", tmp_path / "e.json"), "is written as"), ((tmp_path / "no.mp4",), "no such file"),
                            ((film, "--seconds", 2, "--step", 0.3), "multiple of 0.5 s")):
        run = visrec(*arguments)
        assert run.returncode == 2 and said in run.stderr and run.stderr.count("\n") == 1
