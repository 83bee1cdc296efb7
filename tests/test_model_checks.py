"""Comparing two classifiers, slices of a test set, and corrupted pictures: what the notebooks do not show."""

import tracemalloc
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from visrec_nb.core.errors import InputError, ParameterError
from visrec_nb.core.stats import adjust_p
from visrec_nb.vision.comparison import compare_classifiers, disagreements, items_needed, mcnemar
from visrec_nb.vision.robustness import CORRUPTIONS, corrupt, robustness_summary, robustness_table, try_corruptions
from visrec_nb.vision.slices import make_slices, picture_facts, slice_table


def as_probs(right: np.ndarray) -> np.ndarray:
    "Two classes, the true one is 0."
    return np.stack([right, 1 - right], 1).astype(float)


# Comparison

def test_mcnemar_holds_its_level_and_the_mid_p_is_less_timid():
    draw = np.random.default_rng(0)
    n = draw.binomial(200, 0.15, 3000)
    found = np.array([mcnemar(int(b), int(m - b)) for m, b in zip(n, draw.binomial(n, 0.5), strict=True)])
    exact, middle = (found < 0.05).mean(0)
    assert exact <= 0.05 and exact < middle < 0.06


def test_the_swap_test_of_groups_is_the_exact_one_where_it_can_be_counted():
    # Three groups whose gains are 4, 3 and 2: of eight ways to swap, two have a sum of at least 9 in size.
    right_a, right_b = np.repeat([1, 0], [9, 3]), np.zeros(12, int)
    groups = ["x"] * 4 + ["y"] * 3 + ["z"] * 2 + ["w"] * 3
    found = compare_classifiers(as_probs(right_a), as_probs(right_b), np.zeros(12, int), groups=groups)
    assert found["swap_p"] == pytest.approx(2 / 8, abs=0.02)
    assert "mcnemar_p" not in found and found["groups"] == 4


def test_a_comparison_fits_the_sentence_of_the_reports():
    from visrec_nb.reports.words import comparison_sentence

    found = compare_classifiers(as_probs(np.arange(200) < 190), as_probs(np.arange(200) < 150), np.zeros(200, int))
    assert comparison_sentence("the tuned head", "the plain one", found, "accuracy").startswith("The tuned head is better than")


def test_several_labels_may_have_thresholds_of_their_own():
    targets = np.array([[True, False], [False, True], [True, True], [False, False]])
    a, b = np.where(targets, 0.6, 0.3), np.where(targets, 0.9, 0.7)
    found = compare_classifiers(a, b, targets, thresholds=(0.5, [0.8, 0.8]), rounds=50)
    assert (found["both_right"], found["exact_match_difference"], found["difference"]) == (4, 0, 0)
    assert compare_classifiers(a, b, targets, rounds=50)["only_a_right"] == 3
    assert disagreements(a, b, targets, ["x", "y"])["answer_b"].to_list() == ["x|y"] * 3


@pytest.mark.parametrize(("change", "message"), [
    ({"probs_b": np.full((4, 3), 1 / 3)}, "not the same items"),
    ({"targets": np.array([0, 1])}, "labelled items"),
    ({"targets": np.array([0, 1, 2, 0])}, "class numbers"),
    ({"probs_a": np.full((4, 2), np.nan)}, "probabilities"),
    ({"groups": ["one"] * 4}, "one group"),
    ({"groups": ["one", "two"]}, "2 groups for 4 items"),
])
def test_what_cannot_be_compared_is_said(change, message):
    good = {"probs_a": np.full((4, 2), 0.5), "probs_b": np.full((4, 2), 0.5), "targets": np.array([0, 1, 0, 1])}
    with pytest.raises(InputError, match=message):
        compare_classifiers(**{**good, **change})


def test_no_number_of_items_shows_an_impossible_difference():
    for wrong in ({"difference": 0}, {"difference": 0.2}, {"power": 1}):
        with pytest.raises(ParameterError):
            items_needed(**{"difference": 0.01, "disagreement": 0.1, **wrong})


# Slices

def test_false_alarms_of_the_whole_table_stay_below_one_in_twenty():
    draw = np.random.default_rng(3)
    items = pl.DataFrame({f"x{k}": draw.normal(size=300) for k in range(4)} | {"shop": draw.choice(list("abcdef"), 300)})
    # matters=0: every slice that is significantly worse is flagged, however little.
    alarms = [slice_table(np.random.default_rng(t).random(300) < 0.8, items, matters=0)["flag"].any() for t in range(100)]
    assert np.mean(alarms) <= 0.05


def test_a_weak_slice_is_found_by_each_kind_of_adjustment_and_in_losses():
    draw = np.random.default_rng(5)
    items = pl.DataFrame({"brightness": draw.random(600), "other": draw.random(600), "camera": draw.choice(["a", "b"], 600)})
    dark = items["brightness"].to_numpy() < 0.25
    right = draw.random(600) < np.where(dark, 0.6, 0.9)
    for adjust in ("holm", "hochberg", "benjamini_hochberg", "benjamini_yekutieli"):
        table = slice_table(right, items, adjust=adjust)
        assert table.filter("flag")["column"].to_list() == ["brightness"]
    losses = slice_table(1.0 - right, items, higher_is_better=False)
    assert losses["column"][1] == "brightness" and losses["flag"][1]
    assert losses["mean"][1] == pytest.approx(1 - slice_table(right, items)["accuracy"][1])


def test_slices_of_two_columns_find_what_hides_in_their_corner():
    draw = np.random.default_rng(6)
    items = pl.DataFrame({"a": draw.choice(["p", "q"], 800), "b": draw.choice(["r", "s"], 800)})
    corner = ((items["a"] == "p") & (items["b"] == "r")).to_numpy()
    table = slice_table(draw.random(800) < np.where(corner, 0.6, 0.95), items, pairs=10)
    assert (table["column"][1], table["slice"][1], table["flag"][1]) == ("a & b", "p & r", True)
    assert len(make_slices(items, pairs=2)) == len(make_slices(items)) + 2


def test_the_order_of_the_items_does_not_matter():
    draw = np.random.default_rng(7)
    items, right = pl.DataFrame({"x": draw.random(200), "y": draw.choice(list("abc"), 200)}), draw.random(200) < 0.8
    order = draw.permutation(200)
    assert slice_table(right, items).equals(slice_table(right[order], items[order]))


def test_odd_columns_do_no_harm():
    n = 60
    items = pl.DataFrame({"item_id": [str(i) for i in range(n)], "same": ["x"] * n, "unique": [f"u{i}" for i in range(n)],
                          "none": [None] * n, "nan": [float("nan")] * 30 + [1.0, 2.0] * 15, "flag": [True, False] * 30,
                          "few": [1, 2, 3] * 20, "struct": [{"a": 1}] * n})
    found = {(s.column, s.name) for s in make_slices(items)}
    assert found == {("nan", "missing"), ("flag", "true"), ("flag", "false"), ("few", "1"), ("few", "2"), ("few", "3")}
    empty = slice_table(np.ones(n, bool), items, ["same"])
    assert len(empty) == 1 and empty["accuracy"][0] == 1 and empty["flag"].to_list() == [False]
    assert adjust_p(np.empty(0)).shape == (0,)
    with pytest.raises(ParameterError, match="no 'colour'"):
        slice_table(np.ones(n, bool), items, ["colour"])
    with pytest.raises(InputError, match="60 items"):
        slice_table(np.ones(3, bool), items)
    with pytest.raises(ParameterError, match="holm"):
        slice_table(np.ones(n, bool), items, adjust="bonferoni")


def test_facts_of_a_clip_and_of_what_is_missing(tmp_path):
    from visrec_nb.media.render import render_move

    photo = np.random.default_rng(0).integers(60, 200, (160, 160, 3)).astype(np.uint8)
    render_move(photo, "pan_left", tmp_path / "clip.mp4", seed=0, fps=12, seconds=1, speed=0.05, size=64)
    clip, missing = picture_facts([tmp_path / "clip.mp4", tmp_path / "none.jpg"]).rows(named=True)
    assert (clip["width"], clip["height"]) == (64, 64) and 0.3 < clip["brightness"] < 0.7
    assert missing["problem"] == "no such file" and missing["brightness"] is None


# Robustness

@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    from visrec_nb.data.samples import clothing
    from visrec_nb.media.image import load_image

    return [load_image(path, 128) for path in clothing().filter(split="train")["path"][:120:20]]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_grows_with_its_severity(name, photos):
    found = [np.mean([np.square(corrupt(photo, name, severity, k) - photo.astype(float)).mean() for k, photo in enumerate(photos)])
             for severity in range(1, 6)]
    assert found[0] > 4
    if name == "elastic_transform":  # at 1 and 2 the authors bend a picture, from 3 on they crumple it
        assert found[1] > 1.2 * found[0] and found[4] > 1.2 * found[2]
    elif name == "glass_blur":  # their 2, 1, 3, 2, 2 repeats also shift the picture, by up to a pixel each
        assert found[4] > 1.2 * found[0] and found[4] > 0.9 * max(found)
    else:
        assert all(high > 0.95 * low for low, high in pairwise(found)) and found[4] > 1.2 * found[0], found


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_keeps_the_shape_and_depends_on_the_seed_only(name, photos):
    for shape in ((16, 16), (33, 70), (300, 200)):
        x = np.resize(photos[0], (*shape, 3))
        before = x.copy()
        for severity in (1, 5):
            spoiled = corrupt(x, name, severity, 9)
            assert spoiled.shape == x.shape and spoiled.dtype == np.uint8 and (spoiled == corrupt(x, name, severity, 9)).all()
        assert (x == before).all()
    chance = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert (corrupt(photos[0], name, 3, 1) != corrupt(photos[0], name, 3, 2)).any() == chance
    for level in (0, 255):
        assert np.isfinite(corrupt(np.full((32, 32, 3), level, np.uint8), name, 5)).all()


def test_blurs_and_noise_leave_the_mean_tone(photos):
    for name in ("gaussian_noise", "defocus_blur", "glass_blur", "motion_blur", "contrast", "pixelate", "jpeg_compression"):
        for photo in photos:
            middle = np.clip(photo, 80, 170)
            assert abs(corrupt(middle, name, 2).mean() - middle.mean()) < 2.5, name


def test_a_wrong_name_or_strength_is_refused():
    x = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ParameterError, match="gaussian_noise"):
        corrupt(x, "gausian_noise", 1)
    for severity in (0, 6, 1.5):
        with pytest.raises(ParameterError, match="1 to 5"):
            corrupt(x, "fog", severity)
    for bad in (x[:8], x.astype(float), x[..., 0]):
        with pytest.raises(ParameterError, match="uint8"):
            corrupt(bad, "fog", 1)


def light(x: np.ndarray) -> np.ndarray:
    score = x.mean((1, 2, 3)) / 255
    return np.stack([1 - score, score], 1)


def test_neither_stacks_nor_threads_change_a_result(photos):
    x, targets = np.stack(photos), np.array([0, 1, 0, 1, 0, 1])
    some = {"names": ("snow", "gaussian_noise"), "severities": (2, 5)}
    first = try_corruptions(light, x, targets, threads=1, batch=6, **some)
    for again in (try_corruptions(light, list(photos), targets, threads=3, batch=1, **some),
                  try_corruptions(light, lambda rows: x[rows], targets, batch=4, concurrent=True, **some)):
        assert (again.outcome == first.outcome).all() and again.cells == first.cells
    limited = try_corruptions(light, x, targets, limit=3, **some)
    assert len(limited.rows) == 3 and (limited.outcome == first.outcome[:, limited.rows]).all()


def test_several_labels_are_measured_by_mean_average_precision(photos):
    from sklearn.metrics import average_precision_score

    x, targets = np.stack(photos), np.array([[1, 0], [0, 1], [1, 1], [0, 0], [1, 0], [0, 1]], bool)
    found = try_corruptions(light, x, targets, names=("fog", "contrast"), severities=(3,))
    table = robustness_table(found)
    assert table["map"].to_list() == pytest.approx([average_precision_score(targets, p) for p in found.outcome], abs=1e-6)
    summary = robustness_summary(found)
    assert summary["corrupted_map"] == pytest.approx(table["map"][1:].mean())
    assert summary["relative_robustness"] == pytest.approx(summary["corrupted_map"] / summary["clean_map"])


def test_the_unit_of_chance_is_the_picture():
    # Twenty pictures right everywhere, twenty wrong everywhere: as uncertain as 40 coins, however many cells there are.
    def first_is_right(x: np.ndarray) -> np.ndarray:
        return light(np.where(x.mean((1, 2, 3), keepdims=True) > 127, 255, 0))

    x = np.concatenate([np.full((20, 16, 16, 3), level, np.uint8) for level in (30, 220)])
    found = try_corruptions(first_is_right, x, np.ones(40, int), names=("gaussian_noise", "defocus_blur", "pixelate"))
    summary = robustness_summary(found, rounds=2000)
    assert summary["corrupted_accuracy"] == 0.5
    width = summary["corrupted_accuracy_ci_high"] - summary["corrupted_accuracy_ci_low"]
    assert width == pytest.approx(2 * 1.96 * (0.25 / 40) ** 0.5, abs=0.06)
    assert [summary[f"relative_robustness_ci_{end}"] for end in ("low", "high")] == pytest.approx([1, 1])


def test_memory_does_not_grow_with_the_number_of_pictures():
    def peak(n: int) -> float:
        tracemalloc.start()
        grey = np.full((16, 64, 64, 3), 90, np.uint8)
        try_corruptions(light, lambda rows: grey[rows % 16], np.zeros(n, int), ("contrast", "pixelate"), (1, 3))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(16)
    assert peak(512) < 1.5 * peak(64)


def test_pictures_or_answers_of_another_kind_are_refused(photos):
    targets = np.zeros(6, int)
    with pytest.raises(InputError, match="uint8"):
        try_corruptions(light, lambda rows: np.zeros((len(rows), 32, 32, 3)), targets)
    with pytest.raises(InputError, match="clean, severity 0"):
        try_corruptions(lambda x: np.full((len(x), 2), np.nan), np.stack(photos), targets)
    with pytest.raises(InputError, match="needed"):
        try_corruptions(light, np.stack(photos)[:0], np.zeros(0, int))
    with pytest.raises(ParameterError, match="jpeg_compression"):
        try_corruptions(light, np.stack(photos), targets, names=["jpeg"])
