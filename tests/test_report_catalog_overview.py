"""A first look at a catalog: what is counted, what looks alike, and who uses it, with labels that were split by chance to look alike."""

import re

import numpy as np
import polars as pl
import pytest

from helpers import page_words
from visrec_nb.core.errors import InputError
from visrec_nb.core.seeds import rng
from visrec_nb.data.catalog import write_catalog
from visrec_nb.data.lookalikes import alike_labels, label_likeness, typical_items
from visrec_nb.data.overview import drawn, file_facts
from visrec_nb.data.samples import clothing
from visrec_nb.media.render import render_move
from visrec_nb.reports.runner import run_report


@pytest.fixture(scope="module")
def wardrobe():
    "Shoes, pants and hats; half of the hats, drawn at random, are called caps."
    photos = clothing().filter(pl.col("label").is_in(["hat", "pants", "shoes"])).sort("item_id")
    cap = pl.Series(rng(0, "caps").random(len(photos)) < 0.5)
    return photos.with_columns(label=pl.when((pl.col("label") == "hat") & cap).then(pl.lit("cap")).otherwise("label"))


def test_labels_that_look_alike_are_named(wardrobe, tmp_path):
    write_catalog(wardrobe, tmp_path / "catalog.parquet")
    log = pl.DataFrame({"user_id": [n % 40 for n in range(900)], "item_id": wardrobe["item_id"].gather([n * n % 200 for n in range(900)]),
                        "timestamp": [1_700_000_000 + 40_000 * n for n in range(900)]})
    log.write_csv(tmp_path / "log.csv")
    given = {"catalog": str(tmp_path / "catalog.parquet"), "interactions": str(tmp_path / "log.csv"), "labels": 4, "variations": 1}
    run = run_report("catalog_overview", tmp_path / "report", given)
    m, text = run.metrics, page_words(run)
    counts = dict(wardrobe["label"].value_counts().rows())
    assert m["items"] == len(wardrobe) and m["labels"] == 4 and m["largest_label"] == max(counts.values()) and m["unreadable"] == 0
    assert m["median_width"] == wardrobe["width"].median() and m["median_height"] == wardrobe["height"].median()
    assert re.search(r"(cap and hat|hat and cap) look most alike", text) and "hardly be told" not in text
    assert 0.7 < m["same"] < 1 and m["same_by_chance"] == pytest.approx(sum(n * n for n in counts.values()) / len(wardrobe) ** 2)
    assert m["log_events"] == 900 and m["log_users"] == 40 and m["log_in_catalog"] == 1
    assert m["log_catalog_used"] == pytest.approx(log["item_id"].n_unique() / len(wardrobe))
    assert "The log holds 900 events of 40 users" in text and "2023-11-14" in text and "do not fit" not in text
    assert f"{len(wardrobe):,} photos under 4 labels" in text and "Not part" not in text and "nan" not in text.split()


def test_labels_that_say_nothing_are_told(wardrobe, clothing_vectors, tmp_path):
    "Labels dealt at random cannot be told by sight; the true ones can, and then no pair is close."
    photos, vectors = clothing_vectors
    rows = photos.with_row_index("row").join(wardrobe.select("item_id"), on="item_id")
    some, seen = photos[rows["row"]], vectors[rows["row"].to_numpy()]
    true = alike_labels(label_likeness(some, seen))
    assert true["share"][0] < 0.1 and true["times"][0] < 0.5
    dealt = some.with_columns(label=pl.Series(rng(1, "dealt").choice(["a", "b"], len(some))))
    found = label_likeness(dealt, seen)
    assert abs(np.diagonal(found.share) - 0.5).max() < 0.1
    write_catalog(dealt, tmp_path / "catalog.parquet")
    run = run_report("catalog_overview", tmp_path / "report", {"catalog": str(tmp_path / "catalog.parquet"), "labels": 0})
    assert run.metrics["same"] == pytest.approx(0.5, abs=0.1) and "The labels can hardly be told by sight" in page_words(run)
    assert "as it was not asked for: an interaction log" in page_words(run)


def test_typical_pictures_are_near_the_mean_and_variations_are_not(clothing_vectors):
    photos, vectors = clothing_vectors
    hats = np.flatnonzero(photos["label"] == "hat")
    unit = np.sign(vectors) * np.sqrt(np.abs(vectors))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    near = dict(zip(photos["item_id"][hats], unit[hats] @ unit[hats].mean(0), strict=True))
    shown = typical_items(photos, vectors, typical=2, variations=3).filter(label="hat")
    rank = {item: place for place, item in enumerate(sorted(near, key=near.get, reverse=True))}
    places = [rank[item] for item in shown["item_id"]]
    assert max(places[:2]) < 5 and min(places[2:]) > 20 and max(places) < len(hats) * 0.95


def test_photos_clips_and_a_torn_file(wardrobe, tmp_path):
    paths = wardrobe["path"].head(6).to_list()
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff no photo")
    pixels = np.full((200, 300, 3), 90, np.uint8)
    for n in range(2): render_move(pixels, "pan_left", tmp_path / f"clip{n}.mp4", seed=n, fps=12, seconds=1.0, speed=0.1, size=64)
    rows = {"path": [*paths, str(tmp_path / "torn.jpg"), *(str(tmp_path / f"clip{n}.mp4") for n in range(2))]}
    catalog = pl.DataFrame(rows | {"group": ["one", "one", *(f"g{n}" for n in range(7))]})
    catalog.write_csv(tmp_path / "mixed.csv")
    given = {"catalog": str(tmp_path / "mixed.csv"), "embeddings": False}
    run = run_report("catalog_overview", tmp_path / "report", given)
    m, text = run.metrics, page_words(run)
    assert (m["images"], m["videos"], m["unreadable"], m["groups"], m["largest_group"]) == (7, 2, 1, 8, 2) and "labels" not in m
    assert m["median_seconds"] == pytest.approx(1.0, abs=0.1) and "same" not in m
    assert "7 photos and 2 clips ; none has a label" in text and "1 file of 9 looked at cannot be read" in text
    assert "MP4" in text and "JPEG" in text and "what the pictures show ( embeddings )" in text
    again = run_report("catalog_overview", tmp_path / "again", given)
    assert (again.folder / "metrics.json").read_bytes() == (run.folder / "metrics.json").read_bytes()


def test_a_sample_holds_every_label_and_the_same_one_each_time():
    photos = clothing().with_columns(label=pl.when(pl.int_range(pl.len()) < 3).then(pl.lit("rare")).otherwise("label"))
    some = drawn(photos, 100, seed=1)
    assert some.filter(label="rare").height == 3 and len(some) < 350 and not some.equals(drawn(photos, 100, seed=2))
    facts = file_facts(some[:20])
    assert facts["width"].to_list() == some["width"].head(20).to_list() and facts["problem"].null_count() == 20


def test_a_log_without_users_is_refused(wardrobe, tmp_path):
    write_catalog(wardrobe.head(3), tmp_path / "c.parquet")
    (tmp_path / "log.csv").write_text("person,item_id\n1,2\n")
    with pytest.raises(InputError, match="no column 'user_id'"):
        run_report("catalog_overview", tmp_path / "r", {"catalog": str(tmp_path / "c.parquet"), "interactions": str(tmp_path / "log.csv"),
                                                         "embeddings": False})
