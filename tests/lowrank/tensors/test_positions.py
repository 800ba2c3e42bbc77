"""Weight gradients from pairs of positions: equal to autograd's, and chosen where they are meant to be."""

import pytest
import torch
from hypothesis import assume, given
from references import DEVICE, TOLERANCE, autograd, random_tensor
from strategies import convolutions
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.tensors.geometry import ConvGeometry
from lowrank.tensors.positions import joined_pairs, pays, sum_of_products, weight_gradient


def by_pairs(layer, x, grad):
    sizes = (tuple(x.shape[2:]), tuple(grad.shape[2:]), layer.kernel_size)
    pairs = joined_pairs(*sizes, layer.stride, layer.padding, layer.dilation)
    return weight_gradient(x, grad, pairs, layer.kernel_size, layer.groups)


@pytest.mark.slow
@given(convolutions())
def test_of_any_layer_without_groups_or_with_one_for_each_channel_equal_autograds(setting):
    layer, x, grad = setting.layer(), setting.x(), setting.grad()
    assume(layer.groups in (1, layer.in_channels) and (layer.groups == 1 or layer.out_channels == layer.groups))
    layer.bias = None
    _, _, gradients = autograd(layer, x, grad)
    geometry = ConvGeometry.of(layer)
    layer.padding = tuple(0 if not geometry.native else ahead for ahead, _ in geometry._pads)
    torch.testing.assert_close(by_pairs(layer, geometry._pad(x), grad), gradients["weight"], **TOLERANCE)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 5, padding=2), (2, 3, 4)),
        (nn.Conv1d(6, 6, 7, 2, 3, groups=6), (3, 6, 9)),
        (nn.Conv3d(2, 3, 3, padding=1), (2, 2, 2, 3, 2)),
        (nn.Conv2d(70, 70, 5, padding=2, groups=70), (3, 70, 9, 9)),  # more channels than are computed at once
    ],
    ids=str,
)
def test_of_one_and_three_dimensions_and_of_many_channels(layer, shape):
    layer, x = layer.double(), random_tensor(*shape)
    grad = random_tensor(*layer(x).shape, seed=1)
    layer(x).backward(grad)
    torch.testing.assert_close(by_pairs(layer, x, grad), layer.weight.grad, **TOLERANCE)


@pytest.mark.cpu_only("on a GPU its own operators are faster")
@pytest.mark.parametrize(
    ("groups", "kernel", "side", "expected"),
    [
        (1, 3, 2, True),  # most of the kernel lies on the padding
        (1, 3, 4, False),
        (1, 1, 1, False),
        (8, 3, 2, True),
        (8, 3, 7, False),
        (8, 5, 12, True),
        (8, 5, 56, False),
        (4, 3, 2, False),  # groups of several channels
    ],
)
def test_where_they_pay(groups, kernel, side, expected):
    x = torch.zeros(2, 8, side, side)
    assert pays(x, (kernel, kernel), groups, 8) == expected
    assert not pays(x.bfloat16(), (kernel, kernel), groups, 8)


class LargestTensor(TorchDispatchMode):
    """Numbers of the largest tensor that an operator makes, but for views."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        if isinstance(found, torch.Tensor) and not function.is_view:
            self.numbers = max(self.numbers, found.numel())
        return found


@pytest.mark.parametrize("samples", [1, 16, 40])
def test_of_a_1x1_convolution_on_small_images_from_copies_of_few_samples(samples):
    x, grad = random_tensor(samples, 90, 2, 2), random_tensor(samples, 80, 2, 2, seed=1)
    wanted = torch.einsum("bohw,bchw->oc", grad, x)
    with LargestTensor() as largest:
        found = sum_of_products(x, grad)
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    torch.testing.assert_close(sum_of_products(x.float(), grad.float()).double(), wanted, rtol=0, atol=1e-4)
    if DEVICE == "cpu":
        assert largest.numbers <= max(80 * 90, 16 * 90 * 4)
