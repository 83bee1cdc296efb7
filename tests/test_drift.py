"Drift between catalogs: none where there is none, found where it is planted."

import numpy as np
import polars as pl
import pytest

from visrec_nb.core.seeds import rng
from visrec_nb.data.drift import check_drift, drift_findings, most_typical


def verdict(table): return dict(table.select("column", "drift").rows())


@pytest.mark.slow
def test_random_halves_raise_no_alarm(clothing_vectors):
    catalog, vectors = clothing_vectors
    alarms = []
    for seed in range(10):
        order = rng(seed, "halves").permutation(len(catalog))
        a, b = order[:400], order[400:800]
        alarms.append(drift_findings(check_drift(catalog[a], catalog[b], vectors[a], vectors[b], seed=seed, rounds=99)).height)
    assert sum(n > 0 for n in alarms) <= 1, alarms


@pytest.mark.slow
def test_another_mix_and_another_source_are_found(clothing_vectors):
    catalog, vectors = clothing_vectors
    order = rng(0, "drift").permutation(len(catalog))
    old, rest = order[:800], order[800:]
    shoes = np.array([i for i in rest if catalog["label"][int(i)] in ("shoes", "hat", "pants")])
    mix = check_drift(catalog[old], catalog[shoes], vectors[old], vectors[shoes])
    assert verdict(mix)["label"] == "large" and verdict(mix)["pictures"] in ("small", "large")
    other = vectors[rest] * 0.8 + 0.3 * rng(0, "source").random(vectors.shape[1], np.float32)
    source = check_drift(catalog[old], catalog[rest], vectors[old], other)
    assert verdict(source)["pictures"] == "large" and verdict(source)["label"] == "none"
    assert drift_findings(source)["check"].to_list() == ["picture_drift"]


@pytest.mark.slow
def test_the_strange_part_of_a_delivery_is_named(clothing_vectors):
    catalog, vectors = clothing_vectors
    order = rng(1, "drift").permutation(len(catalog))
    old, new = order[:800], order[800:1200]
    changed = vectors[new].copy()
    changed[:60] = changed[:60][:, ::-1]
    typical = most_typical(catalog[old], catalog[new], vectors[old], changed).filter(side="current")
    strange = set(catalog["item_id"][new[:60].tolist()])
    assert len(strange & set(typical.head(60)["item_id"])) >= 50


def test_size_decides_and_not_the_number_of_items():
    draw = rng(0, "sizes")
    def catalog(n, share):
        return pl.DataFrame({"path": [f"{share}-{i}.jpg" for i in range(n)], "label": np.where(draw.random(n) < share, "a", "b")})
    tiny = check_drift(catalog(100_000, .50), catalog(100_000, .52)).row(0, named=True)
    assert tiny["p_adjusted"] < 1e-6 and tiny["drift"] == "none" and tiny["severity"] == "info"
    unsure = check_drift(catalog(30, .5), catalog(30, .5)).row(0, named=True)
    assert unsure["drift"] == "none"


def test_p_values_agree_with_the_textbook():
    from scipy.stats import chi2_contingency, ks_2samp

    draw = rng(0, "textbook")
    a, b = (pl.DataFrame({"path": [f"{name}{i}.jpg" for i in range(n)], "label": draw.choice(["x", "y"], n, p=[p, 1 - p]),
                          "stars": draw.normal(mean, size=n)}) for name, n, p, mean in (("a", 200, .5, 0), ("b", 150, .7, .4)))
    found = {row["column"]: row for row in check_drift(a, b).iter_rows(named=True)}
    table = [[(t["label"] == k).sum() for k in "xy"] for t in (a, b)]
    assert np.isclose(found["label"]["p_value"], chi2_contingency(table, correction=False).pvalue)
    assert np.isclose(found["label"]["effect"], abs(table[0][0] / 200 - table[1][0] / 150))
    ks = ks_2samp(a["stars"].to_numpy(), b["stars"].to_numpy(), method="asymp")
    assert np.isclose(found["stars"]["p_value"], ks.pvalue) and np.isclose(found["stars"]["effect"], ks.statistic)
    low, high = sorted(row["p_value"] for row in found.values())
    assert np.isclose(max(row["p_adjusted"] for row in found.values()), max(high, 2 * low))
