"""Splits and folds of random catalogs against independent truths: own breadth-first search, published stratification, counts."""

from collections import deque

import numpy as np
import polars as pl
import pytest

from visrec_nb.core.errors import CatalogError, ParameterError, SplitLeak
from visrec_nb.data.splits import (
    fold_catalog,
    group_from_names,
    leaks,
    refuse_leaks,
    repair_leaks,
    split_catalog,
    use_fold,
)

PARTS = ("train", "valid", "test")
SHARES = np.array([0.7, 0.15, 0.15])


def random_catalog(seed, n=400, many_labels=False):
    "Groups for half of the items, a few copies, and pairs, some with an item that is not there."
    draw = np.random.default_rng(seed)
    catalog = pl.DataFrame({
        "item_id": [f"item{i}" for i in draw.permutation(n)],
        "group": [f"g{g}" if g < n // 4 else None for g in draw.integers(0, n // 2, n)],
        "sha256": [f"{s:064x}" for s in draw.integers(0, 8 * n, n)],
        "timestamp": draw.integers(0, n // 2, n),
    }).with_columns(path=pl.col("item_id") + ".jpg")
    if many_labels:
        shown = [[f"c{c}" for c in np.flatnonzero(row)] for row in draw.random((n, 8)) < 0.8 / np.arange(1, 9)]
        shown[::50] = [None] * len(shown[::50])
        catalog = catalog.with_columns(labels=pl.Series(shown, dtype=pl.List(pl.String)))
    else: catalog = catalog.with_columns(label=pl.Series([f"c{c}" for c in (draw.random(n) ** 2 * 8).astype(int)]))
    ends = draw.integers(0, n + 20, (n // 10, 2))
    return catalog, [(f"item{a}", f"item{b}") for a, b in ends.tolist()]


def search(catalog, pairs):
    "The unit of each item by breadth-first search through groups, contents and pairs."
    near = {}
    for column in {"group", "sha256"} & set(catalog.columns):
        for item, key in catalog.select("item_id", column).drop_nulls().iter_rows():
            near.setdefault(item, set()).add((column, key))
            near.setdefault((column, key), set()).add(item)
    for a, b in pairs:
        near.setdefault(a, set()).add(b)
        near.setdefault(b, set()).add(a)
    unit = {}
    for start in sorted(catalog["item_id"]):
        queue = deque([start] if start not in unit else [])
        while queue:
            node = queue.popleft()
            if node in unit: continue
            unit[node] = start
            queue += near.get(node, ())
    return [unit[item] for item in catalog["item_id"]]


def torn(catalog, pairs, column="split"):
    sides = catalog.with_columns(unit=pl.Series(search(catalog, pairs))).drop_nulls(column).group_by("unit").agg(pl.col(column).n_unique())
    return sides.filter(pl.col(column) > 1)["unit"].to_list()


@pytest.mark.parametrize("many_labels", [False, True])
@pytest.mark.parametrize("by", ["label", "random", "time"])
def test_no_unit_is_torn_and_shares_are_met(by, many_labels):
    for seed in range(6):
        catalog, pairs = random_catalog(seed, many_labels=many_labels)
        split = split_catalog(catalog, by=by, together=pairs, seed=seed)
        assert torn(split, pairs) == [] and leaks(split, pairs).is_empty()
        assert split.drop("split").select(sorted(catalog.columns)).equals(catalog.select(sorted(catalog.columns)))
        shares = np.array([(split["split"] == part).mean() for part in PARTS])
        assert np.abs(shares - SHARES).max() < (0.12 if by == "time" else 0.05), shares


def test_random_units_are_those_of_a_breadth_first_search():
    for seed in range(6):
        catalog, pairs = random_catalog(seed)
        draw = np.random.default_rng(seed)
        leaky = catalog.with_columns(split=pl.Series([[*PARTS, None][i] for i in draw.integers(0, 4, len(catalog))], dtype=pl.String))
        found = leaks(leaky, pairs)
        unit = dict(zip(leaky["item_id"], search(leaky, pairs), strict=True))
        assert {unit[item] for item in found["item_id"]} == set(torn(leaky, pairs))
        assert all(unit[a] == unit[b] for a, b in found.select("item_id", "other_item_id").iter_rows())
        assert (found["split"] != found["other_split"]).all()
        with pytest.raises(SplitLeak): refuse_leaks(leaky, pairs)


def test_row_order_does_not_matter_and_seeds_do():
    catalog, pairs = random_catalog(0)
    turned = catalog.sample(fraction=1, shuffle=True, seed=1)
    for call, column in ((split_catalog, "split"), (fold_catalog, "fold")):
        first, again, other = (call(c, together=pairs, seed=s) for c, s in ((catalog, 1), (turned, 1), (catalog, 2)))
        assert first.sort("item_id").equals(again.sort("item_id").select(first.columns))
        assert not first[column].equals(other[column])


def test_every_class_in_every_part():
    for seed in range(6):
        draw = np.random.default_rng(seed)
        label = np.repeat(np.arange(12), draw.integers(4, 40, 12))
        catalog = pl.DataFrame({"path": [f"{i}.jpg" for i in range(len(label))], "label": [f"c{c}" for c in label],
                                "group": [f"{c}-{g}" for c, g in zip(label, draw.integers(0, 4, len(label)), strict=True)]})
        groups = catalog.group_by("label").agg(pl.col("group").n_unique())
        split = split_catalog(catalog, by="group", seed=seed)
        parts = split.group_by("label").agg(pl.col("split").n_unique()).join(groups, on="label")
        assert (parts["split"] == parts["group"].clip(upper_bound=3)).all()
        assert set(split.filter(pl.col("split") == "train")["label"]) == set(catalog["label"])


def test_folds():
    for seed in range(4):
        catalog, pairs = random_catalog(seed, many_labels=seed % 2 == 1)
        folded = fold_catalog(catalog, 5, together=pairs, seed=seed)
        assert torn(folded, pairs, "fold") == [] and leaks(folded, pairs, side="fold").is_empty()
        sizes = folded["fold"].value_counts()["count"]
        assert len(sizes) == 5 and sizes.max() - sizes.min() <= 0.1 * len(catalog), sizes.to_list()
        tested = pl.concat([use_fold(folded, k).filter(pl.col("split") == "test") for k in range(5)])
        assert sorted(tested["item_id"]) == sorted(catalog["item_id"])
        three = split_catalog(use_fold(folded, 2), valid=0.2, keep="test", together=pairs)
        assert (three["split"] == "test").equals(folded["fold"] == 2) and torn(three, pairs) == []
        assert 0.1 < (three["split"] == "valid").mean() < 0.22


def test_folds_of_many_small_classes_are_of_one_size():
    catalog = pl.DataFrame({"path": [f"{i}.jpg" for i in range(700)], "label": [f"c{i // 7}" for i in range(700)]})
    folded = fold_catalog(catalog, 5)
    assert folded["fold"].value_counts()["count"].to_list() == [140] * 5
    per_class = folded.group_by("label", "fold").len()["len"]
    assert per_class.min() == 1 and per_class.max() == 2 and len(per_class) == 500


def test_an_official_test_part_stays():
    for seed in range(5):
        catalog, pairs = random_catalog(seed)
        official = split_catalog(catalog, valid=0, test=0.3, together=pairs, seed=seed)
        cut = split_catalog(official, valid=0.2, keep="test", together=pairs, seed=seed)
        assert (cut["split"] == "test").equals(official["split"] == "test") and torn(cut, pairs) == []
        assert abs((cut["split"] == "valid").sum() / (official["split"] == "train").sum() - 0.2) < 0.06
        folded = fold_catalog(official, 3, together=pairs)
        assert folded["fold"].is_null().equals(official["split"] == "test") and torn(folded, pairs, "fold") == []
        late = split_catalog(official, valid=0.2, keep="test", by="time", together=pairs)
        assert (late["split"] == "test").equals(official["split"] == "test") and torn(late, pairs) == []


def test_what_is_related_to_an_official_test_item_is_refused_or_gets_no_part():
    catalog = pl.DataFrame({"path": [f"{i}.jpg" for i in range(20)], "label": ["a", "b"] * 10,
                            "split": ["train"] * 14 + ["test"] * 5 + [None]})
    with pytest.raises(SplitLeak, match=r"1 pair; first 0.jpg \(train\) and 15.jpg \(test\)"):
        split_catalog(catalog, keep="test", together=[("0.jpg", "15.jpg")])
    left = split_catalog(catalog, keep="test", together=[("19.jpg", "15.jpg")])
    assert left["split"].null_count() == 1 and left["split"][19] is None and left["split"].to_list()[14:19] == ["test"] * 5
    assert split_catalog(catalog, keep="all", together=[("19.jpg", "15.jpg")])["split"][19] == "test"


def test_a_grown_catalog_keeps_its_split():
    for seed in range(5):
        catalog, _ = random_catalog(seed, many_labels=seed % 2 == 1)
        catalog, pairs = catalog.drop("sha256"), []
        old = split_catalog(catalog.head(300), seed=seed)
        grown = split_catalog(pl.concat([old, catalog.tail(100)], how="diagonal"), keep="all", seed=seed)
        assert grown.head(300)["split"].equals(old["split"]) and torn(grown, pairs) == [] and grown["split"].null_count() == 0
        shares = np.array([(grown["split"] == part).mean() for part in PARTS])
        assert np.abs(shares - SHARES).max() < 0.05, shares
    assert split_catalog(old, keep="all", seed=99).equals(old)


def test_a_new_item_that_ties_old_parts_is_refused_until_mended():
    catalog, pairs = random_catalog(0)
    old = split_catalog(catalog.head(300), seed=1)
    both = pl.concat([old, catalog.tail(100)], how="diagonal")
    with pytest.raises(SplitLeak, match="chain"): split_catalog(both, keep="all", together=pairs)
    mended, changed = repair_leaks(both, pairs)
    grown = split_catalog(mended, keep="all", together=pairs)
    assert torn(grown, pairs) == [] and "test" not in set(changed["split"]) and grown["split"].null_count() == 0
    assert set(grown["item_id"]) | set(changed["item_id"]) == set(both["item_id"])


def test_repair():
    for seed in range(6):
        catalog, pairs = random_catalog(seed)
        leaky = catalog.with_columns(split=pl.Series(np.random.default_rng(seed).choice(PARTS, len(catalog), p=SHARES)))
        unit = dict(zip(leaky["item_id"], search(leaky, pairs), strict=True))
        bad = torn(leaky, pairs)
        fine = {item for item in unit if unit[item] not in bad}
        for how in ("leave_out", "move"):
            for favour in PARTS:
                catalog_now, changed = repair_leaks(leaky, pairs, favour, how)
                assert torn(catalog_now, pairs) == [] and not fine & set(changed["item_id"]) and changed["reason"].null_count() == 0
                assert all(unit[a] == unit[b] for a, b in changed.select("item_id", "other_item_id").iter_rows())
                before, after = (set(c.filter(pl.col("split") == favour)["item_id"]) for c in (leaky, catalog_now))
                assert before == after if how == "leave_out" else before <= after
                assert len(catalog_now) == len(leaky) - (len(changed) if how == "leave_out" else 0)


def sechidis(shown, shares, draw):
    "Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011, algorithm 1), item by item."
    need, room, part = shown.sum(0) * shares[:, None], len(shown) * shares, np.full(len(shown), -1)
    while (left := shown[part < 0].sum(0)).any():
        label = np.where(left > 0, left, np.inf).argmin()
        for i in np.flatnonzero((part < 0) & (shown[:, label] > 0)):
            best = np.flatnonzero(need[:, label] == need[:, label].max())
            best = best[room[best] == room[best].max()]
            part[i] = draw.choice(best)
            need[part[i]] -= shown[i]
            room[part[i]] -= 1
    return part


def test_several_labels_are_divided_as_well_as_by_iterative_stratification():
    gaps = []
    for seed in range(5):
        draw = np.random.default_rng(seed)
        shown = (draw.random((1000, 15)) < np.minimum(0.6, 1.2 / np.arange(1, 16))).astype(int)
        shown[shown.sum(1) == 0, 0] = 1
        labels = [[f"c{c}" for c in np.flatnonzero(row)] for row in shown]
        catalog = pl.DataFrame({"path": [f"{i:04}.jpg" for i in range(1000)], "labels": labels})
        ours = split_catalog(catalog, seed=seed)["split"].replace_strict(PARTS, range(3), return_dtype=pl.Int64).to_numpy()
        three = (ours, sechidis(shown, SHARES, draw), draw.choice(3, 1000, p=SHARES))
        gaps.append([np.mean([np.abs(shown[part == p].sum(0) / shown.sum(0) - SHARES[p]).mean() for p in range(3)]) for part in three])
    ours, published, chance = np.mean(gaps, 0)
    assert ours <= published < chance / 3, (ours, published, chance)


def test_groups_with_several_labels_are_divided_better_than_by_iterative_stratification():
    gaps = []
    for seed in range(5):
        draw = np.random.default_rng(seed)
        shown, group = (draw.random((1000, 15)) < 0.9 / np.arange(1, 16)).astype(int), draw.integers(0, 200, 1000)
        labels = [[f"c{c}" for c in np.flatnonzero(row)] for row in shown]
        catalog = pl.DataFrame({"path": [f"{i:04}.jpg" for i in range(1000)], "labels": labels, "group": group})
        ours = split_catalog(catalog, seed=seed)["split"].replace_strict(PARTS, range(3), return_dtype=pl.Int64).to_numpy()
        of_groups = np.zeros((200, 15), int)
        np.add.at(of_groups, group, shown)
        three = (ours, sechidis(of_groups, SHARES, draw)[group])
        gaps.append([np.mean([np.abs(shown[part == p].sum(0) / shown.sum(0) - SHARES[p]).mean() for p in range(3)]) for part in three])
    ours, published = np.mean(gaps, 0)
    assert ours < published / 2, (ours, published)


def test_several_labels_by_hand():
    "Twelve items, two of them with the rare label: one is learnt from and one tested, and each other label is halved."
    labels = [["a", "rare"], ["b", "rare"]] + [["a"], ["a"], ["a"], ["b"], ["b"], ["b"]] + [[], []] + [None, None]
    split = split_catalog(pl.DataFrame({"path": [f"{i}.jpg" for i in range(12)], "labels": labels}), valid=0, test=0.5)
    tested = split.with_columns(tested=pl.col("split") == "test")
    halves = tested.explode("labels").group_by("labels").agg(pl.col("tested").mean()).filter(pl.col("labels").is_not_null())
    assert set(halves["tested"]) == {0.5} and len(halves) == 3
    assert tested[8:10]["tested"].sum() == 1 and tested[10:12]["tested"].sum() == 1


def test_time_with_ties_never_looks_ahead():
    for seed in range(6):
        catalog, _ = random_catalog(seed)
        split = split_catalog(catalog.drop("group", "sha256"), by="time")
        first = {part: rows["timestamp"].min() for (part,), rows in split.group_by("split")}
        last = {part: rows["timestamp"].max() for (part,), rows in split.group_by("split")}
        assert last["train"] < first["valid"] and last["valid"] < first["test"]


def test_groups_from_names():
    names = ["v_A_g01_c01", "v_A_g01_c02", "v_A_g02_c01"]
    catalog = pl.DataFrame({"path": [f"/videos/{n}.avi" for n in names]})
    assert group_from_names(catalog, "ucf101")["group"].to_list() == ["v_A_g01", "v_A_g01", "v_A_g02"]
    assert group_from_names(catalog, r"v_(?P<group>[A-Z]).*")["group"].to_list() == ["A"] * 3
    with pytest.raises(CatalogError, match="3 of 3 names"): group_from_names(catalog, "segment")
    mixed = pl.concat([catalog, pl.DataFrame({"path": ["other.avi"]})])
    assert group_from_names(mixed, "ucf101", allow_others=True)["group"].null_count() == 1
    for pattern in ("(", "v_.*"):
        with pytest.raises(ParameterError, match="pattern"): group_from_names(catalog, pattern)


def test_a_hundred_thousand_rows_in_seconds():
    import time
    catalog, pairs = random_catalog(0, 100_000)
    start = time.perf_counter()
    split = split_catalog(catalog, together=pairs)
    assert leaks(split, pairs).is_empty() and time.perf_counter() - start < 15
