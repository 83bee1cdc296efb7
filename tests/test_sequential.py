"Models of what comes next, against counts by hand, torch, and orders planted in logs; factor models trained by gradients."

import json
import subprocess
import sys
import time
from collections import defaultdict
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from visrec_nb.core.errors import InteractionsError, ParameterError
from visrec_nb.core.seeds import rng
from visrec_nb.recsys import ALS, Blend, Markov, Popularity, load
from visrec_nb.recsys.markov import transitions
from visrec_nb.recsys.matrix import to_matrix
from visrec_nb.recsys.sasrec import SASRec, SASRecScorer, forward, last_items, pieces


def random_log(seed, users=20, items=12, events=150):
    draw = rng(seed, "sequential log")
    return pl.DataFrame({"user_id": draw.integers(0, users, events), "item_id": draw.integers(0, items, events),
                         "timestamp": draw.integers(0, 60, events)})


def sequences(log):
    "Each user's items by time, then row; a repeated item stands where it was last."
    found = defaultdict(list)
    for user, item, _ in sorted(log.rows(), key=lambda r: r[2]):
        if item in found[user]: found[user].remove(item)
        found[user].append(item)
    return found


def cues(n, first, seed, answers=True):
    "All cues in a random order, then the answer to the last one: the set of a history tells nothing."
    draw, rows = rng(seed, "cues"), []
    for u in range(first, first + n):
        order = draw.permutation(8)
        rows += [(u, f"cue {k}", t) for t, k in enumerate(order)]
        if answers: rows.append((u, f"answer {order[-1]}", 8))
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def hits(model):
    "Share of new people whose first recommendation is the answer to their last cue."
    asked = cues(200, 1000, 1, answers=False)
    right = asked.filter(timestamp=7).select("user_id", answer=pl.col("item_id").str.replace("cue", "answer"))
    got = model.fold_in(asked.drop("timestamp")).recommend(right["user_id"], k=1).join(right, on="user_id")
    return float((got["item_id"] == got["answer"]).mean())


@pytest.mark.parametrize("seed", range(8))
def test_order_and_counts_against_slow_ones(seed):
    log = random_log(seed)
    slow, matrix = sequences(log), to_matrix(log, ordered=True)
    for row, user in enumerate(matrix.users): assert matrix.items[matrix.row(row)[0]].to_list() == slow[user]
    window, decay = 1 + seed % 4, 0.3 + seed / 20
    expected = np.zeros((len(matrix.items),) * 2)
    place = {item: n for n, item in enumerate(matrix.items)}
    for items in slow.values():
        for n, a in enumerate(items):
            for step, b in enumerate(items[n + 1:n + 1 + window]): expected[place[a], place[b]] += decay ** step
    assert np.allclose(transitions(matrix, window, decay).to_scipy().toarray(), expected)
    shares = np.array([sum(i in s for s in slow.values()) for i in matrix.items])
    probabilities = (expected + 7 * shares / shares.sum()) / (expected.sum(1, keepdims=True) + 7)
    model = Markov(window, decay, 7).fit(log)
    scores = [sum(decay ** p * probabilities[place[i]] for p, i in enumerate(slow[u][::-1][:window])) for u in matrix.users]
    assert np.allclose(model.score(matrix.users), scores, atol=1e-5)
    best = model.recommend([0], k=1, exclude_seen=False)
    assert np.isclose(model.explain(0, best["item_id"][0])["contribution"].sum(), best["score"][0], atol=1e-5)


def test_pieces_cover_every_step_once():
    matrix = to_matrix(random_log(3), ordered=True)
    steps = sorted((a, b) for u in range(len(matrix)) for a, b in pairwise(matrix.row(u)[0]))
    for length in (1, 2, 5, 40):
        found = pieces(matrix, length)
        assert found.shape[1] == length + 1
        assert sorted((a, b) for row in found for a, b in pairwise(row) if a >= 0 and b >= 0) == steps


@pytest.mark.parametrize(("blocks", "heads", "length"), [(1, 1, 4), (2, 2, 9), (3, 4, 16)])
def test_numpy_answers_as_torch(blocks, heads, length):
    torch = pytest.importorskip("torch")
    from visrec_nb.recsys.sasrec import as_arrays, network
    torch.manual_seed(blocks)
    net = network(12, length, 16, blocks, heads, 0.3).eval()
    matrix = to_matrix(random_log(blocks), ordered=True)
    with torch.no_grad():
        for value in net.parameters(): value.add_(torch.randn_like(value) * 0.4)
        expected = net(torch.as_tensor(last_items(matrix, length)))[:, -1].numpy()
    weights = as_arrays(net)
    assert np.abs(forward(weights, last_items(matrix, length), heads) - expected).max() < 1e-5
    scorer = SASRecScorer(heads, np.ones(12), **weights)
    assert np.abs(scorer.encode(matrix) - expected).max() < 1e-5
    assert (scorer.encode(matrix.take(np.array([5, 2])))[0] == scorer.encode(matrix.take(np.array([5])))[0]).all()


def test_only_the_order_tells():
    log = cues(400, 0, 0)
    assert hits(Markov(window=1).fit(log)) > 0.97
    assert hits(ALS(factors=8, regularization=1).fit(log)) < 0.3 and hits(Popularity().fit(log)) < 0.3


def test_sasrec_finds_the_order(tmp_path):
    pytest.importorskip("torch")
    settings = {"dim": 32, "length": 8, "dropout": 0.0, "learning_rate": 1e-2, "epochs": 40, "patience": 8, "batch": 100}
    log = cues(400, 0, 0)
    model = SASRec(**settings).fit(log)
    assert hits(model) > 0.97
    drawn = settings | {"negatives": 48, "batch": 40, "learning_rate": 5e-3, "epochs": 25, "blocks": 1}
    assert hits(SASRec(**drawn).fit(log)) > 0.9
    bundle = model.to_bundle(tmp_path / "sasrec", users=False)
    asked = cues(30, 2000, 5, answers=False).drop("timestamp")
    asked.write_parquet(tmp_path / "asked.parquet")
    code = """
import sys
for name in ("torch", "implicit", "scipy", "sklearn", "fastai"): sys.modules[name] = None
import json, polars as pl
from visrec_nb.recsys import load
asked = pl.read_parquet(sys.argv[2])
print(json.dumps(load(sys.argv[1]).fold_in(asked).recommend(asked["user_id"], k=1)["item_id"].to_list()))
"""
    done = subprocess.run([sys.executable, "-c", code, bundle, tmp_path / "asked.parquet"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == model.fold_in(asked).recommend(asked["user_id"], k=1)["item_id"].to_list()
    with pytest.raises(ParameterError, match="not a sum"): model.explain(0, "cue 1")


@pytest.mark.slow
def test_a_killed_training_goes_on(tmp_path):
    pytest.importorskip("torch")
    log, settings = random_log(2, 60, 30, 1500), {"dim": 16, "length": 20, "epochs": 12, "batch": 8, "patience": 0}
    log.write_parquet(tmp_path / "log.parquet")
    code = "import sys, polars as pl; from visrec_nb.recsys import SASRec\n" \
           f"SASRec(**{settings}, checkpoint=sys.argv[2]).fit(pl.read_parquet(sys.argv[1]))"
    file = tmp_path / "state.safetensors"
    running = subprocess.Popen([sys.executable, "-c", code, tmp_path / "log.parquet", file])
    while not file.exists() and running.poll() is None: time.sleep(0.01)
    running.kill()
    running.wait()
    assert file.exists()                                                                        # it was not done
    again = SASRec(**settings, checkpoint=file).fit(log)
    assert np.allclose(again.score(range(60)), SASRec(**settings).fit(log).score(range(60)), atol=1e-4) and not file.exists()


def test_sasrec_seeds_and_edges():
    pytest.importorskip("torch")
    log, short = random_log(1), {"dim": 8, "length": 6, "epochs": 2, "validation": 5}
    one, same, other = (SASRec(**short, seed=s).fit(log).score(range(20)) for s in (0, 0, 1))
    assert (one == same).all() and (one != other).any()
    assert np.isfinite(SASRec(**short, patience=0).fit(log).score(range(20))).all()
    model = SASRec(**short).fit(log, items=pl.DataFrame({"item_id": range(14)}))
    assert {12, 13}.isdisjoint(model.recommend([0], k=14, exclude_seen=False)["item_id"])          # nobody used them: nothing is known
    assert model.sources([0, 999]) == ["known", "popular"]
    with pytest.raises(InteractionsError, match="two items"): SASRec(**short).fit(log.unique("user_id"))
    with pytest.raises(ParameterError, match="not finite"): SASRec(**short, learning_rate=1e30).fit(log)
    with pytest.raises(ParameterError, match="divide"): SASRec(dim=10, heads=3)


@pytest.mark.parametrize("make", [Markov, lambda: Blend([Markov(), ALS(factors=4)], [1, 0.1])])
def test_the_order_goes_everywhere(make, tmp_path):
    story = pl.DataFrame([(u, f"part {k}", k) for u in range(30) for k in range(5) if (u + k) % 7],
                         schema=["user_id", "item_id", "timestamp"], orient="row")
    shuffled = story.sample(fraction=1, shuffle=True, seed=2)
    model = make().fit(shuffled)
    assert np.allclose(model.score(range(30)), make().fit(story).score(range(30)), atol=1e-4)
    with pytest.raises(InteractionsError, match="timestamp"): make().fit(story.drop("timestamp"))
    back = pl.DataFrame({"user_id": [4, "new", "new"], "item_id": ["part 0", "part 2", "part 1"], "timestamp": [99, 50, 40]}, strict=False)
    for asked in (model.fold_in(back), load(model.to_bundle(tmp_path / "bundle")).fold_in(back)):
        assert asked.recommend([4], k=5, exclude_seen=False)["item_id"][0] == "part 1"           # the newest event counts
        assert asked.recommend(["new"], k=1)["item_id"][0] == "part 3"                          # by time, not by row
    if isinstance(model, Markov):
        grown = make().fit(story.filter(pl.col("timestamp") < 3)).partial_fit(story.filter(pl.col("timestamp") >= 3))
        assert grown.agreement(model, k=2) == 1


def test_gradient_models_beat_popularity_on_blocks():
    pytest.importorskip("implicit")
    from visrec_nb.recsys import BPR, LogisticMF, evaluate
    draw = rng(0, "blocks")
    block = pl.DataFrame([(u, i) for u in range(120) for i in range(90) if u % 3 == i % 3 and draw.random() < 0.5],
                         schema=["user_id", "item_id"], orient="row")
    test = block.filter(pl.Series(draw.random(block.height) < 0.3))
    train = block.join(test, on=["user_id", "item_id"], how="anti")
    plain = evaluate(Popularity().fit(train), test)["recall@10"]
    for model in (BPR(factors=8, iterations=100), LogisticMF(factors=8)):
        assert evaluate(model.fit(train), test)["recall@10"] > 1.8 * plain
        new = train.filter(user_id=0).with_columns(user_id=pl.lit(500))
        assert np.allclose(model.fold_in(new).score([500]), model.score([0]), atol=1e-4)
    with pytest.raises(ParameterError): BPR(learning_rate=0)


def test_popularity_of_segments_and_lately(tmp_path):
    log = pl.DataFrame({"user_id": [1, 1, 2, 3, 3, 4], "item_id": list("abaccd"), "timestamp": [0, 0, 0, 9, 9, 9]}).with_columns(
        pl.from_epoch(pl.col("timestamp") * 86_400))
    people = pl.DataFrame({"user_id": [1, 2, 3, 4, 50, 51], "land": ["x", "x", "y", "y", "y", None]})
    model = Popularity(segments=people, back_off=0).fit(log)
    assert model.recommend([50], k=1)["item_id"][0] == "c" and model.recommend([51], k=1)["item_id"][0] == "a"
    assert model.sources([50, 51, 1, 99]) == ["segment", "popular", "segment", "popular"]
    again = load(model.to_bundle(tmp_path / "segments"))
    assert again.sources([50, 51, 1, 99]) == model.sources([50, 51, 1, 99])
    assert again.recommend([50, 1], k=3).equals(model.recommend([50, 1], k=3))
    filled = dict(zip(model.items, Popularity(segments=people, back_off=6).fit(log).score([50])[0].tolist(), strict=True))
    assert np.allclose([filled[i] for i in "abcd"], np.array([6 * 2 / 5, 6 / 5, 1 + 6 / 5, 1 + 6 / 5]) / 8)      # y has c and d once
    lately = dict(zip("abcd", Popularity(half_life=3).fit(log).score([1])[0][[model.items.index_of(i) for i in "abcd"]], strict=True))
    assert np.isclose(lately["a"] / lately["d"], 2 / 8)
    with pytest.raises(ParameterError): Popularity(by="genres", segments=people)
    with pytest.raises(ParameterError): Popularity(segments=log)
