"Planted wrong labels and strangers among the clothing photos are found, with the embeddings that the package computes."

import numpy as np
import polars as pl
import pytest

from visrec_nb.core.seeds import rng
from visrec_nb.data.labels import as_features, label_findings, label_issues, outliers

SHARE = 0.05


def plant(catalog, seed, to=None):
    "Another class for 5 % of the items: any, or with `to` the class that this one is confused with. And which items."
    labels, draw = sorted(catalog["label"].unique()), rng(seed, "planted labels")
    wrong = draw.choice(len(catalog), round(SHARE * len(catalog)), replace=False)
    new = catalog["label"].to_list()
    for i in wrong:
        others = [label for label in labels if label != new[i]] if to is None else [to[new[i]]]
        new[i] = others[draw.integers(len(others))]
    return catalog.with_columns(label=pl.Series(new)), set(catalog["item_id"][wrong.tolist()])


def precision(issues, wrong): return len(wrong & set(issues.head(len(wrong))["item_id"])) / len(wrong)


@pytest.mark.slow
def test_five_percent_wrong_labels_are_found(clothing_vectors):
    catalog, vectors = clothing_vectors
    found, flagged = [], []
    for seed in range(5):
        planted, wrong = plant(catalog, seed)
        issues = label_issues(planted, vectors)
        found.append(precision(issues, wrong))
        suspected = set(issues.filter("is_issue")["item_id"])
        flagged.append((len(wrong & suspected) / len(wrong), len(wrong & suspected) / len(suspected)))
        original = dict(catalog.select("item_id", "label").rows())
        repaired = issues.filter(pl.col("item_id").is_in(list(wrong))).select(
            pl.col("item_id").replace_strict(original) == pl.col("suggested_label")).to_series().mean()
        assert repaired >= 0.7
    assert min(found) >= 0.65, found
    assert min(recall for recall, _ in flagged) >= 0.75 and min(p for _, p in flagged) >= 0.4, flagged


@pytest.mark.slow
def test_labels_swapped_with_the_likeliest_class_are_found(clothing_vectors):
    catalog, vectors = clothing_vectors
    confused = label_issues(catalog, vectors).filter(pl.col("label") != pl.col("suggested_label"))
    to = dict(confused.group_by("label", "suggested_label").len().sort("len").select("label", "suggested_label").rows())
    found = [precision(label_issues(planted, vectors), wrong) for planted, wrong in (plant(catalog, seed, to) for seed in range(2))]
    assert min(found) >= 0.5, found


@pytest.mark.slow
def test_strangers_are_at_the_top(clothing_vectors, tmp_path):
    from PIL import Image, ImageDraw
    from sklearn.metrics import roc_auc_score

    from visrec_nb.data.rules import as_catalog
    from visrec_nb.vision.backbones import onnx_backbone
    from visrec_nb.vision.features import embed, image_preprocessing

    catalog, vectors = clothing_vectors
    draw, rows = rng(0, "strangers"), []
    for i in range(10):
        noise = Image.fromarray(draw.integers(0, 256, (160, 160, 3)).astype(np.uint8))
        x, y = np.linspace(0, 1, 160)[None, :, None], np.linspace(0, 1, 160)[:, None, None]
        gradient = Image.fromarray((x * draw.integers(0, 128, 3) + y * draw.integers(0, 128, 3)).astype(np.uint8))
        text = Image.new("RGB", (160, 160), "white")
        for line in range(5, 150, 14):
            ImageDraw.Draw(text).text((5, line), "".join(draw.choice(list("abcdefg hijk"), 24)), fill="black")
        for name, image in (("noise", noise), ("gradient", gradient), ("text", text)):
            image.save(tmp_path / f"{name}{i}.png")
            rows.append((str(tmp_path / f"{name}{i}.png"), sorted(catalog["label"].unique())[i]))
    strangers = as_catalog(pl.DataFrame(rows, schema=["path", "label"], orient="row"))
    embedded = embed(strangers, onnx_backbone(), image_preprocessing(views=("plain",)), tmp_path / "store")
    columns = ["item_id", "path", "media", "label"]
    every = pl.concat([catalog.select(columns), strangers.select(columns)])
    table = outliers(every, np.concatenate([vectors, embedded.features[:, 0]]))
    strange = table["item_id"].is_in(strangers["item_id"].implode())
    assert roc_auc_score(strange, table["score"]) >= 0.99
    assert strange.head(len(strangers)).mean() >= 0.95
    assert table.filter(strange)["is_outlier"].all()
    assert table.filter(~strange)["is_outlier"].mean() <= 0.01
    findings = label_findings(strangers=table)
    assert set(findings["check"]) == {"outlier"} and "warning" in set(findings["severity"])


@pytest.mark.slow
def test_unreadable_and_small_classes_are_counted(clothing_vectors):
    catalog, vectors = clothing_vectors
    vectors = vectors.copy()
    vectors[:7] = np.nan
    few = catalog.with_columns(label=pl.when(pl.int_range(pl.len()).is_in([20, 21])).then(pl.lit("scarf")).otherwise("label"))
    issues = label_issues(few, vectors)
    reasons = dict(issues["not_judged"].drop_nulls().value_counts().rows())
    assert len(issues) == len(catalog) and reasons.pop("no embedding") == 7 and len(reasons) == 1
    assert "'scarf' has only 2 items, at least 5" in next(iter(reasons))
    assert issues.filter(pl.col("not_judged").is_not_null())["is_issue"].null_count() == 9
    assert outliers(few, vectors)["not_judged"].drop_nulls().to_list() == ["no embedding"] * 7
    said = label_findings(issues).filter(check="label_not_judged")["message"].to_list()
    assert any("7 items" in text for text in said)


def test_a_time_axis_is_averaged():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert np.allclose(as_features(x)[0], as_features(x.mean(1))[0])
