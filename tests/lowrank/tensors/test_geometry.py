import pytest
import torch
from hypothesis import given
from references import TOLERANCE, autograd, random_tensor
from strategies import LAYERS, convolutions
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank.tensors.geometry import ConvGeometry, LinearGeometry


def geometry_of(layer):
    return ConvGeometry.of(layer) if isinstance(layer, nn.Conv2d) else LinearGeometry()


@given(LAYERS)
def test_forward_and_every_gradient_equal_autograd(setting):
    layer, x, grad = setting.layer(), setting.x(), setting.grad()
    geometry = geometry_of(layer)
    y, grad_x, gradients = autograd(layer, x, grad)
    torch.testing.assert_close(geometry.forward(x, layer.weight, layer.bias), y, **TOLERANCE)
    torch.testing.assert_close(geometry.input_gradient(grad, layer.weight, tuple(x.shape)), grad_x, **TOLERANCE)
    torch.testing.assert_close(geometry.weight_gradient(x, grad), gradients["weight"], **TOLERANCE)
    if layer.bias is not None:
        torch.testing.assert_close(geometry.bias_gradient(grad), gradients["bias"], **TOLERANCE)


@pytest.mark.slow
@given(convolutions())
def test_single_precision_has_ways_of_its_own_to_the_same(setting):
    layer, x, grad = setting.layer(), setting.x(), setting.grad()
    geometry = geometry_of(layer)
    y, grad_x, gradients = autograd(layer, x, grad)
    x32, weight, grad32 = (tensor.detach().float() for tensor in (x, layer.weight, grad))
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    if layer.bias is not None:
        torch.testing.assert_close(geometry.affine(x32, weight, layer.bias.detach().float()), y.detach(), **close)
    torch.testing.assert_close(geometry.input_gradient(grad32, weight, tuple(x.shape)), grad_x, **close)
    torch.testing.assert_close(geometry.weight_gradient(x32, grad32), gradients["weight"], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 3), (40, 3), (24, 5), (3, 7)])
def test_products_of_small_images_are_autograds(size, dtype):
    """1 x 1 convolutions of so few positions that samples are multiplied side by side."""
    samples, side = size
    layer = nn.Conv2d(96, 160, 1).double()
    x, grad = random_tensor(samples, 96, side, side), random_tensor(samples, 160, side, side, seed=1)
    y, grad_x, gradients = autograd(layer, x, grad)
    geometry, close = ConvGeometry.of(layer), {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    x, grad, weight, bias = (tensor.detach().to(dtype) for tensor in (x, grad, layer.weight, layer.bias))
    with torch.no_grad():
        torch.testing.assert_close(geometry.affine(x, weight, bias), y, **close)
    torch.testing.assert_close(geometry.input_gradient(grad, weight, tuple(x.shape)), grad_x, **close)
    torch.testing.assert_close(geometry.weight_gradient(x, grad), gradients["weight"], **close)
    torch.testing.assert_close(geometry.bias_gradient(grad), gradients["bias"], **close)


@given(LAYERS)
def test_output_shape_is_that_of_the_layer(setting):
    layer = setting.layer()
    out_channels = layer.weight.shape[0]
    assert geometry_of(layer).output_shape(setting.shape, out_channels) == tuple(layer(setting.x()).shape)


@given(LAYERS)
def test_macs_are_half_the_flops_that_pytorch_counts(setting):
    layer, x = setting.layer(), setting.x()
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert 2 * geometry_of(layer).macs(setting.shape, layer.weight.shape[0]) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "padding"),
    [
        ({"kernel_size": 3, "padding": 1}, (1, 1, 1, 1)),
        ({"kernel_size": 3, "padding": (1, 2)}, (1, 1, 2, 2)),
        ({"kernel_size": 3, "padding": "valid"}, (0, 0, 0, 0)),
        ({"kernel_size": (4, 3), "padding": "same"}, (1, 2, 1, 1)),
        ({"kernel_size": (2, 3), "dilation": (3, 2), "padding": "same"}, (1, 2, 2, 2)),
    ],
)
def test_padding_is_top_bottom_left_right(options, padding):
    assert ConvGeometry.of(nn.Conv2d(2, 2, **options)).padding == padding


@pytest.mark.parametrize(
    ("options", "native", "pointwise"),
    [
        ({"kernel_size": 3, "padding": (0, 1)}, True, False),
        ({"kernel_size": 1, "stride": 2}, True, True),
        ({"kernel_size": 1, "padding": 1}, True, False),
        ({"kernel_size": 2, "padding": "same"}, False, False),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, False, False),
    ],
)
def test_what_counts_as_native_padding_and_as_pointwise(options, native, pointwise):
    geometry = ConvGeometry.of(nn.Conv2d(2, 2, **options))
    assert (geometry.native, geometry.pointwise) == (native, pointwise)


@given(convolutions())
def test_equal_layers_have_equal_hashable_geometries(setting):
    first, second = ConvGeometry.of(setting.layer()), ConvGeometry.of(setting.layer())
    assert first == second
    assert hash(first) == hash(second)


def test_settings_and_kernel_are_those_of_the_moment():
    """As where a built backbone is dilated, or a kernel is padded or merged."""
    layer = nn.Conv2d(2, 4, 3, stride=2, padding=1)
    layer.stride, layer.dilation, layer.padding, layer.groups = (1, 1), (2, 3), (4, 2), 1
    layer.weight = nn.Parameter(torch.randn(4, 2, 5, 1))
    geometry, x = ConvGeometry.of(layer), torch.randn(2, 2, 16, 17)
    assert (geometry.kernel, geometry.stride, geometry.dilation) == ((5, 1), (1, 1), (2, 3))
    assert geometry.padding == (4, 4, 2, 2)
    torch.testing.assert_close(geometry.forward(x, layer.weight, layer.bias), layer(x))
    assert geometry.output_shape(tuple(x.shape), 4) == layer(x).shape
