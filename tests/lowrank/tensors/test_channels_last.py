"""Gradients where the output's gradient has its channels last in memory: autograd's, and no copy of what is large."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from references import DEVICE, TOLERANCE, autograd, random_tensor
from strategies import convolutions
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank import Tucker
from lowrank.kernels import library
from lowrank.layers.kinds import TransposedConvGeometry
from lowrank.tensors.geometry import ConvGeometry
from lowrank.tensors.gradients import gradients, weight_gradient

SHAPE = (6, 8, 10, 9)
# Layers, and the ranks of an input of that shape; a rank that is a size has no factor.
CASES = [
    (nn.Conv2d(8, 12, 1), (3, 4, 2, 5)),
    (nn.Conv2d(8, 12, 1), (6, 4, 2, 5)),
    (nn.Conv2d(8, 12, 1), (3, 8, 10, 9)),
    (nn.Conv2d(8, 12, 1, stride=2), (3, 4, 2, 5)),
    (nn.Conv2d(8, 12, 1, groups=4), (3, 4, 2, 5)),
    (nn.Conv2d(8, 12, 3, padding=1), (3, 4, 2, 5)),
    (nn.Conv2d(8, 12, 3, padding=1), (6, 4, 2, 5)),
    (nn.Conv2d(8, 8, 5, 2, 2, groups=8), (2, 3, 2, 2)),
    (nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="circular"), (2, 8, 2, 2)),
    (nn.ConvTranspose2d(8, 12, 3, 2, 1), (3, 4, 2, 5)),
    (nn.ConvTranspose2d(8, 12, 1), (3, 4, 2, 5)),
]


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def tucker_of(shape, ranks, seed=0):
    sizes = enumerate(zip(shape, ranks, strict=True))
    factors = tuple(None if r == n else random_tensor(n, r, seed=seed + mode) for mode, (n, r) in sizes)
    return Tucker(random_tensor(*ranks, seed=seed + 9), factors)


def geometry_of(layer):
    return (TransposedConvGeometry if isinstance(layer, nn.ConvTranspose2d) else ConvGeometry).of(layer)


class Copied(TorchDispatchMode):
    """Sizes of all that is copied."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.sizes.append(result.numel())
        return result


@given(convolutions(), st.data())
def test_gradients_of_any_convolution_are_autograds_on_the_dense_input(setting, data):
    layer, grad = setting.layer(), last(setting.grad())
    tucker = tucker_of(setting.shape, [data.draw(st.integers(1, size)) for size in setting.shape], setting.seed)
    wanted = autograd(layer, tucker.dense(), grad)[2]["weight"]
    found, bias = gradients(tucker, grad, geometry_of(layer))
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    torch.testing.assert_close(bias, grad.sum((0, 2, 3)), **TOLERANCE)
    torch.testing.assert_close(weight_gradient(tucker, grad, geometry_of(layer)), wanted, **TOLERANCE)


@pytest.mark.parametrize("layer", [nn.Conv3d(6, 4, 1), nn.Conv3d(6, 4, 3, padding=1)], ids=str)
@pytest.mark.parametrize("ranks", [(2, 3, 2, 3, 2), (5, 6, 2, 4, 3)])
def test_of_three_dimensions(layer, ranks):
    layer, tucker = copy.deepcopy(layer).to(DEVICE, torch.float64), tucker_of((5, 6, 4, 4, 3), ranks)
    grad = random_tensor(*layer(tucker.dense()).shape, seed=1).contiguous(memory_format=torch.channels_last_3d)
    wanted = autograd(layer, tucker.dense(), grad)[2]["weight"]
    found, bias = gradients(tucker, grad, geometry_of(layer))
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    torch.testing.assert_close(bias, grad.sum((0, 2, 3, 4)), **TOLERANCE)


@pytest.mark.parametrize("context", [nullcontext, library.plain], ids=["compiled", "plain"])
@pytest.mark.parametrize(("layer", "ranks"), CASES, ids=str)
def test_so_they_are_in_single_precision_which_kernels_are_for(layer, ranks, context):
    layer, tucker = copy.deepcopy(layer).to(DEVICE, torch.float64), tucker_of(SHAPE, ranks)
    grad = last(random_tensor(*layer(tucker.dense()).shape, seed=1))
    wanted = autograd(layer, tucker.dense(), grad)[2]["weight"]
    with context():
        found, bias = gradients(tucker.to(torch.float32), grad.float(), geometry_of(layer))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    torch.testing.assert_close(bias.double(), grad.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layer", "ranks"), [case for case in CASES if case[1][0] < 6 and case[1][1] < 8], ids=str)
def test_nothing_as_large_as_the_gradient_is_copied(layer, ranks):
    layer, tucker = copy.deepcopy(layer).to(DEVICE, torch.float64), tucker_of(SHAPE, ranks)
    grad = last(random_tensor(*layer(tucker.dense()).shape, seed=1))
    with Copied() as copied:
        gradients(tucker, grad, geometry_of(layer))
    assert max(copied.sizes, default=0) < grad.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bias_gradient_of_what_lies_beyond_the_caches(dtype):
    grad = last(torch.randn(3, 48, 171, 173, dtype=dtype, device=DEVICE))
    found = geometry_of(nn.Conv2d(4, 48, 1)).bias_gradient(grad)
    torch.testing.assert_close(found, grad.double().sum((0, 2, 3)).to(dtype), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("side", [2, 12])  # pairs of positions, and PyTorch's own
def test_a_weight_gradient_lies_as_a_weight_does_that_has_its_channels_last(side):
    layer = nn.Conv2d(8, 12, 3, padding=1, bias=False, device=DEVICE).to(memory_format=torch.channels_last)
    x = last(torch.randn(4, 8, side, side, device=DEVICE))
    grad = torch.randn_like(layer(x))
    wanted = torch.autograd.grad(layer(x), layer.weight, grad)[0]
    found = geometry_of(layer).weight_gradient(x, grad)
    torch.testing.assert_close(found, wanted)
    assert found.stride() == layer.weight.stride()


@pytest.mark.parametrize("method", [lowrank.Vanilla(), lowrank.ASI((2, 8, 2, 2))], ids=str)
def test_neither_bytes_nor_the_peak_depend_on_the_order_in_memory(method):
    """Large weights on small images, of which no second copy may be made."""
    layers = [nn.Conv2d(64, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU(), nn.Conv2d(256, 512, 3, padding=1)]
    network, x = nn.Sequential(*layers, nn.BatchNorm2d(512), nn.ReLU()).eval().to(DEVICE), torch.randn(4, 64, 4, 4)
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        own = copy.deepcopy(network).to(memory_format=form)
        lowrank.convert(own, lowrank.trailing_layers(own, "all"), method)
        given = own, lambda model, batch: model(batch).square().sum(), x.to(DEVICE).contiguous(memory_format=form)
        found.append((lowrank.saved_bytes(*given), lowrank.peak_bytes(*given)))
    (kept, peak), (kept_last, peak_last) = found
    assert kept_last == kept
    assert peak_last <= 1.02 * peak


WAYS = [
    lowrank.ASI((8, 8, 2, 2), storage="int8"),
    lowrank.ASI((16, 512, 2, 2)),
    lowrank.HOSVD(0.9),
    lowrank.GradientFilter(2),
]


@pytest.mark.slow
@pytest.mark.parametrize("method", WAYS, ids=["ranks", "all channels", "energy", "patches"])
def test_nor_does_the_peak_of_a_network_whose_weights_are_most_of_it(method):
    """Its largest gradient is 9 MiB, of which there is no second."""
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        network = torchvision.models.resnet18(num_classes=10).eval().to(DEVICE, memory_format=form)
        names = lowrank.trailing_layers(network, 4)
        lowrank.freeze_before(network, names)
        x = torch.randn(16, 3, 72, 72, device=DEVICE).contiguous(memory_format=form)
        step = network, lambda model, batch: model(batch).square().sum(), x
        vanilla = lowrank.peak_bytes(*step)
        lowrank.convert(network, names, method, everywhere=True)
        found.append(lowrank.peak_bytes(*step) / vanilla)
    assert max(found) <= 1.05
