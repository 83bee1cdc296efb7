"Ranking metrics against loops in plain Python, scikit-learn, SciPy and what RecTools and LensKit said; protocols against planted leaks."
import json
import math
import warnings
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats
from sklearn import metrics as skm

from visrec_nb.core.errors import DataWarning, InputError
from visrec_nb.core.stats import adjust_p, bootstrap_interval, mean_interval, ratio_interval, resampled_sums, sign_flip_test
from visrec_nb.data.samples import movielens
from visrec_nb.recsys import metrics as m
from visrec_nb.recsys.base import Recommender
from visrec_nb.recsys.evaluation import category_shares, compare, evaluate, paired_tests, user_metrics
from visrec_nb.recsys.item_item import ItemItem
from visrec_nb.recsys.popularity import Popularity, Random
from visrec_nb.recsys.protocols import (
    PROTOCOLS, compare_protocol, describe, draw_negatives, official, protocol, run_protocol, sampled_ranks, with_negatives,
)
from visrec_nb.recsys.scorers import ConstantScorer

# Metrics


def test_peers_said_the_same():
    kept = json.loads((Path(__file__).parent / "ranking_peers.json").read_text())
    d = {name: np.array(value) for name, value in kept["inputs"].items()}
    n_items, people, n, k = int(d["n_items"]), len(np.unique(d["prev_users"])), np.diff(d["indptr"]), d["lists"].shape[1]
    counts, ours = np.bincount(d["prev_items"], minlength=n_items), {}
    for prefix, lists in (("", d["lists"]), ("short_", d["short"])):
        hit = m.hits(lists, d["indptr"], d["indices"])
        ours |= {prefix + name.partition("@")[0]: value for name, value in m.ranking_metrics(hit, n, k).items()}
        ours |= {f"{prefix}novelty": m.novelty(lists, counts, people), f"{prefix}mean_count": people * m.popularity(lists, counts, people)}
    lists = d["lists"]
    ours |= {"serendipity": m.serendipity(lists, m.hits(lists, d["indptr"], d["indices"]), counts), "gini": m.gini(lists, n_items),
             "coverage": m.coverage(lists, n_items), "diversity": m.diversity(lists, d["features"]),
             "recall_capped": ours["recall"] * n / np.minimum(n, k)}
    ends = np.arange(0, d["wanted"].size + 1, d["wanted"].shape[1])
    ranks, candidates = m.target_ranks(-np.argsort(d["order"], 1).astype(float), ends, d["wanted"].ravel())
    ours["auc"] = m.auc(ranks, ends, candidates)
    for peer, names in (("rectools", 19), ("lenskit", 7)):
        said = kept["peers"][peer]["values"]
        assert len(said) == names
        for name, value in said.items(): assert np.abs(np.array(value) - ours[name]).max() < 1e-9, (peer, name)


def made(seed, users=40, items=30, k=12):
    "Lists, some of them short or empty, test sets with unknown items, item counts with zeros, histories."
    d = np.random.default_rng(seed)
    lists = d.random((users, items)).argsort(1)[:, :k]
    lists = np.where(np.arange(k) < d.integers(0, k + 1, users)[:, None], lists, -1)
    n = d.integers(1, 2 * k, users)
    tests = [np.append(d.choice(items, x - (x > 3), replace=False), [-1] * int(x > 3)).astype(int) for x in n]
    histories = [d.choice(items, d.integers(0, 9), replace=False) for _ in range(users)]
    return lists, tests, histories, d.integers(0, 20, items), d.normal(size=(items, 5)), d.random((items, 4)) * (d.random((items, 1)) > 0.2)


def slow(row, test, k, counts, people, features, history, categories):
    "One user's metrics, as the definitions read."
    row, wanted = [i for i in row if i >= 0], {i for i in test if i >= 0}
    found = [i in wanted for i in row]
    gains = [1 / math.log2(r + 2) for r in range(k)]
    precisions = sum(sum(found[:r + 1]) / (r + 1) for r in range(len(row)) if found[r])
    out = {f"recall@{k}": sum(found) / len(test), f"precision@{k}": sum(found) / k, f"hit_rate@{k}": float(any(found)),
           f"mrr@{k}": 1 / (found.index(True) + 1) if any(found) else 0, f"map@{k}": precisions / len(test),
           f"map_capped@{k}": precisions / min(k, len(test)),
           f"ndcg@{k}": sum(g for g, f in zip(gains, found, strict=False) if f) / sum(gains[:min(k, len(test))])}
    levels = sorted(set(counts), reverse=True)
    place = {i: levels.index(counts[i]) + 1 if counts[i] else len(counts) + 1 for i in row}
    out["serendipity"] = sum(max((len(counts) - r) / len(counts) - (len(counts) + 1 - place[i]) / len(counts), 0)
                             for r, i in enumerate(row) if found[r]) / k
    out["novelty"] = np.mean([-math.log2(max(counts[i], 0.5) / people) for i in row]) if row else math.nan
    out["popularity"] = np.mean([counts[i] / people for i in row]) if row else math.nan
    pairs = [1 - features[i] @ features[j] / np.linalg.norm(features[i]) / np.linalg.norm(features[j]) for i in row for j in row if i < j]
    out["diversity"] = np.mean(pairs) if pairs else math.nan
    p, q = (sum((categories[i] for i in part), np.zeros(4)) for part in (history, row))
    out["miscalibration"] = stats.entropy(p, 0.99 * q / q.sum() + 0.01 * p / p.sum()) if p.sum() and q.sum() else math.nan
    return out


@pytest.mark.parametrize("seed", range(4))
def test_every_metric_as_its_definition_reads(seed):
    lists, tests, histories, counts, features, categories = made(seed)
    users, k = lists.shape
    indptr = np.cumsum([0, *map(len, tests)])
    hit = m.hits(lists, indptr, np.concatenate(tests))
    found = m.ranking_metrics(hit, np.diff(indptr), k)
    past = np.cumsum([0, *map(len, histories)]), np.concatenate(histories)
    found |= {"serendipity": m.serendipity(lists, hit, counts), "novelty": m.novelty(lists, counts, 20),
              "popularity": m.popularity(lists, counts, 20), "diversity": m.diversity(lists, features),
              "miscalibration": m.miscalibration(lists, *past, np.ones(len(past[1])), categories)}
    truth = [slow(lists[u], tests[u], k, counts, 20, features, histories[u], categories) for u in range(users)]
    for name, value in found.items(): np.testing.assert_allclose(value, [t[name] for t in truth], rtol=0, atol=1e-9, err_msg=name)
    shown = np.bincount(lists[lists >= 0], minlength=30)
    assert m.coverage(lists, 30) == (shown > 0).mean()
    assert m.gini(lists, 30) == pytest.approx(np.abs(shown[:, None] - shown).sum() / (2 * 30**2 * shown.mean()), abs=1e-12)
    shorter = m.ranking_metrics(hit[:, :5], np.diff(indptr), 5)
    assert all(np.allclose(m.ranking_metrics(hit, np.diff(indptr), 5)[name], value) for name, value in shorter.items())


def test_map_both_ways_by_hand():
    hit = np.array([[1, 0, 1, 0]], bool) # 1/1 + 2/3
    found = m.ranking_metrics(hit, np.array([10]), 4)
    assert found["map@4"][0] == pytest.approx((1 + 2 / 3) / 10) and found["map_capped@4"][0] == pytest.approx((1 + 2 / 3) / 4)
    full = m.ranking_metrics(np.ones((1, 4), bool), np.array([10]), 4)
    assert full["map_capped@4"] == full["ndcg@4"] == 1 and full["map@4"] == pytest.approx(0.4)


def test_as_scikit_learn():
    d = np.random.default_rng(5)
    truth, scores = d.random((60, 40)) < 0.15, d.random((60, 40))
    truth[:, 0] = True
    order, n = np.argsort(-scores, 1), truth.sum(1)
    found = m.ranking_metrics(np.take_along_axis(truth, order, 1), n, 40)
    np.testing.assert_allclose(found["map@40"], [skm.average_precision_score(t, s) for t, s in zip(truth, scores, strict=True)], atol=1e-12)
    np.testing.assert_allclose(found["ndcg@40"], [skm.ndcg_score([t], [s]) for t, s in zip(truth, scores, strict=True)], atol=1e-12)
    ends, ties = np.concatenate([[0], n.cumsum()]), scores.round(1)
    hidden = (d.random((60, 40)) < 0.3) & ~truth # seen before: no candidates
    ranks, candidates = m.target_ranks(np.where(hidden, np.nan, ties), ends, np.nonzero(truth)[1])
    slow_auc = [skm.roc_auc_score(t[~h], s[~h]) for t, s, h in zip(truth, ties, hidden, strict=True)]
    np.testing.assert_allclose(m.auc(ranks, ends, candidates), slow_auc, atol=1e-12)
    slow_ranks = [stats.rankdata(-s[~h])[t[~h]] for t, s, h in zip(truth, ties, hidden, strict=True)]
    np.testing.assert_allclose(ranks, np.concatenate(slow_ranks))


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(InputError, match="without test items"): m.ranking_metrics(np.zeros((1, 3), bool), np.array([0]), 3)
    with pytest.raises(InputError, match="not among the candidates"):
        m.target_ranks(np.array([[np.nan, 1.]]), np.array([0, 1]), np.array([0]))
    assert np.isnan(m.auc(np.array([1., 2]), np.array([0, 2]), np.array([2]))) # nothing else to rank
    assert m.gini(np.full((2, 3), -1), 9) == m.coverage(np.full((2, 3), -1), 9) == 0
    assert all(math.isnan(x) for x in m.popularity_lift(np.array([0.1]), np.array([math.nan])))
    model = Popularity().fit(LOG)
    with pytest.raises(InputError, match="at least 1"): evaluate(model, TEST, k=0)
    with pytest.raises(InputError, match="no events"): evaluate(model, TEST.clear())
    with pytest.raises(InputError, match="no such column"): category_shares(pl.DataFrame({"item_id": ["a"]}), "genre", model.items)
    with pytest.raises(InputError, match="a column of `items`"): compare({"p": Popularity()}, LOG, TEST, categories="genre")


# Intervals and tests


def test_one_resampling_serves_all():
    d = np.random.default_rng(0)
    table = d.normal(size=(157, 3))
    table[:, 2] = np.abs(table[:, 2])
    means = resampled_sums(table, seed=4) / 157
    for c in range(3):
        np.testing.assert_allclose(np.quantile(means[:, c], [0.025, 0.975]), mean_interval(table[:, c], 4), rtol=1e-12)
    slow_ratio = bootstrap_interval(157, lambda rows: table[rows, 0].sum() / table[rows, 2].sum(), 4)
    assert ratio_interval(table[:, 0], table[:, 2], 4) == pytest.approx(slow_ratio, rel=1e-12)


@pytest.mark.parametrize("n", [3, 7, 12])
def test_sign_flips_as_scipy(n):
    d = np.random.default_rng(n).normal(0.4, 1, n).round(1)
    said = stats.permutation_test((d, np.zeros(n)), lambda a, b: (a - b).mean(), permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(d) == pytest.approx(said.pvalue, abs=1e-12)


def test_p_values_keep_their_promise():
    d, wrong, plain = np.random.default_rng(1), 0, 0
    for i in range(200): # five models that are all alike
        per_user = {name: {"ndcg@10": d.beta(0.5, 2, 60)} for name in "abcde"}
        found = paired_tests(per_user, against="a", seed=i, rounds=400)
        wrong, plain = wrong + (found["p_holm"] < 0.05).any(), plain + (found["p_value"] < 0.05).sum()
    assert wrong <= 17 and 20 <= plain <= 62 # 10 of 200 and 40 of 800 expected
    assert adjust_p(np.array([0.01, 0.02, 0.03, 0.5])) == pytest.approx([0.04, 0.06, 0.06, 0.5])
    with pytest.raises(InputError, match="no such model"): paired_tests(per_user, against="z")
    with pytest.raises(InputError, match="different users"): paired_tests({"a": {"x": np.ones(2)}, "b": {"x": np.ones(3)}}, "x")


# Protocols

LOG = pl.DataFrame({"user_id": [1, 1, 2, 2, 3, 3, 4], "item_id": list("abacabd")})
TEST = pl.DataFrame({"user_id": [1, 2, 9], "item_id": ["c", "z", "a"]})


@pytest.fixture(scope="module")
def ratings(): return movielens().ratings.filter(pl.col("user_id") <= 150)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_parts_and_facts(name, ratings):
    split = protocol(ratings, name, seed=3)
    parts = [part.select("user_id", "item_id") for part in (split.train, split.history, split.test) if part is not None]
    assert pl.concat(parts).sort("user_id", "item_id").equals(ratings.select("user_id", "item_id").sort("user_id", "item_id"))
    users, items = (set(pl.concat(parts[:-1])[column]) for column in ("user_id", "item_id"))
    assert split.facts["unknown_test_users"] == len(set(split.test["user_id"]) - users)
    assert split.facts["unknown_test_items"] == len(set(split.test["item_id"]) - items)
    assert split.facts["events_of_unknown_items"] == sum(i not in items for i in split.test["item_id"])
    end = split.train["timestamp"].max()
    late = sum(t < end for t in split.test["timestamp"]) / split.test.height
    assert split.facts["test_before_train_ends"] == pytest.approx(late) and (late == 0) == (name == "global_time")
    assert split.facts["pairs_in_both"] == 0 and not split.facts["sampled"] and json.dumps(split.facts)
    inner = split.validation()
    assert inner.name == name and inner.train.height + inner.test.height <= split.train.height
    assert inner.test.join(split.train, on=["user_id", "item_id"], how="anti").is_empty() # nothing of the test part
    if name in ("random", "random_per_user", "user_holdout", "item_holdout"):
        assert not protocol(ratings, name, seed=4).test.equals(split.test)
    text = describe(split.facts)
    assert ("older than the newest training event" in text) == (name != "global_time")


def test_planted_leaks_are_counted(ratings):
    split = protocol(ratings, "global_time")
    late = split.test.head(7)
    with pytest.warns(DataWarning, match="7 pairs of user and item stand in train and in test"):
        leaky = official(pl.concat([split.train, late]), split.test)
    assert leaky.facts["pairs_in_both"] == 7 and leaky.facts["test_before_train_ends"] > 0
    honest = run_protocol(Popularity(), split)
    assert run_protocol(Popularity(), leaky).metrics["recall@10"] <= honest.metrics["recall@10"] # what is in train is not recommended
    text = pl.DataFrame({"user_id": ["1", "2"], "item_id": ["c", "b"]}) # ids of another type are looked up as the log's
    assert official(LOG, text).facts["unknown_test_users"] == 0
    with pytest.raises(InputError, match="use the same ids"): official(LOG, TEST.with_columns(item_id=pl.lit("q")))
    with pytest.raises(InputError, match="no column 'item_id'"): official(LOG, TEST.drop("item_id"))
    with pytest.raises(InputError, match="the test part has no events"): official(LOG, TEST.clear())
    with pytest.raises(InputError, match="one of global_time"): protocol(ratings, "by_moon")
    with pytest.raises(InputError, match="say how to cut train"): official(LOG, TEST).validation()
    assert official(ratings, ratings.head(0).vstack(ratings.tail(3)).with_columns(user_id=pl.lit(1, ratings["user_id"].dtype))
                    ).validation("random").test.height


class Fixed(Recommender):
    "Given scores by item."
    def __init__(self, scores): self.scores = scores
    def _fit(self, matrix, items): return ConstantScorer(np.array([self.scores.get(i, 0) for i in matrix.items], np.float32))


def test_slices_by_hand():
    split = official(LOG, TEST)
    found = run_protocol(Fixed({"c": 4, "a": 3, "b": 2, "d": 1}), split, k=2, cold_items=1, cold_users=2)
    def one(kind, name): return found.slices.filter(kind=kind, slice=name, metric="recall@2").select("value", "n_users").row(0)
    assert found.metrics["recall@2"] == pytest.approx((1 + 0 + 1) / 3) # c for user 1; z unknown; a for the stranger, by popularity
    assert one("users", "new") == (1, 1) and one("users", "cold") == (0.5, 2) and one("items", "new") == (0, 1) # z
    assert one("items", "cold") == (1, 1) and one("items", "warm") == (1, 1) # c has one user, a three
    assert found.facts["unknown_test_users"] == found.facts["unknown_test_items"] == 1
    pops = np.array([3, 2, 1, 1]) / 4 # a b c d
    taste = found.taste.filter(slice="all").row(0, named=True)
    assert taste["own"] == pytest.approx(np.mean([(pops[0] + pops[1]) / 2, (pops[0] + pops[2]) / 2]))
    assert taste["shown"] == pytest.approx(np.mean([(pops[2] + pops[3]) / 2, (pops[1] + pops[3]) / 2])) # c d, and b d
    assert taste["lift"] == pytest.approx(taste["shown"] / taste["own"] - 1)
    some = user_metrics(found.model, TEST, (1, 2), with_auc=True)[1]
    assert some["auc"].tolist() == pytest.approx([1, 0, 1]) and {"recall@1", "recall@2"} <= set(some) # a before b c d for the stranger


def test_sampled_ranks_as_a_loop(ratings):
    split = protocol(ratings, "leave_last_out")
    drawn = draw_negatives(split, 20, seed=1)
    assert drawn.equals(draw_negatives(split, 20, seed=1)) and not drawn.equals(draw_negatives(split, 20, seed=2))
    model = ItemItem("bm25").fit(split.train)
    ranks = sampled_ranks(model, split.test, drawn)
    row = {item: i for i, item in enumerate(model.items)}
    for (user, item), rank in zip(split.test.select("user_id", "item_id").rows(), ranks, strict=True):
        scores = model.score([user])[0]
        mine = scores[row[item]] if item in row else -np.inf
        other = np.array([scores[row[i]] if i in row else -np.inf for i in drawn.filter(user_id=user)["item_id"]])
        assert rank == 1 + (other > mine).sum() + (other == mine).sum() / 2
    found = run_protocol(model, with_negatives(split, drawn), k=(5, 10), fit=False)
    assert found.metrics["sampled"] and found.metrics["hit_rate@10"] == pytest.approx((ranks < 11).mean())
    assert found.metrics["ndcg@10"] == pytest.approx(np.where(ranks < 11, 1 / np.log2(ranks + 1), 0).mean())
    assert "coverage@10" not in found.metrics
    both = compare_protocol({"popularity": Popularity(), "random": Random()}, with_negatives(split, drawn))[0]
    assert set(both.frame["metric"]) == {"hit_rate@10", "ndcg@10", "mrr@10", "n_users"} and both.tests("ndcg@10")["difference"][0] > 0
    with pytest.raises(InputError, match="none for user"): with_negatives(split, drawn.filter(pl.col("user_id") > 3))
    with pytest.raises(InputError, match="items left to draw"): draw_negatives(split, 10**6)


def test_new_users_are_folded_in(ratings):
    split = protocol(ratings, "user_holdout", seed=1)
    found = run_protocol(ItemItem("bm25"), split, with_auc=True)
    assert set(found.model.sources(found.users)) == {"folded_in"} and found.facts["history_events"] == split.history.height
    model = ItemItem("bm25").fit(split.train).fold_in(split.history)
    again = evaluate(model, split.test, with_auc=True)
    assert all(found.metrics[name] == value for name, value in again.items())
    assert 0.7 < found.metrics["auc"] < 1


def test_several_models_through_one_protocol(ratings):
    movies = movielens().movies
    split = protocol(ratings, "time_per_user")
    models = {"item_item": ItemItem("bm25"), "popularity": Popularity(), "random": Random()}
    both, results = compare_protocol(models, split, (10, 20), movies, categories="genres")
    plain = compare(models, split.train, split.test, movies, (10, 20), categories="genres")
    assert both.metrics == plain.metrics == {name: r.metrics for name, r in results.items()}
    tested = both.tests("ndcg@10", against="random")
    assert tested["p_holm"].max() < 0.001 and tested["ci_low"].min() > 0 and tested["model"].to_list() == ["item_item", "popularity"]
    assert both.metrics["popularity"]["gini@10"] > both.metrics["item_item"]["gini@10"] > both.metrics["random"]["gini@10"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        json.dumps({name: r.metrics | r.facts for name, r in results.items()}, allow_nan=False)
    for name in ("recall@20", "ndcg@10", "map@10", "mrr@10", "hit_rate@10", "coverage@10", "novelty@10"): # the names of metrics.json
        assert {name, f"{name}_ci_low", f"{name}_ci_high"} <= set(both.metrics["item_item"])
