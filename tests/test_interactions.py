"Splits of interactions against a slow, independent implementation; planted faults in logs."

from collections import defaultdict
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from visrec_nb.core.errors import InteractionsError
from visrec_nb.core.seeds import rng
from visrec_nb.data.interactions import check_interactions, hold_out_users, read_interactions, split_interactions, without_bots
from visrec_nb.data.samples import movielens

KEY = ["user_id", "item_id"]
HOUR = 3600


def random_log(seed):
    draw = rng(seed, "log")
    n = int(draw.integers(30, 200))
    rows = {(int(u), int(i)) for u, i in zip(draw.integers(0, 15, n), draw.integers(0, 25, n), strict=True)}
    users, items = zip(*sorted(rows), (99, 1), strict=True)
    return read_interactions({"user_id": users, "item_id": items, "timestamp": draw.integers(0, 20, len(users))})


def slow_last(log, count):
    "The last `count(n)` events of each user, by time, then item; users with one event have none."
    users = defaultdict(list)
    for user, item, time in log.select("user_id", "item_id", "timestamp").rows(): users[user].append((time, item))
    return {(user, item) for user, events in users.items() if len(events) > 1
            for _, item in sorted(events)[-min(count(len(events)), len(events) - 1):]}


def rows(frame): return set(frame.select(KEY).rows())


@pytest.mark.parametrize("seed", range(25))
def test_splits_against_slow_ones(seed):
    log = random_log(seed)
    expected = {"leave_last": slow_last(log, lambda n: 1), "time_per_user": slow_last(log, lambda n: max(1, int(0.3 * n + 0.5)))}
    times = sorted(log["timestamp"])
    cut = times[max(0, int(len(times) * 0.7) - 1)]
    expected["time"] = {(u, i) for u, i, t in log.select(*KEY, "timestamp").rows() if t > cut}
    for by, test_rows in expected.items():
        train, test = split_interactions(log, by, 0.3)
        assert rows(test) == test_rows, by
        assert rows(train) | rows(test) == rows(log) and not rows(train) & rows(test)
        assert by == "time" or 99 not in set(test["user_id"])
    for by in ("user", "item", "random"):
        train, test = split_interactions(log, by, 0.3, seed=seed)
        column = f"{by}_id"
        assert rows(train) | rows(test) == rows(log) and not rows(train) & rows(test)
        if by == "random": assert test.height == round(0.3 * log.height)
        else:
            assert not set(train[column]) & set(test[column])
            assert test[column].n_unique() == max(1, round(0.3 * log[column].n_unique()))


@pytest.mark.parametrize("by", ["time_per_user", "leave_last", "time", "user", "item", "random"])
def test_seed_decides_and_row_order_does_not(by):
    log = random_log(7)
    shuffled = log.sample(fraction=1, shuffle=True, seed=3)
    assert rows(split_interactions(log, by, seed=1)[1]) == rows(split_interactions(shuffled, by, seed=1)[1])
    parts = {frozenset(rows(split_interactions(log, by, seed=seed)[1])) for seed in range(8)}
    assert (len(parts) > 1) == (by in ("user", "item", "random"))


def test_ties_by_hand():
    log = read_interactions({"user_id": [1, 1, 1, 2, 2, 3], "item_id": [5, 9, 7, 1, 2, 8], "timestamp": [10, 10, 3, 4, 4, 99]})
    assert split_interactions(log, "leave_last")[1].select(KEY).rows() == [(1, 9), (2, 2)]
    assert rows(split_interactions(log, "time", 0.5)[1]) == {(1, 5), (1, 9), (3, 8)}      # cut after the second 4: the tens stay together
    assert rows(split_interactions(log, "time", 0.3)[1]) == {(3, 8)}                       # item 8 and user 3 are new in the test part
    with pytest.raises(InteractionsError, match="would be empty"): split_interactions(log.filter(pl.col("user_id") == 3), "leave_last")
    with pytest.raises(InteractionsError, match="would be empty"): split_interactions(log.head(2), "random", 0.1)
    with pytest.raises(InteractionsError, match="needs a column 'timestamp'"): split_interactions(log.drop("timestamp"), "leave_last")


@pytest.mark.parametrize("seed", range(10))
def test_held_out_users_have_history_and_target(seed):
    log = random_log(seed)
    train, history, target = hold_out_users(log, 0.3, 0.4, seed)
    assert rows(train) | rows(history) | rows(target) == rows(log) and train.height + history.height + target.height == log.height
    assert not set(train["user_id"]) & set(history["user_id"]) and set(history["user_id"]) == set(target["user_id"])
    expected = slow_last(log.filter(pl.col("user_id").is_in(history["user_id"].implode())), lambda n: max(1, int(0.4 * n + 0.5)))
    assert rows(target) == expected and 99 in set(train["user_id"])


def events(user, times, items=None):
    times = list(times)
    return pl.DataFrame({"user_id": [user] * len(times), "item_id": list(items or range(len(times))), "timestamp": [int(t) for t in times]})


def people(users=60, seed=0):
    "People: sessions at odd times, with pauses that vary."
    draw, start = rng(seed, "people"), 1_400_000_000
    parts = []
    for user in range(users):
        days = start + 86400 * draw.choice(200, 4) + 15 * HOUR
        times = np.concatenate([day + np.cumsum(draw.exponential(120, draw.integers(2, 15))) for day in days])
        parts.append(events(user, np.sort(times), draw.choice(150, len(times)).tolist()))
    return pl.concat(parts)


def found(log, **options):
    checks = defaultdict(set)
    for row in check_interactions(log, **options).iter_rows(named=True): checks[row["check"]].add(row["subject"])
    return checks


def test_people_are_no_bots():
    for seed in range(5):
        checks = found(people(seed=seed))
        assert not {"bot", "metronome", "round_the_clock", "import", "burst", "future", "too_old"} & set(checks)


start = 1_400_000_000
BOTS = {
    "thousands at regular intervals": (lambda: events("b", (start + 30 * i for i in range(5000)), [i % 150 for i in range(5000)]),
                                       "metronome"),
    "few, but metronomic": (lambda: events("b", (start + 86400 * i + i % 3 for i in range(25))), "metronome"),
    "never asleep": (lambda: events("b", start + np.cumsum(rng(0, "gaps").exponential(600, 400)), [i % 90 for i in range(400)]),
                     "round_the_clock"),
    "all items within minutes": (lambda: events("b", start + np.arange(150) // 5), "wide_user"),
}


@pytest.mark.parametrize("kind", BOTS)
def test_bots_are_found_and_left_out(kind):
    make, sign = BOTS[kind]
    log = pl.concat([people().cast({"user_id": pl.String}), make()])
    findings = check_interactions(log)
    checks = found(log)
    assert checks["bot"] == {"b"} and "b" in checks[sign]
    kept, left_out = without_bots(log, findings)
    assert kept.height == people().height and left_out["user_id"].to_list() == ["b"] and left_out["reason"].to_list() == ["bot"]
    assert "bot" not in found(kept)


def test_faults_of_time():
    base = people()
    now = datetime(2020, 1, 1, tzinfo=UTC)
    assert not {"future", "too_old", "one_time", "import"} & set(found(base, now=now))
    assert "future" in found(pl.concat([base, events(1, [1_700_000_000])]), now=now)
    assert "too_old" in found(pl.concat([base, events(1, [0])]), now=now)
    assert "import" in found(pl.concat([base, *(events(1000 + u, [start] * 4) for u in range(40))]))
    assert "burst" in found(pl.concat([base, events(70, start + np.arange(100) // 4, [i % 40 for i in range(100)])]))
    assert "unordered" in found(base.sample(fraction=1, shuffle=True, seed=0)) and "unordered" not in found(base.sort("timestamp"))
    assert "one_time" in found(base.with_columns(timestamp=pl.lit(5_000_000_000)), now=datetime(2200, 1, 1, tzinfo=UTC))
    assert "no_time" in found(base.drop("timestamp"))
    dates = base.with_columns(timestamp=pl.col("timestamp") // 86400 * 86400)
    assert not {"burst", "metronome", "round_the_clock", "bot"} & set(found(dates))         # nothing is known of gaps


def test_faults_of_content():
    base = people()
    twice = check_interactions(pl.concat([base, base])).filter(check="repeated_rows")
    assert twice["severity"].to_list() == ["warning"] and twice["count"].item() >= base.height
    lonely = pl.concat([base, *(events(5000 + u, [start + 1000 * u], [9000 + u]) for u in range(100))])
    table = check_interactions(lonely)
    assert table.filter(check="one_event_users").select("severity", "count").row(0) == ("warning", 100)
    assert table.filter(check="one_user_items")["count"].item() >= 100
    assert table["severity"].to_list() == sorted(table["severity"], key=["error", "warning", "info"].index)


def test_movielens_has_no_bots():
    checks = found(movielens().ratings)
    assert not {"bot", "heavy_user", "metronome", "round_the_clock", "wide_user", "import", "future"} & set(checks)
    assert len(checks["burst"]) == 3
