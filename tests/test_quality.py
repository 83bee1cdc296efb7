"""Planted faults are found: bad files, copies of every kind, leaks, and what is out of balance."""

import io
import sys

import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from visrec_nb.core.errors import InputError, MissingExtra, ParameterError
from visrec_nb.core.seeds import rng
from visrec_nb.data import duplicates, quality
from visrec_nb.data.neighbours import Neighbours, near_pairs
from visrec_nb.data.quality import check_catalog
from visrec_nb.data.samples import clothing


def opened(path):
    return Image.open(path).convert("RGB")


def cut(im, left, top, right, bottom):
    w, h = im.size
    return im.crop((round(left * w), round(top * h), round((1 - right) * w), round((1 - bottom) * h)))


def resized(im, scale):
    return im.resize([round(scale * x) for x in im.size], Image.Resampling.BICUBIC)


def any_sides(im, draw):
    return cut(im, *(draw.uniform(0.05, 0.1, 4) * (draw.random(4) < 0.5)))


EDITS = {
    "encoded again": (lambda im, draw: im, 40),
    "half the size": (lambda im, draw: resized(im, 0.5), 85),
    "twice the size": (lambda im, draw: resized(im, 2), 85),
    "cut by 10 %": (lambda im, draw: cut(im, 0.05, 0.05, 0.05, 0.05), 90),
    "cut at some sides": (any_sides, 90),
    "mirrored": (lambda im, draw: ImageOps.mirror(im), 90),
    "darker": (lambda im, draw: ImageEnhance.Contrast(ImageEnhance.Brightness(im).enhance(0.8)).enhance(0.85), 85),
    "several at once": (lambda im, draw: ImageEnhance.Brightness(resized(ImageOps.mirror(any_sides(im, draw)), 0.7)).enhance(0.85), 70),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "300 photos and eight copies of 40 of them, each in another part than its original."
    folder, draw = tmp_path_factory.mktemp("planted"), rng(1, "planted copies")
    photos = clothing().sort("item_id").gather_every(5).select("item_id", "path", "label", "split")
    rows = []
    for i in draw.permutation(len(photos))[:40].tolist():
        item, path, label, split = photos.row(i)
        for k, (name, (edit, jpeg)) in enumerate(EDITS.items()):
            edit(opened(path), draw).save(folder / f"{i}-{k}.jpg", quality=jpeg)
            rows.append((f"{item}|{name}", str(folder / f"{i}-{k}.jpg"), label, "train" if split == "test" else "test"))
    return pl.concat([photos, pl.DataFrame(rows, schema=photos.schema, orient="row")])


def recall_and_precision(check):
    "By kind of change, the share of copies that were found as copies of their original; the share of pairs that are copies."
    pairs = check.pairs.with_columns(a=pl.col("item_id").str.split("|").list.first(), b=pl.col("other_item_id").str.split("|").list.first())
    true = pairs.filter(pl.col("a") == pl.col("b"))
    found = {(x if "|" in x else y).partition("|")[2] + "|" + a for x, y, a in true.select("item_id", "other_item_id", "a").rows()
             if ("|" in x) != ("|" in y)}
    return {name: sum(f.startswith(f"{name}|") for f in found) / 40 for name in EDITS}, len(true) / len(pairs)


@pytest.mark.slow
def test_planted_copies_are_found(planted):
    check = check_catalog(planted)
    recall, precision = recall_and_precision(check)
    assert precision >= 0.95 and np.mean([*recall.values()]) >= 0.95, recall
    assert all(recall[name] >= 0.95 for name in EDITS if name not in ("several at once", "cut at some sides")), recall
    assert min(recall.values()) >= 0.85, recall
    copied = {i for i in planted["item_id"] if "|" in i}
    trained = set(planted.filter(split="train")["item_id"])
    leaks = check.findings.filter(check="near_leak")
    assert leaks["item_id"].is_in([*trained, *planted.filter(split="valid")["item_id"]]).all(), "what goes is what was trained on"
    assert check.left_out["reason"].unique().to_list() == ["near_leak"] and len(check.kept) + len(check.left_out) == len(planted)
    assert copied & set(check.left_out["item_id"])
    assert check_catalog(check.kept).facts["leaks"] == 0


@pytest.mark.slow
def test_embeddings_add_copies(planted):
    pytest.importorskip("onnxruntime")
    from visrec_nb.core.files import cache_dir
    from visrec_nb.vision.backbones import onnx_backbone
    from visrec_nb.vision.features import embed, image_preprocessing
    embedded = embed(planted, onnx_backbone(), image_preprocessing(views=("plain",)), cache_dir("embeddings"))
    assert embedded.catalog["item_id"].equals(planted["item_id"])
    vectors = embedded.features[:, 0]
    plain, both = (recall_and_precision(check_catalog(planted, vectors=v)) for v in (None, vectors))
    assert both[1] >= 0.95 and all(both[0][name] >= plain[0][name] for name in EDITS), (plain, both)


@pytest.fixture(scope="module")
def photo():
    return opened(clothing().sort("item_id")["path"][6])


def gif(im):
    im.save(file := io.BytesIO(), "GIF", save_all=True, append_images=[ImageOps.flip(im)])
    return file.getvalue()


def light(im):
    out = im.point(lambda v: 247 + v // 32)
    out.paste(im.resize((24, 24)), (40, 40))
    return out


FAULTS = {
    "unreadable": ("empty.jpg", lambda im: b""), "wrong_extension": ("png.jpg", lambda im: im),
    "tiny": ("small.png", lambda im: im.resize((20, 30))), "dark": ("dark.png", lambda im: im.point(lambda v: v // 8)),
    "blank": ("even.png", lambda im: Image.new("RGB", (90, 90), (120, 130, 140))),
    "light": ("light.png", light), "blurred": ("soft.png", lambda im: im.filter(ImageFilter.GaussianBlur(6))),
    "odd_aspect": ("strip.png", lambda im: im.resize((600, 140))), "animated": ("two.gif", gif), "missing": ("gone.jpg", lambda im: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_alone(fault, photo, tmp_path):
    name, make = FAULTS[fault]
    made = make(photo)
    if isinstance(made, bytes): (tmp_path / name).write_bytes(made)
    elif made is not None: made.save(tmp_path / name, "PNG")
    findings = check_catalog(pl.DataFrame({"path": [str(tmp_path / name)]})).findings
    assert findings["check"].to_list() == [fault]


def test_half_a_photo_a_folder_and_a_text(photo, tmp_path):
    photo.save(tmp_path / "half.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "half.jpg").read_bytes()[:-500])
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    check = check_catalog(pl.DataFrame({"path": [str(tmp_path / n) for n in ("half.jpg", "folder.jpg", "text.png")]}))
    assert check.findings["check"].to_list() == ["unreadable"] * 3 and check.kept.is_empty()


def test_balance_groups_and_several_labels():
    photos = clothing().sort("item_id").head(24).select("item_id", "path")
    table = photos.with_columns(label=pl.Series(["common"] * 22 + ["rare", "other"]), group=pl.Series([*"a" * 20, *"bbcc"]),
                                split=pl.Series(["train"] * 18 + ["test"] * 6))
    found = dict(check_catalog(table, near=None).findings.group_by("check").len().rows())
    assert found == {"imbalance": 1, "small_class": 2, "group_imbalance": 1, "group_leak": 1, "missing_class": 2}
    several = table.drop("label").with_columns(labels=pl.Series([["x", "y"]] * 12 + [["x"]] * 10 + [[], None]))
    check = check_catalog(several, near=None)
    assert check.facts["classes"] == 2 and check.facts["largest_class"] == 22
    assert check.findings.filter(check="missing_class")["message"].to_list() == ["the class 'y' does not occur in test"]
    assert check.findings.filter(check="unlabelled")["value"].to_list() == [1]


def write_clip(path, frames, crf="20"):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": crf})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for pixels in frames: container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels))))
        container.mux(stream.encode())


def test_clips_and_photos(photo, tmp_path):
    large = np.asarray(photo.resize((320, 320)))
    right = [large[40:232, 5 * t:5 * t + 192] for t in range(24)]
    write_clip(tmp_path / "clip.mp4", right)
    write_clip(tmp_path / "trimmed.mp4", right[5:], crf="30")
    write_clip(tmp_path / "back.mp4", right[::-1])
    Image.fromarray(right[15]).resize((150, 150)).save(tmp_path / "frame.jpg", quality=60)
    names = ["clip.mp4", "trimmed.mp4", "back.mp4", "frame.jpg"]
    check = check_catalog(pl.DataFrame({"item_id": names, "path": [str(tmp_path / n) for n in names], "split": ["train"] * 3 + ["test"]}))
    found = {tuple(sorted(pair)) for pair in check.pairs.select("item_id", "other_item_id").rows()}
    assert found == {("clip.mp4", "trimmed.mp4"), ("clip.mp4", "frame.jpg"), ("frame.jpg", "trimmed.mp4"), ("back.mp4", "frame.jpg")}
    assert check.kept["item_id"].to_list() == ["frame.jpg"]
    assert "a frame of" in check.findings.filter(check="near_leak")["message"][0] or "one of its frames" in check.findings["message"][0]


def test_too_many_copies_stop_the_search(monkeypatch, photo):
    monkeypatch.setattr(duplicates, "MAX_CANDIDATES", 1000)
    draw = rng(0, "noise")
    base = np.asarray(photo.resize((128, 128))).astype(int)
    noisy = np.clip(base + draw.integers(-6, 7, (200, *base.shape)), 0, 255).astype(np.uint8)
    pictures = [duplicates.small_pictures(pixels[None]) for pixels in noisy]
    copies = duplicates.near_duplicates(pictures)
    assert not copies.complete and len(copies.first) == 1000


def test_photos_in_a_store(monkeypatch, photo, tmp_path):
    import fsspec
    monkeypatch.setenv("VISREC_CACHE", str(tmp_path))
    photo.save(file := io.BytesIO(), "JPEG")
    fsspec.filesystem("memory").pipe("/quality/a.jpg", file.getvalue())
    check = check_catalog(pl.DataFrame({"path": ["memory://quality/a.jpg", "memory://quality/b.jpg"]}))
    assert check.findings.select("check", "path").rows() == [("missing", "memory://quality/b.jpg")] and check.facts["readable"] == 1


def test_an_interruption_stops_soon(monkeypatch):
    looked = []
    def interrupted(row, measures):
        looked.append(row)
        if len(looked) == 3: raise KeyboardInterrupt
        return quality._Seen("not looked at")
    monkeypatch.setattr(quality, "_look", interrupted)
    with pytest.raises(KeyboardInterrupt): check_catalog(clothing())
    assert len(looked) <= 64


def test_what_is_refused(monkeypatch):
    photos = clothing().head(3)
    with pytest.raises(ParameterError, match="near=0"): check_catalog(photos, near=0)
    with pytest.raises(ParameterError, match="5 rows for a catalog of 3"): check_catalog(photos, vectors=np.ones((5, 8), np.float32))
    monkeypatch.setitem(sys.modules, "cleanvision.issue_managers.image_property_issue_manager", None)
    with pytest.raises(MissingExtra, match=r"visrec_nb\[data\]"): check_catalog(photos)


def test_near_pairs_are_those_of_faiss(tmp_path):
    faiss = pytest.importorskip("faiss")
    draw = rng(2, "vectors")
    x = (draw.standard_normal((4000, 256)) * 0.97 ** np.arange(256) + 0.3).astype(np.float16)
    x[3000:3100] = x[:100] + (0.2 * draw.standard_normal((100, 256)) * 0.97 ** np.arange(256)).astype(np.float16)
    x[17, 3] = np.nan
    np.save(tmp_path / "x.npy", x)
    pairs = near_pairs(np.load(tmp_path / "x.npy", mmap_mode="r"), 0.8)
    unit = x.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    unit[17] = 0
    index = faiss.IndexFlatIP(256)
    index.add(unit)
    def by_faiss(similarity):
        limits, _, rows = index.range_search(unit, similarity)
        i = np.repeat(np.arange(4000), np.diff(limits).astype(int))
        return {*zip(i[i < rows].tolist(), rows[i < rows].tolist(), strict=True)}
    found = {*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)}
    assert by_faiss(0.80001) <= found <= by_faiss(0.79999)
    assert len(pairs.first) > 90 and 17 not in pairs.first


def test_neighbours_of_a_graph(tmp_path):
    pytest.importorskip("faiss")
    x = (rng(3, "vectors").standard_normal((3000, 128)) * 0.97 ** np.arange(128)).astype(np.float32)
    exact, graph = Neighbours(x), Neighbours(x, exact_below=10)
    graph.save(tmp_path / "index")
    again = Neighbours.load(tmp_path / "index", dimension=128, count=3000)
    truth, found = exact.query(x[:200])[1], again.query(x[:200])[1]
    assert (truth[:, 0] == np.arange(200)).all()
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(truth, found, strict=True)]) >= 0.95
    (tmp_path / "index").write_bytes((tmp_path / "index").read_bytes()[:5000])
    with pytest.raises(InputError, match="build it again"): Neighbours.load(tmp_path / "index")
