"What recommenders answer to input that is odd, empty or wrong."
import numpy as np
import polars as pl
import pytest

from visrec_nb.core.errors import InputError, InteractionsError, ParameterError
from visrec_nb.recsys import ALS, EASE, EDLAE, GFCF, Blend, Content, Hybrid, ItemItem, PolynomialFilter, Popularity, load

FILMS = pl.DataFrame({"item_id": [f"i{n}" for n in range(12)], "title": [f"Film {n}" for n in range(12)],
                      "genres": [["Drama"] if n % 2 else ["Comedy"] for n in range(12)]})
draw = np.random.default_rng(0)
LOG = pl.DataFrame([(f"u{u}", f"i{i}") for u in range(20) for i in range(10) if (u + i) % 2 == 0 and draw.random() < 0.8],
                   schema=["user_id", "item_id"], orient="row")
MODELS = {"popularity": Popularity, "als": lambda: ALS(4, 1, iterations=3), "item_item": ItemItem, "ease": lambda: EASE(1),
          "edlae": lambda: EDLAE(1), "gfcf": GFCF, "polynomial": PolynomialFilter, "content": lambda: Content(dims=4),
          "hybrid": lambda: Hybrid(ALS(4, 1, iterations=3), dims=4), "blend": lambda: Blend([EASE(1), ItemItem()])}

@pytest.fixture(scope="module", params=MODELS)
def model(request): return MODELS[request.param]().fit(LOG, items=FILMS)

def test_unknown_users_get_what_is_popular_and_it_says_so(model, tmp_path):
    popular = LOG["item_id"].value_counts().sort("count", "item_id", descending=[True, False])["item_id"].to_list()
    for one in (model, load(model.to_bundle(tmp_path/"b"))):
        table = one.recommend(["nobody", None, 7], k=3)
        assert set(table["source"]) == {"popular"} and table.group_by("user_id").len()["len"].to_list() == [3] * 3
        assert table.filter(user_id="nobody")["item_id"].to_list() == popular[:3]
        with pytest.raises(ParameterError, match="nobody"): one.explain("nobody", "i0")
        with pytest.raises(ParameterError, match="nothing is known"): one.similar_users("nobody")

def test_unknown_items_are_told(model):
    for ask in (lambda: model.similar_items("i99"), lambda: model.explain("u0", "i99"), lambda: model.recommend(["u0"], allow=["i99"])):
        with pytest.raises(ParameterError): ask()
    assert model.recommend(["u0"], k=3, block=["i99"]).equals(model.recommend(["u0"], k=3))
    assert model.recommend(["u0"], k=3, allow={"u0": ["i99"]}).is_empty()
    assert model.score_pairs(pl.DataFrame({"user_id": ["u0"], "item_id": ["i99"]}))["score"].to_list() == [None]
    assert model.fold_in(pl.DataFrame({"user_id": ["new", "new"], "item_id": ["i99", "i1"]})).ignored == 1

def test_an_empty_history_is_popularity(model):
    wider = model.fold_in(pl.DataFrame({"user_id": ["new"], "item_id": ["i99"]}))
    assert wider.sources(["new"]) == ["popular"] and wider.recommend(["new"], k=3).height == 3
    nothing = model.fold_in(LOG.clear())
    assert nothing.ignored == 0 and nothing.recommend(None, k=2).equals(model.recommend(None, k=2))
    assert model.recommend([], k=3).is_empty() and model.recommend(["u0"], k=3, allow=None, block=[]).height == 3

def test_more_than_the_catalogue_gives_what_there_is(model):
    table = model.recommend(["u0", "nobody"], k=1000)
    assert table.filter(user_id="nobody").height == 12
    seen = LOG.filter(user_id="u0").height
    assert 0 < table.filter(user_id="u0").height <= 12 - seen
    assert table.filter(user_id="u0")["item_id"].n_unique() == table.filter(user_id="u0").height
    assert model.recommend(["u0"], k=1000, exclude_seen=False).height >= table.filter(user_id="u0").height

@pytest.mark.parametrize("name", MODELS)
def test_a_log_with_one_user(name):
    "Fits, and answers with what it has; or says in one sentence what it lacks."
    log = LOG.filter(user_id="u0")
    try: model = MODELS[name]().fit(log, items=FILMS)
    except InputError as e:
        assert len(str(e)) > 20
        return
    table = model.recommend(["u0", "nobody"], k=3)
    assert table["score"].is_finite().all() and not set(table.filter(user_id="u0")["item_id"]) & set(log["item_id"])
    assert table.filter(user_id="nobody").height == 3

@pytest.mark.parametrize("name", MODELS)
def test_weights_of_zero(name):
    with pytest.raises(InteractionsError, match="every weight in the log is 0"):
        MODELS[name]().fit(LOG.with_columns(weight=0.0), items=FILMS)
    with pytest.raises(InteractionsError, match="empty"): MODELS[name]().fit(LOG.clear(), items=FILMS)
    one = LOG.with_columns(weight=pl.when(pl.col("user_id") == "u0").then(0.0).when(pl.col("item_id") == "i3").then(0.0).otherwise(1.0))
    table = MODELS[name]().fit(one, items=FILMS).recommend(["u0", "u1"], k=3)
    assert table["score"].is_finite().all() and table.filter(user_id="u1").height > 0

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_weights_that_are_not_numbers_are_refused(bad):
    weights = [1.0] * LOG.height
    weights[4] = bad
    with pytest.raises(InteractionsError, match=r"weight.*row 5"): ALS(4).fit(LOG.with_columns(weight=pl.Series(weights, dtype=pl.Float64)))

@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_missing_ids_are_refused(column):
    ids = LOG[column].to_list()
    ids[2] = None
    with pytest.raises(InteractionsError, match=rf"{column}.*row 3"): Popularity().fit(LOG.with_columns(pl.Series(column, ids)))
    with pytest.raises(InteractionsError, match=f"no column '{column}'"): Popularity().fit(LOG.drop(column))

def test_embeddings_of_other_items_than_the_log():
    "Items with an embedding but without events or a row in the catalog are left out; items without an embedding are not scored by content."
    ids = [f"i{n}" for n in range(8)] + ["only in the embeddings"]
    embeddings = (ids, np.random.default_rng(0).normal(size=(9, 5)))
    for make in (lambda: Content(embeddings, {}), lambda: Hybrid(ALS(4, 1, iterations=3), item_embeddings=embeddings, columns={})):
        model = make().fit(LOG)
        assert sorted(model.items) == [f"i{n}" for n in range(10)]
        assert model.recommend(["u0"], k=20)["score"].is_finite().all()
    shown = Content(embeddings, {}).fit(LOG).recommend(["u0"], k=20, exclude_seen=False)["item_id"].to_list()
    assert "i8" not in shown and "i9" not in shown                                # no embedding: content is silent
    alone = Hybrid(ALS(4, 1, iterations=3), item_embeddings=embeddings, columns={}).fit(LOG)
    assert {"i8", "i9"} <= set(alone.recommend(["u0"], k=20, exclude_seen=False)["item_id"])                # but it has events
    with pytest.raises(ParameterError): Content((["x", "y"], np.ones((2, 3))), {}).fit(LOG)
    wider = Hybrid(ALS(4, 1, iterations=3), item_embeddings=embeddings, columns={}).fit(LOG, items=pl.DataFrame({"item_id": ids}))
    assert "only in the embeddings" in wider.recommend(["u0"], k=20)["item_id"].to_list()

def test_embeddings_that_are_not_numbers_are_refused():
    values = np.random.default_rng(0).normal(size=(12, 5))
    values[3, 2] = np.nan
    for make in (lambda e: Content(e, {}), lambda e: Hybrid(ALS(4, 1, iterations=3), item_embeddings=e, columns={})):
        with pytest.raises(ParameterError, match="NaN"): make((FILMS["item_id"], values)).fit(LOG)

def test_ids_of_another_type_are_the_same_ids():
    numbers = LOG.select(pl.col("user_id").str.slice(1).cast(pl.Int64), pl.col("item_id").str.slice(1).cast(pl.Int64))
    model = ALS(4, 1, iterations=3).fit(numbers)
    assert model.recommend(["0", "3"], k=2)["item_id"].equals(model.recommend([0, 3], k=2)["item_id"])
    assert model.recommend([0], k=3, block={"0": ["3", "5"]}).equals(model.recommend([0], k=3, block=[3, 5]))
