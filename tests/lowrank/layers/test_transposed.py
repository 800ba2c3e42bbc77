"""Transposed convolutions: exact at full rank, from factors as autograd on the compressed input, and counted."""

import copy
import pickle
from itertools import product
from math import prod

import pytest
import torch
from layer_cases import assert_exact_but_for_the_weight
from references import TOLERANCE, autograd, hosvd_input, random_tensor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank
from lowrank import ASI, HOSVD, ConversionError, GradientFilter, Tucker, Vanilla
from lowrank.tensors import gradients
from lowrank.tensors.geometry import TransposedConvGeometry

SETTINGS = [  # stride, padding, output_padding, dilation, groups
    (stride, padding, further, dilation, groups)
    for stride, padding, further, dilation, groups in product((1, 2, (2, 3)), (0, (1, 2)), (0, 1), (1, 2), (1, 2, 4))
    if not further or max(stride if isinstance(stride, tuple) else (stride,)) > 1 or dilation > 1
]
OTHERS = {
    "1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (3, 4, 5)),
    "3d": (lambda: nn.ConvTranspose3d(4, 6, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 0)), (2, 4, 3, 4, 5)),
    "pointwise": (lambda: nn.ConvTranspose2d(4, 6, 1, bias=False), (3, 4, 5, 6)),
    "depthwise": (lambda: nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, groups=4), (3, 4, 5, 6)),
}


def layer_of(setting):
    stride, padding, further, dilation, groups = setting
    torch.manual_seed(0)
    options = {"stride": stride, "padding": padding, "output_padding": further, "dilation": dilation}
    return nn.ConvTranspose2d(4, 8, (3, 2), groups=groups, **options).double()


def converted(layer, method):
    return lowrank.convert(nn.Sequential(copy.deepcopy(layer)), ["0"], method)


@pytest.mark.parametrize("setting", SETTINGS)
def test_all_gradients_are_autograds_and_the_weights_is_that_of_the_compressed_input(setting):
    layer, x = layer_of(setting), random_tensor(3, 4, 5, 6)
    grad = random_tensor(*layer(x).shape, seed=1)
    for method, kept in ((Vanilla(), x), (HOSVD(0.6), hosvd_input(x, 0.6)), (ASI(99), x)):
        assert_exact_but_for_the_weight(layer, converted(layer, method), x, grad, kept)


@pytest.mark.parametrize("name", OTHERS)
def test_of_other_dimensions_and_kernels_with_and_without_a_batch(name):
    make, shape = OTHERS[name]
    layer, x = make().double(), random_tensor(*shape)
    model = converted(layer, HOSVD(1.0))
    for given in (x, x[0]):
        grad = random_tensor(*layer(given).shape, seed=1)
        wanted, found = autograd(layer, given, grad), autograd(model[0], given, grad)
        torch.testing.assert_close(found, wanted, **TOLERANCE)
    assert type(pickle.loads(pickle.dumps(model))[0]) is type(model[0])
    assert type(lowrank.revert(model)[0]) is type(layer)


@pytest.mark.parametrize("setting", SETTINGS[::5])
def test_the_gradient_from_factors_in_every_order_of_contractions(setting):
    layer, shape, ranks = layer_of(setting), (3, 4, 5, 6), (2, 3, 2, 2)
    geometry = TransposedConvGeometry.of(layer)
    for factored in ((0, 1, 2, 3), (0,), (1,), (2, 3)):
        sizes = [rank if m in factored else size for m, (size, rank) in enumerate(zip(shape, ranks, strict=True))]
        factors = [
            random_tensor(n, r) if m in factored else None for m, (n, r) in enumerate(zip(shape, ranks, strict=True))
        ]
        tucker = Tucker(random_tensor(*sizes), tuple(factors))
        grad = random_tensor(*layer(tucker.dense()).shape, seed=2)
        wanted = autograd(layer, tucker.dense(), grad)[2]["weight"]
        torch.testing.assert_close(gradients.weight_gradient(tucker, grad, geometry), wanted, **TOLERANCE)


@pytest.mark.parametrize("setting", SETTINGS[::4])
def test_shape_and_operations_are_what_pytorch_makes_and_counts(setting):
    layer, x = layer_of(setting), random_tensor(3, 4, 5, 6)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    geometry = TransposedConvGeometry.of(layer)
    assert geometry.output_shape((3, 4, 5, 6), 8) == tuple(y.shape)
    assert geometry.macs((3, 4, 5, 6), 8) == 3 * 4 * 5 * 6 * (8 // layer.groups) * 6
    if layer.groups == 1:  # the counter does not look at groups
        assert 2 * geometry.macs((3, 4, 5, 6), 8) == counter.get_total_flops()
    cost = lowrank.account(nn.Sequential(layer), ["0"], x.requires_grad_())["0"]
    assert cost.flops == 6 * geometry.macs((3, 4, 5, 6), 8)
    assert cost.activation_bytes == x.nbytes


def test_kept_are_four_factors_which_the_account_tells_ahead():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2))
    assert lowrank.trailing_layers(model, 1) == ["2"]
    lowrank.freeze_before(model, ["2"])
    lowrank.convert(model, ["2"], ASI([2, 3, 4, 4]))
    x = random_tensor(4, 3, 12, 12).float()
    numbers = 2 * 3 * 4 * 4 + 4 * 2 + 8 * 3 + 2 * 12 * 4
    assert lowrank.saved_bytes(model, lambda m, x: m(x).sum(), x) == 4 * numbers
    assert lowrank.account(model, ["2"], x)["2"].activation_bytes == 4 * numbers


def test_perplexity_and_a_choice_of_ranks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(6, 4, 2, stride=2)).double()
    x = random_tensor(4, 3, 6, 6)
    table = lowrank.measure_perplexity(model, ["2"], lambda m, x: m(x).square().sum(), x, energies=(0.5, 0.9))
    (layer,) = table.layers
    kept = torch.tanh(model[0](x)).detach()
    y = model[2](kept)
    wanted = autograd(model[2], kept, 2 * y.detach())[2]["weight"]
    found = autograd(model[2], hosvd_input(kept, 0.5), 2 * y.detach())[2]["weight"]
    assert layer.perplexity[0] == pytest.approx(float((wanted - found).norm()), rel=1e-4)
    plan = lowrank.select_ranks(table, 8 * prod(kept.shape))
    lowrank.convert(model, ["2"], ASI(plan))


def test_the_size_of_the_output_may_be_given_at_the_call():
    layer, x = layer_of((2, 1, 0, 1, 1)), random_tensor(3, 4, 5, 6)
    size = (10, 11)
    model = converted(layer, ASI(2))
    torch.testing.assert_close(model[0](x, output_size=size), layer(x, output_size=size), **TOLERANCE)
    assert model[0](x, size).shape[2:] == size


def test_what_it_is_not_made_for_is_refused_ahead():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3))
    with pytest.raises(ConversionError, match="4 modes"):
        lowrank.convert(model, ["0"], ASI([2, 2]))
    with pytest.raises(ConversionError, match="gradient filter"):
        lowrank.convert(model, ["0"], GradientFilter(2))
