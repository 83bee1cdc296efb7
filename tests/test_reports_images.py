"""The reports about photo classifiers, run as a user runs them: on few photos, with a planted fault, and with several labels a photo."""

import json

import numpy as np
import polars as pl
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, average_precision_score

from helpers import page_words
from visrec_nb.core.errors import InputError
from visrec_nb.core.files import cache_dir
from visrec_nb.data.catalog import write_catalog
from visrec_nb.data.samples import clothing
from visrec_nb.reports.runner import run_report
from visrec_nb.vision.learners import image_learner

pytestmark = pytest.mark.slow
CLASSES = ["hat", "pants", "shoes"]


@pytest.fixture(scope="module")
def photos():
    "Of three classes 25 photos for training, 25 for validation and 50 for the test; half of these, of camera `b`, carry wrong labels."
    few = clothing().filter(pl.col("label").is_in(CLASSES)).sort("item_id")
    parts = [few.filter(label=c)[:20 if c == "hat" else 40] for c in CLASSES]
    few = pl.concat([p.with_columns(split=pl.Series(np.resize(["train", "valid", "test", "test"], len(p)))) for p in parts])
    test = few.filter(split="test").with_row_index("n")
    assert len(test) == 50
    wrong = pl.col("label").replace_strict(CLASSES, [*CLASSES[1:], CLASSES[0]])
    bad = pl.col("n") % 2 == 0
    camera = pl.when(bad).then(pl.lit("b")).otherwise(pl.lit("a"))
    test = test.with_columns(label=pl.when(bad).then(wrong).otherwise("label"), camera=camera)
    return pl.concat([few.filter(pl.col("split") != "test").with_columns(camera=pl.lit("a")), test.drop("n")])


@pytest.fixture(scope="module")
def bundle(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "photos"
    return image_learner(photos, store=cache_dir("embeddings")).fit_head(folds=3).to_bundle(path)


def test_the_evaluation_names_the_slice_with_the_planted_fault(photos, bundle, tmp_path):
    write_catalog(photos, tmp_path / "catalog.parquet")
    run = run_report("image_evaluation", tmp_path / "report", {
        "catalog": str(tmp_path / "catalog.parquet"), "bundle": str(bundle.path), "compare": str(bundle.path), "slices": "camera",
        "robustness": 1, "explain": 1})
    test, text = photos.filter(split="test"), page_words(run)
    answers = bundle.predict(test["path"].to_list())["label"]
    assert run.metrics["accuracy"] == pytest.approx(accuracy_score(test["label"], answers))
    flagged = [f"{row['column']} {row['slice']}" for row in run.metrics["slices"] if row["flag"]]
    assert "camera b" in flagged and "Clearly worse than elsewhere: camera b" in text
    assert run.metrics["comparison"]["difference"] == 0 and "right and wrong about the same items" in text
    assert run.metrics["robustness"]["items"] == 1 and "Spoiled photos" in text
    assert "not be relied on" in text # half of the labels are wrong, and the model is sure
    assert "not asked for" not in text and "nan" not in text.split()


def test_a_report_on_several_labels(photos, tmp_path):
    rows, draw = [], np.random.default_rng(0)
    for part, n in (("train", 36), ("valid", 15), ("test", 15)):
        members = photos.filter(split="train" if part == "train" else "valid")
        for k in range(n):
            sheet, two = Image.new("RGB", (200, 120)), draw.choice(len(members), 2, replace=False)
            for x, r in enumerate(two):
                with Image.open(members["path"][int(r)]) as photo: sheet.paste(photo.convert("RGB").resize((100, 120)), (100 * x, 0))
            sheet.save(file := tmp_path / f"{part}{k}.jpg")
            labels = sorted({members["label"][int(r)] for r in two})
            rows.append({"item_id": file.stem, "path": str(file), "media": "image", "labels": labels, "split": part})
    write_catalog(catalog := pl.DataFrame(rows), tmp_path / "pairs.parquet")
    model = image_learner(catalog, store=tmp_path / "store").fit_head(folds=3).to_bundle(tmp_path / "bundle")
    run = run_report("image_evaluation", tmp_path / "report", {
        "catalog": str(tmp_path / "pairs.parquet"), "bundle": str(tmp_path / "bundle"), "explain": 0})
    test = model.evaluate(catalog, store=tmp_path / "store")
    assert run.metrics["map"] == pytest.approx(average_precision_score(test.targets, test.probs, average="macro"))
    text = page_words(run)
    assert "all their labels and no other" in text and "set_size@90" not in run.metrics
    assert "as it was not asked for: spoiled photos" in text


def test_a_column_that_is_not_there_is_told(photos, bundle, tmp_path):
    write_catalog(photos, tmp_path / "catalog.parquet")
    given = {"catalog": str(tmp_path / "catalog.parquet"), "bundle": str(bundle.path), "explain": 0}
    with pytest.raises(InputError, match="no column 'colour'"): run_report("image_evaluation", tmp_path / "r", given | {"slices": "colour"})


def test_photos_without_a_test_part_are_not_tested_on_what_was_learned(tmp_path):
    "Labels dealt at random cannot be known: who tests on what was learned would see far more than chance."
    few = clothing().filter(pl.col("label").is_in(CLASSES)).sort("item_id").gather_every(2)
    draw = np.random.default_rng(3)
    write_catalog(few.drop("split").with_columns(label=pl.Series(draw.permutation(np.resize(CLASSES, len(few))))), tmp_path / "c.parquet")
    run = run_report("image_training", tmp_path / "report", {"catalog": str(tmp_path / "c.parquet"), "bundle": str(tmp_path / "b")})
    data = json.loads((tmp_path / "b" / "manifest.json").read_text())["data"]
    assert run.metrics["items"] + data["train"] + data["valid"] == len(few) and run.metrics["items"] < 0.2 * len(few)
    assert run.metrics["accuracy_ci_low"] < 1 / 3 and "had no test part" in page_words(run) and "do not use it" in page_words(run)


def test_the_training_report_trains_the_whole_network_where_epochs_are_asked_for(photos, tmp_path):
    few = pl.concat([photos.filter(label=c, split=part)[:4] for c in CLASSES for part in ("train", "valid", "test")])
    write_catalog(few, tmp_path / "catalog.parquet")
    given = {"catalog": str(tmp_path / "catalog.parquet"), "bundle": str(tmp_path / "bundle"), "epochs": 1}
    run = run_report("image_training", tmp_path / "report", given, bundles=[tmp_path / "bundle"])
    facts = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert len(facts["training"]["epochs"]) == 1 and facts["network_gap"] < 1e-4 and facts["metrics"]["accuracy"] == run.metrics["accuracy"]
    assert "Epochs of the whole network: 1" in page_words(run)
