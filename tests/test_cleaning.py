"Cleaning on real embeddings, the command of a user who knows the truth; and a log of decisions that outlives its process."

import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest

from visrec_nb.core.seeds import rng
from visrec_nb.data.catalog import read_catalog
from visrec_nb.data.cleaning import Cleaning, apply_cleaning, cleaning_candidates, read_decisions
from visrec_nb.data.labels import label_issues, outliers

SHARE = 0.05


@pytest.fixture(scope="module")
def planted(clothing_vectors):
    "The photos with 5 % wrong labels, the catalog as it was, and what the checks say."
    right, vectors = clothing_vectors
    labels, draw = sorted(right["label"].unique()), rng(3, "planted labels")
    new = right["label"].to_list()
    for i in draw.choice(len(right), round(SHARE * len(right)), replace=False):
        new[i] = draw.choice([label for label in labels if label != new[i]])
    wrong = right.with_columns(label=pl.Series(new))
    return right, wrong, cleaning_candidates(wrong, label_issues(wrong, vectors), None, outliers(wrong, vectors))


def wrong_labels(catalog, right):
    truth = dict(right.select("item_id", "label").rows())
    return sum(truth[item] != label for item, label in catalog.select("item_id", "label").rows())


def test_a_user_who_knows_the_truth_repairs_most_labels(planted):
    right, wrong, candidates = planted
    n, truth = round(SHARE * len(right)), dict(right.select("item_id", "label").rows())
    assert wrong_labels(wrong, right) == n
    state = Cleaning(wrong)
    looked_at = candidates.head(2 * n)
    for item, label in looked_at.select("item_id", "label").rows():
        if truth[item] == label:
            state.decide(item, "keep")
        else:
            state.decide(item, "relabel", truth[item])
    cleaned = apply_cleaning(wrong, state, test=True)
    assert wrong_labels(cleaned.catalog, right) <= 0.25 * n  # a tenth of the photos was looked at
    assert cleaned.counts["relabelled"] == n - wrong_labels(cleaned.catalog, right)
    untouched = apply_cleaning(wrong, state).catalog.filter(split="test")
    assert untouched.equals(wrong.filter(split="test"))
    assert state.progress(candidates)["left"] == len(candidates) - len(looked_at)


def test_following_the_suggestions_alone_makes_the_labels_better(planted):
    right, wrong, candidates = planted
    state = Cleaning(wrong)
    sure = candidates.filter(pl.col("suggested_label").is_not_null()).head(40)
    for item, label in sure.select("item_id", "suggested_label").rows():
        state.decide(item, "relabel", label)
    assert wrong_labels(apply_cleaning(wrong, state, test=True).catalog, right) <= wrong_labels(wrong, right) - 20


DECIDE = """
import sys
import polars as pl
from visrec_nb.data.cleaning import Cleaning
state = Cleaning(pl.DataFrame({"path": [f"{i}.jpg" for i in range(200)], "label": ["a", "b"] * 100}))
for i in range(200):
    state.decide(f"{i}.jpg", "relabel", "b").save(sys.argv[1])
    print(i, flush=True)
"""


@pytest.mark.parametrize("name", ["log.json", "log.parquet"])
def test_a_killed_process_leaves_a_whole_log(tmp_path, name):
    "Whatever the moment, the file holds every decision that was saved before it."
    path = tmp_path / name
    with subprocess.Popen([sys.executable, "-c", DECIDE, str(path)], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(5):
            process.stdout.readline()
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        saved = 5 + len(process.stdout.read().splitlines())
    log = read_decisions(path)
    assert saved <= len(log) <= saved + 1
    assert log["item_id"].to_list() == [f"{i}.jpg" for i in range(len(log))]
    catalog = read_catalog(pl.DataFrame({"path": [f"{i}.jpg" for i in range(200)], "label": ["a", "b"] * 100}))
    again = Cleaning.load(path, catalog)
    again.decide("199.jpg", "leave_out").save(path)  # the next process goes on, and sweeps what the first left aside
    assert len(read_decisions(path)) == len(log) + 1 and [p.name for p in tmp_path.iterdir()] == [name]


def test_decisions_follow_the_item_through_any_order(tmp_path):
    "A widget that remembers rows loses its edits when the list is sorted or filtered; this one does not."
    draw = rng(0, "orders")
    catalog = read_catalog(pl.DataFrame({"path": [f"{i}.jpg" for i in range(50)], "label": [f"c{i % 5}" for i in range(50)]}))
    state, wanted = Cleaning(catalog), dict(catalog.select("item_id", "label").rows())
    for _ in range(30):
        shown = catalog[draw.permutation(50).tolist()].head(int(draw.integers(1, 50)))
        item, label = shown["item_id"][0], f"c{draw.integers(5)}"
        state.decide(item, "relabel", label)
        wanted[item] = label
        state.save(tmp_path / "log.parquet")
        state = Cleaning.load(tmp_path / "log.parquet", catalog[draw.permutation(50).tolist()])
    cleaned = apply_cleaning(catalog[draw.permutation(50).tolist()], tmp_path / "log.parquet").catalog
    assert dict(cleaned.select("item_id", "label").rows()) == wanted
