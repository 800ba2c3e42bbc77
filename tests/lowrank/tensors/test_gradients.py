from itertools import product
from math import prod
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import TOLERANCE, MultiplicationCounter, autograd, random_tensor
from strategies import LAYERS, LayerSetting
from torch import nn

from lowrank import Tucker
from lowrank.tensors import gradients
from lowrank.tensors.geometry import ConvGeometry, LinearGeometry
from lowrank.tensors.gradients import weight_gradient
from lowrank.tensors.plans import candidate_plans, fewest_macs, plan_gradient


def geometry_of(layer):
    return ConvGeometry.of(layer) if isinstance(layer, nn.Conv2d) else LinearGeometry()


def random_tucker(shape, ranks, seed=0):
    """A Tucker tensor with a factor in every mode whose rank is below the dimension."""
    sizes = enumerate(zip(shape, ranks, strict=True))
    factors = tuple(None if r == n else random_tensor(n, r, seed=seed + mode) for mode, (n, r) in sizes)
    return Tucker(random_tensor(*ranks, seed=seed + 9), factors)


def every_plan(geometry, tucker, out_channels):
    """All the orders of contraction among which the package chooses."""
    factored = tuple(factor is not None for factor in tucker.factors)
    return candidate_plans(geometry, tucker.shape, tucker.ranks, factored, out_channels)


def gradient_by(plan, tucker, grad, geometry):
    with mock.patch.object(gradients, "plan_gradient", return_value=plan):
        return weight_gradient(tucker, grad, geometry)


def conv_setting(shape, outputs, kernel_size, **options):
    options = {"in_channels": shape[1], "out_channels": outputs, "kernel_size": kernel_size, "bias": False, **options}
    return LayerSetting(shape, tuple(options.items()), 3)


def linear_setting(shape, outputs):
    return LayerSetting(shape, (("in_features", shape[-1]), ("out_features", outputs), ("bias", False)), 3)


SETTINGS = [
    (conv_setting((5, 6, 7, 8), 4, 3, padding=1), (2, 3, 4, 5)),
    (conv_setting((5, 6, 9, 8), 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(0, 2)), (2, 3, 4, 5)),
    (conv_setting((5, 6, 9, 8), 6, 3, groups=6, padding="same"), (2, 3, 4, 5)),
    (conv_setting((5, 6, 9, 8), 4, 2, groups=2, padding="same"), (2, 3, 4, 5)),
    (conv_setting((5, 6, 9, 8), 12, 3, groups=6, padding=1, padding_mode="circular"), (2, 3, 4, 5)),
    (conv_setting((5, 6, 7, 8), 4, 1), (2, 3, 4, 5)),
    (conv_setting((5, 6, 7, 8), 4, 1, groups=2), (2, 3, 4, 5)),
    (conv_setting((5, 6, 8, 9), 4, 1, stride=2), (2, 3, 4, 5)),
    (conv_setting((5, 6, 8, 9), 4, 1, stride=(1, 3)), (2, 6, 8, 9)),
    (conv_setting((5, 6, 8, 9), 4, 1, stride=2), (5, 3, 8, 4)),
    (conv_setting((5, 6, 8, 9), 4, 3), (2, 6, 8, 9)),
    (conv_setting((5, 6, 8, 9), 4, 3), (5, 3, 8, 9)),
    (conv_setting((5, 6, 8, 9), 4, 3), (5, 6, 3, 9)),
    (linear_setting((6, 7), 5), (2, 3)),
    (linear_setting((6, 7), 5), (2, 7)),
    (linear_setting((4, 6, 7), 5), (2, 3, 4)),
    (linear_setting((4, 5, 6, 7), 5), (2, 3, 3, 4)),
    (linear_setting((4, 5, 6, 7), 5), (4, 3, 6, 4)),
]


@given(LAYERS, st.data())
def test_the_gradient_equals_autograd_on_the_dense_input(setting, data):
    layer, grad = setting.layer(), setting.grad()
    ranks = [data.draw(st.integers(1, size)) for size in setting.shape]
    tucker = random_tucker(setting.shape, ranks, setting.seed)
    expected = autograd(layer, tucker.dense(), grad)[2]["weight"]
    torch.testing.assert_close(weight_gradient(tucker, grad, geometry_of(layer)), expected, **TOLERANCE)


@pytest.mark.slow
@given(LAYERS, st.data())
def test_every_order_of_contraction_gives_the_same_gradient(setting, data):
    layer, grad = setting.layer(), setting.grad()
    ranks = [data.draw(st.integers(1, size)) for size in setting.shape]
    tucker, geometry = random_tucker(setting.shape, ranks, setting.seed), geometry_of(layer)
    expected = autograd(layer, tucker.dense(), grad)[2]["weight"]
    for plan in every_plan(geometry, tucker, layer.weight.shape[0]):
        torch.testing.assert_close(gradient_by(plan, tucker, grad, geometry), expected, **TOLERANCE)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("options", [{"groups": 6}, {"groups": 6, "kernel_size": 1}, {"groups": 3}, {}], ids=str)
@pytest.mark.parametrize("large", [False, True], ids=["small", "laid out in pieces"])
def test_so_it_does_whichever_modes_have_factors(kind, options, large, monkeypatch):
    if large:  # the gradient, of which a few outputs at a time are made, the last time fewer
        monkeypatch.setattr(gradients, "_LARGE", 0)
        monkeypatch.setattr(gradients, "_AT_ONCE", 4 * 6 * 3 ** (kind(1, 1, 1).weight.ndim - 2))
    layer = kind(6, 6, **({"kernel_size": 3, "padding": 1, "bias": False} | options), dtype=torch.float64)
    shape = (5, 6, 7, 4, 5)[: layer.weight.ndim]
    geometry = ConvGeometry.of(layer)
    for factored in product((False, True), repeat=len(shape)):
        tucker = random_tucker(shape, [2 if has else n for has, n in zip(factored, shape, strict=True)])
        dense = tucker.dense()
        grad = random_tensor(*layer(dense).shape, seed=1)
        expected = autograd(layer, dense, grad)[2]["weight"]
        for plan in every_plan(geometry, tucker, 6):
            torch.testing.assert_close(gradient_by(plan, tucker, grad, geometry), expected, **TOLERANCE)


@pytest.mark.parametrize(("setting", "ranks"), SETTINGS)
def test_a_plan_counts_the_multiplications_that_it_takes(setting, ranks):
    layer, grad = setting.layer(), setting.grad()
    tucker, geometry = random_tucker(setting.shape, ranks), geometry_of(layer)
    planned, counted = [], []
    for plan in every_plan(geometry, tucker, layer.weight.shape[0]):
        with MultiplicationCounter() as counter:
            gradient_by(plan, tucker, grad, geometry)
        planned.append((plan.meet, plan.project, plan.expand, plan.macs))
        counted.append((plan.meet, plan.project, plan.expand, counter.total))
    assert planned == counted


@pytest.mark.parametrize(("setting", "ranks"), SETTINGS)
def test_the_fewest_multiplications_are_those_of_the_order_that_takes_fewest(setting, ranks):
    layer, grad = setting.layer(), setting.grad()
    tucker, geometry = random_tucker(setting.shape, ranks), geometry_of(layer)
    totals = []
    for plan in every_plan(geometry, tucker, layer.weight.shape[0]):
        with MultiplicationCounter() as counter:
            gradient_by(plan, tucker, grad, geometry)
        totals.append(counter.total)
    factored = tuple(factor is not None for factor in tucker.factors)
    assert fewest_macs(geometry, setting.shape, ranks, factored, layer.weight.shape[0]) == min(totals)


# Layer, shape of input and ranks, and the order that took the least time on the server whose costs these are.
MEASURED = [
    ({"kernel_size": 3, "padding": 1, "groups": 32}, (64, 32, 112, 112), (8, 8, 4, 4), ("windows", (0, 2, 3))),
    (
        {"kernel_size": 3, "padding": 1, "groups": 96, "stride": 2},
        (64, 96, 112, 112),
        (8, 8, 4, 4),
        ("rows", (0, 2)),
    ),
    ({"kernel_size": 3, "padding": 1}, (64, 64, 56, 56), (8, 8, 4, 4), ("windows", (0, 2, 3))),
    ({"kernel_size": 3, "padding": 1, "groups": 960}, (64, 960, 7, 7), (8, 8, 4, 4), ("shifts", (0,))),
    ({"kernel_size": 3, "padding": 1, "groups": 192}, (64, 192, 14, 14), (8, 8, 4, 4), ("rows", (0, 2))),
    ({"kernel_size": 3, "padding": 1, "groups": 144}, (64, 144, 56, 56), (8, 8, 48, 48), ("shifts", (0,))),
    ({"kernel_size": 3, "padding": 1}, (8, 64, 56, 56), (8, 32, 48, 48), ("shifts", ())),
    ({"kernel_size": 1}, (64, 64, 14, 14), (8, 8, 4, 4), ("positions", (0,))),
]


@pytest.mark.parametrize(("options", "shape", "ranks", "chosen"), MEASURED)
def test_the_chosen_order_is_the_one_that_took_least_time(options, shape, ranks, chosen):
    with torch.device("meta"):
        geometry = ConvGeometry.of(nn.Conv2d(shape[1], shape[1], **options))
    factored = tuple(rank < size for rank, size in zip(ranks, shape, strict=True))
    plan = plan_gradient(geometry, shape, ranks, factored, shape[1])
    assert (plan.meet, plan.project) == chosen


def test_the_papers_order_is_among_the_plans_at_the_papers_count():
    """papers, A2: Z1 to Z4 and the product with the channel factor."""
    (b, c, h, w), (k0, k1, k2, k3), o, kernel = (5, 6, 7, 8), (2, 3, 4, 5), 4, (3, 3)
    rows, columns, taps = h, w, prod(kernel)
    setting = conv_setting((b, c, h, w), o, kernel, padding=1)
    plans = every_plan(geometry_of(setting.layer()), random_tucker((b, c, h, w), (k0, k1, k2, k3)), o)
    z1 = k0 * b * o * rows * columns
    z4 = o * k0 * k1 * taps * rows * columns
    last = o * c * taps * k1
    height_first = h * k0 * k1 * k2 * k3 + h * w * k0 * k1 * k3
    width_first = w * k0 * k1 * k2 * k3 + h * w * k0 * k1 * k2
    shifts = [plan for plan in plans if plan.meet == "shifts"]
    counts = [plan.macs for plan in shifts if plan.project == (0,) and 1 not in plan.expand]
    assert counts == [z1 + min(height_first, width_first) + z4 + last]


def test_rebuilding_the_input_is_among_the_plans():
    for setting, ranks in SETTINGS:
        layer = setting.layer()
        tucker = random_tucker(setting.shape, ranks)
        factored = {mode for mode, factor in enumerate(tucker.factors) if factor is not None}
        plans = every_plan(geometry_of(layer), tucker, layer.weight.shape[0])
        assert any(not plan.project and set(plan.expand) == factored for plan in plans)


@pytest.mark.parametrize(("groups", "rank"), list(product([1, 2, 3, 6], [1, 2, 5, 6])))
def test_a_channel_factor_serves_each_group_its_own_rows(groups, rank):
    setting = conv_setting((3, 6, 5, 5), 6, 3, groups=groups)
    layer, grad = setting.layer(), setting.grad()
    tucker = random_tucker((3, 6, 5, 5), (3, rank, 5, 5))
    expected = autograd(layer, tucker.dense(), grad)[2]["weight"]
    torch.testing.assert_close(weight_gradient(tucker, grad, geometry_of(layer)), expected, **TOLERANCE)
