"""Linear autoencoders, graph filters, blends and two stages against plain linear algebra."""

import numpy as np
import polars as pl
import pytest
from scipy.sparse import random as random_sparse

from visrec_nb.core.errors import ParameterError
from visrec_nb.data.interactions import split_interactions
from visrec_nb.data.samples import movielens
from visrec_nb.recsys import EASE, EDLAE, GFCF, Blend, ItemItem, PolynomialFilter, TwoStage, load
from visrec_nb.recsys.als import ALS
from visrec_nb.recsys.blend import best_weights
from visrec_nb.recsys.evaluation import evaluate, user_metrics
from visrec_nb.recsys.linear import leading_directions, linear_weights, local_part
from visrec_nb.recsys.rerank import hide


@pytest.fixture(scope="module")
def small() -> tuple[pl.DataFrame, np.ndarray]:
    "A made log of 40 users and 25 items, and its matrix with items in the order of a model's rows."
    draw = np.random.default_rng(1)
    log = pl.DataFrame({"user_id": draw.integers(0, 40, 400), "item_id": (25 * draw.random(400) * draw.random(400)).astype(int)}).unique()
    items = EASE().fit(log).items.to_list()
    x = np.zeros((40, len(items)))
    for u, i in log.iter_rows():
        x[u, items.index(i)] = 1
    return log.sort("user_id", "item_id"), x


def every_model() -> dict:
    return {
        "ease": EASE(5),
        "edlae": EDLAE(5, 0.3, user_exponent=0.2, item_exponent=0.1, history_exponent=0.1, popularity_exponent=0.2),
        "large ease": EASE(5, dense_limit=0, rank=5, item_exponent=0.3),
        "gfcf": GFCF(rank=4),
        "polynomial": PolynomialFilter((2, -1), power=0.8, popularity_exponent=0.1),
        "neighbours": ItemItem(neighbours=10),
        "blend": Blend([EASE(5), ALS(4, 5), GFCF(rank=0)], [1, 0.5, 0.3], [0, -0.7, 0.2]),
    }


def unseen(model, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return model._scores(np.arange(len(x)))[x == 0], x == 0


def test_ease_is_the_inverse_of_its_paper(small):
    log, x = small
    p = np.linalg.inv(x.T @ x + 5 * np.eye(x.shape[1]))
    b = -p / np.diag(p)
    np.fill_diagonal(b, 0)
    assert np.allclose(EASE(5).fit(log)._scores(np.arange(40)), x @ b, atol=1e-5)


@pytest.mark.parametrize("dropout", [0, 0.4])
def test_every_column_solves_the_constrained_least_squares(small, dropout):
    log, x = small
    scores = EDLAE(3, dropout).fit(log)._scores(np.arange(40))
    penalty = 3 + dropout / (1 - dropout) * (x**2).sum(0)
    for j in range(x.shape[1]):
        rest = np.arange(x.shape[1]) != j
        stacked = np.vstack([x[:, rest], np.diag(np.sqrt(penalty[rest]))])
        column = np.linalg.lstsq(stacked, np.concatenate([x[:, j], np.zeros(rest.sum())]), rcond=None)[0]
        assert np.allclose(scores[:, j], x[:, rest] @ column, atol=1e-5)


def test_edlae_by_hand():
    "Two users have a and b, one has a alone: XᵀX = [[3, 2], [2, 2]]; p = ½ adds its diagonal: [[7, 2], [2, 5]] with l2 = 1."
    log = pl.DataFrame({"user_id": [0, 0, 1, 1, 2], "item_id": ["a", "b", "a", "b", "a"]})
    model = EDLAE(1, 0.5).fit(log)
    assert model.items.to_list() == ["a", "b"]
    assert np.allclose(model.scorer.weights, [[0, 2 / 7], [2 / 5, 0]])
    assert np.isclose(model.explain(2, "b")["contribution"][0], 2 / 7)


def test_dropout_is_what_training_with_dropped_items_gives(small):
    "The mean over many draws of the log with items dropped, against the closed form without the diagonal's constraint."
    _, x = small
    p, draw = 0.3, np.random.default_rng(0)
    kept = [x * (draw.random(x.shape) >= p) / (1 - p) for _ in range(3000)]
    gram = sum(k.T @ k for k in kept) / len(kept)
    assert np.allclose(gram, x.T @ x + np.diag(p / (1 - p) * (x**2).sum(0)), atol=0.6)


def test_weights_in_single_precision_in_place():
    draw = np.random.default_rng(0)
    x = draw.random((300, 1203)) < 0.05
    gram = (x.T.astype(np.float32) @ x).astype(np.float64)
    exact = linear_weights(gram.copy(), np.full(1203, 20.0))
    assert np.allclose(linear_weights(gram.astype(np.float32), np.full(1203, 20.0)), exact, atol=1e-4)
    p = np.linalg.inv(gram + 20 * np.eye(1203))
    assert np.allclose(exact + np.eye(1203), np.eye(1203) - (p / np.diag(p) - np.eye(1203)), atol=1e-8)


def test_sparse_and_low_rank_is_the_dense_table_when_all_directions_are_kept(small):
    log, x = small
    for model in (EASE, EDLAE):
        settings = {"user_exponent": 0.2, "item_exponent": 0.2, "history_exponent": 0.1, "popularity_exponent": 0.3}
        dense, sparse = model(2, **settings).fit(log), model(2, dense_limit=0, rank=100, **settings).fit(log)
        assert np.allclose(unseen(dense, x)[0], unseen(sparse, x)[0], atol=1e-4)


def test_leading_directions_of_a_larger_matrix():
    matrix = random_sparse(900, 700, 0.01, "csr", np.float32, np.random.default_rng(0), data_rvs=np.ones)
    s, v = leading_directions(matrix, 15, rounds=15)
    exact = np.linalg.svd(matrix.toarray())[1][:15]
    assert np.allclose(s, exact, rtol=0.01) and np.allclose(v.T @ v, np.eye(15), atol=1e-5)
    local = local_part(matrix, 5)
    full = (matrix.T @ matrix).toarray()
    np.fill_diagonal(full, 0)
    strongest = np.sort(full, 1)[:, -5:]
    assert np.allclose(np.sort(local.toarray(), 1)[:, -5:], strongest) and np.diff(local.indptr).max() <= 5


def test_filters_against_dense_algebra(small):
    log, x = small
    du, di = np.maximum(x.sum(1), 1), np.maximum(x.sum(0), 1)
    tilde = x / np.sqrt(np.outer(du, di))
    gram = tilde.T @ tilde
    v = np.linalg.eigh(gram)[1][:, ::-1][:, :4]
    ideal = np.diag(di**-0.5) @ v @ v.T @ np.diag(di**0.5)
    assert np.allclose(unseen(GFCF(rank=4, gain=0.7).fit(log), x)[0], (x @ (gram + 0.7 * ideal))[x == 0], atol=1e-4)
    cube = x @ (3 * gram - 3 * gram @ gram + gram @ gram @ gram)
    assert np.allclose(unseen(PolynomialFilter((3, -3, 1)).fit(log), x)[0], cube[x == 0], atol=1e-4)


@pytest.mark.parametrize("name", every_model())
def test_contributions_add_up_and_a_bundle_keeps_everything(small, name, tmp_path):
    log, _ = small
    model = every_model()[name].fit(log)
    best = model.recommend([3], k=1)
    assert np.isclose(model.explain(3, best["item_id"][0])["contribution"].sum(), best["score"][0], rtol=1e-4)
    again = load(model.to_bundle(tmp_path / "m.bundle"))
    assert np.allclose(again._scores(np.arange(40)), model._scores(np.arange(40)), rtol=1e-5, atol=1e-6)
    alike = [m.similar_items(0).sort("item_id") for m in (again, model)]
    assert alike[0]["item_id"].equals(alike[1]["item_id"]) and np.allclose(alike[0]["score"], alike[1]["score"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", every_model())
def test_a_user_who_is_folded_in_scores_like_one_who_was_there(small, name):
    log, _ = small
    model = every_model()[name].fit(log)
    guest = model.fold_in(log.filter(pl.col("user_id") == 3).with_columns(pl.lit(99).cast(pl.Int64).alias("user_id")))
    assert np.allclose(guest.score([99]), model.score([3]), rtol=1e-4, atol=1e-5)


def test_a_blend_of_one_is_its_part_and_weights_are_chosen(small):
    log, _ = small
    part, blend = EASE(5).fit(log), Blend([EASE(5), GFCF(rank=0)], [1, 0]).fit(log)
    assert (part.lists(range(40), 5)[0] == blend.lists(range(40), 5)[0]).mean() > 0.99
    train, valid = split_interactions(log, "random_per_user", 0.2, 0)
    weights, activity, trials = best_weights(Blend([EASE(5), GFCF(rank=0)]).fit(train), valid)
    chosen = user_metrics(Blend([EASE(5), GFCF(rank=0)], weights, activity).fit(train), valid)[1]["ndcg@10"].mean()
    assert np.isclose(chosen, trials["ndcg@10"].max(), atol=1e-6)


def test_a_part_counts_less_for_the_busy(small):
    log, x = small
    length = x.sum(1)
    blend, parts = Blend([EASE(5), GFCF(rank=3)], [1, 2], [0, -1]).fit(log), [EASE(5).fit(log), GFCF(rank=3).fit(log)]
    scores = [m._scores(np.arange(40)) for m in parts]
    weight = 2 * np.median(length) / length[:, None]
    by_hand = scores[0] / scores[0].std(1, keepdims=True) + weight * scores[1] / scores[1].std(1, keepdims=True)
    assert np.allclose(blend._scores(np.arange(40)), by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda **k: EASE(5, **k), lambda **k: GFCF(rank=3, **k), lambda **k: PolynomialFilter((2, -1), **k)])
def test_weights_that_count_in_histories_alone(small, make):
    log, _ = small
    draw = np.random.default_rng(0)
    heavy = log.with_columns(pl.Series("weight", draw.random(log.height) + 0.1))
    alike, weighted = make().fit(log), make(weighted=False).fit(heavy)
    table = alike.scorer.score(weighted.history, alike.scorer.encode(weighted.history))
    assert np.allclose(weighted._scores(np.arange(40)), table, rtol=1e-4, atol=1e-5)
    assert not np.allclose(make().fit(heavy)._scores(np.arange(40)), table, rtol=1e-2, atol=1e-3)


def test_fewer_directions_come_near_the_dense_table():
    log = movielens()[0].filter(pl.len().over("item_id") >= 25)
    dense, few = EASE(200).fit(log), EASE(200, dense_limit=0, rank=150).fit(log)
    assert dense.agreement(few) > 0.8


def test_an_item_without_events_is_not_recommended(small):
    log, _ = small
    for name, model in every_model().items():
        scores = model.fit(log, items=pl.DataFrame({"item_id": [*range(25), 999]})).score([3])
        assert scores[0, -1] == -np.inf, name


def test_two_stages(tmp_path):
    log = movielens()[0].filter(pl.len().over("item_id") >= 25)
    train, test = split_interactions(log, "random_per_user", 0.2, 0)
    models = [PolynomialFilter(power=1.2, user_exponent=0.25), EASE(100)]
    model = TwoStage(models, candidates=60, trees=40).fit(train)
    assert evaluate(model, test, k=20)["recall@20"] > 0.9 * evaluate(models[0].fit(train), test, k=20)["recall@20"]
    again = load(model.to_bundle(tmp_path / "m.bundle"))
    asked = log["user_id"].unique().sort().head(20).to_list()
    assert (again.lists(asked)[0] == model.lists(asked)[0]).all()
    guest = model.fold_in(train.filter(pl.col("user_id") == asked[0]).with_columns(pl.lit(10**6).cast(pl.Int64).alias("user_id")))
    assert np.allclose(guest.score([10**6]), model.score(asked[:1]), atol=1e-4)
    best = model.recommend(asked[:1], k=1)
    assert np.isclose(model.explain(asked[0], best["item_id"][0])["contribution"].sum(), best["score"][0], rtol=1e-4)
    everything = model.lists(asked[:3], k=len(model.items))[0]
    assert (everything[:, :60] == model.lists(asked[:3], k=60)[0]).all()
    rest, gone = hide(model.history, 0.2, 0)
    assert rest.to_scipy().multiply(gone.to_scipy()).nnz == 0 and len(rest.indices) + len(gone.indices) == train.height


@pytest.mark.parametrize("make", [lambda: EASE(0), lambda: EDLAE(1, 1), lambda: EASE(1, rank=0), lambda: GFCF(rank=-1), lambda: Blend([]),
                                  lambda: PolynomialFilter(()), lambda: Blend([EASE()], [1, 2]), lambda: TwoStage([EASE()], table=1),
                                  lambda: TwoStage([GFCF()], hidden=1.0), lambda: TwoStage([EASE()]).fit(movielens()[0].head(200))])
def test_settings_that_make_no_sense(make):
    with pytest.raises(ParameterError):
        make()
