"""Chains of elementwise operations in one compiled pass against PyTorch's operators."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lowrank import kernels
from lowrank.kernels import library, passes

pytestmark = [
    pytest.mark.cpu_only("compiled kernels work in its memory"),
    pytest.mark.skipif(not kernels.status().active, reason=str(kernels.status())),
]
WIDTHS = [4, 8, 16]
# Planes that do not fill a vector, that fill several, and more than one thread takes at a time.
SHAPES = [(2, 3, 5), (3, 5, 7, 7), (2, 16, 16, 16), (1, 2, 130, 131), (2, 3, 2, 3, 5), (0, 3, 4, 4), (2, 3, 0)]
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, 88.5, -88.5, 90.0, -90.0, 1e30, -1e30]


@pytest.fixture(params=WIDTHS, autouse=True)
def width(request):
    library.library().set_width(request.param)
    passes.rounds_as_batch_norm.cache_clear()
    yield request.param
    library.library().set_width(16)
    passes.rounds_as_batch_norm.cache_clear()


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(shape, seed=0, special=False):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if special and x.numel() > len(SPECIAL):
        x.view(-1)[:: x.numel() // len(SPECIAL)][: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limits", [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)])
@pytest.mark.parametrize("summed", [False, True])
def test_a_normalisation_a_sum_and_limits_are_bit_for_bit_those_of_the_operators(shape, limits, summed, threads):
    x, channels = drawn(shape, special=True), shape[1]
    other = drawn(shape, seed=1) if summed else None
    weight, bias, mean = (drawn(channels, seed) for seed in (2, 3, 4))
    inverse = drawn(channels, 5).abs()
    found = passes.affine(x, inverse * weight, torch.addcmul(bias, mean, inverse * weight, value=-1), other, *limits)
    if found is None:  # this processor's kernel of this width multiplies and adds in two steps, PyTorch in one
        assert not passes.rounds_as_batch_norm()
        return
    y = F.batch_norm(x, mean, torch.ones(channels), inverse * weight, bias, False, 0.0, 1e-30) if x.numel() else x
    y = y if other is None else y + other
    assert torch.equal(found.nan_to_num(7.0), y.clamp(*limits).nan_to_num(7.0))


def test_the_widest_kernel_of_this_processor_rounds_as_pytorch(width):
    if width == max(WIDTHS) and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert passes.rounds_as_batch_norm()


GATES = {"SiLU": F.silu, "GELU": partial(F.gelu, approximate="tanh")}


@pytest.mark.parametrize("count", [0, 1, 3, 15, 16, 1001, 3 * 16384 + 5])
@pytest.mark.parametrize("by", GATES)
def test_gates_and_their_gradients_are_those_of_double_precision(by, count, threads):
    g, u, grad = (drawn(count, seed) for seed in (1, 2, 3))
    g *= 5
    g64, u64 = g.double().requires_grad_(), u.double().requires_grad_()
    y = GATES[by](g64) * u64
    wanted = torch.autograd.grad(y, (g64, u64), grad.double())
    for one, exact in zip((passes.gate(g, u, by), *passes.gate_gradients(grad, g, u, by)), (y, *wanted), strict=True):
        torch.testing.assert_close(one.double(), exact.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("by", GATES)
def test_what_is_no_number_stays_so(by):
    g = torch.tensor(SPECIAL, requires_grad=True)
    u = torch.ones_like(g, requires_grad=True)
    y = GATES[by](g) * u
    finite = torch.isfinite(g.detach()) & (g.detach().abs() < 1e20)
    found, wanted = passes.gate(g.detach(), u.detach(), by), y.detach()
    torch.testing.assert_close(found[finite], wanted[finite], rtol=1e-5, atol=1e-30)
    assert torch.equal(found.isnan(), wanted.isnan())
    of_g, of_u = passes.gate_gradients(torch.full_like(y, 2.0), g.detach(), u.detach(), by)
    for one, stock in zip((of_g, of_u), torch.autograd.grad(y, (g, u), torch.full_like(y, 2.0)), strict=True):
        torch.testing.assert_close(one[finite], stock[finite], rtol=1e-5, atol=1e-30)
        assert torch.equal(one.isnan(), stock.isnan())


def test_other_tensors_are_left_to_the_operators():
    x, vector = drawn((2, 3, 8, 8)), drawn(3)
    assert passes.affine(x.double(), vector.double(), vector.double()) is None
    assert passes.affine(x.to(memory_format=torch.channels_last), vector, vector) is None
    assert passes.affine(x, vector, vector, x[:, :, :1]) is None
    assert passes.affine(drawn((4, 3)), vector, vector) is None
    assert passes.gate(x, x[:1]) is None
    assert passes.gate(x.mT, x.mT) is None
    assert passes.gate_gradients(x, x, x.double()) is None
    with library.plain():
        assert passes.gate(x, x) is None
