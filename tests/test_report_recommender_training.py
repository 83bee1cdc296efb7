"""The report on one recommender, run as a user runs it: on films, on noise, on a test log with strangers; and what it stands on."""

import json

import numpy as np
import polars as pl
import pytest

from helpers import page_words
from visrec_nb.core.errors import InputError
from visrec_nb.data.samples import movielens
from visrec_nb.recsys import ALS, EASE, Hybrid, load, protocol, tune
from visrec_nb.recsys.linear import linear_weights, linear_weights_by_users
from visrec_nb.recsys.matrix import to_matrix
from visrec_nb.recsys.models import make_model
from visrec_nb.reports.runner import run_report


@pytest.fixture(scope="module")
def films():
    ratings, movies = movielens()[:2]
    return ratings.filter(pl.col("user_id") <= 250), movies


def noise(users, seed=0):
    "People who choose by chance: there is nothing to learn."
    draw = np.random.default_rng(seed)
    rows = [(f"u{u}", f"i{i}") for u in range(users) for i in draw.choice(300, 25, replace=False)]
    log = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    return log.with_columns(timestamp=pl.Series(draw.permutation(log.height)) * 1000 + 1_500_000_000)


@pytest.mark.slow
def test_a_good_model_is_said_to_be_worth_using(films, tmp_path):
    log, movies = films
    log.write_parquet(tmp_path / "log.parquet"), movies.write_parquet(tmp_path / "movies.parquet")
    given = {"interactions": str(tmp_path / "log.parquet"), "items": str(tmp_path / "movies.parquet"), "weight": "rating",
             "threshold": 3.0, "min_item_events": 3, "bundle": str(tmp_path / "bundle"), "k": 5}
    run = run_report("recommender_training", tmp_path / "report", given)
    found, text = run.metrics, page_words(run)
    assert found["verdict"] == "worth_using" and found["hits_difference_ci_low"] > 0
    assert run.manifest["conclusion"].startswith("This model is worth using. Of 5 suggestions,")
    # the hits once more, by joining tables
    events = log.filter(pl.col("rating") >= 3).filter(pl.len().over("item_id") >= 3)
    events = events.select("user_id", "item_id", "timestamp", weight="rating")
    split = protocol(events, "time_per_user")
    assert found["data"]["events"] == events.height and found["data"]["events_left_out"] == log.height - events.height
    model = make_model("als", 42, **found["settings"]).fit(split.train, items=movies)
    people = split.test["user_id"].unique()
    hits = model.recommend(people, 5).join(split.test, on=["user_id", "item_id"]).height / len(people)
    assert found["hits_als"] == pytest.approx(hits)
    assert found["models"]["als"]["ndcg@5"] > found["models"]["popularity"]["ndcg@5"] > found["models"]["random"]["ndcg@5"]
    assert {f"{n}@5" for n in ("recall", "ndcg", "hit_rate", "mrr", "coverage", "novelty", "diversity")} <= set(found["models"]["als"])
    # the settings are those that were best on validation, and the bundle was trained on everything
    best = max(found["validation"], key=lambda row: row["value"])["settings"]
    assert all(f"{name} {value}" in best for name, value in found["settings"].items()) and "seconds" not in found["validation"][0]
    bundle = load(tmp_path / "bundle")
    assert len(bundle.history.indices) == events.height and bundle.manifest["metrics"] == found["models"]["als"]
    assert bundle.manifest["refit"] and "trained once more on the whole log" in text and "because of" in text
    assert "with a weight of at least 3" in text and load(tmp_path / "bundle").recommend([1], 1)["title"][0] in text
    assert "Every group of people is served better" in text or "is served worse than by popularity" in text
    assert "nan" not in text.split() and "None" not in text.split()


def test_a_model_of_noise_is_no_better(tmp_path):
    noise(600).write_csv(tmp_path / "log.csv")
    given = {"interactions": str(tmp_path / "log.csv"), "model": "item_item", "tune": False, "refit": False, "bundle": str(tmp_path / "b")}
    run = run_report("recommender_training", tmp_path / "report", given)
    text = page_words(run)
    assert run.metrics["verdict"] == "no_better" and "no better than showing everybody what is popular" in text
    assert "too small to matter" in text and run.metrics["settings"] == {} and "usual settings were taken" in text
    assert "served better than by popularity" not in text
    bundle = load(tmp_path / "b")
    assert len(bundle.history.indices) == run.metrics["protocol"]["train_events"] and "the very model that was tested" in text
    assert "a choice of settings (" in text and "training on the whole log (" in text


def test_a_test_log_with_strangers_and_the_same_bytes_twice(films, tmp_path):
    log = films[0].select("user_id", "item_id", "timestamp")
    split = protocol(log.filter(pl.col("user_id") <= 80), "time_per_user")
    test = split.test.select(pl.col("user_id", "item_id").cast(pl.Int64))
    strange = test.head(40).with_columns(user_id=pl.col("user_id") + 100_000)
    later = pl.concat([test, strange, pl.DataFrame({"user_id": [1], "item_id": [99_999_999]})])
    split.train.write_csv(tmp_path / "log.csv"), later.write_csv(tmp_path / "later.csv")
    given = {"interactions": str(tmp_path / "log.csv"), "test_log": str(tmp_path / "later.csv"), "model": "popularity",
             "bundle": str(tmp_path / "b"), "examples": 1}
    runs = [run_report("recommender_training", tmp_path / name, given) for name in ("one", "two")]
    found, text = runs[0].metrics, page_words(runs[0])
    unknown = strange["user_id"].n_unique()
    assert found["protocol"]["unknown_test_users"] == unknown and f"{unknown} of these people were not seen in training" in text
    assert found["by_activity"][0]["items"] == "none" and found["by_activity"][0]["n_users"] == unknown
    assert found["plain"] == "random" and found["verdict"] == "worth_using" and "than chance (between" in text
    assert not found["refit"] and "the very model that was tested" in text
    assert "as it was not asked for: what describes the items" in text
    assert (tmp_path / "one" / "metrics.json").read_bytes() == (tmp_path / "two" / "metrics.json").read_bytes()


@pytest.mark.slow
def test_too_little_data_is_said_to_be_too_little(films, tmp_path):
    log = films[0].filter(pl.col("user_id") <= 12).drop("timestamp")
    log.select("user_id", "item_id").write_csv(tmp_path / "log.csv")
    given = {"interactions": str(tmp_path / "log.csv"), "test": "random_per_user", "bundle": str(tmp_path / "b"), "tune": False}
    run = run_report("recommender_training", tmp_path / "report", given)
    text = page_words(run)
    assert run.metrics["verdict"] == "too_little_data" and "12 people in the test" in text and "The log has no times" in text


@pytest.mark.slow
@pytest.mark.parametrize("given, told", [
    ({"model": "content"}, "needs items, a file with the items' features"),
    ({"items": "other.csv"}, "none of the log's items stands there"),
    ({"threshold": 3.0}, "needs a weight"),
])
def test_wrong_input_is_a_sentence(tmp_path, given, told):
    noise(20).write_csv(tmp_path / "log.csv")
    pl.DataFrame({"item_id": ["x"], "label": ["y"]}).write_csv(tmp_path / "other.csv")
    if "items" in given: given = {"items": str(tmp_path / given["items"])}
    places = {"interactions": str(tmp_path / "log.csv"), "bundle": str(tmp_path / "b")}
    with pytest.raises(InputError, match=told):
        run_report("recommender_training", tmp_path / "r", given | places)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_the_comparison_takes_any_models(films, tmp_path):
    films[0].filter(pl.col("user_id") <= 120).write_parquet(tmp_path / "log.parquet")
    given = {"interactions": str(tmp_path / "log.parquet"), "items": None, "models": "ease,markov", "bundle": str(tmp_path / "b")}
    run = run_report("recommender_comparison", tmp_path / "report", given)
    assert list(run.metrics["models"]) == ["ease", "markov", "popularity"] and run.metrics["new_items"] == {}
    best = max(run.metrics["models"], key=lambda name: run.metrics["models"][name]["ndcg@10"])
    assert run.metrics["taken"] == best != "popularity" and f"{best}_popularity" in run.metrics["differences"]
    assert "training seconds" in page_words(run) and "training_seconds" not in json.dumps(run.metrics)
    assert "as it was not asked for: new items" in page_words(run)


def test_what_tuning_takes_over_changes_no_figure(films):
    log = films[0].filter((pl.col("user_id") <= 60) & (pl.len().over("item_id") >= 20)).select("user_id", "item_id", "timestamp")
    movies = films[1].filter(pl.col("item_id").is_in(log["item_id"].implode()) | (pl.col("item_id") < 50))
    grid = {"dims": [8, 16], "shrink": [0.0, 3.0], "content_weight": [0.5, 1.5]}
    settings = {"als": ALS(8), "columns": {"genres": "list", "year": "year"}}
    _, trials = tune(lambda **tried: Hybrid(**settings, **tried), grid, log, movies)
    for row in trials.to_dicts():
        alone = {name: [row[name]] for name in grid}
        assert tune(lambda **tried: Hybrid(**settings, **tried), alone, log, movies)[1]["ndcg@10"][0] == row["ndcg@10"]


def test_ease_by_users_is_ease_by_items(films):
    log = films[0].filter(pl.col("user_id") <= 40).select("user_id", "item_id")
    matrix = to_matrix(log)
    x, penalty = matrix.to_scipy(), np.linspace(20, 60, matrix.shape[1])
    assert 2 * matrix.shape[0] < matrix.shape[1]
    exact = linear_weights(np.asarray((x.T @ x).todense(), np.float64), penalty)
    assert np.allclose(linear_weights_by_users(x, penalty), exact, atol=1e-6)
    some = pl.DataFrame({"item_id": [*matrix.items.to_list(), 10**7, 10**7 + 1]})
    model, plain = EASE(50.0).fit(log, items=some), EASE(50.0).fit(log)
    assert not model.scorer.rankable[-2:].any() and np.allclose(model.score([1])[:, :-2], plain.score([1]), atol=1e-6)
