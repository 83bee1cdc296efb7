"""Backbones without a network, their layers and files; photos on their way to an encoder; several encoders at once."""

import io
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageOps

from visrec_nb.core.errors import BundleError, InputError, MediaError, ParameterError
from visrec_nb.media.image import fit_pixels, load_image
from visrec_nb.vision.encoder import Encoder, FunctionEncoder, open_encoder
from visrec_nb.vision.features import ALL_VIEWS, embed, embed_all, image_preprocessing, read_photo, stream_features

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
from safetensors.torch import save_file  # noqa: E402

from visrec_nb.vision import backbones  # noqa: E402
from visrec_nb.vision.backbones import backbone, backbone_id, onnx_backbone, torch_backbone  # noqa: E402
from visrec_nb.vision.export import check_onnx, quantize_encoder  # noqa: E402

yy, xx = np.mgrid[:90, :120]
PICTURE = np.stack([xx * 2, yy * 2, 255 - xx], -1).astype(np.uint8)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    "A machine whose name server knows nobody, with empty caches."
    from huggingface_hub import constants

    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["resnet18", "botnet26t_256", "torchvision/squeezenet1_1"])
def test_weights_that_cannot_be_fetched_are_told_within_seconds(no_network, name):
    row = backbone(name)
    start = time.monotonic()
    with pytest.raises(InputError, match="could not be fetched") as e:
        torch_backbone(row)
    assert time.monotonic() - start < 8
    assert all(way in str(e.value) for way in ("efficientnet_lite0", "safetensors", "pretrained=False"))
    assert torch_backbone(row, pretrained=False).eval()(torch.zeros(1, 3, row.size, row.size)).shape == (1, row.dim)


def test_weights_fetched_before_are_used_without_a_network(no_network):
    from torchvision import models

    row, net = backbone("torchvision/squeezenet1_1"), models.squeezenet1_1()
    (no_network / "torch/hub/checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), no_network / "torch/hub/checkpoints/squeezenet1_1-b8a52dc0.pth")
    kept = torch_backbone(row).state_dict()
    assert all((value == net.state_dict()[key]).all() for key, value in kept.items())

    folder = no_network / "hub/models--timm--test_resnet.r160_in1k"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    net = timm.create_model("test_resnet")
    save_file(net.state_dict(), folder / "snapshots/abc/model.safetensors")
    start = time.monotonic()
    kept = torch_backbone(backbone("test_resnet")).state_dict()
    assert time.monotonic() - start < 8
    assert all((value == net.state_dict()[key]).all() for key, value in kept.items())


def test_a_host_that_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(backbones, "getproxies", dict)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        start = time.monotonic()
        assert not backbones._answers(f"http://127.0.0.1:{silent.getsockname()[1]}/", 0.5)
        silent.listen()
        assert backbones._answers(f"http://127.0.0.1:{silent.getsockname()[1]}/", 0.5)
        assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("efficientnet_lite00", "did you mean 'efficientnet_lite0' or"),
        ("torchvision/resnet19", "'torchvision/resnet18'"),
        ("restnet50", "'resnet50'"),
        ("resnet18.nonsense", "resnet18.a1_in1k"),
        ("torchvision/resnet18.nonsense", "IMAGENET1K_V1"),
        ("efficientnet_lite0@7", "its stages are 0 to 4"),
        ("efficientnet_lite0@first", "numbers of stages"),
        ("torchvision/squeezenet1_1@1", "does not show its layers"),
    ],
)
def test_names_that_nobody_knows(name, said):
    with pytest.raises(ParameterError) as e:
        backbone(name)
    assert said in str(e.value)


def test_size_where_the_network_allows_it():
    assert backbone("efficientnet_lite0", size=160).size == 160 and backbone(size=224) == backbone()
    assert backbone("vit_tiny_patch16_224", size=160).size == 160  # timm makes its position table anew
    with pytest.raises(ParameterError, match="does not take pictures of 160 x 160"):
        backbone("torchvision/vit_b_16", size=160)
    with pytest.raises(ParameterError, match="at least 1"):
        backbone(size=0)


def test_rows_say_what_timm_and_torchvision_say():
    row, cfg = backbone("mobilenetv3_small_050"), timm.get_pretrained_cfg("mobilenetv3_small_050")
    assert (row.size, row.interpolation, row.licence) == (cfg.input_size[1], cfg.interpolation, cfg.license)
    assert np.allclose(np.array(row.mean) / 255, cfg.mean) and np.allclose(np.array(row.std) / 255, cfg.std)
    assert row.dim == timm.create_model("mobilenetv3_small_050", num_classes=0)(torch.zeros(2, 3, 224, 224)).shape[1]
    from torchvision.models import ResNet50_Weights

    row, how = backbone("torchvision/resnet50.IMAGENET1K_V1"), ResNet50_Weights.IMAGENET1K_V1.transforms()
    assert (row.size, row.interpolation, row.dim) == (how.crop_size[0], how.interpolation.value, 2048)
    assert backbone_id(row) != backbone_id(backbone("torchvision/resnet50"))


def test_identities_and_places_in_the_store_are_those_of_former_times(tmp_path):
    assert backbone_id(backbone()) == "7aaac7af15de37b17385b17a7496a5578da9ee9b6d2a621f741158cc6fe77d19"
    assert backbone_id(backbone("resnet18")) == "ef66ef5f12bb74f70343d78550c239461c6caf8eb25c1279c740d2a091765c30"
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    catalog = pl.DataFrame({"item_id": ["a"], "path": [str(tmp_path / "a.png")]})
    as_now = image_preprocessing(views=["plain"])
    as_then = {"media": "image", "size": 224, "views": ["plain"]}
    assert embed(catalog, "efficientnet_lite0", as_now, tmp_path / "store").computed == 1
    assert (tmp_path / "store/37ed7bbf75744dfc").is_dir()
    assert embed(catalog, "efficientnet_lite0", as_then, tmp_path / "store").computed == 0
    for other in ({"fit": "crop"}, {"interpolation": "bilinear"}):
        assert embed(catalog, "efficientnet_lite0", image_preprocessing(views=["plain"], **other), tmp_path / "store").computed == 1
    assert len(list((tmp_path / "store").iterdir())) == 3


def test_weights_of_a_file(tmp_path):
    row = backbone("resnet18")
    whole = timm.create_model("resnet18", num_classes=7)
    save_file(whole.state_dict(), tmp_path / "mine.safetensors")
    net = torch_backbone(row, weights=tmp_path / "mine.safetensors")
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(net.eval()(pixels), whole.eval().forward_head(whole.forward_features(pixels), pre_logits=True))
    save_file(net.state_dict(), tmp_path / "bare.safetensors")
    assert torch.equal(torch_backbone(row, weights=tmp_path / "bare.safetensors").eval()(pixels), net(pixels))

    state = whole.state_dict()
    save_file(state | {"layer3.0.conv1.weight": torch.zeros(3, 3)}, tmp_path / "shape.safetensors")
    save_file({k: v for k, v in state.items() if k != "conv1.weight"}, tmp_path / "lacks.safetensors")
    save_file(timm.create_model("resnet34").state_dict(), tmp_path / "more.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "mine.safetensors").read_bytes()[:100_000])
    torch.save(state, tmp_path / "pickle.pth")
    wrong = {"shape": r"layer3.0.conv1.weight' is \(3, 3\)", "lacks": "has no tensor 'conv1.weight'", "more": "of another one",
             "half": "cannot be read", "absent": "no such file"}  # fmt: skip
    for name, said in wrong.items():
        with pytest.raises(InputError, match=said):
            torch_backbone(row, weights=tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="can hold code"):
        torch_backbone(row, weights=tmp_path / "pickle.pth")


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    "resnet18@2,3 with random weights for pictures of 64 pixels, as ONNX."
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISREC_CACHE", str(folder))
        yield onnx_backbone("resnet18@3,2", size=64, pretrained=False)


def test_layers_are_the_means_of_the_maps(layered):
    row = backbone("resnet18@2,3", size=64)
    whole, plain = torch_backbone(row, pretrained=False).eval(), torch_backbone(backbone("resnet18", 64), pretrained=False).eval()
    seen = []
    for layer in (plain.layer2, plain.layer3):
        layer.register_forward_hook(lambda net, put, out: seen.append(out.mean((2, 3))))
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    pixels = ((torch.tensor(noise).float() - torch.tensor(row.mean)) / torch.tensor(row.std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        last, got = plain(pixels), whole(pixels)
    assert row.dim == 128 + 256 + 512 == got.shape[1] and torch.allclose(got, torch.cat([*seen, last], 1), atol=1e-5)
    assert check_onnx(layered, {"pixels": noise}, got.numpy(), 1e-4) < 1e-4
    assert Encoder(layered).id == backbone_id(row, pretrained=False) != backbone_id(row)
    with pytest.raises(BundleError, match="differs from torch"):
        check_onnx(layered, {"pixels": noise}, got.numpy() + 1e-3, 1e-4)


def test_random_weights_are_the_same_everywhere_and_disturb_no_other_draw():
    row = backbone("resnet18", size=64)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = torch_backbone(row, pretrained=False)
    assert torch.equal(torch.rand(3), expected)
    two, other = torch_backbone(row, pretrained=False), torch_backbone(row, pretrained=False, seed=1)
    assert torch.equal(one.conv1.weight, two.conv1.weight) and not torch.equal(one.conv1.weight, other.conv1.weight)


def test_torchvision_as_onnx_knows_its_filter(tmp_path, monkeypatch):
    monkeypatch.setenv("VISREC_CACHE", str(tmp_path))
    encoder = open_encoder("torchvision/squeezenet1_1", "cpu", size=64, pretrained=False)
    assert (encoder.size, encoder.dim, encoder.interpolation) == (64, 512, "bilinear")
    row = backbone("torchvision/squeezenet1_1", 64)
    picture = fit_pixels(PICTURE, 64)
    pixels = ((torch.tensor(picture).float() - torch.tensor(row.mean)) / torch.tensor(row.std)).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = torch_backbone(row, pretrained=False).eval()(pixels).numpy()
    assert np.abs(encoder(picture[None]) - expected).max() < 1e-4 * np.abs(expected).max()


def test_an_8_bit_network_says_nearly_the_same(layered, tmp_path):
    draw = np.random.default_rng(0)
    pixels = np.stack([fit_pixels(draw.integers(0, 256, (4, 5, 3), dtype=np.uint8), 64) for _ in range(48)])
    taken = []

    def batches():
        for n in range(0, 32, 8):
            taken.append(n)
            yield pixels[n : n + 8]

    quantize_encoder(layered, tmp_path / "int8.onnx", batches())
    exact, short = Encoder(layered), Encoder(tmp_path / "int8.onnx")
    a, b = exact(pixels[32:]), short(pixels[32:])
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.99 and taken == [0, 8, 16, 24] and not (a == b).all()
    assert short.id != exact.id and (short.size, short.dim) == (exact.size, exact.dim)
    assert (tmp_path / "int8.onnx").stat().st_size < 0.4 * layered.stat().st_size
    for nothing in ([], pixels[:0]):
        with pytest.raises(InputError):
            quantize_encoder(layered, tmp_path / "none.onnx", nothing)
    with pytest.raises(ValueError, match="uint8"):
        quantize_encoder(layered, tmp_path / "none.onnx", pixels.astype(np.float32))
    assert not (tmp_path / "none.onnx").exists()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(90, 120), (120, 90), (64, 64), (30, 600)])
def test_the_ways_to_a_square_are_those_of_pillow(tmp_path, shape, interpolation):
    im = Image.fromarray(PICTURE).resize(shape[::-1])
    im.save(tmp_path / "a.png")
    method = Image.Resampling[interpolation.upper()]
    by_hand = {
        "squash": im.resize((64, 64), method),
        "crop": ImageOps.fit(im, (64, 64), method),
        "pad": ImageOps.pad(im, (64, 64), method, (127, 127, 127)),
    }
    for fit, expected in by_hand.items():
        got = read_photo((tmp_path / "a.png").read_bytes(), 64, ["plain"], fit=fit, interpolation=interpolation)[0]
        assert (np.abs(got.astype(int) - np.asarray(expected)) <= 1).all(), fit
        assert (got == load_image(tmp_path / "a.png", 64, fit=fit, interpolation=interpolation)).all()


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_large_jpegs_and_turned_ones_fit_alike(tmp_path, fit):
    large = Image.fromarray(PICTURE).resize((1200, 900))
    large.save(tmp_path / "large.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    reduced, turned = load_image(tmp_path / "large.jpg", 64, fit=fit), load_image(tmp_path / "turned.jpg", 64, fit=fit)
    whole = fit_pixels(np.asarray(Image.open(tmp_path / "large.jpg")), 64, fit)
    assert np.abs(reduced.astype(int) - whole).max() <= 6 and np.abs(reduced.astype(int) - turned).max() <= 6


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_odd_photos_hold_no_surprise(fit):
    def read(im, kind="PNG"):
        file = io.BytesIO()
        im.save(file, kind)
        return read_photo(file.getvalue(), 28, ALL_VIEWS, fit=fit)

    assert read(Image.new("RGB", (40, 2), "red")).shape == read(Image.new("RGB", (2, 40), "red")).shape == (len(ALL_VIEWS), 28, 28, 3)
    middle = {name: read(im, kind)[0, 13, 13].tolist() for name, im, kind in (
        ("oblong", Image.new("RGB", (1000, 50), "red"), "PNG"),
        ("thin", Image.new("RGB", (30_000, 1), "red"), "PNG"),
        ("grey", Image.new("L", (40, 40), 100), "JPEG"),
        ("16 bit", Image.fromarray(np.full((40, 40), 25700, np.uint16)), "PNG"),
        ("cmyk", Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "TIFF"),
        ("clear", Image.new("RGBA", (40, 40), (255, 0, 0, 0)), "PNG"),
        ("half clear", Image.new("RGBA", (40, 40), (255, 0, 0, 128)), "PNG"),
    )}  # fmt: skip
    assert middle["oblong"] == [255, 0, 0] and middle["grey"] == middle["16 bit"] == [100] * 3
    assert middle["cmyk"] == [255, 0, 0] and middle["clear"] == [255] * 3 and middle["half clear"] == [255, 127, 127]
    assert middle["thin"] == [255, 0, 0]


def test_what_is_not_known_is_refused():
    for wrong in ({"fit": "stretch"}, {"interpolation": "cubic"}, {"views": ["plain", "upside_down"]}, {"views": []}):
        with pytest.raises(ParameterError):
            image_preprocessing(**wrong)
    for wrong in (PICTURE[:, :, 0], PICTURE.astype(float), PICTURE[:0], np.zeros((5, 5, 4), np.uint8), [[1]]):
        with pytest.raises(MediaError, match="a picture is uint8"):
            fit_pixels(wrong, 32)


COLOURS = FunctionEncoder(lambda pixels: pixels.mean((1, 2)), "mean colour", size=32)
POINTS = FunctionEncoder(lambda pixels: pixels[:, [8, 15]][:, :, [8, 15]].reshape(len(pixels), -1), "four points", size=24)
VIEWS = ["plain", "left_flip"]


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_pixels_go_the_way_of_files(tmp_path, fit):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    how = image_preprocessing(24, VIEWS, fit, "bilinear")
    items = [tmp_path / "a.png", PICTURE, PICTURE[..., 0], (tmp_path / "a.png").read_bytes(), b"nothing", PICTURE[:, ::-1]]
    batches = list(stream_features(items, how, POINTS))
    features = np.concatenate([b.features for b in batches if b.rows])
    assert [row for b in batches for row in b.rows] == [0, 1, 3, 5] and {r for b in batches for r in b.errors} == {2, 4}
    assert (features[:3] == features[0]).all() and not (features[3] == features[0]).all()


def test_several_encoders_are_the_singles_side_by_side(tmp_path):
    for name in "ab":
        Image.fromarray(PICTURE[:: 1 if name == "a" else -1]).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n")
    shutil.copy(tmp_path / "a.png", tmp_path / "d.png")
    paths = [str(tmp_path / f"{name}.png") for name in "abcd"]
    catalog = pl.DataFrame({"item_id": list("abcd"), "path": paths})
    hows = [image_preprocessing(32, VIEWS), image_preprocessing(24, VIEWS, "crop")]
    both = embed_all(catalog, [COLOURS, POINTS], hows, tmp_path / "store")
    singles = [embed(catalog, e, how).features for e, how in zip([COLOURS, POINTS], hows, strict=True)]
    assert both.features.shape == (3, 2, 15) and (both.features == np.concatenate(singles, 2)).all()
    assert both.skipped["item_id"].to_list() == ["c"] and both.catalog["item_id"].to_list() == ["a", "b", "d"]
    assert (both.vectors([2, 0]) == both.features[[2, 0]]).all() and (both.for_items(["b"])[0] == both.features[1].mean(0)).all()
    batches = list(stream_features([*paths, PICTURE], hows, [COLOURS, POINTS]))
    streamed = np.concatenate([b.features for b in batches if b.rows])
    assert (streamed[:3] == both.features).all() and (streamed[3] == streamed[0]).all()
    assert [list(b.errors) for b in batches if b.errors] == [[2]]
    assert embed_all(catalog, [COLOURS, POINTS], hows, tmp_path / "store").computed == 0
    assert embed(catalog, POINTS, hows[1], tmp_path / "store").computed == 0


def test_clips_through_several_encoders_say_their_motion_once(tmp_path):
    from visrec_nb.media.render import render_move
    from visrec_nb.vision.features import clip_preprocessing

    render_move(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8), "pan_left", tmp_path / "a.mp4", seed=0, size=64)
    catalog = pl.DataFrame({"item_id": ["a"], "path": [str(tmp_path / "a.mp4")]})
    hows = [clip_preprocessing(32, 3), clip_preprocessing(24, 3)]
    both = embed_all(catalog, [COLOURS, POINTS], hows).features
    first, second = (embed(catalog, e, how).features for e, how in zip([COLOURS, POINTS], hows, strict=True))
    assert (both == np.concatenate([first[..., :3], second[..., :12], first[..., 3:]], 2)).all()
    (batch,) = stream_features([tmp_path / "a.mp4"], hows, [COLOURS, POINTS])
    assert (batch.features == both).all()


def test_encoders_and_preprocessings_must_fit_each_other(tmp_path):
    catalog = pl.DataFrame({"item_id": ["a"], "path": [str(Path(tmp_path / "a.png"))]})
    with pytest.raises(ParameterError, match="wants pictures of 32 pixels"):
        embed(catalog, COLOURS, image_preprocessing(24))
    with pytest.raises(ParameterError, match="as many encoders"):
        embed_all(catalog, [COLOURS, POINTS], [image_preprocessing(32)])
    with pytest.raises(ParameterError, match="as many encoders"):
        list(stream_features([], image_preprocessing(32), [COLOURS]))
    with pytest.raises(ParameterError, match="the same views"):
        embed_all(catalog, [COLOURS, POINTS], [image_preprocessing(32), image_preprocessing(24, ["plain"])])
