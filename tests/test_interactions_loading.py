"Reading logs: policies, weights, minimum counts and pieces against slow, independent implementations; memory in fresh processes."

import json
import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from visrec_nb.core.errors import DataWarning, InteractionsError, ParameterError
from visrec_nb.core.seeds import rng
from visrec_nb.data.interactions import k_core, merge_duplicates, read_interactions, split_interactions
from visrec_nb.recsys import ALS, Popularity
from visrec_nb.recsys.matrix import from_events, rows_of, to_matrix


def random_log(seed, n=120, kind="int", weight=True, timestamp=True):
    draw = rng(seed, "loading")
    named = {"int": lambda x: int(x) * 1_000_003, "negative": lambda x: int(x) - 5, "text": lambda x: f"id {x}",
             "uuid": lambda x: str(uuid.UUID(int=int(x)))}[kind]
    log = {"user_id": [named(x) for x in draw.integers(0, 12, n)], "item_id": [named(x) for x in draw.integers(0, 9, n)]}
    if weight: log["weight"] = draw.integers(0, 6, n).astype(float)
    if timestamp: log["timestamp"] = [datetime.fromtimestamp(int(t), UTC) for t in draw.integers(1e9, 1e9 + 90, n)]
    return pl.DataFrame(log)


def slow_merge(log, how):
    "A dictionary, row by row."
    found = {}
    for place, row in enumerate(log.rows(named=True)):
        found.setdefault((row["user_id"], row["item_id"]), []).append((row.get("timestamp"), place, row.get("weight", 1.0)))
    out = []
    for (user, item), events in found.items():
        weights = [e[2] for e in events]
        last = max(events, key=lambda e: (e[0] or 0, e[1]) if e[0] is None else (e[0], e[1]))[2]
        weight = {"sum": sum(weights), "max": max(weights), "last": last, "count": float(len(events))}[how]
        out.append((user, item, weight, *([max(e[0] for e in events)] if events[0][0] else [])))
    return out


@pytest.mark.parametrize("how", ["sum", "max", "last", "count"])
@pytest.mark.parametrize("kind", ["int", "negative", "text", "uuid"])
def test_duplicates_against_a_dictionary(how, kind):
    for seed, (weight, timestamp) in enumerate([(True, True), (True, False), (False, True), (False, False)]):
        log = random_log(seed, kind=kind, weight=weight, timestamp=timestamp)
        merged = read_interactions(log, duplicates=how)
        expected = slow_merge(log, how)
        assert merged.rows() == expected
        assert merge_duplicates(merged, "error").rows() == expected
    with pytest.warns(DataWarning, match="repeat an earlier user and item"): assert read_interactions(log).height == len(expected)
    with pytest.raises(InteractionsError, match=r"events that repeat .* first in row"): read_interactions(log, duplicates="error")
    assert read_interactions(log, duplicates="keep").height == log.height


def slow_core(log, users, items):
    while True:
        counts = [log[c].to_list() for c in ("user_id", "item_id")]
        kept = [u for u, (a, b) in enumerate(zip(*counts, strict=True)) if counts[0].count(a) >= users and counts[1].count(b) >= items]
        if len(kept) == log.height: return log
        log = log[kept]


@pytest.mark.parametrize("seed", range(12))
def test_k_core_against_a_loop(seed):
    log = random_log(seed, 40 + 5 * seed, ["int", "text"][seed % 2]).unique(["user_id", "item_id"], maintain_order=True)
    for users, items in ((2, 2), (3, 4), (5, 3), (1, 6)):
        expected = slow_core(log, users, items)
        assert k_core(log, users, items).equals(expected)
        if expected.height:
            read = read_interactions(log, min_user_events=users, min_item_events=items)
            assert read.rows() == read_interactions(expected).rows()
        else:
            with pytest.raises(InteractionsError, match="nothing is left"):
                read_interactions(log, min_user_events=users, min_item_events=items)


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("kind", ["int", "text"])
def test_pieces_give_the_same_log(ending, kind, tmp_path):
    log = random_log(1, 300, kind).with_columns(pl.col("timestamp").dt.epoch("s"))
    file = tmp_path / f"log.{ending}"
    {"csv": log.write_csv, "parquet": log.write_parquet, "jsonl": log.write_ndjson}[ending](file)
    plain = read_interactions(file, duplicates="last", threshold=1, half_life=1e-4, min_user_events=3)
    texts = [pl.col(c).cast(pl.String) for c in ("user_id", "item_id")]
    for piece in (7, 100, 10_000):
        streamed = read_interactions(file, duplicates="last", threshold=1, half_life=1e-4, min_user_events=3, stream=True, piece=piece)
        assert streamed["user_id"].dtype == (pl.Categorical if kind == "text" else pl.Int64)
        assert streamed.with_columns(texts).drop("weight").equals(plain.with_columns(texts).drop("weight"))
        assert np.allclose(streamed["weight"], plain["weight"])
    same, other = to_matrix(plain), to_matrix(streamed)
    assert other.users.equals(same.users) and other.items.equals(same.items) and abs(other.to_scipy() - same.to_scipy()).max() < 1e-4
    for by in ("leave_last", "time_per_user", "random", "user"):
        for a, b in zip(split_interactions(plain, by), split_interactions(streamed, by), strict=True):
            assert a.select(texts).rows() == b.select(texts).rows()


def test_a_recommender_takes_a_streamed_log():
    log = random_log(4, 200, "text").drop("weight")
    plain, streamed = read_interactions(log, duplicates="count"), read_interactions(log, duplicates="count", stream=True, piece=50)
    for make in (Popularity, lambda: ALS(factors=4)):
        one, two = make().fit(plain), make().fit(streamed)
        assert one.recommend_all(k=3).equals(two.recommend_all(k=3)) and one.items.dtype == two.items.dtype == pl.String
        new = pl.DataFrame({"user_id": ["new"], "item_id": ["id 3"]})
        assert two.fold_in(new.cast(pl.Categorical)).score(["new"]).tolist() == one.fold_in(new).score(["new"]).tolist()


def test_weights_in_other_ways():
    log = pl.DataFrame({"user_id": [1, 1, 2, 2], "item_id": [1, 2, 1, 3], "seconds": [30.0, 60, 90, 0], "length": [60.0, 60, 90, 90],
                        "timestamp": [0, 86_400, 172_800, 172_800]})
    for stream in (False, True):
        share = read_interactions(log, weight=pl.col("seconds") / pl.col("length"), threshold=0.6, stream=stream)
        assert share.columns == ["user_id", "item_id", "weight", "timestamp"] and share["weight"].to_list() == [1, 1]
        aged = read_interactions(log.drop("seconds", "length"), half_life=1, stream=stream)
        assert np.allclose(aged["weight"], [0.25, 0.5, 1, 1])
        plays = read_interactions(log.drop("length"), weight=pl.col("seconds").log1p(), stream=stream)
        assert np.allclose(plays["weight"], np.log1p([30, 60, 90, 0]))
        for wrong, what in (({"weight": pl.col("secs") * 2}, "no column 'secs'"), ({"threshold": 1, "extra": "drop"}, "needs a weight"),
                            ({"weight": "seconds"}, "unknown column 'length'"),
                            ({"weight": "seconds", "threshold": 1e9, "extra": "drop"}, "nothing is left"),
                            ({"weight": -pl.col("seconds"), "extra": "drop"}, "3 negative weights")):
            with pytest.raises(InteractionsError, match=what): read_interactions(log, stream=stream, **wrong)
        with pytest.raises(InteractionsError, match="timestamp"):
            read_interactions(log.drop("timestamp"), half_life=3, extra="drop", stream=stream)
        with pytest.raises(ParameterError): read_interactions(log, half_life=-1, extra="drop", stream=stream)


def test_faults_in_pieces_are_found(tmp_path):
    good = pl.DataFrame({"user_id": ["a"] * 10, "item_id": range(10)})
    users = pl.Series(["a"] * 6 + [None, ""] + ["a"] * 2)
    for bad, what in ((good.with_columns(user_id=users), "rows 5 to 8: .*2 missing ids, first in rows 3, 4"),
                      (good.with_columns(weight=pl.Series([1.0] * 9 + [np.nan])), "rows 9 to 10: .*not numbers, first in row 2"),
                      (good.with_columns(timestamp=pl.Series(["2020-01-01"] * 9 + ["soon"])), "cannot be read"),
                      (good.clear(), "no rows"), (good.rename({"item_id": "item"}), "is it 'item'")):
        with pytest.raises(InteractionsError, match=what): read_interactions(bad, stream=True, piece=4)
    with pytest.raises(InteractionsError, match="no such file"): read_interactions(tmp_path / "none.csv", stream=True)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InteractionsError, match="cannot be read"): read_interactions(tmp_path / "broken.parquet", stream=True)


def test_bots_are_left_out_with_a_word():
    events = [(u, (u * 7 + k * k) % 50, 1_600_000_000 + 5000 * k * (u + 1) + 977 * k * k) for u in range(30) for k in range(12)]
    people = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row")
    bot = pl.DataFrame({"user_id": [99] * 400, "item_id": np.arange(400) % 50, "timestamp": 1_600_000_000 + 60 * np.arange(400)})
    for stream in (False, True):
        with pytest.warns(DataWarning, match=r"1 users with 400 events were left out \(bot\): 99"):
            log = read_interactions(pl.concat([people, bot]), duplicates="sum", leave_out=("bot",), stream=stream)
        assert 99 not in set(log["user_id"]) and log["user_id"].n_unique() == 30
    with pytest.raises(ParameterError): read_interactions(people, duplicates="sum", leave_out=("no_time",))


def test_rows_and_events_against_slow_ones():
    draw = rng(0, "rows")
    for known, asked in (([3, 1, 9], [9, 9, 2, 1]), ([10**15, 5], [5, 10**15, 6]), ([-3, 4], [4, -3, 0]), (["b", "a"], ["a", "c", "b"]),
                         ([1, 2], [])):
        expected = [known.index(x) if x in known else -1 for x in asked]
        dtype = pl.String if isinstance(known[0], str) else pl.Int64
        assert rows_of(pl.Series(asked, dtype=dtype), pl.Series(known)).tolist() == rows_of(asked, pl.Series(known)).tolist() == expected
        if dtype == pl.String: assert rows_of(pl.Series(asked).cast(pl.Categorical), pl.Series(known)).tolist() == expected
    for n in (0, 1, 5, 200):
        u, i, w = draw.integers(0, 6, n), draw.integers(-1, 7, n), draw.random(n)
        dense = np.zeros((6, 7))
        np.add.at(dense, (u[i >= 0], i[i >= 0]), w[i >= 0])
        for ordered in (False, True):
            made = from_events(pl.Series(range(6)), pl.Series(range(7)), u, i, w, ordered)
            assert np.allclose(made.to_scipy().toarray(), dense)
            if not ordered: assert all((np.diff(made.row(r)[0]) > 0).all() for r in range(6))


MEASURE = """
import json, sys
import os
from pathlib import Path
from visrec_nb.data.interactions import read_interactions
def status(name): return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)).split()[1]) / 1e3
import polars, numpy
read_interactions({"user_id": ["a"], "item_id": ["b"]}, stream=sys.argv[2] == "stream")
before = status("VmHWM")
log = read_interactions(sys.argv[1], duplicates="sum", stream=sys.argv[2] == "stream")
print(json.dumps([status("VmHWM") - before, log.height]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_streamed_log_is_small(tmp_path):
    n, draw, file = 2_000_000, rng(0, "memory"), tmp_path / "log.parquet"
    names = [pl.Series([str(uuid.UUID(int=int(x), version=4)) for x in draw.integers(0, 2**62, size)]) for size in (20_000, 3_000)]
    pl.DataFrame({"user_id": names[0][draw.integers(0, 20_000, n)], "item_id": names[1][draw.integers(0, 3_000, n)]}).write_parquet(file)
    taken = {}
    for how in ("whole", "stream"):
        done = subprocess.run([sys.executable, "-c", MEASURE, file, how], capture_output=True, text=True, check=True,
                              env={**os.environ, "POLARS_MAX_THREADS": "2"})   # each thread holds its own part of the file
        taken[how], rows = json.loads(done.stdout)
    assert 1_900_000 < rows <= n
    assert taken["stream"] < 0.75 * taken["whole"], taken                                                      # MB
    assert taken["stream"] * 1e6 < 170 * n, taken                                                # bytes an event
