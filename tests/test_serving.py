"What is shown: filters that count right, lists for everybody, re-ranking, exploration, explanations."
import os
import warnings
from datetime import date, timedelta

import numpy as np
import polars as pl
import pytest

from visrec_nb.core.errors import ParameterError
from visrec_nb.data.samples import movielens
from visrec_nb.recsys import (
    ALS,
    EASE,
    EDLAE,
    GFCF,
    Blend,
    Content,
    Hybrid,
    ItemItem,
    PolynomialFilter,
    Popularity,
    epsilon_greedy,
    load,
    off_policy_metrics,
    plackett_luce,
    rerank_candidates,
    shown_policy,
    thompson,
)

STRANGER, NOBODY, TWIN = 10**9, 10**9 + 1, 10**9 + 2

def small_als(): return ALS(8, 5, iterations=4)

LINEAR = {
    "als": small_als, "cosine": ItemItem, "tfidf": lambda: ItemItem("tfidf"), "bm25": lambda: ItemItem("bm25"),
    "ease": lambda: EASE(100), "edlae": lambda: EDLAE(100), "gfcf": GFCF, "polynomial": PolynomialFilter,
    "content": lambda: Content(dims=16), "hybrid": lambda: Hybrid(small_als(), dims=16), "blend": lambda: Blend([EASE(100), small_als()]),
}

@pytest.fixture(scope="module")
def data():
    log, films = movielens()[:2]
    users = log["user_id"].unique().sort()[:150]
    log = log.filter(pl.col("user_id").is_in(users.implode())).filter(pl.len().over("item_id") >= 5)
    log = log.select(pl.col("user_id", "item_id").cast(pl.Int64))
    return log, films.with_columns(pl.col("item_id").cast(pl.Int64)).filter(pl.col("item_id").is_in(log["item_id"].unique().implode()))

@pytest.fixture(scope="module")
def models(data):
    log, films = data
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=DeprecationWarning)
        return {name: make().fit(log, items=films) for name, make in LINEAR.items()}

def by_hand(model, user, k, allowed, seen):
    "The list of one user: every score, what is not allowed struck out, sorted."
    scores = model.score([user])[0].astype(float)
    ids = model.items.to_list()
    order = sorted((-s, n) for n, s in enumerate(scores) if s > -np.inf and ids[n] in allowed and ids[n] not in seen)
    return [ids[n] for _, n in order[:k]], [-s for s, _ in order[:k]]

@pytest.mark.parametrize("name", ["als", "cosine", "ease", "gfcf", "content", "hybrid", "blend"])
def test_filters_leave_k_results_whenever_enough_items_are_left(data, models, name):
    "implicit#736: as many results as asked for, none of them filtered out, whoever is filtered how."
    model, log = models[name], data[0]
    draw, users = np.random.default_rng(0), log["user_id"].unique().sort()[:12].to_list() + [STRANGER]
    items = model.items.to_list()
    block = {u: draw.choice(items, int(draw.integers(0, 200)), replace=False).tolist() for u in users[::2]}
    allow = {users[1]: draw.choice(items, 40, replace=False).tolist(), STRANGER: items[5:9], NOBODY: items[:3]}
    for blocked, allowed in ((items[:30], None), (block, None), (block, allow), (None, items[10:200]), (pl.DataFrame(
            {"user_id": [u for u, x in block.items() for _ in x], "item_id": [i for x in block.values() for i in x]}), allow)):
        table = model.recommend(users, k=7, allow=allowed, block=blocked)
        for user in users:
            gone = set(blocked) if isinstance(blocked, list) else set(block.get(user, [])) if blocked is not None else set()
            may = set(allowed) if isinstance(allowed, list) else set((allowed or {}).get(user, items))
            seen = set(log.filter(user_id=user)["item_id"])
            ids, scores = by_hand(model, user, 7, may - gone, seen)
            mine = table.filter(user_id=user)
            assert len(mine) == len(ids) and np.allclose(mine["score"], scores, atol=1e-4)
            assert set(mine["item_id"]) <= may - gone - seen and mine["rank"].to_list() == list(range(1, len(ids) + 1))

def test_all_lists_at_once_are_those_of_implicit(data):
    "The same factors and filters: the same items, up to ties, by block and by the longest first."
    from implicit.cpu.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    from visrec_nb.recsys.matrix import best_products
    model = ALS(16, 5, iterations=4).fit(movielens()[0])
    bare = AlternatingLeastSquares(factors=16)
    bare.user_factors, bare.item_factors, h = model.vectors, model.scorer.factors, model.history
    with threadpool_limits(1, "blas"):
        items, scores = bare.recommend(np.arange(len(h)), h.to_scipy(), N=10, filter_already_liked_items=True)
    lists, values = model.lists(h.users, 10)
    assert np.allclose(values, scores, atol=1e-5) and (lists == items).mean() > 0.999
    whole, products = best_products(model.vectors, model.scorer.factors, 10, prune=False)
    quick, same = best_products(model.vectors, model.scorer.factors, 10, cells=200_000)
    assert np.allclose(products, same, atol=1e-5) and (whole == quick).mean() > 0.999

def test_lists_for_everybody_go_to_a_file(data, models, tmp_path, monkeypatch):
    model, path = models["als"], tmp_path/"lists.parquet"
    assert model.recommend_all(5, out=path)["users"].sum() == len(model.history)
    assert pl.read_parquet(path).equals(model.recommend_all(5))
    before, calls, real = path.read_bytes(), [], type(model).recommend
    def broken(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(self, *args, **kwargs)
    monkeypatch.setattr(type(model), "recommend", broken)
    with pytest.raises(KeyboardInterrupt): model.recommend_all(5, out=path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["lists.parquet"]

@pytest.mark.parametrize("name", LINEAR)
def test_contributions_add_up_to_the_score(data, models, name, tmp_path):
    model = models[name]
    for user in model.history.users[:3]:
        top = model.recommend([user], k=2)
        for item, score in zip(top["item_id"], top["score"], strict=True):
            why = model.explain(user, item)
            assert why["item_id"].null_count() == 0, "every part of the score belongs to an item of the history"
            assert np.isclose(why["contribution"].sum(), score, rtol=1e-3, atol=1e-4)
            assert set(why["item_id"]) == set(data[0].filter(user_id=user)["item_id"])
    again = load(model.to_bundle(tmp_path/name))
    assert again.explain(user, item).equals(why)

@pytest.mark.parametrize("name", ["als", "cosine", "ease", "gfcf", "content", "hybrid"])
def test_similar_users(data, models, name):
    "A twin is the most similar; and the figures are cosines."
    model, log = models[name], data[0]
    user = model.history.users[3]
    wider = model.fold_in(log.filter(user_id=user).with_columns(user_id=pl.lit(TWIN)))
    table = wider.similar_users(user, 5)
    assert table["user_id"][0] == TWIN and np.isclose(table["score"][0], 1, atol=1e-4) and user not in table["user_id"].to_list()
    assert np.isclose(wider.similar_users(TWIN, 1)["score"][0], 1, atol=1e-4) and wider.similar_users(TWIN, 1)["user_id"][0] == user
    x = model.history.to_scipy().toarray() if model.vectors is None else model.vectors
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    assert np.allclose(model.similar_users(user, 5)["score"], np.sort(np.delete(x @ x[3], 3))[::-1][:5], atol=1e-4)

def test_scores_of_pairs(data, models):
    log = data[0]
    for model in (models["als"], models["cosine"]):
        odd = pl.DataFrame({"user_id": [STRANGER, log["user_id"][0]], "item_id": [log["item_id"][0], -5]}, schema=log.schema)
        pairs = pl.concat([log.sample(50, seed=0), odd])
        scored = model.score_pairs(pairs)
        assert scored["score"].null_count() == 1 and scored["score"][-1] is None
        for user, item, score in scored.head(51).iter_rows():
            assert np.isclose(score, model.score([user])[0, model.items.index_of(item)], atol=1e-5)

# Re-ranking

def made(seed, users=6, c=12):
    draw = np.random.default_rng(seed)
    score = -np.sort(-draw.normal(size=(users, c)), axis=1)
    table = pl.DataFrame({"user_id": np.repeat(np.arange(users), c), "rank": np.tile(np.arange(1, c + 1), users),
                          "item_id": np.concatenate([draw.permutation(30)[:c] for _ in range(users)]), "score": score.ravel()})
    genres = [draw.choice(list("xyz"), int(draw.integers(1, 3)), replace=False).tolist() for _ in range(30)]
    days = [date(2026, 1, 1) - timedelta(int(d)) for d in draw.integers(0, 100, 30)]
    films = pl.DataFrame({"item_id": range(30), "genre": genres, "day": days})
    return table, films, draw.normal(size=(30, 4)), draw

def relevance(rows):
    s = rows["score"].to_numpy()
    return dict(zip(rows["item_id"], (s - s.min()) / (s.max() - s.min()), strict=True))

@pytest.mark.parametrize("seed", range(3))
def test_mmr_is_its_formula(seed):
    table, _, looks, _ = made(seed)
    got, unit = rerank_candidates(table, 5, vectors=(range(30), looks), trade_off=0.4), looks / np.linalg.norm(looks, axis=1, keepdims=True)
    for (user,), rows in table.group_by("user_id"):
        value, out = relevance(rows), []
        for _ in range(5):
            def worth(i, out=out, value=value): return 0.6 * value[i] - 0.4 * max((unit[i] @ unit[j] for j in out), default=0)
            out.append(max((i for i in value if i not in out), key=worth))
        assert got.filter(user_id=user)["item_id"].to_list() == out

@pytest.mark.parametrize("seed", range(3))
def test_calibration_is_its_formula(seed):
    table, films, _, draw = made(seed)
    history = pl.DataFrame({"user_id": draw.integers(0, 5, 40), "item_id": draw.integers(0, 30, 40), "weight": draw.random(40) + 0.1})
    share = {i: {g: 1 / len(x) for g in x} for i, x in films.select("item_id", "genre").iter_rows()}
    got = rerank_candidates(table, 5, films, categories="genre", history=history, trade_off=0.5)
    for (user,), rows in table.group_by("user_id"):
        value, out = relevance(rows), []
        p = {g: sum(w * share[i].get(g, 0) for _, i, w in history.filter(user_id=user).iter_rows()) for g in "xyz"}
        p = {g: v / max(sum(p.values()), 1e-12) for g, v in p.items()}
        for _ in range(5):
            def worth(i, out=out, p=p, value=value):
                q = {g: sum(share[j].get(g, 0) for j in [*out, i]) / (len(out) + 1) for g in "xyz"}
                return 0.5 * value[i] - 0.5 * sum(p[g] * np.log(p[g] / (0.99 * q[g] + 0.01 * p[g])) for g in "xyz" if p[g] > 0)
            out.append(max((i for i in value if i not in out), key=worth))
        assert got.filter(user_id=user)["item_id"].to_list() == out

def test_everything_together_keeps_its_promises():
    table, films, looks, _ = made(9, users=40)
    genre = dict(films.select("item_id", "genre").iter_rows())
    got = rerank_candidates(table, 6, films, pinned={2: 29}, max_per={"genre": 3}, fresh="day", half_life=20, vectors=(range(30), looks))
    for (_,), rows in got.group_by("user_id"):
        ids = rows.sort("rank")["item_id"].to_list()
        assert ids[1] == 29 and len(set(ids)) == len(ids)
        counts = {g: sum(g in genre[i] for i in ids) for g in "xyz"}
        assert max(counts.values()) <= 3
        left = set(table.filter(user_id=rows["user_id"][0])["item_id"]) - set(ids)
        assert len(ids) == 6 or not any(all(counts[g] < 3 for g in genre[i]) for i in left), "short only where no candidate may follow"

def test_freshness_by_hand():
    films = pl.DataFrame({"item_id": [1, 2, 3], "day": [date(2026, 1, 1), date(2025, 12, 2), date(2025, 11, 2)]})
    table = pl.DataFrame({"user_id": [0] * 3, "rank": [1, 2, 3], "item_id": [3, 2, 1], "score": [1.0, 0.9, 0.0]})
    gains = {w: rerank_candidates(table, 3, films, fresh="day", half_life=30, fresh_weight=w)["item_id"].to_list() for w in (0, 0.5, 1.5)}
    assert gains == {0: [3, 2, 1], 0.5: [2, 3, 1], 1.5: [2, 1, 3]}       # 1 + w/4, 0.9 + w/2, 0 + w
    later = rerank_candidates(table, 3, films, fresh="day", half_life=30, fresh_weight=1.5, today=date(2027, 1, 1))
    assert later["item_id"].to_list() == [3, 2, 1]

# Exploration

@pytest.mark.parametrize("by_rank", [True, False])
def test_ips_recovers_what_another_list_would_have_got(by_rank):
    "From a log of explored lists alone, whatever way they were explored."
    draw = np.random.default_rng(1)
    taste = 1 / (1 + np.exp(2 - draw.normal(size=(800, 3)) @ draw.normal(size=(3, 20))))
    model = ALS(4, 5, iterations=5).fit(pl.DataFrame(np.argwhere(draw.random((800, 20)) < taste), schema=["user_id", "item_id"]))
    best = model.recommend(range(800), 10, exclude_seen=False)
    other = best.filter(pl.col("rank").is_between(2, 4)).with_columns(pl.col("rank") - 1)               # not what was mostly shown
    truth = taste[other["user_id"], other["item_id"]].mean()
    ways = {"epsilon_greedy": lambda s: epsilon_greedy(best, 5 if not by_rank else 3, 0.5, by_rank, seed=s),
            "plackett_luce": lambda s: plackett_luce(best, 5 if not by_rank else 3, 0.5, 100, by_rank, seed=s),
            "thompson": lambda s: thompson(model, range(800), 5 if not by_rank else 3, 10, 3.0, 200, by_rank, seed=s, exclude_seen=False)}
    for name, way in ways.items():
        if by_rank and name == "epsilon_greedy": continue                        # shows the best list's items at their own places only
        log = pl.concat([way(s) for s in range(3)])
        log = log.with_columns(reward=(draw.random(log.height) < taste[log["user_id"], log["item_id"]]).astype(float))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = off_policy_metrics(log, shown_policy(other, by_rank), slots=1 if by_rank else 5)
        scale = 1 if by_rank else 3 / 5                                          # the other list is 3 long, 5 were shown
        assert found["ips_ci_low"] < truth * scale < found["ips_ci_high"], name
        assert abs(found["mean_weight"] - scale) < 0.1 * scale, name

def test_exploration_refuses_what_it_cannot_do(models):
    with pytest.raises(ParameterError, match="no posterior"): thompson(models["ease"], None)
    some = models["als"].recommend(models["als"].history.users[:2], 5)
    for wrong in (lambda: epsilon_greedy(some, 6), lambda: epsilon_greedy(some, 2, 1.5), lambda: plackett_luce(some, 2, 0)):
        with pytest.raises(ParameterError): wrong()

def test_thompson_from_a_bundle_and_for_a_stranger(models, tmp_path):
    again = load(models["als"].to_bundle(tmp_path/"als"))
    users = [*models["als"].history.users[:3], STRANGER]
    assert thompson(again, users, 4, seed=3).equals(thompson(models["als"], users, 4, seed=3))
    assert thompson(again, users, 4).group_by("user_id").len()["len"].to_list() == [4] * 4

def test_approximate_search_finds_nearly_all(data, models):
    pytest.importorskip("faiss")
    from visrec_nb.recsys import ItemIndex
    index, users = ItemIndex(models["als"], probes=10**6), models["als"].history.users
    assert index.recall(users, 10) == 1
    assert np.allclose(index.lists(users[:9], 10)[1], models["als"].lists(users[:9], 10)[1], atol=1e-5)
    with pytest.raises(ParameterError, match="not products"): ItemIndex(Popularity().fit(data[0]))
