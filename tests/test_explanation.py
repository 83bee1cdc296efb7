"Explanations of a real network on real photos: what they point at matters to it, and they are of this network."

import numpy as np
import pytest

from visrec_nb.media.image import decode_image
from visrec_nb.vision.backbones import backbone
from visrec_nb.vision.encoder import open_encoder
from visrec_nb.vision.explanation import agreement, grad_cam, nearest_examples, occlusion, overlay

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def classifier(clothing_vectors):
    "A network for clothes: the packaged body and a linear head; six photos that it has not seen; the same by ONNX."
    from sklearn.linear_model import LogisticRegression

    from visrec_nb.vision.backbones import torch_backbone

    catalog, vectors = clothing_vectors
    row, encoder = backbone("efficientnet_lite0"), open_encoder("efficientnet_lite0")
    train = (catalog["split"] == "train").to_numpy()
    mean, std = vectors[train].mean(0), vectors[train].std(0) + 1e-2
    fitted = LogisticRegression(C=0.003, max_iter=100).fit((vectors[train] - mean) / std, catalog["label"].to_numpy()[train])
    head = torch.nn.Linear(vectors.shape[1], len(fitted.classes_))
    head.weight.data = torch.tensor(fitted.coef_ / std, dtype=torch.float32)
    head.bias.data = torch.tensor(fitted.intercept_ - (fitted.coef_ / std) @ mean, dtype=torch.float32)

    def classify(pixels):
        with torch.no_grad():
            return head(torch.from_numpy(encoder(pixels))).softmax(1).numpy()

    shown = catalog.filter(split="valid").sort("item_id").gather_every(57)
    pixels = np.stack([decode_image(open(path, "rb").read(), row.size) for path in shown["path"]])
    return row, torch.nn.Sequential(torch_backbone(row), head), classify, pixels


def covered(pixels, heat, hottest):
    "The photos with the hottest (or coldest) fifth of 8 x 8 places greyed."
    size = pixels.shape[1] // 8
    places = heat.reshape(len(heat), 8, size, 8, size).mean((2, 4)).reshape(len(heat), 64)
    order = np.argsort(-places if hottest else places, axis=1)[:, :13]
    out = pixels.copy()
    for picture, some in zip(out, order, strict=True):
        for y, x in zip(*np.divmod(some, 8), strict=True):
            picture[y * size:(y + 1) * size, x * size:(x + 1) * size] = 127
    return out


def test_what_the_maps_point_at_matters_to_the_network(classifier):
    row, net, classify, pixels = classifier
    before = classify(pixels)
    answer = before.argmax(1)
    rows = np.arange(len(pixels))
    for heat in (grad_cam(net, pixels, row.mean, row.std), occlusion(classify, pixels)):
        hot, cold = (classify(covered(pixels, heat, hottest))[rows, answer] for hottest in (True, False))
        assert (before[rows, answer] - hot).mean() > 2 * (before[rows, answer] - cold).mean() + 0.05


def test_maps_change_with_the_weights(classifier):
    "Adebayo et al. 2018: with random weights in the head the maps are others; with the same weights they are the same."
    row, net, _, pixels = classifier
    torch.manual_seed(0)
    number = np.arange(len(pixels)) % net[1].out_features
    real = grad_cam(net, pixels, row.mean, row.std, number)
    head = torch.nn.Linear(net[1].in_features, net[1].out_features)
    other_head = grad_cam(torch.nn.Sequential(net[0], head), pixels, row.mean, row.std, number)

    def alike(a, b):
        pairs = [(x.ravel(), y.ravel()) for x, y in zip(a, b, strict=True) if x.std() > 0 and y.std() > 0]
        return np.mean([np.corrcoef(x, y)[0, 1] for x, y in pairs])

    assert alike(real, other_head) < 0.5
    assert alike(real, grad_cam(net, pixels, row.mean, row.std, number)) > 0.999


def test_a_learner_goes_on_training_as_if_nothing_had_been_asked(classifier):
    "Modes, gradients in progress, frozen and trainable weights and running statistics are untouched by Grad-CAM."
    row, _, _, pixels = classifier
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2), torch.nn.BatchNorm2d(4), torch.nn.ReLU(inplace=True), torch.nn.Dropout(0.5),
                              torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    net.train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net(torch.rand(2, 3, 32, 32)).sum().backward()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    modes, free = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    heat = grad_cam(net, pixels[:2], row.mean, row.std)
    assert heat.shape == (2, row.size, row.size)
    with pytest.raises(RuntimeError), torch.no_grad():
        grad_cam(torch.nn.Sequential(net, torch.nn.Linear(3, 3)), pixels[:1], row.mean, row.std)
    assert [m.training for m in net.modules()] == modes and [p.requires_grad for p in net.parameters()] == free
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    for name, p in net.named_parameters():
        assert (p.grad is None) == (gradients[name] is None) and (p.grad is None or torch.equal(p.grad, gradients[name]))
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


def test_a_second_opinion_tells_right_answers_from_wrong_ones(clothing_vectors):
    "Where the nearest training photos agree with the answer, it is right more often."
    from sklearn.linear_model import RidgeClassifier

    catalog, vectors = clothing_vectors
    train, valid = ((catalog["split"] == part).to_numpy() for part in ("train", "valid"))
    labels = catalog["label"].to_numpy()
    answers = RidgeClassifier(1e3).fit(vectors[train], labels[train]).predict(vectors[valid])
    examples = nearest_examples(vectors[valid], vectors[train], catalog.filter(split="train"), 5, catalog.filter(split="valid"))
    share, right = agreement(examples, answers), answers == labels[valid]
    assert right[share >= 0.6].mean() > right[share < 0.6].mean() + 0.15


def test_an_overlay_of_nothing_is_the_grey_photo(classifier):
    *_, pixels = classifier
    grey = overlay(pixels, np.zeros(pixels.shape[:3], np.float32))
    assert np.ptp(grey.astype(int), axis=3).max() == 0
    with pytest.raises(ValueError, match="heat"):
        overlay(pixels, np.zeros((1, 2, 2), np.float32))
