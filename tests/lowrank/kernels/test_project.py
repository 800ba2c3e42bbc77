"""Projections of the output's gradient, and the sums in the same read, against autograd and double precision."""

from unittest import mock

import pytest
import torch
from references import autograd, random_tensor
from torch import nn

from lowrank import ASI, Tucker, kernels
from lowrank.kernels import library, passes
from lowrank.tensors import gradients
from lowrank.tensors.geometry import ConvGeometry, LinearGeometry
from lowrank.tensors.plans import candidate_plans

pytestmark = [
    pytest.mark.cpu_only("compiled kernels work in its memory"),
    pytest.mark.skipif(not kernels.status().active, reason=str(kernels.status())),
]
# Rows and columns of the matrix that is read: fewer than a vector, than what is read at once, and than both.
SIZES = [(1, 1), (2, 7), (16, 16), (17, 49), (40, 1000), (64, 383), (5, 1201)]
# Layer, shape of its input, ranks.
LAYERS = [
    ({"out_channels": 7, "kernel_size": 1}, (9, 6, 13, 17), (3, 4, 4, 3)),
    ({"out_channels": 5, "kernel_size": 1}, (4, 6, 1, 60), (3, 4, 1, 3)),
    ({"out_channels": 4, "kernel_size": 1, "stride": 2}, (6, 5, 7, 9), (2, 3, 4, 4)),
    ({"out_channels": 4, "kernel_size": 1, "stride": 2}, (2, 5, 40, 64), (2, 3, 4, 4)),
    ({"out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 6}, (9, 6, 15, 33), (4, 3, 4, 4)),
    ({"out_channels": 6, "kernel_size": 5, "padding": 2, "groups": 6, "stride": 2}, (5, 6, 21, 16), (2, 6, 3, 4)),
    ({"out_channels": 4, "kernel_size": 7, "padding": 3, "groups": 4}, (3, 4, 8, 11), (2, 2, 3, 3)),
    ({"out_channels": 6, "kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2}, (5, 4, 14, 9), (2, 3, 4, 3)),
    ({"out_channels": 5, "kernel_size": (3, 2), "padding": (1, 0)}, (6, 4, 12, 31), (3, 2, 4, 3)),
    (
        {"out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 3, "padding_mode": "circular"},
        (4, 6, 6, 10),
        (3, 4, 4, 4),
    ),
    ({"out_channels": 4, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (4, 3, 6, 5), (3, 2, 4, 3)),
    ({"out_channels": 4, "kernel_size": 3, "padding": "same", "dilation": 3}, (1, 3, 16, 16), (1, 2, 4, 3)),
    ({"out_channels": 7}, (6, 9, 12), (4, 3, 5)),
    ({"out_channels": 7}, (30, 12), (4, 5)),
]


@pytest.fixture(params=[4, 8, 16])
def width(request):
    """As on a processor whose vectors have at most so many numbers."""
    library.library().set_width(request.param)
    yield
    library.library().set_width(16)


def given(options, shape, ranks, dtype=torch.float32):
    """A layer, the Tucker form of its input, and a gradient of its output."""
    if len(shape) == 4:
        layer = nn.Conv2d(shape[1], dtype=dtype, **options)
    else:
        layer = nn.Linear(shape[-1], options["out_channels"], dtype=dtype)
    factors = [
        None if rank == size else random_tensor(size, rank, seed=mode).to(dtype)
        for mode, (size, rank) in enumerate(zip(shape, ranks, strict=True))
    ]
    tucker = Tucker(random_tensor(*ranks, seed=9).to(dtype), tuple(factors))
    with torch.no_grad():
        grad = random_tensor(*layer(tucker.dense()).shape, seed=5).to(dtype)
    geometry = ConvGeometry.of(layer) if len(shape) == 4 else LinearGeometry()
    return layer, tucker, grad, geometry


def exact(layer, tucker, grad):
    return autograd(layer.double(), tucker.to(torch.float64).dense(), grad.double())[2]


def assert_near(found, wanted):
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("columns", [1, 3, 5, 9, 10, 12])
def test_a_projection_is_the_product(width, n, m, columns):
    x, s = random_tensor(n, m), random_tensor(n, columns, seed=1)
    assert_near(passes.project(x.float(), s.float()), s.mT @ x)


@pytest.mark.parametrize("shape", [(3, 9, 16), (2, 5, 13, 17), (4, 70, 3, 8)])
@pytest.mark.parametrize("columns", [1, 4, 5, 8])
def test_a_projection_in_a_mode_is_the_product(width, shape, columns):
    x, s = random_tensor(*shape), random_tensor(shape[1], columns, seed=1)
    found = passes.project_mode(x.float(), s.float(), 1)
    assert_near(found, torch.einsum("an...,nr->ar...", x, s))
    assert passes.project_mode(x.float(), random_tensor(shape[1], 9).float(), 1) is None
    assert passes.project_mode(x.float(), random_tensor(shape[-1], 1).float(), x.ndim - 1) is None


def test_a_projection_is_the_same_with_any_number_of_threads():
    x, s = random_tensor(50, 20011).float(), random_tensor(50, 9, seed=1).float()
    wanted, before = passes.project(x, s), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(passes.project(x, s), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("setting", LAYERS)
@pytest.mark.parametrize("joined", [False, True])
def test_both_gradients_are_autograds_by_every_order(setting, joined):
    layer, tucker, grad, geometry = given(*setting)
    wanted = exact(layer, tucker, grad)
    factored, shape = tuple(factor is not None for factor in tucker.factors), tuple(setting[1])
    for plan in candidate_plans(geometry, shape, tucker.ranks, factored, setting[0]["out_channels"], joined):
        with mock.patch.object(gradients, "plan_gradient", return_value=plan):
            weight, bias = gradients.gradients(tucker, grad, geometry)
            alone = gradients.weight_gradient(tucker, grad, geometry)
        assert_near(weight, wanted["weight"])
        assert_near(alone, wanted["weight"])
        assert_near(bias, wanted["bias"])


@pytest.mark.parametrize("setting", [LAYERS[0], LAYERS[4], LAYERS[8], LAYERS[12]])
def test_other_layouts_precisions_and_no_kernels_give_the_same(width, setting):
    layer, tucker, grad, geometry = given(*setting)
    wanted = exact(layer, tucker, grad)
    apart = torch.stack([grad, grad], -1)[..., 0]
    last = grad.movedim(1, -1).contiguous().movedim(-1, 1)
    for way in (grad, apart, last):
        for found, name in zip(gradients.gradients(tucker, way, geometry), ("weight", "bias"), strict=True):
            assert_near(found, wanted[name])
    with library.plain():
        plain = gradients.gradients(tucker, grad, geometry)
    double = gradients.gradients(tucker.to(torch.float64), grad.double(), geometry)
    for found, precise, name in zip(plain, double, ("weight", "bias"), strict=True):
        assert_near(found, wanted[name])
        torch.testing.assert_close(precise, wanted[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("setting", [LAYERS[0], LAYERS[4], LAYERS[8]])
def test_what_is_not_finite_stays_with_its_output_channel(bad, setting):
    layer, tucker, grad, geometry = given(*setting)
    grad[1, 2, 3, 4] = bad
    weight, bias = gradients.gradients(tucker, grad, geometry)
    wanted = exact(layer, tucker, grad)
    torch.testing.assert_close(bias[2].double(), wanted["bias"][2], equal_nan=True)
    assert not weight[2].isfinite().all()
    others = [at for at in range(grad.shape[1]) if at != 2]
    assert_near(weight[others], wanted["weight"][others])
    assert_near(bias[others], wanted["bias"][others])


class WithHalf(ASI):
    """A user's method that has a weight gradient of its own alone."""

    def weight_gradient(self, kept, grad, geometry, shape):
        return super().weight_gradient(kept, grad, geometry, shape) / 2


def test_a_methods_own_weight_gradient_is_used():
    layer, tucker, grad, geometry = given(*LAYERS[0])
    weight, bias = WithHalf(ranks=4).gradients((tucker.core, *tucker.factors), grad, geometry, tucker.shape)
    wanted = exact(layer, tucker, grad)
    assert_near(weight, wanted["weight"] / 2)
    assert_near(bias, wanted["bias"])


@pytest.mark.parametrize(("n", "m"), [(1, 8), (2, 16), (16, 24), (17, 56), (40, 1000), (64, 384), (5, 1208), (3, 4104)])
@pytest.mark.parametrize("columns", [1, 4, 5, 9, 12])
def test_a_mask_and_a_projection_in_one_pass_are_both_to_the_last_bit(width, n, m, columns):
    x, s = random_tensor(n, m).float(), random_tensor(n, columns, seed=1).float()
    x[0, ::3], x[-1, 1::4], x[:, m // 2] = float("nan"), float("inf"), -0.0
    bits = torch.randint(0, 256, (n * m // 8,), generator=torch.Generator().manual_seed(2)).byte()
    masked = torch.empty_like(x)
    assert passes.apply(x.view(-1), bits, 1.0, None, masked.view(-1))
    wanted = passes.project(masked, s)
    found = passes.masked_project(x, bits, s)
    assert torch.equal(x.view(torch.int32), masked.view(torch.int32))
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


def test_a_mask_of_rows_that_are_no_whole_bytes_is_left_to_others():
    x, bits = random_tensor(4, 12).float(), torch.zeros(6, dtype=torch.uint8)
    assert passes.masked_project(x, bits, random_tensor(4, 2).float()) is None
    assert torch.equal(x, random_tensor(4, 12).float())


def test_a_mask_and_a_projection_are_the_same_with_any_number_of_threads():
    s, bits = random_tensor(50, 9, seed=1).float(), torch.arange(50 * 2501).byte()
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = random_tensor(50, 20008).float()
            found.append((passes.masked_project(x, bits, s), x))
    finally:
        torch.set_num_threads(before)
    for product, x in found[1:]:
        assert torch.equal(product, found[0][0])
        assert torch.equal(x, found[0][1])
