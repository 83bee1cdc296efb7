"""Scoring everything: files that cannot be read, a run that is killed, other data than in training, users of every kind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from helpers import page_words
from visrec_nb.core.errors import InputError
from visrec_nb.core.files import cache_dir
from visrec_nb.data.catalog import write_catalog
from visrec_nb.data.samples import clothing, movielens
from visrec_nb.recsys import ALS
from visrec_nb.recsys.base import load
from visrec_nb.recsys.metrics import coverage
from visrec_nb.reports.answers import answer_facts, answer_table
from visrec_nb.reports.runner import run_report
from visrec_nb.reports.scoring import recommend_users, score_catalog
from visrec_nb.vision.learners import image_learner
from visrec_nb.vision.predictor import ClassifierBundle

CLASSES = ["hat", "pants", "shoes"]


@pytest.fixture(scope="module")
def photos():
    "Of three classes 40 photos each for training, and 20 others."
    few = clothing().filter(pl.col("label").is_in(CLASSES)).sort("item_id")
    return pl.concat([few.filter(label=c)[:60] for c in CLASSES]).with_columns(split=pl.Series((["train"] * 40 + ["test"] * 20) * 3))


@pytest.fixture(scope="module")
def bundle(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "photos"
    image_learner(photos.filter(split="train"), store=cache_dir("embeddings"), valid_fraction=0).fit_head(folds=3).to_bundle(path)
    return path


@pytest.fixture
def shop(photos, tmp_path):
    "A folder of 60 new photos, one of them torn, with a table that also names one that is not there."
    new = photos.filter(split="test").drop("split", "label", "sha256")
    (tmp_path / "shop").mkdir()
    for n, path in enumerate(new["path"]): shutil.copy(path, tmp_path / "shop" / f"{n:02}.jpg")
    (tmp_path / "shop" / "07.jpg").write_bytes((tmp_path / "shop" / "07.jpg").read_bytes()[:700])
    names = [f"{n:02}" for n in range(60)] + ["gone"]
    table = pl.DataFrame({"item_id": [f"no. {n}" for n in names], "path": [f"{n}.jpg" for n in names]})
    table.write_csv(tmp_path / "shop" / "catalog.csv")
    return tmp_path / "shop"


def test_a_catalog_is_scored_and_what_failed_is_counted(shop, bundle, tmp_path):
    given = {"bundle": str(bundle), "catalog": str(shop / "catalog.csv"), "examples": 2, "store": str(tmp_path / "store")}
    run = run_report("batch_scoring", tmp_path / "report", given)
    table, text = pl.read_parquet(run.folder / "predictions.parquet"), page_words(run)
    assert table.columns == ["path", "label", "score", "labels", "scores", "error", "item_id"]
    assert table["item_id"].to_list() == [f"no. {n:02}" for n in range(60)] + ["no. gone"] # all of them, in the catalog's order
    bad = table.filter(pl.col("error").is_not_null())
    assert [Path(p).name for p in bad["path"]] == ["07.jpg", "gone.jpg"] and bad["label"].null_count() == 2

    model = ClassifierBundle(bundle)
    told = model.predict(table["path"].to_list())
    assert table["label"].equals(told["label"]) and (table["score"] - told["score"]).abs().max() < 1e-5
    m, limit = run.metrics, model.manifest["sure_above"]["0.95"]
    assert (m["items"], m["scored"], m["failed"]) == (61, 59, 2)
    assert m["answers"] == dict(sorted(told["label"].drop_nulls().value_counts().rows()))
    assert m["answered@95"] == pytest.approx((told["score"].drop_nulls() >= limit).mean())
    assert m["certainty"] == pytest.approx(told["score"].mean())
    assert "59 of 61 photos got an answer; 2 files could not be read" in text and "no such file" in text and "truncated" in text
    assert f"{round(59 * m['answered@95'])} of the answers" in text and "come about as often" in text
    assert "nan" not in text.split() and "None" not in text.split() and "Not part" not in text

    again = run_report("batch_scoring", tmp_path / "again", given)
    assert (again.folder / "metrics.json").read_bytes() == (run.folder / "metrics.json").read_bytes()


def test_other_photos_than_in_training_are_told(shop, bundle, tmp_path):
    "Only shoes come in: the answers are not spread as the training labels were."
    for n in range(40): (shop / f"{n:02}.jpg").unlink()
    (shop / "catalog.csv").unlink()
    run = run_report("batch_scoring", tmp_path / "report", {"bundle": str(bundle), "catalog": str(shop), "examples": 0, "promise": 90})
    assert "at least 90 in 100 are right" in page_words(run)
    assert (run.metrics["items"], run.metrics["failed"]) == (20, 0) and run.metrics["label_shift"] > 0.5
    assert "All 20 photos got an answer" in page_words(run) and "may be of another kind than those in training: shoes is" in page_words(run)
    assert "Every file could be read" in page_words(run) and "come about as often" not in page_words(run)


KILLED = """import sys
from visrec_nb.reports.scoring import recommend_users, score_catalog
from visrec_nb.vision.predictor import ClassifierBundle
score_catalog(ClassifierBundle(sys.argv[1], threads=1), sys.argv[2], sys.argv[3], work=sys.argv[4], part=6)
"""


def test_a_killed_run_goes_on_where_it_was(shop, bundle, tmp_path):
    work, out = tmp_path / "work", tmp_path / "answers.parquet"
    command = [sys.executable, "-c", KILLED, *map(str, (bundle, shop / "catalog.csv", out, work))]
    child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 60
    while len(list(work.glob("[0-9a-f]*.parquet"))) < 3 and time.monotonic() < until: time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    parts = {p.name: p.stat().st_mtime_ns for p in work.glob("[0-9a-f]*.parquet")}
    assert 3 <= len(parts) < 11 and not out.exists()

    model = ClassifierBundle(bundle, threads=1)
    whole = score_catalog(model, shop / "catalog.csv", tmp_path / "whole.parquet", work=tmp_path / "other", part=6)
    shutil.copytree(work, tmp_path / "copy")
    went_on = score_catalog(model, shop / "catalog.csv", out, work=work, part=6)
    assert whole.reused == 0 and went_on.reused == 6 * len(parts) and went_on.rows == whole.rows == 61
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes() and not work.exists()

    shutil.copy(shop / "59.jpg", shop / "00.jpg") # a file that was scored before the kill is another one by now
    os.utime(shop / "00.jpg", (1, 1))
    changed = score_catalog(model, shop / "catalog.csv", out, work=tmp_path / "copy", part=6)
    table = pl.read_parquet(out)
    assert changed.reused == 6 * (len(parts) - 1) and table["score"][0] == pytest.approx(table["score"][59], abs=1e-6)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "A recommender bundle, and what it was trained on: everybody but users 1 to 20."
    log = movielens().ratings.select("user_id", "item_id")
    path = tmp_path_factory.mktemp("films") / "films"
    ALS(factors=16, seed=0).fit(log.filter(pl.col("user_id") > 20), items=movielens().movies).to_bundle(path)
    return path, log.filter(pl.col("user_id") <= 20)


def test_users_of_every_kind_get_lists(films, tmp_path):
    bundle, since = films
    since.filter(pl.col("user_id") <= 10).write_csv(tmp_path / "since.csv")
    (tmp_path / "users.txt").write_text("".join(f"{n}\n" for n in range(1, 101)))
    given = {"bundle": str(bundle), "users": str(tmp_path / "users.txt"), "events": str(tmp_path / "since.csv"), "k": 5, "explain": True}
    run = run_report("batch_scoring", tmp_path / "report", given)
    table, text, m = pl.read_parquet(run.folder / "predictions.parquet"), page_words(run), run.metrics
    assert table.columns == ["user_id", "rank", "item_id", "score", "source", "title", "reason"] and table.height == 500
    assert (m["users"], m["users_known"], m["users_folded_in"], m["users_popular"], m["without_list"]) == (100, 80, 10, 10, 0)

    rec = load(bundle)
    wanted = rec.fold_in(since.filter(pl.col("user_id") <= 10)).recommend([str(n) for n in range(1, 101)], 5)
    assert table["item_id"].to_list() == wanted["item_id"].to_list()
    lists = rec.fold_in(since.filter(pl.col("user_id") <= 10)).lists(range(1, 101), 5)[0]
    assert m["coverage@5"] == pytest.approx(coverage(lists, len(rec.items)))
    times = np.bincount(lists.ravel(), minlength=len(rec.items))
    assert m["most_shown"] == pytest.approx(times.max() / 100)
    assert m["top_1_percent"] == pytest.approx(np.sort(times)[::-1][:round(len(rec.items) / 100)].sum() / 500)
    assert "100 users got a list of 5: 80 from what they did before the training, 10 with newer events" in text
    assert "Pulp Fiction" in text and "because of" in text and "best-seller" not in text and "nan" not in text.split()


def test_everybody_of_a_bundle_and_only_what_is_in_stock(films, tmp_path):
    bundle, _ = films
    pl.DataFrame({"item_id": [296, 318, 356, 593]}).write_parquet(tmp_path / "stock.parquet")
    given = {"bundle": str(bundle), "items": str(tmp_path / "stock.parquet"), "k": 4, "examples": 0}
    run = run_report("batch_scoring", tmp_path / "report", given)
    table = pl.read_parquet(run.folder / "predictions.parquet")
    assert set(table["item_id"]) <= {296, 318, 356, 593} and run.metrics["users"] == 651
    had = movielens().ratings.filter(pl.col("item_id").is_in([296, 318, 356, 593]), pl.col("user_id") > 20)
    per_user = had.group_by("user_id").len()
    assert run.metrics["without_list"] == (per_user["len"] == 4).sum() and run.metrics["short_lists"] == (per_user["len"] < 4).sum()
    assert "nothing was left to show" in page_words(run)


def test_ids_are_taken_as_they_are_written(tmp_path):
    "007 is not 7; and a bundle that holds no users says so."
    log = pl.DataFrame({"user_id": ["007", "007", "7", "8", "8"], "item_id": ["a", "b", "c", "a", "d"]})
    rec = ALS(factors=2, seed=0).fit(log)
    (tmp_path / "users.csv").write_text("user_id\n007\n7\n7\n9\n")
    found = recommend_users(rec, tmp_path / "lists.parquet", tmp_path / "users.csv", k=4, part=2)
    table = pl.read_parquet(tmp_path / "lists.parquet")
    assert found.users == 3 and dict(table.group_by("user_id").len().rows()) == {"007": 2, "7": 3, "9": 4}
    rec.to_bundle(tmp_path / "empty", users=False)
    with pytest.raises(InputError, match="holds no users"): recommend_users(load(tmp_path / "empty"), tmp_path / "x.parquet")
    (tmp_path / "none.csv").write_text("user_id\n")
    with pytest.raises(InputError, match="holds no users"): recommend_users(rec, tmp_path / "x.parquet", tmp_path / "none.csv")


def test_what_does_not_fit_the_bundle_is_refused(bundle, films, shop, tmp_path):
    (tmp_path / "users.txt").write_text("1\n")
    with pytest.raises(InputError, match="users: goes with a recommender"):
        run_report("batch_scoring", tmp_path / "r", {"bundle": str(bundle), "users": str(tmp_path / "users.txt")})
    with pytest.raises(InputError, match="no column 'user_id'; it has item_id, path"):
        run_report("batch_scoring", tmp_path / "r", {"bundle": str(films[0]), "users": str(shop / "catalog.csv")})
    assert json.loads((tmp_path / "r.failed" / "manifest.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_clips_and_parts_of_videos(tmp_path):
    "Some rows are whole files and some are parts of one, in parts of the work where only one kind occurs too."
    from visrec_nb.media.render import render_move
    from visrec_nb.vision.learners import video_learner

    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    for n in range(16):
        render_move(noise, ("pan_left", "zoom_in")[n % 2], tmp_path / f"{n}.mp4", seed=n, fps=12, seconds=1.5, speed=0.2, size=64)
    rows = pl.DataFrame({"item_id": [str(n) for n in range(16)], "path": [str(tmp_path / f"{n}.mp4") for n in range(16)],
                         "label": ["pan_left", "zoom_in"] * 8, "split": ["valid"] * 4 + ["train"] * 12})
    video_learner(rows, store=tmp_path / "store", num_segments=2, streams=["plain"]).fit_head().to_bundle(tmp_path / "moves")
    todo = rows.select("item_id", "path").head(6).with_columns(start=pl.Series([None, None, None, 0.0, 0.5, None], dtype=pl.Float64),
                                                               seconds=pl.Series([None, None, None, 1.0, 1.0, None], dtype=pl.Float64))
    model = ClassifierBundle(tmp_path / "moves")
    for part, store in ((2, None), (3, tmp_path / "store")):
        score_catalog(model, todo, tmp_path / "out.parquet", part=part, store=store)
        table = pl.read_parquet(tmp_path / "out.parquet")
        assert table.columns[:3] == ["path", "start", "seconds"] and table["start"].to_list() == [None, None, None, 0, 0.5, None]
        wanted = model.predict(todo)
        assert table["label"].equals(wanted["label"]) and (table["score"] - wanted["score"]).abs().max() < 1e-5
    write_catalog(todo, tmp_path / "todo.parquet")
    run = run_report("batch_scoring", tmp_path / "report", {"bundle": str(tmp_path / "moves"), "catalog": str(tmp_path / "todo.parquet")})
    assert run.metrics["scored"] == 6 and "All 6 clips got an answer" in page_words(run) and "surest" in page_words(run)


def test_several_labels_an_item(tmp_path):
    "Counted by hand: three items, one without a label, one that could not be read."
    rows = [("a", "hat", .9, ["hat", "shoe"], [.9, .6], None), ("b", None, .2, [], [], None), ("c", "hat", .7, ["hat"], [.7], None),
            ("d", None, None, None, None, "no such file")]
    pl.DataFrame(rows, ["path", "label", "score", "labels", "scores", "error"], orient="row").write_parquet(tmp_path / "p.parquet")
    manifest = {"labels": ["hat", "shoe"], "multi_label": True, "data": {"train": 10, "train_labels": {"hat": 9, "shoe": 3}}}
    table, facts = answer_table(tmp_path / "p.parquet", manifest), answer_facts(tmp_path / "p.parquet", manifest)
    assert table["label"].to_list() == ["hat", "shoe"] and table["answers"].to_list() == [2, 1]
    assert table["train_share"].to_list() == [.9, .3]
    assert table["share"].to_list() == pytest.approx([2 / 3, 1 / 3]) and table["certainty"].to_list() == pytest.approx([.8, .6])
    assert facts["unlabelled"] == 1 and facts["scored"] == 3 and facts["failed"] == 1 and "answered@95" not in facts
