"""Weight gradients of depthwise convolutions in one compiled pass against PyTorch's in double precision."""

import pytest
import torch
import torch.nn.functional as F

from lowrank import kernels
from lowrank.kernels import library, passes
from lowrank.tensors.geometry import ConvGeometry

pytestmark = [
    pytest.mark.cpu_only("compiled kernels work in its memory"),
    pytest.mark.skipif(not kernels.status().active, reason=str(kernels.status())),
]
# Input, kernel, stride, padding, dilation: kernels of more places than are taken at once, images smaller than them,
# channels that do not fill a vector, inputs of which the last rows are not read.
CASES = [
    ((8, 32, 8, 8), (7, 7), (1, 1), (3, 3), (1, 1)),
    ((3, 17, 9, 12), (5, 5), (2, 2), (2, 2), (1, 1)),
    ((2, 5, 15, 14), (3, 5), (3, 2), (2, 4), (2, 3)),
    ((1, 33, 4, 3), (7, 5), (1, 1), (3, 2), (1, 1)),
    ((2, 16, 1, 20), (1, 13), (1, 2), (0, 6), (1, 1)),
    ((4, 2, 10, 11), (2, 2), (3, 3), (0, 0), (1, 1)),
    ((2, 3, 5, 5), (1, 1), (4, 4), (3, 3), (1, 1)),
]


def given(shape, kernel, stride, padding, dilation):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    y = F.conv2d(x, x.new_zeros(shape[1], 1, *kernel), None, stride, padding, dilation, shape[1])
    return x, torch.randn(y.shape, generator=generator)


def stocks(x, grad, kernel, stride, padding, dilation):
    """The same by autograd, in the precision of the input."""
    weight = x.new_zeros(x.shape[1], 1, *kernel, requires_grad=True)
    y = F.conv2d(x, weight, None, stride, padding, dilation, x.shape[1])
    return torch.autograd.grad(y, weight, grad)[0]


@pytest.fixture(params=[4, 8, 16], autouse=True)
def width(request):
    library.library().set_width(request.param)
    yield
    library.library().set_width(16)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_it_is_stocks(case, threads):
    (x, grad), sizes = given(*case), case[1:]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = passes.depthwise(x, grad, *sizes)
    finally:
        torch.set_num_threads(before)
    wanted = stocks(x.double(), grad.double(), *sizes)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_in_any_layout_and_not_in_double_precision():
    x, grad = given(*CASES[0])
    wanted = passes.depthwise(x, grad, *CASES[0][1:])
    last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad)]
    assert torch.equal(passes.depthwise(*last, *CASES[0][1:]), wanted)
    assert passes.depthwise(x.double(), grad.double(), *CASES[0][1:]) is None


def test_infinities_and_nan_reach_the_places_that_they_reach_in_stock():
    x, grad = given(*CASES[0])
    x[1, 3, 4, 4], x[2, 7, 0, 7], x[0, 9, 7, 0] = float("nan"), float("inf"), float("-inf")
    found, wanted = passes.depthwise(x, grad, *CASES[0][1:]), stocks(x.double(), grad.double(), *CASES[0][1:])
    assert torch.equal(found.isfinite(), wanted.isfinite())


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_layers_use_it_where_pytorch_is_slow(kernel, monkeypatch):
    calls = []
    monkeypatch.setattr(passes, "depthwise", lambda *given: calls.append(given))
    layer = torch.nn.Conv2d(32, 32, kernel, padding=kernel // 2, groups=32)
    x = torch.randn(2, 32, 16, 16)
    grad = torch.randn_like(x)
    found = ConvGeometry.of(layer).weight_gradient(x, grad)
    assert len(calls) == (kernel != 3)
    pad = kernel // 2
    wanted = stocks(x, grad, (kernel, kernel), (1, 1), (pad, pad), (1, 1))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
