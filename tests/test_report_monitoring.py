"""The nightly watch of a classifier and of a recommender: quiet nights are quiet, planted faults are found, and the page says so."""

import json
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageFilter

from helpers import page_words
from visrec_nb.core.errors import CatalogError, InteractionsError, ParameterError
from visrec_nb.core.files import cache_dir, write_json
from visrec_nb.core.seeds import rng
from visrec_nb.data.catalog import write_catalog
from visrec_nb.data.samples import clothing
from visrec_nb.recsys import ItemItem, load
from visrec_nb.recsys.health import _checks, recommender_health, trend
from visrec_nb.recsys.matrix import rows_of
from visrec_nb.reports.monitoring import _with_facts, compare_night, watch_classifier
from visrec_nb.reports.runner import run_report
from visrec_nb.vision.learners import image_learner
from visrec_nb.vision.monitoring import estimate_accuracy, gallery_distance, unknown_share
from visrec_nb.vision.predictor import ClassifierBundle

STORE = cache_dir("embeddings")
CLASSES = ["dress", "hat", "longsleeve", "pants", "shirt"]


@pytest.fixture(scope="module")
def photos():
    "Of five classes 40 for training, 20 for validation, and the rest dealt to the test and to what comes in."
    draw, parts = rng(0, "monitoring photos"), []
    for label in CLASSES:
        part = clothing().filter(label=label).sort("item_id")
        split = (["train"] * 40 + ["valid"] * 20 + ["test", None] * len(part))[: len(part)] # None: what comes in
        parts.append(part[draw.permutation(len(part))].with_columns(split=pl.Series(split)))
    return pl.concat(parts)


def incoming(photos): return photos.filter(pl.col("split").is_null()).drop("split")


def known_part(photos): return photos.filter(pl.col("split").is_not_null())


@pytest.fixture(scope="module")
def model(photos, tmp_path_factory):
    learn = image_learner(known_part(photos), store=STORE).fit_head(folds=3)
    learn.to_bundle(path := tmp_path_factory.mktemp("bundle") / "photos")
    return ClassifierBundle(path)


@pytest.fixture(scope="module")
def everything(photos, model):
    "All photos that were not trained on, as one table with what is known of each; their probabilities, class numbers and embeddings."
    test = model.evaluate(photos.filter(pl.col("split").is_null() | (pl.col("split") == "test")), None, STORE)
    gallery = model.embed(photos.filter(split="train"), STORE).features
    table = _with_facts(model, test.catalog.drop("split"), test.probs, gallery_distance(test.features, gallery))
    return table, test.probs, test.targets, test.features


def spoil(catalog, folder):
    "The same photos, darker and blurred."
    paths = []
    for i, path in enumerate(catalog["path"]):
        with Image.open(path) as image: dim = image.convert("RGB").filter(ImageFilter.GaussianBlur(2)).point(lambda v: v // 2)
        dim.save(folder / f"{i}.jpg", quality=90)
        paths.append(str(folder / f"{i}.jpg"))
    return catalog.with_columns(path=pl.Series(paths)).drop("sha256")


@pytest.mark.slow
def test_quiet_nights_raise_an_alarm_in_at_most_5_of_100(everything):
    table, probs, targets, vectors = everything
    alarms, within, unknown, errors = 0, 0, 0, []
    for k in range(40):
        order = rng(k, "deal").permutation(len(table))
        a, b = order[: len(order) // 2], order[len(order) // 2:]
        found = compare_night(table[a], table[b], vectors[a, 0], vectors[b, 0], seed=k, rounds=499)
        alarms += (found["drift"] != "none").any()
        estimate, true = estimate_accuracy(probs[a], targets[a], probs[b]), (probs[b].argmax(1) == targets[b]).mean()
        errors.append(estimate["estimated_accuracy"] - true)
        within += estimate["estimated_accuracy_ci_low"] <= true <= estimate["estimated_accuracy_ci_high"]
        distance = table["distance"].to_numpy()
        unknown += unknown_share(distance[a], distance[b], k, 100)["unknown_share_ci_low"] > 0
    assert alarms <= 2 and unknown <= 3
    assert within >= 34 and np.sqrt(np.mean(np.square(errors))) < 0.05


def test_the_estimated_accuracy_follows_the_true_one(everything):
    "Harder and easier parts of what came in: thirds by how sure the model is, and single classes."
    table, probs, targets, _ = everything
    order = rng(0, "estimate").permutation(len(table))
    old, new = order[::2], order[1::2]
    sure = probs[new].max(1)
    parts = [new[np.argsort(sure)[start:start + len(new) // 3]] for start in (0, len(new) // 3, 2 * len(new) // 3)]
    parts += [new[targets[new] != k] for k in range(len(CLASSES))]
    estimated = np.array([estimate_accuracy(probs[old], targets[old], probs[p])["estimated_accuracy"] for p in parts])
    true = np.array([(probs[p].argmax(1) == targets[p]).mean() for p in parts])
    assert np.corrcoef(estimated, true)[0, 1] > 0.9 and np.abs(estimated - true).max() < 0.1


def test_labels_given_only_where_the_model_was_unsure_are_no_test_of_it(everything):
    table, probs, _, vectors = everything
    old, new = np.arange(0, len(table), 2), np.arange(1, len(table), 2)
    unsure = pl.Series(probs[new].max(1) < np.quantile(probs[new].max(1), 0.4))
    asked = table[new].with_columns(label=pl.when(unsure).then("label"))
    found = compare_night(table[old], asked, vectors[old, 0], vectors[new, 0], rounds=49)
    assert not {"accuracy", "label"} & set(found["column"])
    drawn = table[new].with_columns(label=pl.when(pl.int_range(len(new)) % 3 == 0).then("label"))
    found = compare_night(table[old], drawn, vectors[old, 0], vectors[new, 0], rounds=49)
    assert {"accuracy", "label"} <= set(found["column"])


@pytest.mark.slow
def test_planted_changes_are_found(photos, model, tmp_path):
    reference, new = known_part(photos), incoming(photos).drop("label")

    def watch(current): return watch_classifier(model, reference, current, store=STORE, spoiled=0)
    def drifted(night): return set(night.drift.filter(pl.col("drift") != "none")["column"])
    quiet = watch(new)
    assert drifted(quiet) == set()
    assert {"brightness", "sharpness", "pictures"} <= drifted(watch(spoil(new, tmp_path)))
    no_pants = watch(incoming(photos).filter(pl.col("label") != "pants").drop("label"))
    assert "answer" in drifted(no_pants) and no_pants.mix.filter(label="pants")["share"].item() < 0.03
    shoes = clothing().filter(label="shoes").head(30).drop("label", "split")
    strange = watch(pl.concat([new, shoes], how="diagonal"))
    share = 30 / (30 + new.height)
    assert strange.metrics["unknown"] == 1 and 0.5 * share < strange.metrics["unknown_share"] < 1.5 * share
    far = set(strange.items.filter("far")["item_id"])
    assert len(far & set(shoes["item_id"])) >= 25
    assert strange.metrics["estimated_accuracy_ci_low"] < quiet.metrics["estimated_accuracy_ci_low"]


def test_wrong_requests_are_told_in_a_sentence(photos, model, tmp_path):
    reference, new = known_part(photos), incoming(photos).head(4)
    with pytest.raises(ParameterError, match="no column 'hour'"): watch_classifier(model, reference, new, time="hour", store=STORE)
    words = new.with_columns(day=pl.lit("last week"))
    with pytest.raises(ParameterError, match="'day' holds no dates"): watch_classifier(model, reference, words, time="day", store=STORE)
    with pytest.raises(CatalogError, match="no items of split 'exam'"): watch_classifier(model, reference, new, "exam", store=STORE)
    lost = new.with_columns(path=pl.lit(str(tmp_path)) + "/no" + pl.col("item_id") + ".jpg").drop("sha256")
    with pytest.raises(CatalogError, match="none of the 4 files"): watch_classifier(model, reference, lost, store=STORE)
    few = watch_classifier(model, reference, new, store=STORE, spoiled=0)
    assert few.drift.is_empty() and few.metrics["drifted"] == 0 and few.metrics["items"] == 4


@pytest.mark.slow
def test_the_report_of_a_bad_night(photos, model, tmp_path):
    write_catalog(known_part(photos), tmp_path / "reference.parquet")
    (tmp_path / "files").mkdir()
    bad = spoil(incoming(photos), tmp_path / "files")
    row = pl.int_range(pl.len())
    wrong = pl.col("label").replace_strict(CLASSES, [*CLASSES[1:], CLASSES[0]])
    label = pl.when(row % 3 == 0).then("label").when(row % 3 == 1).then(wrong)
    bad = bad.with_columns(label=label, day=pl.lit("2026-11-0") + (1 + row // 40).cast(pl.String))
    for path in bad["path"][:3]: (tmp_path / "files" / path.rpartition("/")[2]).write_bytes(b"\xff\xd8\xff torn")
    write_catalog(bad, tmp_path / "bad.parquet")
    given = {"bundle": str(model.path), "reference": str(tmp_path / "reference.parquet"), "current": str(tmp_path / "bad.parquet")}
    run = run_report("monitoring", tmp_path / "report", given | {"time": "day", "spoiled": 10})
    text = page_words(run)
    assert run.manifest["conclusion"].startswith("The model has become worse.") and "brightness" in run.manifest["conclusion"]
    assert run.metrics["accuracy_fell"] == run.metrics["drifted"] == 1 and run.metrics["unreadable"] == 3
    assert "3 files could not be read" in text and "By day" in text and "nan" not in text.split()
    items = pl.read_parquet(run.folder / "items.parquet")
    known = items.filter(pl.col("label").is_not_null())
    assert run.metrics["accuracy"] == (known["answer"] == known["label"]).mean() and run.metrics["labelled"] == known.height


@pytest.mark.slow
def test_the_report_of_a_quiet_night(photos, model, tmp_path):
    "What came in is a folder without labels; the reference has no training part; the same inputs give the same bytes."
    write_catalog(photos.filter(split="test").drop("split"), tmp_path / "reference.parquet")
    (tmp_path / "in").mkdir()
    for path in incoming(photos)["path"]: (tmp_path / "in" / path.rpartition("/")[2]).symlink_to(path)
    given = {"bundle": str(model.path), "reference": str(tmp_path / "reference.parquet"), "current": str(tmp_path / "in"), "spoiled": 0}
    run = run_report("monitoring", tmp_path / "report", given)
    again = watch_classifier(model, given["reference"], given["current"], store=STORE, spoiled=0, seed=42)
    write_json(tmp_path / "again.json", again.metrics)
    assert (run.folder / "metrics.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    text = page_words(run)
    assert run.manifest["conclusion"].startswith("Nothing needs to be done.") and "Nothing: the next night's run looks again." in text
    assert "The reference holds no part train" in text
    assert "not asked for or not given: the course over time ( time ), spoiled photos ( spoiled ), the accuracy on labelled items" in text
    assert run.metrics["drifted"] == 0 and "accuracy" not in run.metrics


CUT = datetime(2026, 4, 13, tzinfo=UTC) # after 14 weeks


def made_log(weeks=20, users=120, items=400, seed=0, taste_shift=None, new_ids=None, silent=None):
    "People of several tastes who choose three films in most weeks."
    draw = rng(seed, "health log")
    kind, taste = draw.integers(0, 6, items), draw.dirichlet(np.full(6, 0.25), users)
    appeal, rows = draw.pareto(1.5, items) + 0.3, []
    for week in range(weeks):
        if week == silent: continue
        if week == taste_shift: taste, appeal = draw.dirichlet(np.full(6, 0.25), users), draw.permutation(appeal)
        for user in np.flatnonzero(draw.random(users) < 0.7):
            p = taste[user][kind] * appeal
            new = 1000 * (new_ids is not None and week >= new_ids)
            chosen = draw.choice(items, 3, replace=False, p=p / p.sum()) + new
            rows += [(user, item, week * 604800 + draw.integers(604800)) for item in chosen]
    frame = pl.DataFrame(rows, ["user_id", "item_id", "t"], orient="row").sort("t")
    return frame.select("user_id", "item_id", (pl.lit(datetime(2026, 1, 5, tzinfo=UTC)) + pl.duration(seconds="t")).alias("timestamp"))


def trained(log): return ItemItem("bm25").fit(log.filter(pl.col("timestamp") < CUT))


def test_weeks_in_another_order_raise_an_alarm_in_at_most_5_of_100():
    "Were all weeks alike, each order of them would be as likely."
    alarms, deals = 0, 0
    for seed in range(4):
        log = made_log(seed=seed)
        found, draw = recommender_health(trained(log), log), rng(seed, "orders")
        who = rows_of(found.per_user["user_id"], found.per_user["user_id"].unique(maintain_order=True))
        for _ in range(40):
            order = draw.permutation(found.periods.height)
            values = found.per_user.with_columns(number=pl.Series(order[found.per_user["number"].to_numpy()]))
            line = trend(values["number"].to_numpy(), who, values["ndcg"].to_numpy())
            gain = {"relative_gain": 1.0, "p_value": draw.random()} # training again does not help: any p value is as likely
            alarms += (_checks(found.periods, values, line, gain, "week", len(order) - 1)["severity"] != "ok").any()
            deals += 1
    assert alarms <= 0.05 * deals


def test_faults_of_a_log_are_told_apart():
    broken = {"ids": made_log(new_ids=19), "silent": made_log(silent=17)}
    found = {name: recommender_health(trained(log), log) for name, log in broken.items()}
    assert {name: h.checks["check"][0] for name, h in found.items()} == {"ids": "lost_items", "silent": "silence"}
    assert all(h.metrics["broken"] == 1 and h.metrics["retrain"] == 0 for h in found.values())
    other = made_log(taste_shift=15)
    shifted = recommender_health(trained(other), other)
    assert "fall" in shifted.checks.filter(severity="warning")["check"] and shifted.metrics["retrain"] == 1
    early = made_log(taste_shift=9)
    early = recommender_health(ItemItem("bm25").fit(early.filter(pl.col("timestamp") < datetime(2026, 2, 16, tzinfo=UTC))), early)
    assert "decay" in early.checks.filter(severity="warning")["check"]
    assert early.metrics["ndcg@10_change_ci_high"] < 0 < early.metrics["retraining_gain_ci_low"]
    log = made_log()
    well = recommender_health(trained(log), log)
    assert well.metrics["broken"] == well.metrics["retrain"] == 0
    last_week = pl.col("timestamp") >= datetime(2026, 5, 18, tzinfo=UTC)
    renamed = log.with_columns(user_id=pl.when(last_week).then(pl.col("user_id") + 5000).otherwise("user_id"))
    users = recommender_health(trained(log), renamed)
    assert users.checks["check"][0] == "lost_users"
    stopped = recommender_health(trained(log), log, until=datetime(2026, 6, 9, tzinfo=UTC))
    assert stopped.metrics["broken"] == 1 and stopped.checks["message"][0].startswith("no events in the week of 2026-05-25")
    before = log.filter(pl.col("timestamp") < CUT)
    with pytest.raises(InteractionsError, match="nothing to watch yet"): recommender_health(trained(log), before)
    with pytest.raises(InteractionsError, match="timestamp"): recommender_health(trained(log), log.drop("timestamp"))


def test_known_shares_are_those_of_a_count_by_hand(tmp_path):
    log = made_log(seed=5)
    model = load(trained(log).to_bundle(tmp_path / "bundle"))
    found, train = recommender_health(model, log), log.filter(pl.col("timestamp") < CUT)
    week = log.filter(pl.col("timestamp") >= found.periods["period"][3], pl.col("timestamp") < found.periods["ends"][3])
    assert found.periods["known_event_share"][3] == pytest.approx(week["item_id"].is_in(train["item_id"].unique().implode()).mean())
    new = set(week["user_id"]) - set(train["user_id"])
    assert found.periods["new_user_share"][3] == pytest.approx(len(new) / week["user_id"].n_unique())
    hits, users = 0, 0
    for user in sorted(set(week["user_id"]) & set(train["user_id"])): # each list by hand: what was seen before the week is left out
        before = set(log.filter(pl.col("user_id") == user, pl.col("timestamp") < week["timestamp"].min())["item_id"])
        wanted = set(week.filter(pl.col("user_id") == user)["item_id"]) - before
        if not wanted: continue
        users += 1
        hits += bool(wanted & set(model.recommend([user], 10, block=list(before))["item_id"]))
    assert found.periods["measured_users"][3] == users and found.periods["hit_rate@10"][3] == pytest.approx(hits / users)


@pytest.mark.slow
def test_the_report_of_a_recommender(tmp_path):
    for name, log in {"well": made_log(), "ids": made_log(new_ids=19)}.items():
        log.write_parquet(tmp_path / f"{name}.parquet")
        trained(log).to_bundle(tmp_path / "bundle" / name)
    def run(name, **more):
        given = {"bundle": str(tmp_path / "bundle" / name), "interactions": str(tmp_path / f"{name}.parquet")}
        return run_report("recommender_monitoring", tmp_path / "out" / name, given | more)
    well, ids = run("well"), run("ids", until="2026-05-24")
    text = page_words(well)
    assert well.manifest["conclusion"].startswith("The recommender is healthy.") and "Nothing: the next run looks again." in text
    assert "a log that has stopped is not noticed" in text and "a log that has stopped" not in page_words(ids)
    assert ids.manifest["conclusion"].startswith("Something is broken. Events of items that the model knows went from")
    assert ids.metrics["known_event_share"] == 0 and ids.metrics["broken"] == 1 and "Compare some item ids" in page_words(ids)
    assert {"ndcg@10", "ndcg@10_ci_low", "known_event_share", "new_user_share", "coverage@10"} <= set(well.metrics)
    assert json.loads((well.folder / "metrics.json").read_text())["ndcg@10"] == well.metrics["ndcg@10"]
