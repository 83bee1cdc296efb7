"""The commands of the data room, one after the other, as a user types them."""

import json
import os
import re
import signal
import subprocess
import sys

import helpers
import numpy as np
import polars as pl
import pytest
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_sample_image


def visrec(*args, status=0):
    "What a command prints; `status` is the exit status that it must have."
    done = helpers.visrec(*args)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Two classes of 24 patches, a broken file, and in `patch-copy.jpg` a cropped copy of the first one."
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, name in (("building", "china"), ("plant", "flower")):
        (folder / label).mkdir()
        whole = Image.fromarray(load_sample_image(f"{name}.jpg"))
        for n in range(24):
            x, y = draw.integers(0, 640 - 200), draw.integers(0, 427 - 200)
            whole.crop((x, y, x + 200, y + 200)).save(folder / label / f"{n:02}.jpg", quality=92)
    with Image.open(folder / "building" / "00.jpg") as first:
        first.crop((12, 0, 200, 200)).save(folder / "building" / "copy.jpg", quality=70)
    (folder / "plant" / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return folder


@pytest.mark.slow
def test_check_split_repair_prepare(photos, tmp_path):
    facts = json.loads(visrec("data", "check", photos, "--out", tmp_path / "checked", "--json"))
    assert facts["items"] == 50 and facts["unreadable"] == 1 and facts["kept"] == 49 and facts["near_duplicates"] >= 1
    findings = pl.read_csv(tmp_path / "checked" / "findings.csv", infer_schema_length=None)
    assert findings.filter(check="unreadable")["item_id"].to_list() == ["plant/broken.jpg"]
    pairs = pl.read_csv(tmp_path / "checked" / "pairs.csv", infer_schema_length=None)
    assert {"building/00.jpg", "building/copy.jpg"} in [set(p) for p in pairs.select("item_id", "other_item_id").rows()]
    kept = tmp_path / "checked" / "kept.parquet"
    split = ("data", "split", kept, "--pairs", tmp_path / "checked" / "pairs.csv", "--test", "0.3")
    visrec(*split, "--out", tmp_path / "catalog.parquet")
    parts = dict(pl.read_parquet(tmp_path / "catalog.parquet").select("item_id", "split").rows())
    assert parts["building/00.jpg"] == parts["building/copy.jpg"] and set(parts.values()) == {"train", "valid", "test"}

    in_train = (pl.col("item_id") == "building/copy.jpg") | pl.col("item_id").str.starts_with("plant/0")
    torn = pl.read_parquet(kept).with_columns(split=pl.when(in_train).then(pl.lit("train")).otherwise(pl.lit("test")))
    torn.with_columns(path=pl.lit(f"{photos}/") + pl.col("item_id")).write_parquet(tmp_path / "torn.parquet")
    visrec("data", "repair", tmp_path / "torn.parquet", "--out", tmp_path / "mended.parquet", "--pairs", tmp_path / "checked" / "pairs.csv",
           "--changes", tmp_path / "changes.csv")
    assert "building/copy.jpg" in pl.read_csv(tmp_path / "changes.csv")["item_id"]
    assert "building/copy.jpg" not in pl.read_parquet(tmp_path / "mended.parquet")["item_id"]

    prepare = ("data", "prepare", tmp_path / "catalog.parquet", "--cache", tmp_path / "cache", "--out", tmp_path / "ready.parquet",
               "--size", "64")
    assert json.loads(visrec(*prepare, "--json")) == {"pictures": 49, "made": 49, "reused": 0, "skipped": 0}
    assert json.loads(visrec(*prepare, "--json"))["reused"] == 49
    ready = pl.read_parquet(tmp_path / "ready.parquet")
    assert Image.open(tmp_path / ready["path"][0]).size == (64, 64)
    assert "the catalog already has a split" in visrec("data", "split", tmp_path / "catalog.parquet", "--out", tmp_path / "x.csv", status=2)


@pytest.mark.slow
def test_embed_and_search(photos, tmp_path):
    store = tmp_path / "store"
    assert json.loads(visrec("embed", photos, "--store", store, "--json")) == {"items": 49, "computed": 49, "skipped": 1}
    assert json.loads(visrec("embed", photos, "--store", store, "--json"))["computed"] == 0
    found = json.loads(visrec("search", store, photos / "building" / "copy.jpg", "-k", "3", "--json"))["results"]
    assert [row["item_id"] for row in found[:2]] == ["building/copy.jpg", "building/00.jpg"] and found[0]["similarity"] > 0.999
    assert visrec("search", tmp_path / "nothing", "x.jpg", status=2).startswith("visrec: ")
    assert visrec("search", store, photos / "plant" / "broken.jpg", status=2).startswith("visrec: ")


@pytest.mark.slow
def test_drift_and_log(photos, tmp_path):
    dark = tmp_path / "dark"
    for file in sorted(photos.rglob("[0-9]*.jpg")):
        target = dark / file.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as photo: photo.point(lambda v: v // 5).save(target)
    table = {row["check"]: row["drift"] for row in json.loads(visrec("data", "drift", photos, dark, "--json"))["drift"]}
    assert "large" in table.values()
    events = pl.DataFrame({"user_id": [n % 7 for n in range(70)] + [99] * 4000, "item_id": [n % 10 for n in range(70)] + list(range(4000)),
                           "timestamp": [1_600_000_000 + 86_399 * n for n in range(70)] + [1_600_000_000 + 15 * n for n in range(4000)]})
    events.write_csv(tmp_path / "log.csv")
    facts = json.loads(visrec("data", "check-log", tmp_path / "log.csv", "--out", tmp_path / "log", "--json"))
    assert facts["events"] == 4070 and facts["left_out"] >= 1 and facts["kept"] == 70
    assert pl.read_csv(tmp_path / "log" / "left_out.csv")["user_id"].cast(pl.String).to_list() == ["99"]


@pytest.mark.slow
def test_an_interrupted_command_says_so_and_goes_on(tmp_path):
    code, photos = "from visrec_nb.cli import main; main()", str(ROOT / "data" / "clothing")
    command = [sys.executable, "-c", code, "embed", photos, "--store", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"VISREC_PROGRESS": "1"})
    said = b""
    while not re.search(rb"embedding: +[1-9]\d?%", said): # a fast machine's bar jumps over 1 %
        more = process.stderr.read1()
        assert more, said.decode()
        said += more
    process.send_signal(signal.SIGINT)
    said += process.communicate()[1]
    assert process.returncode == 130 and said.decode().splitlines()[-1] == "visrec: interrupted; what was done is kept"
    computed = json.loads(visrec("embed", photos, "--store", tmp_path, "--json"))["computed"]
    assert 0 < computed < 1513
