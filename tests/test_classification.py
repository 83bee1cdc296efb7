"""Image classifiers as users meet them: through the command line and the package, with good and with bad input."""

import json
import sys
import warnings
from pathlib import Path

import helpers
import numpy as np
import polars as pl
import pytest
from PIL import Image

from visrec_nb.cli import main
from visrec_nb.core.errors import CatalogError, DataWarning, InputError, ParameterError
from visrec_nb.data.catalog import class_labels

LABELS = ("horizontal", "vertical")


def texture(label: str, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    stripe = (64, 1, 3) if label == "horizontal" else (1, 64, 3)
    return np.broadcast_to(draw.integers(0, 256, stripe, dtype=np.uint8), (64, 64, 3))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A catalog of 60 textures of two kinds."
    folder, rows = tmp_path_factory.mktemp("textures"), []
    for number, (part, count) in enumerate((("train", 16), ("valid", 8), ("test", 6))):
        for label in LABELS:
            for n in range(count):
                path = folder / f"{part}-{label}-{n}.png"
                Image.fromarray(texture(label, 1000 * number + 2 * n + (label == "vertical"))).save(path)
                rows.append({"item_id": path.stem, "path": str(path), "label": label, "split": part})
    return pl.DataFrame(rows)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def learn(photos, store):
    from visrec_nb.vision import image_learner

    return image_learner(photos, store=store).fit_head()


@pytest.fixture(scope="module")
def bundle(learn, tmp_path_factory):
    return learn.to_bundle(tmp_path_factory.mktemp("bundles") / "textures")


def visrec(*arguments):
    run = helpers.visrec(*arguments)
    assert run.returncode == 0, run.stderr
    return run


def test_a_bundle_answers_for_files_arrays_and_frames_alike(bundle, photos):
    test = photos.filter(split="test")
    by_path, by_frame = bundle.predict(test["path"].to_list()), bundle.predict(test)
    by_array = bundle.predict([np.asarray(Image.open(p).convert("RGB")) for p in test["path"]])
    assert by_path["label"].to_list() == test["label"].to_list()
    assert by_frame.equals(by_path) and by_array.drop("path").equals(by_path.drop("path")) and by_array["path"][1] == "array 1"
    assert bundle.classify(np.stack([np.asarray(Image.open(p).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
                                     for p in test["path"]])).argmax(1).tolist() == [LABELS.index(v) for v in test["label"]]


def test_the_graph_is_the_network(learn, bundle, photos):
    "fastai's own get_preds on the same files, before the temperature."
    import torch

    valid = learn.catalog.filter(split="valid")
    with learn.no_bar():
        theirs = learn.get_preds(dl=learn.dls.valid)[0]
    logits = bundle.logits(bundle.embed(valid).features)
    assert np.abs(torch.softmax(torch.from_numpy(logits), 1).numpy() - theirs.numpy()).max() < 1e-4
    assert max(bundle.manifest["network_gap"], bundle.manifest["head_gap"]) <= 1e-4


def test_sets_rejection_and_top(bundle, photos):
    paths = photos.filter(split="test")["path"].to_list()
    sets = bundle.predict(paths, coverage=0.9)
    assert all(len(s) >= 1 for s in sets["labels"])
    refused = bundle.predict(paths, reject_below=1.1)
    assert refused["label"].null_count() == len(paths) and refused["labels"].list.len().min() == 2
    assert bundle.predict(paths, top=1)["labels"].list.len().max() == 1
    with pytest.raises(InputError): bundle.predict(paths, top=0)


def test_integers_keep_the_answers(learn, photos, tmp_path):
    small = learn.to_bundle(tmp_path / "small", int8=True)
    test = photos.filter(split="test")
    assert small.predict(test)["label"].to_list() == test["label"].to_list()
    facts = small.manifest
    assert facts["files"]["encoder.onnx"]["bytes"] < 5e6 and facts["int8"]["accuracy_int8"] >= facts["int8"]["accuracy_float32"] - 0.1


def test_several_backbones_and_components(photos, store, tmp_path):
    from visrec_nb.vision import image_learner

    both = image_learner(photos, ["efficientnet_lite0", "efficientnet_lite0@2"], size=96, components=8, store=store).fit_head()
    model = both.to_bundle(tmp_path / "both")
    test = photos.filter(split="test")
    assert len(model.encoders) == 2 and model.predict(test)["label"].to_list() == test["label"].to_list()
    assert model.evaluate(photos).metrics["accuracy"] == 1
    with pytest.raises(ParameterError, match="frozen"): both.fit_network(1)


def test_grey_deep_and_oblong_photos(bundle, tmp_path):
    stripes = texture("vertical", 5)
    Image.fromarray(stripes[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(stripes[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.repeat(stripes[:8], 1, 0)).save(tmp_path / "banner.png")
    Image.fromarray(stripes).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    answers = bundle.predict([tmp_path / n for n in ("grey.png", "deep.png", "banner.png", "print.jpg")])
    assert answers["error"].null_count() == 4 and answers["label"].to_list() == ["vertical"] * 4
    grey, deep = answers["score"].to_list()[:2]
    assert abs(grey - deep) < 1e-3


def test_labels_that_nobody_taught(bundle, photos, tmp_path):
    test = photos.filter(split="test")
    odd = test.with_columns(label=pl.when(pl.int_range(pl.len()) < 2).then(pl.lit("spiral")).otherwise("label"))
    with pytest.warns(DataWarning, match="spiral"):
        found = bundle.evaluate(odd)
    assert found.metrics["unknown_labels"] == 2 and found.metrics["items"] == test.height - 2
    with pytest.raises(CatalogError, match="does not know"): bundle.evaluate(test.with_columns(label=pl.lit("spiral")))


def test_bad_training_data(photos, store):
    from visrec_nb.vision import image_learner

    with pytest.raises(CatalogError, match="at least two classes"): image_learner(photos.filter(label="vertical"), store=store)
    train = photos.filter(split="train").drop("split")
    lone = pl.concat([train.filter(label="vertical"), train.filter(label="horizontal").head(1)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert image_learner(lone, store=store, views=["plain"]).fit_head().labels == list(LABELS)
    twins = photos.with_columns(label=pl.when(pl.int_range(pl.len()) % 3 == 0).then(pl.col("label") + " ").otherwise("label"))
    with pytest.warns(DataWarning, match="case, blanks"): image_learner(twins, store=store, views=["plain"])
    accents = pl.DataFrame({"label": ["J\u00e4cke", "Ja\u0308cke", "hose"]})
    with pytest.warns(DataWarning, match="accents"): assert len(class_labels(accents)) == 3
    with pytest.raises(CatalogError, match="has no training item"):
        image_learner(photos.with_columns(label=pl.when(split="valid").then(pl.lit("spiral")).otherwise("label")), store=store)
    with pytest.raises(ParameterError, match="efficientnet_lite0"): image_learner(photos, "eficientnet_lite0", store=store)
    with pytest.raises(ParameterError, match="gives its answer away"): image_learner(photos, columns=["label"], store=store)
    with pytest.raises(CatalogError, match="no column 'price'"): image_learner(photos, columns=["price"], store=store)


def test_fastai_s_pickles_are_refused(learn, tmp_path):
    from visrec_nb.serve.bundle import open_bundle

    with pytest.raises(InputError, match="to_bundle"): learn.export(tmp_path / "export.pkl")
    (tmp_path / "export.pkl").write_bytes(b"\x80\x04")
    with pytest.raises(InputError): open_bundle(tmp_path / "export.pkl")


@pytest.mark.slow
def test_the_command_line(photos, tmp_path, monkeypatch, capsys):
    catalog = tmp_path / "catalog.csv"
    photos.with_columns(price=pl.when(label="vertical").then(9.0).otherwise(1.0)).write_csv(catalog)
    metrics = json.loads(visrec("train", "image", catalog, "--out", tmp_path / "a", "--head-only", "--json").stdout)
    assert metrics["accuracy"] == 1 and metrics["unknown_labels"] == 0 and "set_coverage@90" in metrics
    visrec("train", "image", catalog, "--out", tmp_path / "b", "--head-only", "--columns", "price", "--int8")
    told = visrec("train", "image", catalog, "--out", tmp_path / "c", "--epochs", 1, "--size", 64).stderr
    assert "head" in told and "whole network" in told and "kept" in told and not Path(tmp_path / "c.checkpoints").exists()
    compared = json.loads(visrec("evaluate", tmp_path / "a", catalog, "--compare", tmp_path / "c", "--json").stdout)
    assert compared["both_right"] + compared["only_a_right"] + compared["only_b_right"] + compared["both_wrong"] == 12
    answers = json.loads(visrec("predict", tmp_path / "b", catalog, "--coverage", 0.9, "--json").stdout)["predictions"]
    assert len(answers) == 60 and answers[0]["label"] == "horizontal"
    for wrong, words in ((("predict", tmp_path / "b", photos["path"][0]), "price"),
                         (("train", "image", catalog, "--out", tmp_path / "d", "--arch", "resnet19", "--head-only"), "did you mean"),
                         (("train", "image", catalog, "--out", tmp_path / "d", "--columns", "price"), "--head-only"),
                         (("train", "image", catalog, "--out", tmp_path / "d", "--fit", "stretch", "--head-only"), "squash"),
                         (("train", "image", tmp_path / "nowhere", "--out", catalog), "is not a bundle")): # asked before anything is read
        monkeypatch.setattr(sys, "argv", ["visrec", *map(str, wrong)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and words in said and "Traceback" not in said


def test_answers_to_items_left_out_calibrate_as_well_as_items_nobody_saw():
    from visrec_nb.vision.bundles import head_logits
    from visrec_nb.vision.calibration import fit_temperature
    from visrec_nb.vision.evaluation import log_loss, softmax
    from visrec_nb.vision.head_fitting import fit_head_on
    from visrec_nb.vision.heads import ImageHead

    draw = np.random.default_rng(5)
    def clips(n):
        y = draw.integers(0, 3, n)
        return (0.9 * np.eye(3, 60)[y] + draw.normal(size=(n, 60))).astype(np.float32)[:, None], y
    (x, y), (fresh, truth) = clips(250), clips(6000)
    head = ImageHead(60, 3)
    left_out = fit_head_on(head, x, y, np.arange(250) % 5, strengths=[1e-4, 1e-5])[1]
    logits = head_logits(head, fresh)
    heats = {"left out": fit_temperature(left_out, y), "seen": fit_temperature(head_logits(head, x), y),
             "best": fit_temperature(logits, truth)}
    loss = {name: log_loss(softmax(logits, heat), truth) for name, heat in heats.items()}
    assert loss["left out"] < loss["best"] + 0.03 and loss["seen"] > loss["best"] + 0.15, (loss, heats)


def test_a_head_without_validation_items_is_also_a_fastai_learner(photos, store, tmp_path):
    from visrec_nb.vision import image_learner

    learn = image_learner(photos.drop("split"), store=store, valid_fraction=0.0)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        with pytest.raises(ParameterError, match="fit_head"): learn.to_bundle(tmp_path / "b")
