"""Prepared files after kills, changes and races; frames without leaks; weights against scikit-learn."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from visrec_nb.core.errors import CatalogError, MediaError, ParameterError
from visrec_nb.data.catalog import read_catalog, write_catalog
from visrec_nb.data.prepare import class_weights, extract_frames, prepare_again, prepare_images, sample_weights
from visrec_nb.data.splits import fold_catalog, leaks, split_catalog
from visrec_nb.media.image import load_image

CHILD = """
import sys
from visrec_nb.data.prepare import extract_frames, prepare_images
source, folder, what = sys.argv[1:]
if what == "images": prepare_images(source, folder, 256, format="webp", threads=1)
else: extract_frames(source, folder, 6, size=64, threads=1)
"""


def draw_photos(folder, n, size=(320, 240)):
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03}.jpg", quality=80)
    return pl.DataFrame({"item_id": [f"{i:03}" for i in range(n)], "path": [str(folder / f"{i:03}.jpg") for i in range(n)],
                         "label": ["a", "b"] * (n // 2), "stars": range(n)})


def draw_clips(folder, n, frames=30):
    from visrec_nb.media.render import write_video
    folder.mkdir(parents=True)
    for i in range(n):
        grey = (np.arange(frames) * 6 + i).astype(np.uint8)[:, None, None, None]
        write_video(folder / f"{i:02}.mp4", np.broadcast_to(grey, (frames, 48, 64, 3)).copy(), fps=10)
    return pl.DataFrame({"item_id": [f"{i:02}" for i in range(n)], "path": [str(folder / f"{i:02}.mp4") for i in range(n)],
                         "label": ["a", "b"] * (n // 2), "group": [f"g{i // 2}" if i % 4 < 2 else None for i in range(n)]})


def contents(catalog): return [Path(p).read_bytes() for p in catalog["path"]]


@pytest.mark.parametrize("what", ["images", "frames"])
def test_a_killed_run_is_continued(tmp_path, what):
    catalog = draw_photos(tmp_path / "in", 100, (1200, 900)) if what == "images" else draw_clips(tmp_path / "in", 80, 60)
    catalog.write_parquet(tmp_path / "catalog.parquet")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "catalog.parquet"), str(tmp_path / "killed"), what]
    found = "*/??/*.webp" if what == "images" else "*/??/*"
    child = subprocess.Popen(command)
    end = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob(found))) < 10 and time.monotonic() < end: time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    def call(folder):
        if what == "images": return prepare_images(catalog, folder, 256, format="webp")
        return extract_frames(catalog, folder, 6, size=64)
    rest, whole = call(tmp_path / "killed"), call(tmp_path / "whole")
    assert rest.reused >= 10 and rest.made > 0 and rest.made + rest.reused == len(catalog) and whole.reused == 0
    assert rest.catalog.drop("path").equals(whole.catalog.drop("path")) and contents(rest.catalog) == contents(whole.catalog)
    def names(folder): return sorted(p.relative_to(folder) for p in folder.rglob("*"))
    assert names(tmp_path / "killed") == names(tmp_path / "whole")


def test_only_what_changed_is_done_again(tmp_path):
    catalog = draw_photos(tmp_path / "in", 6)
    first = prepare_images(catalog, tmp_path / "out", 64)
    Image.new("RGB", (100, 50), "red").save(catalog["path"][2])
    second = prepare_images(catalog, tmp_path / "out", 64)
    assert (second.made, second.reused) == (1, 5) and second.catalog["path"][2] != first.catalog["path"][2]
    assert abs(load_image(second.catalog["path"][2]).mean((0, 1)) - [254, 0, 0]).max() < 2
    assert prepare_images(catalog, tmp_path / "out", 65).made == 6 and prepare_images(catalog, tmp_path / "out", 64, quality=50).made == 6
    Path(second.catalog["path"][0]).write_bytes(contents(second.catalog)[0][:-3])
    assert prepare_images(catalog, tmp_path / "out", 64).made == 1


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("fit", ["squash", "short_side", "pad", "crop"])
def test_sizes_and_pixels(tmp_path, fit, format):
    "Against Pillow's own resizing of the whole picture."
    catalog = draw_photos(tmp_path / "in", 2, (300, 200))
    made = prepare_images(catalog, tmp_path / "out", 50, fit, format, 95).catalog
    for source, path in zip(catalog["path"], made["path"], strict=True):
        size = {"squash": (50, 50), "short_side": (75, 50), "pad": (50, 33), "crop": (75, 50)}[fit]
        truth = np.asarray(Image.open(source).resize(size, Image.Resampling.BICUBIC)).astype(int)
        pixels = load_image(path).astype(int)
        if fit == "pad":
            assert pixels.shape == (50, 50, 3) and max(pixels[:5].mean(), pixels[-5:].mean()) < 8
            pixels = pixels[8:41]
        if fit == "crop": truth = truth[:, 12:62]
        assert pixels.shape == truth.shape and np.abs(pixels - truth).mean() < 6
    if fit == "short_side": assert load_image(prepare_images(catalog, tmp_path / "out", 500, fit).catalog["path"][0]).shape == (200, 300, 3)


def test_odd_pictures(tmp_path):
    "Upright, without transparency, every mode; what cannot be read is reported."
    base = Image.fromarray(np.arange(96 * 64, dtype=np.uint32).reshape(64, 96).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    base.convert("CMYK").save(tmp_path / "in/cmyk.jpg")
    base.save(tmp_path / "in/turned.jpg", exif=exif)
    base.save(tmp_path / "in/turned.png", exif=exif)
    Image.new("RGBA", (30, 60), (0, 0, 0, 0)).save(tmp_path / "in/clear.png")
    base.convert("P").save(tmp_path / "in/palette.gif")
    (tmp_path / "in/cut.jpg").write_bytes((tmp_path / "in/turned.jpg").read_bytes()[:-300])
    (tmp_path / "in/empty.jpg").touch()
    (tmp_path / "in/text.jpg").write_text("not a picture")
    names = sorted(p.name for p in (tmp_path / "in").iterdir())
    catalog = pl.DataFrame({"item_id": names, "path": [str(tmp_path / "in" / n) for n in names]})
    done = prepare_images(catalog, tmp_path / "out", 32, "short_side")
    shapes = {item: load_image(path).shape[:2] for item, path in done.catalog.select("item_id", "path").iter_rows()}
    assert shapes == {"clear.png": (60, 30), "cmyk.jpg": (32, 48), "palette.gif": (32, 48), "turned.jpg": (48, 32), "turned.png": (48, 32)}
    assert done.skipped["item_id"].to_list() == ["cut.jpg", "empty.jpg", "text.jpg"] and done.skipped["reason"].null_count() == 0
    assert load_image(done.catalog["path"][0]).min() > 250


def test_two_at_once(tmp_path):
    catalog, clips = draw_photos(tmp_path / "in", 20), draw_clips(tmp_path / "clips", 6)
    shutil.copytree(tmp_path / "clips", tmp_path / "copies")
    copies = clips.with_columns(item_id=pl.col("item_id") + " again", path=pl.col("path").str.replace("/clips/", "/copies/"))
    twice = pl.concat([clips, copies])
    with ThreadPoolExecutor(3) as pool:
        photos = list(pool.map(lambda _: prepare_images(catalog, tmp_path / "out", 64), range(3)))
        frames = list(pool.map(lambda _: extract_frames(twice, tmp_path / "out", 4, size=32, threads=3), range(3)))
    assert all(p.catalog.equals(photos[0].catalog) for p in photos) and all(f.catalog.equals(frames[0].catalog) for f in frames)
    assert len(frames[0].catalog) == 48 and all(map(os.path.isfile, frames[0].catalog["path"]))
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_interrupted_leaves_nothing_half_written(tmp_path, monkeypatch):
    from visrec_nb.data import prepare
    catalog, count, encoded = draw_photos(tmp_path / "in", 10), [0], prepare._encoded
    def stop(*args):
        count[0] += 1
        if count[0] == 5: raise KeyboardInterrupt
        return encoded(*args)
    monkeypatch.setattr(prepare, "_encoded", stop)
    with pytest.raises(KeyboardInterrupt): prepare_images(catalog, tmp_path / "out", 64, threads=1)
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob("*.partial"))
    rest = prepare_images(catalog, tmp_path / "out", 64)
    assert rest.made + rest.reused == 10 and rest.reused >= 4 and len(rest.catalog) == 10


def test_frames_inherit_and_never_leak(tmp_path):
    clips = draw_clips(tmp_path / "in", 12)
    clips = clips.with_columns(split=pl.Series(["train", "train", "test", "test"] * 3))
    frames = extract_frames(clips, tmp_path / "out", 5, size=32).catalog
    assert len(frames) == 60 and frames["item_id"].n_unique() == 60 and leaks(frames).is_empty()
    joined = frames.join(clips, left_on="clip_id", right_on="item_id", suffix="_clip")
    expected = joined.with_columns(label="label_clip", split="split_clip", group=pl.coalesce("group_clip", "clip_id"))
    assert len(joined) == 60 and joined.equals(expected)
    assert leaks(split_catalog(frames.drop("split"), seed=3)).is_empty()
    assert leaks(fold_catalog(frames.drop("split"), 3), side="fold").is_empty()
    for path, when, clip in frames.select("path", "time_s", "clip_id").iter_rows():
        assert abs(load_image(path).mean() - (round(when * 10) * 6 + int(clip))) < 4


def test_bad_clips_are_counted(tmp_path):
    clips = draw_clips(tmp_path / "in", 4)
    data = Path(clips["path"][1]).read_bytes()
    Path(clips["path"][1]).write_bytes(data[:len(data) // 2])
    Path(clips["path"][2]).unlink()
    photo = draw_photos(tmp_path / "photos", 2).select("item_id", "path", "label").with_columns(group=pl.lit("p"))
    done = extract_frames(pl.concat([clips, photo.head(1).select(clips.columns)]), tmp_path / "out", 3, size=32)
    assert set(done.catalog["clip_id"]) == {"00", "03"} and done.made == 2
    assert done.skipped["item_id"].to_list() == ["01", "02", "000"] and "prepare_images" in done.skipped["reason"][2]
    assert prepare_images(clips.head(1), tmp_path / "out").skipped["reason"].to_list() == ["a video; extract_frames takes those"]


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_the_written_catalog_is_enough_to_repeat_it(tmp_path, ending):
    photos, clips = draw_photos(tmp_path / "in", 6), draw_clips(tmp_path / "clips", 4)
    clips = clips.with_columns(item_id="clip " + pl.col("item_id"))
    both = pl.concat([prepare_images(photos, tmp_path / "out", (40, 60), "pad", "png").catalog,
                      extract_frames(clips, tmp_path / "out", fps=2, size=32, fit="short_side", format="webp").catalog], how="diagonal")
    write_catalog(both, tmp_path / f"prepared.{ending}")
    before = contents(both)
    (tmp_path / "out").rename(tmp_path / "gone")
    again = prepare_again(tmp_path / f"prepared.{ending}", tmp_path / "elsewhere")
    assert contents(again.catalog) == before and again.skipped.is_empty() and again.made == 10
    assert again.catalog.drop("path").equals(read_catalog(tmp_path / f"prepared.{ending}").drop("path"))
    Image.new("RGB", (9, 9)).save(photos["path"][0])
    Path(photos["path"][1]).unlink()
    later = prepare_again(tmp_path / f"prepared.{ending}", tmp_path / "elsewhere")
    assert later.skipped.sort("item_id")["item_id"].to_list() == ["000", "001"] and len(later.catalog) == len(both) - 2


def test_remote_files(tmp_path, monkeypatch):
    from visrec_nb.data import prepare
    photos = draw_photos(tmp_path / "in", 2)
    def local_file(path):
        name = Path(path).name
        if name == "001.jpg": raise MediaError(path, "no such object")
        return tmp_path / "in" / name
    monkeypatch.setattr(prepare, "local_file", local_file)
    far = photos.with_columns(path="s3://bucket/photos/" + pl.col("item_id") + ".jpg")
    done = prepare_images(far, tmp_path / "out", 32)
    assert done.catalog["source_path"].to_list() == ["s3://bucket/photos/000.jpg"]
    assert done.skipped["reason"].to_list() == ["no such object"]
    monkeypatch.undo()
    assert contents(done.catalog) == contents(prepare_images(photos, tmp_path / "out", 32).catalog)[:1]


def test_wrong_arguments(tmp_path):
    photos = draw_photos(tmp_path / "in", 2)
    pair = {"size": (1, 2), "fit": "short_side"}
    for options in ({"fit": "stretch"}, {"format": "gif"}, {"quality": 0}, {"size": 0}, pair, {"threads": 0}):
        with pytest.raises(ParameterError): prepare_images(photos, tmp_path / "out", **options)
    for options in ({"num_frames": 0}, {"fps": 0}):
        with pytest.raises(ParameterError): extract_frames(photos, tmp_path / "out", **options)
    done = prepare_images(photos, tmp_path / "out", 32).catalog
    with pytest.raises(ParameterError, match="prepared already"): prepare_images(done, tmp_path / "out", 16)
    with pytest.raises(CatalogError, match="no column 'prepared'"): prepare_again(photos, tmp_path / "out")
    with pytest.raises(CatalogError, match="not a recipe"): prepare_again(done.with_columns(prepared=pl.lit("{}")), tmp_path / "out")


def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight
    draw = np.random.default_rng(0)
    label = np.array([f"c{c}" for c in (draw.random(300) ** 3 * 7).astype(int)])
    catalog = pl.DataFrame({"path": [f"{i}.jpg" for i in range(300)], "label": label, "split": draw.choice(["train", "test"], 300)})
    train = label[(catalog["split"] == "train").to_numpy()]
    weights = class_weights(catalog)
    assert np.allclose(weights["weight"], compute_class_weight("balanced", classes=np.array(weights["label"]), y=train))
    rows = sample_weights(catalog)
    assert np.allclose(rows[rows > 0], compute_sample_weight("balanced", train)) and (rows > 0).sum() == len(train)
    share = np.bincount(catalog["label"].rank("dense").to_numpy() - 1, rows)
    assert np.allclose(share, share[0])


def test_weight_schemes_lie_between_nothing_and_balanced():
    catalog = pl.DataFrame({"path": [f"{i}.jpg" for i in range(110)], "label": ["a"] * 100 + ["b"] * 10})
    weights = {s: class_weights(catalog, s, 0.99)["weight"] for s in ("balanced", "sqrt", "effective")}
    ratio = {s: w[1] / w[0] for s, w in weights.items()}
    assert ratio["balanced"] == pytest.approx(10) and ratio["sqrt"] == pytest.approx(10**0.5)
    assert ratio["effective"] == pytest.approx((1 - 0.99**100) / (1 - 0.99**10)) and 1 < ratio["effective"] < 10
    assert class_weights(catalog, "effective", 0.0)["weight"].to_list() == [1, 1]
    for s in ("balanced", "sqrt", "effective"):
        w = class_weights(catalog, s)
        assert (w["items"] * w["weight"]).sum() == pytest.approx(110) and sample_weights(catalog, s).mean() == pytest.approx(1)
    with pytest.raises(ParameterError): class_weights(catalog, "inverse")
    with pytest.raises(CatalogError): class_weights(catalog.drop("label"))
