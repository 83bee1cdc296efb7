"Metrics against scikit-learn, intervals and promises by simulation."
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from sklearn import metrics as skm

from visrec_nb.core.errors import InputError, ParameterError
from visrec_nb.vision.calibration import (
    aurc, choose_thresholds, conformal_metrics, conformal_scores, conformal_sets, conformal_state, conformal_threshold, fit_temperature,
    reject, reliability, selective_curve, threshold_for,
)
from visrec_nb.vision.evaluation import (
    check_predictions, class_table, classification_metrics, confused_pairs, confusion_matrix, ece_if_calibrated, ece_interval,
    expected_calibration_error, log_loss, multi_label_metrics, multi_label_table, sigmoid, softmax, worst_mistakes,
)


def single(n, classes, seed, ties=False):
    "A calibrated model (its logits are the true log odds), rounded to one digit for ties."
    draw = np.random.default_rng(seed)
    targets = draw.integers(0, classes, n)
    probs = softmax(2 * (draw.normal(size=(n, classes)) + 2 * np.eye(classes)[targets]))
    if ties:
        probs = probs.round(1)
        probs[:, 0] += 1 - probs.sum(1)
        probs = np.clip(probs, 0, None) / np.clip(probs, 0, None).sum(1, keepdims=True)
    return probs, targets


def several(n, classes, seed, ties=False):
    draw = np.random.default_rng(seed)
    truth = draw.random((n, classes)) < np.linspace(.05, .5, classes)
    probs = sigmoid(1.5 * (draw.normal(size=(n, classes)) + 2 * truth - 1))
    return (probs.round(1) if ties else probs), truth


def finite(metrics):
    json.dumps(metrics, allow_nan=False)
    for name in metrics:
        if f"{name}_ci_low" in metrics: assert metrics[f"{name}_ci_low"] <= metrics[name] <= metrics[f"{name}_ci_high"], name
    return metrics


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n, classes, seed", [(300, 8, 0), (60, 3, 1), (40, 2, 2), (25, 12, 3)])
def test_single_label_as_scikit_learn(n, classes, seed, ties):
    probs, targets = single(n, classes, seed, ties)
    if classes == 8: probs, targets = probs[targets != 3], targets[targets != 3] # a class without items
    answers, found = probs.argmax(1), finite(classification_metrics(probs, targets, rounds=50))
    assert found["accuracy"] == pytest.approx(skm.accuracy_score(targets, answers))
    for kind, score in (("precision", skm.precision_score), ("recall", skm.recall_score), ("f1", skm.f1_score)):
        assert found[f"macro_{kind}"] == pytest.approx(score(targets, answers, average="macro", zero_division=0))
    occur = np.unique(targets)
    assert found["roc_auc"] == pytest.approx(np.mean([skm.roc_auc_score(targets == c, probs[:, c]) for c in occur]))
    assert found["log_loss"] == pytest.approx(skm.log_loss(targets, probs, labels=range(classes)))
    assert found["brier"] == pytest.approx(((probs - np.eye(classes)[targets]) ** 2).sum(1).mean())
    if classes > 5 and not ties:
        assert found["top5_accuracy"] == pytest.approx(skm.top_k_accuracy_score(targets, probs, k=5, labels=range(classes)))
    assert ("top5_accuracy" in found) == (classes > 5)
    top2 = classification_metrics(probs, targets, rounds=1, top_k=2)
    if classes > 2 and not ties:
        assert top2["top2_accuracy"] == pytest.approx(skm.top_k_accuracy_score(targets, probs, k=2, labels=range(classes)))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n, classes, seed", [(300, 6, 0), (50, 2, 1), (200, 1, 2)])
def test_several_labels_as_scikit_learn(n, classes, seed, ties):
    probs, truth = several(n, classes, seed, ties)
    limits = np.linspace(.3, .7, classes)
    answers, found = probs >= limits, finite(multi_label_metrics(probs, truth, limits, rounds=50))
    assert found["map"] == pytest.approx(np.mean([skm.average_precision_score(truth[:, c], probs[:, c]) for c in range(classes)]))
    assert found["roc_auc"] == pytest.approx(np.mean([skm.roc_auc_score(truth[:, c], probs[:, c]) for c in range(classes)]))
    assert found["exact_match"] == pytest.approx((truth == answers).all(1).mean())
    assert found["hamming_loss"] == pytest.approx((truth != answers).mean())
    for kind, score in (("precision", skm.precision_score), ("recall", skm.recall_score), ("f1", skm.f1_score)):
        if classes == 1:
            assert found[f"micro_{kind}"] == found[f"macro_{kind}"] == pytest.approx(score(truth[:, 0], answers[:, 0]))
        else:
            for mean in ("micro", "macro"):
                assert found[f"{mean}_{kind}"] == pytest.approx(score(truth, answers, average=mean, zero_division=0))
    assert found["log_loss"] == pytest.approx(skm.log_loss(truth.ravel(), probs.ravel())) == pytest.approx(log_loss(probs, truth))
    table = multi_label_table(probs, truth, limits, [str(c) for c in range(classes)]).sort("label")
    assert table["average_precision"].mean() == pytest.approx(found["map"])


def test_degenerate_inputs_leave_out_what_is_not_defined():
    one = finite(classification_metrics(np.array([[.7, .3]]), np.array([0]), rounds=20))
    assert one["accuracy"] == 1 and "roc_auc" not in one and one["macro_f1"] == 1
    same = finite(classification_metrics(np.tile([.2, .5, .3], (30, 1)), np.arange(30) % 3, rounds=20)) # one class answered
    assert same["roc_auc"] == .5 and same["macro_precision"] == pytest.approx(1 / 9)
    certain = finite(classification_metrics(np.eye(3)[[0, 1, 2, 0]], np.array([0, 1, 2, 1]), rounds=20)) # a wrong answer at probability 1
    assert certain["log_loss"] == pytest.approx(skm.log_loss([0, 1, 2, 1], np.eye(3)[[0, 1, 2, 0]]))
    none = finite(multi_label_metrics(np.full((5, 3), .2), np.zeros((5, 3), bool), .5, rounds=20)) # no positives, no answers
    assert "map" not in none and "roc_auc" not in none and none["exact_match"] == 1
    part = np.zeros((6, 2), bool); part[:3, 0] = True
    assert finite(multi_label_metrics(np.linspace(.1, .9, 12).reshape(6, 2), part, .5, rounds=20))["map"] > 0
    assert multi_label_table(np.full((6, 2), .4), part, .5, ["a", "b"])["roc_auc"].null_count() == 1
    assert class_table(np.zeros((2, 2), int), ["a", "b"])["most_confused_with"].null_count() == 2
    assert worst_mistakes(np.eye(2), np.array([0, 1]), ["a", "b"]).height == 0


@pytest.mark.parametrize("probs, targets, words", [
    (np.ones((2, 3)) / 3, np.array([0]), "2 predictions for 1"), (np.zeros((0, 3)), np.zeros(0, int), "0 predictions"),
    (np.array([[3., -1.]]), np.array([0]), "row 0"), (np.array([[.5, .5], [np.nan, 1]]), np.array([0, 1]), "row 1"),
    (np.array([[.9, .9]]), np.array([0]), "row 0"), (np.array([[.5, .5]]), np.array([2]), "class numbers"),
    (np.ones((2, 3)) / 3, np.ones((2, 2), bool), "do not fit")])
def test_what_is_no_probability_is_refused(probs, targets, words):
    with pytest.raises(InputError, match=words): check_predictions(probs, targets)


def test_confused_pairs_by_hand():
    pairs = confused_pairs(np.array([[8, 2, 0], [3, 6, 1], [0, 0, 0]]), ["a", "b", "c"], k=5)
    assert pairs.rows() == [("a", "b", 5, 2, 3, .2, .3), ("b", "c", 1, 1, 0, .1, 0.)]


def slow_ece(confidence, right, bins=15):
    "numpy's array_split of the sorted answers."
    order = np.argsort(confidence)
    parts = [p for p in np.array_split(order, bins) if len(p)]
    return sum(len(p) * abs(right[p].mean() - confidence[p].mean()) for p in parts) / len(right)


def test_calibration_error():
    for n in (5, 15, 100, 372):
        probs, targets = single(n, 6, n)
        assert expected_calibration_error(probs, targets) == pytest.approx(slow_ece(probs.max(1), probs.argmax(1) == targets))
    probs, targets = single(200, 4, 0, ties=True)
    order = np.random.default_rng(1).permutation(200)
    assert expected_calibration_error(probs[order], targets[order]) == pytest.approx(expected_calibration_error(probs, targets))
    by_hand = np.array([[.9, .1], [.9, .1], [.6, .4], [.6, .4]]) # 0.6: both right, 0.9: one of two
    assert expected_calibration_error(by_hand, np.array([0, 1, 0, 0]), bins=2) == pytest.approx(.4)
    assert reliability(by_hand, np.array([0, 1, 0, 0]), bins=2).select("items", "accuracy").rows() == [(2, 1.0), (2, .5)]
    assert reliability(*single(372, 6, 3))["items"].sum() == 372


def test_what_a_calibrated_model_shows():
    mean, point = ece_if_calibrated(single(372, 6, 0)[0], rounds=500)
    seen = [expected_calibration_error(*single(372, 6, 100 + i)) for i in range(200)] # calibrated by construction
    assert mean == pytest.approx(np.mean(seen), rel=.1) and .9 <= np.mean(np.array(seen) <= point) <= .99
    points = [classification_metrics(*single(372, 6, i), rounds=100)["ece_calibrated_95"] for i in range(5)]
    assert np.mean(points) == pytest.approx(point, rel=.15)
    big = single(40_000, 6, 0)[0] # above two million draws the normal limit takes over
    assert ece_if_calibrated(big, 200)[0] == pytest.approx(mean * (372 / 40_000) ** .5, rel=.2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_interval_of_the_calibration_error_holds_the_truth(temperature):
    def world(n, draw):
        odds = draw.normal(2.2, 1.6, n)
        return 1 / (1 + np.exp(-odds)), 1 / (1 + np.exp(-odds / temperature)) # said, true
    said, true = world(200_000, np.random.default_rng(0))
    truth, held = np.abs(said - true).mean(), 0
    for i in range(100):
        draw = np.random.default_rng(i + 1)
        said, true = world(300, draw)
        low, high = ece_interval(said, (draw.random(300) < true).astype(float), seed=i, rounds=200)
        held += low <= truth <= high
    assert held >= 89 # of 95 expected: under 1 % below


def test_bootstrap_intervals_hold_the_truth():
    truth, held = classification_metrics(*single(60_000, 5, 0), rounds=1), dict.fromkeys(("macro_f1", "roc_auc", "log_loss", "brier"), 0)
    for i in range(100):
        found = classification_metrics(*single(300, 5, i + 1), seed=i, rounds=150)
        for name in held: held[name] += found[f"{name}_ci_low"] <= truth[name] <= found[f"{name}_ci_high"]
    assert min(held.values()) >= 86, held


def test_temperature():
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 5, 3000)
    logits = 2.5 * (draw.normal(size=(3000, 5)) + 2.5 * np.eye(5)[targets]) # the true log odds
    assert fit_temperature(3 * logits, targets) == pytest.approx(3, rel=.08)
    assert fit_temperature(logits, targets) == pytest.approx(1, rel=.08)
    truth = draw.random((3000, 4)) < .3
    log_odds = 2 * (draw.normal(size=(3000, 4)) + 2 * truth - 1) + np.log(.3 / .7)
    assert fit_temperature(2 * log_odds, truth, multi_label=True) == pytest.approx(2, rel=.08)
    few = softmax(8 * np.eye(3), fit_temperature(8 * np.eye(3), np.arange(3)))
    assert .4 < few.max(1).mean() < .95 # three right answers are no proof
    assert fit_temperature(np.zeros((4, 3)), np.array([0, 1, 2, 0])) == 1
    assert .05 <= fit_temperature(np.eye(3)[[0]] * 5, np.array([1])) <= 20.01
    with pytest.raises(InputError): fit_temperature(np.array([[np.nan, 1.]]), np.array([0]))


def test_selective_curve_by_hand():
    sure = np.array([.9, .8, .8, .6])
    curve = selective_curve(np.stack([sure, 1 - sure], 1), np.array([0, 0, 1, 0]))
    assert curve.select("threshold", "items", "accuracy").rows() == [(.9, 1, 1.0), (.8, 3, 2 / 3), (.6, 4, .75)]
    assert aurc(np.stack([sure, 1 - sure], 1), np.array([0, 0, 1, 0])) == pytest.approx((0 + .25 + 1 / 3 + .25) / 4)


def test_threshold_keeps_its_promise():
    big, big_targets = single(100_000, 6, 0)
    order = np.argsort(-big.max(1))
    sure, running = -big.max(1)[order], (big.argmax(1) == big_targets)[order].cumsum() / np.arange(1, 100_001)
    broken = given = 0
    for i in range(200):
        threshold = threshold_for(*single(400, 6, i + 1), accuracy=.9)
        if threshold is None: continue
        given += 1
        k = np.searchsorted(sure, -threshold, "right")
        broken += running[k - 1] < .9
    assert given > 150 and broken <= 18 # 10 expected at most
    assert reject(big[:5], None).all() and threshold_for(*single(20, 6, 0), accuracy=.95) is None
    with pytest.raises(ParameterError): threshold_for(big, big_targets, accuracy=1.0)


def test_conformal_coverage():
    probs, targets = single(60_000, 6, 0)
    reached = []
    for i in range(200):
        state = conformal_state(probs[i * 200:(i + 1) * 200], targets[i * 200:(i + 1) * 200])
        reached.append((conformal_scores(probs[40_000:], targets[40_000:]) <= conformal_threshold(state, .9)).mean())
    k = math.ceil(201 * .9)
    theory = k / 201, (k * (201 - k) / (201 ** 2 * 202)) ** .5 # of Beta(k, n + 1 - k)
    assert np.mean(reached) == pytest.approx(theory[0], abs=4 * theory[1] / 200 ** .5)
    assert np.std(reached) == pytest.approx(theory[1], rel=.2)
    found = conformal_metrics(probs[40_000:], targets[40_000:], state, .9)
    assert found["set_coverage@90"] >= reached[-1] and found["set_size@90"] >= 1 # never empty


def test_conformal_state_survives_json():
    probs, targets = single(2500, 6, 0)
    state = json.loads(json.dumps(conformal_state(probs, targets)))
    exact = np.sort(conformal_scores(probs, targets))
    assert len(state["scores"]) == 1000 and state["scores"][-1] == exact[-1]
    for coverage in (.5, .9, .95, .99):
        rank = np.searchsorted(exact, conformal_threshold(state, coverage)) + 1
        assert 0 <= rank - math.ceil(2501 * coverage) <= 2 # never below the promise
    small = conformal_state(probs[:9], targets[:9])
    assert conformal_threshold(small, .95) == math.inf and conformal_sets(probs[:1], small, .95)[0] == np.argsort(-probs[0]).tolist()
    unsure = np.full((1, 6), 1 / 6)
    assert conformal_sets(unsure, state, .5, allow_empty=True) == [[]] and conformal_sets(unsure, state, .5) == [[0]]
    with pytest.raises(ParameterError): conformal_sets(probs, state, 1.0)
    with pytest.raises(InputError): conformal_threshold({"method": "aps"}, .9)


def test_thresholds_help_on_new_items():
    def world(n, seed): # labels from 1 % to 40 %, each with its own shift
        draw = np.random.default_rng(seed)
        share = np.geomspace(.01, .4, 10)
        truth = draw.random((n, 10)) < share
        return sigmoid(1.5 * (draw.normal(size=(n, 10)) + 2.2 * truth - 1.1) + np.log(share) + np.linspace(-1, 1, 10)), truth
    new, new_truth = world(20_000, 99)
    def score(limits): return skm.f1_score(new_truth, new >= limits, average="macro", zero_division=0)
    found = np.mean([[score(choose_thresholds(*world(200, i), shrink=s)) for s in (0, 3, 1e9)] for i in range(15)], 0)
    assert found[1] > found[0] - .003 and found[1] > found[2] + .01 and found[1] > score(.5)
    strict, lenient = (choose_thresholds(*world(3000, 0), metric=m).mean() for m in ("f0.5", "f2"))
    assert strict > lenient
    assert np.allclose(choose_thresholds(np.full((4, 2), .3), np.zeros((4, 2), bool)), .5)
    with pytest.raises(ParameterError): choose_thresholds(*world(10, 0), metric="accuracy")


def test_prediction_needs_numpy_only():
    code = ("import sys, visrec_nb.vision.calibration as c, visrec_nb.vision.evaluation, numpy as np\n"
            "c.conformal_sets(np.eye(3), {'method': 'lac', 'items': 3, 'scores': [.1, .2, .3]}, .5); c.reject(np.eye(3), .5)\n"
            "assert not {'scipy', 'sklearn', 'torch', 'matplotlib', 'fastai'} & set(sys.modules), 'heavy imports'")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_confusion_matrix():
    probs, targets = single(100, 5, 0)
    assert (confusion_matrix(targets, probs.argmax(1), 5) == skm.confusion_matrix(targets, probs.argmax(1), labels=range(5))).all()
