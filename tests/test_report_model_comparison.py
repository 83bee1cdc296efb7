"""Champion against challenger: better, worse and the same, with planted faults that have to come out."""

import shutil

import numpy as np
import polars as pl
import pytest
from PIL import Image
from scipy.stats import binomtest

from helpers import page_words
from visrec_nb.core.errors import InputError
from visrec_nb.core.files import cache_dir, write_json
from visrec_nb.data.catalog import write_catalog
from visrec_nb.data.samples import clothing, movielens
from visrec_nb.recsys import EASE, Popularity, paired_tests, protocol
from visrec_nb.recsys.evaluation import user_metrics
from visrec_nb.reports.champion import run_contest
from visrec_nb.reports.runner import run_report
from visrec_nb.reports.words_service import changes_conclusion, verdict_conclusion
from visrec_nb.serve.bundle import open_bundle, open_recommender
from visrec_nb.vision.learners import image_learner

CLASSES = ["dress", "hat", "pants", "shoes"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A catalog of four classes; the bundle `good`, and `bad`, which learned that most hats are shoes."
    folder = tmp_path_factory.mktemp("photos")
    few = clothing().filter(pl.col("label").is_in(CLASSES)).sort("item_id")
    few = pl.concat([few.filter(label=c).head(60) for c in CLASSES])
    few = few.with_columns(split=pl.Series(np.resize(["train", "valid", "test", "test"], len(few))),
                           camera=pl.Series(np.resize(["a"] * 4 + ["b"] * 4, len(few))))
    write_catalog(few, folder / "catalog.parquet")
    learned = pl.col("split") != "test"
    n = pl.int_range(pl.len()).over("label", "split")
    wrong = pl.when(learned & (pl.col("label") == "hat") & (n % 4 != 0)).then(pl.lit("shoes")).otherwise("label")
    for name, catalog in (("good", few), ("bad", few.with_columns(label=wrong))):
        image_learner(catalog, store=cache_dir("embeddings")).fit_head(folds=3).to_bundle(folder / name)
    return folder


def compare(folder, out, champion, challenger, source, **given):
    paths = {"champion": str(folder / champion), "challenger": str(folder / challenger), "source": str(folder / source)}
    return run_report("model_comparison", out, paths | {"timed": 0, "shown": 2} | given)


@pytest.mark.slow
def test_photos_a_clearly_better_challenger_and_the_other_way_round(photos, tmp_path):
    run = compare(photos, tmp_path / "r", "bad", "good", "catalog.parquet", slices="camera", timed=2)
    found, text = run.metrics, page_words(run)
    assert found["verdict"] == "take" and run.manifest["conclusion"].startswith("Take the challenger.")
    only = found["only_challenger_right"], found["only_champion_right"]
    assert found["difference"] == pytest.approx((only[0] - only[1]) / found["items"])
    assert found["difference"] == pytest.approx(found["challenger"]["accuracy"] - found["champion"]["accuracy"])
    assert found["p"] <= binomtest(only[0], sum(only)).pvalue # mid-p is the exact test's, less half of what was seen
    parts = {(row["column"], row["slice"]): row for row in found["parts"]}
    assert parts["label", "hat"]["change"] == "better" and parts["label", "dress"]["change"] == ""
    assert {("camera", "a"), ("camera", "b")} <= parts.keys() and all(row["change"] != "worse" for row in parts.values())
    assert f"Clearly better: hat (from {100 * parts['label', 'hat']['champion']:.0f} % to" in run.manifest["conclusion"]
    assert "MB on disk" in text and "nan" not in text.split() and "None" not in text.split()
    assert not any("milli" in name or "megabyte" in name for name in found) # times are for the page only

    back = compare(photos, tmp_path / "b", "good", "bad", "catalog.parquet", slices="camera")
    assert back.metrics["verdict"] == "keep" and back.manifest["conclusion"].startswith("Keep the champion.")
    assert "The challenger is clearly worse. Clearly worse: hat" in back.manifest["conclusion"]
    assert "Clearly better" not in back.manifest["conclusion"]
    assert back.metrics["difference"] == pytest.approx(-found["difference"]) and back.metrics["agreement"] == found["agreement"]
    assert back.metrics["difference_ci_low"] == pytest.approx(-found["difference_ci_high"]) and back.metrics["p"] == found["p"]
    assert "hat, now taken for shoes" in page_words(back) and "as it was not asked for" in page_words(back)


def test_photos_the_same_model_and_a_test_that_cannot_tell(photos, tmp_path):
    shutil.copytree(photos / "good", tmp_path / "copy")
    same = run_contest(photos / "good", tmp_path / "copy", photos / "catalog.parquet", store=cache_dir("embeddings"))
    assert same.metrics["verdict"] == "alike" and same.metrics["agreement"] == 1 and same.metrics["difference_ci_high"] == 0
    assert verdict_conclusion(same.metrics).endswith("there is nothing to gain.") and same.regressions.is_empty()
    catalog = pl.read_parquet(photos / "catalog.parquet")
    few = pl.concat([catalog.filter(split="test", label="hat").head(3), catalog.filter(split="test", label="dress").head(9)])
    write_catalog(few, tmp_path / "few.parquet")
    run = compare(photos, tmp_path / "f", "bad", "good", tmp_path / "few.parquet")
    assert run.metrics["verdict"] == "open" and run.manifest["conclusion"].startswith("This test can't tell; about ")
    assert run.metrics["more_needed"] > 0 and "Until then, keep the champion." in run.manifest["conclusion"]


def test_photos_the_bar_decides(photos):
    paths = photos / "bad", photos / "good", photos / "catalog.parquet"

    def verdict(**bar): return run_contest(*paths, store=cache_dir("embeddings"), **bar).metrics
    found = verdict(least_gain=0.9)
    assert found["verdict"] == "keep" and found["bar"] == 0.9
    assert verdict(least_gain=found["difference"])["verdict"] == "open"
    with pytest.raises(InputError, match="give one of them"): verdict(least_gain=0.1, non_inferiority=0.1)


def test_photos_items_of_a_group_count_as_one(photos):
    catalog = pl.read_parquet(photos / "catalog.parquet")
    grouped = catalog.with_columns(group=pl.col("label"))
    one, four = (run_contest(photos / "bad", photos / "good", c, store=cache_dir("embeddings")).metrics for c in (catalog, grouped))
    assert one["verdict"] == "take" and four["verdict"] == "open" and four["units"] == 4 # four classes are four facts
    assert four["difference"] == one["difference"] and four["p"] > one["p"]
    assert four["difference_ci_high"] - four["difference_ci_low"] > one["difference_ci_high"] - one["difference_ci_low"]


def test_what_cannot_be_compared_is_refused(photos, films, tmp_path):
    catalog = pl.read_parquet(photos / "catalog.parquet").filter(pl.col("label") != "hat")
    image_learner(catalog, store=cache_dir("embeddings")).fit_head(folds=3).to_bundle(tmp_path / "no_hats")
    with pytest.raises(InputError, match="answers other labels, such as 'hat'") as e:
        compare(photos, tmp_path / "r", "good", tmp_path / "no_hats", "catalog.parquet")
    assert str(e.value).startswith("model_comparison: ") and not (tmp_path / "r").exists()
    with pytest.raises(InputError, match="is for recommendation, the champion for image classification"):
        run_contest(photos / "good", films / "ease", photos / "catalog.parquet")
    with pytest.raises(InputError, match="history: is for recommenders"):
        run_contest(photos / "good", photos / "bad", photos / "catalog.parquet", history=films / "test.parquet")
    with pytest.raises(InputError, match="no column 'colour'"):
        run_contest(photos / "good", photos / "bad", photos / "catalog.parquet", slices="colour", store=cache_dir("embeddings"))


@pytest.mark.slow
def test_several_labels_a_photo(photos, tmp_path):
    "Sheets of two photos; the challenger was taught to call hats dresses and dresses hats; one sheet is damaged."
    members, rows, draw = pl.read_parquet(photos / "catalog.parquet").filter(pl.col("label") != "pants"), [], np.random.default_rng(0)
    for part, n in (("train", 30), ("valid", 14), ("test", 30)):
        pool = members.filter((pl.col("split") == "test") == (part == "test"))
        for k in range(n):
            sheet, two = Image.new("RGB", (200, 120)), draw.choice(len(pool), 2, replace=False)
            for x, r in enumerate(two):
                with Image.open(pool["path"][int(r)]) as photo: sheet.paste(photo.convert("RGB").resize((100, 120)), (100 * x, 0))
            sheet.save(file := tmp_path / f"{part}{k}.jpg")
            labels = sorted({pool["label"][int(r)] for r in two})
            rows.append({"item_id": file.stem, "path": str(file), "media": "image", "labels": labels, "split": part})
    catalog = pl.DataFrame(rows)
    swapped = pl.col("labels").list.eval(pl.element().replace({"hat": "dress", "dress": "hat"})).list.sort()
    taught = pl.when(pl.col("split") != "test").then(swapped).otherwise("labels")
    for name, c in (("good", catalog), ("bad", catalog.with_columns(labels=taught))):
        image_learner(c, store=tmp_path / "store").fit_head(folds=3).to_bundle(tmp_path / name)
    write_catalog(catalog, tmp_path / "sheets.parquet")
    (tmp_path / "test7.jpg").write_bytes(b"not a photo")
    run = compare(tmp_path, tmp_path / "r", "good", "bad", "sheets.parquet")
    found, text = run.metrics, page_words(run)
    assert found["metric"] == "map" and found["items"] == 29 and found["skipped"] == 1 and "test7" in text
    assert found["difference"] == pytest.approx(found["challenger"]["map"] - found["champion"]["map"]) and found["p"] is None
    assert found["verdict"] == "keep" and "a mean average precision of" in run.manifest["conclusion"]
    assert "Clearly worse: dress" in run.manifest["conclusion"] or "Clearly worse: hat" in run.manifest["conclusion"]
    test = open_bundle(tmp_path / "bad").evaluate(catalog, store=tmp_path / "store")
    decided = (test.probs >= open_bundle(tmp_path / "bad").thresholds) == test.targets
    by_label = {row["slice"]: row for row in found["parts"] if row["column"] == "label"}
    for k, label in enumerate(["dress", "hat", "shoes"]): assert by_label[label]["challenger"] == pytest.approx(decided[:, k].mean())


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Bundles trained on the first part of each person's ratings, and the log of what came later."
    folder, data = tmp_path_factory.mktemp("films"), movielens()
    log = data.ratings.filter(pl.len().over("item_id") >= 15).filter(pl.col("user_id") <= 300)
    cut = protocol(log.select("user_id", "item_id", "timestamp"), "time_per_user")
    data.movies.join(log, on="item_id", how="semi").write_parquet(folder / "movies.parquet")
    for name, table in (("train", cut.train), ("test", cut.test)): table.write_parquet(folder / f"{name}.parquet")
    for name, model in (("popularity", Popularity()), ("ease", EASE(300))):
        model.fit(cut.train, items=pl.read_parquet(folder / "movies.parquet")).to_bundle(folder / name)
    return folder


def test_recommenders_both_ways_round(films, tmp_path):
    run = compare(films, tmp_path / "r", "popularity", "ease", "test.parquet", timed=5)
    found, text, test = run.metrics, page_words(run), pl.read_parquet(films / "test.parquet")
    truth = {name: user_metrics(open_recommender(films / name), test, 10)[1] for name in ("popularity", "ease")}
    row = paired_tests(truth, "ndcg@10", against="popularity", seed=42).row(0, named=True)
    assert (found["verdict"], found["difference"], found["p"]) == ("take", row["difference"], row["p_value"])
    assert (found["difference_ci_low"], found["better"], found["worse"]) == (row["ci_low"], row["better"], row["worse"])
    assert found["recall@10_difference"] == pytest.approx(truth["ease"]["recall@10"].mean() - truth["popularity"]["recall@10"].mean())
    assert run.manifest["conclusion"].startswith("Take the challenger. Among 10 suggestions of the challenger, ")
    assert text.count("✓") > 1 and "Star Wars" in text and "MB on disk" in text and "known choices" in text and "nan" not in text.split()
    assert {row["column"] for row in found["parts"]} == {"known choices", "taste"}

    back = compare(films, tmp_path / "b", "ease", "popularity", "test.parquet")
    assert back.metrics["verdict"] == "keep" and back.manifest["conclusion"].startswith("Keep the champion.")
    assert back.metrics["difference"] == pytest.approx(-found["difference"])
    again = run_contest(films / "ease", films / "popularity", films / "test.parquet", seed=42).metrics # in another process
    write_json(tmp_path / "again.json", again)
    assert (tmp_path / "again.json").read_bytes() == (back.folder / "metrics.json").read_bytes()


def test_recommenders_a_slice_that_loses_is_named(films, tmp_path):
    "The challenger is the same model, but knows nothing of the people of one country, until it is told."
    country = pl.when(pl.col("user_id") % 3 == 0).then(pl.lit("Fiji")).otherwise(pl.lit("Chad")).alias("country")
    model = EASE(300).fit(pl.read_parquet(films / "train.parquet"), items=pl.read_parquet(films / "movies.parquet"))
    model.history = model.history.take(np.flatnonzero(model.history.users.to_numpy() % 3))
    model.to_bundle(tmp_path / "half")
    log = pl.read_parquet(films / "test.parquet").with_columns(country)
    contest = run_contest(films / "ease", tmp_path / "half", log, slices="country")
    parts = {row["slice"]: row for row in contest.parts.filter(column="country").to_dicts()}
    assert parts["Fiji"]["change"] == "worse" and parts["Chad"]["difference"] == 0 and contest.metrics["verdict"] == "keep"
    assert "**country Fiji**" in changes_conclusion(contest.parts, share=False)
    told = run_contest(films / "ease", tmp_path / "half", log, history=films / "train.parquet", slices="country").metrics
    assert told["verdict"] == "alike" and told["challenger"] == told["champion"] == contest.metrics["champion"]


def test_recommenders_over_different_catalogues_are_compared_on_what_both_know(films, tmp_path):
    train = pl.read_parquet(films / "train.parquet").filter(pl.col("item_id") < 3000)
    EASE(300).fit(train).to_bundle(tmp_path / "few")
    run = compare(films, tmp_path / "r", "ease", tmp_path / "few", "test.parquet")
    found, test = run.metrics, pl.read_parquet(films / "test.parquet")
    known = open_recommender(tmp_path / "few").items
    assert found["items_in_common"] == len(known) and found["events"] == test.filter(pl.col("item_id").is_in(known.implode())).height
    assert found["events"] + found["events_of_other_items"] == test.height
    assert f"the {len(known):,} that both know, so nothing is said of the others" in page_words(run)
    with pytest.raises(InputError, match="no event is left to predict"):
        run_contest(films / "ease", tmp_path / "few", films / "train.parquet")
