"""A batch normalisation with running statistics: with its convolution in one, or by itself; its scale's gradient."""

import copy
import pickle

import pytest
import torch
from block_cases import assert_equal, network, results, smooth
from hypothesis import given
from hypothesis import strategies as st
from networks import frozen_statistics, with_statistics
from references import DEVICE, random_tensor
from strategies import convolutions as convolution_settings
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, Vanilla
from lowrank.meters.memory import held_bytes


def pair(*layers, method=HOSVD(1.0), names=("0",), freeze=()):  # noqa: B008
    stock = frozen_statistics(with_statistics(nn.Sequential(*layers))).double()
    for name in freeze:
        stock.get_parameter(name).requires_grad_(False)
    return stock, lowrank.convert(copy.deepcopy(stock), list(names), method)


TRAINED = st.lists(st.sampled_from(["0.weight", "0.bias", "1.weight", "1.bias"]), unique=True)


@pytest.mark.slow
@given(setting=convolution_settings(), affine=st.booleans(), frozen=TRAINED, wants_x=st.booleans())
def test_any_convolution_and_any_set_of_trained_parameters(setting, affine, frozen, wants_x):
    conv = setting.layer()
    names = {"0.weight"} | ({"0.bias"} if conv.bias is not None else set())
    names |= {"1.weight", "1.bias"} if affine else set()
    stock, model = pair(conv, nn.BatchNorm2d(conv.out_channels, affine=affine), freeze=set(frozen) & names)
    found = {}
    for network_ in (stock, model):
        leaf = setting.x().requires_grad_(wants_x)
        y = network_(leaf)
        if y.requires_grad:
            y.backward(random_tensor(*y.shape, seed=setting.seed))
        gradients = {name: p.grad for name, p in network_.named_parameters()}
        found[network_] = {"output": y.detach(), "x": leaf.grad, **gradients, "strides": torch.tensor(y.stride())}
    torch.testing.assert_close(found[model], found[stock], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("affine", [False, True])
def test_a_lone_normalisation_with_a_frozen_scale_keeps_that_alone(affine):
    """As in networks that normalise ahead of each convolution."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.BatchNorm2d(4, affine=affine), nn.Conv2d(4, 2, 3))
    model = frozen_statistics(with_statistics(model)).double()
    if affine:
        model[2].weight.requires_grad_(False)
    x = random_tensor(2, 3, 9, 8)
    expected = results(model, x)
    lowrank.convert(model, ["0", "3"], ASI(999))
    assert_equal(results(model, x), expected)
    kept_of = {row.module: row.nbytes for row in lowrank.explain(model, lambda m, b: m(b).sum(), x)}
    assert kept_of["2"] == 4 * 8, "one number per channel"
    model.train()
    stock = lowrank.revert(copy.deepcopy(model))
    assert_equal(results(model, x), results(stock, x))


def test_the_smaller_of_input_and_output_is_kept_for_a_scale_behind_a_frozen_weight():
    for channels, kept in (((8, 2), 2), ((2, 8), 2)):
        inputs, outputs = channels
        stock, model = pair(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), freeze=["0.weight", "0.bias"])
        x = random_tensor(2, inputs, 6, 5)
        assert_equal(results(model, x), results(stock, x))
        lowrank.convert(model, ["0"], Vanilla())
        bytes_kept = lowrank.saved_bytes(model, lambda m, b: m(b * 1).sum(), x.requires_grad_())
        assert bytes_kept <= 8 * (kept * 2 * 6 * 5 + 4 * outputs)


def test_a_scale_behind_a_frozen_weight_whose_input_is_computed_again():
    """The input, of a smooth activation, is kept as what that is made of."""
    layers = *smooth(3, 4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
    stock, model = pair(*layers, method=Vanilla(), freeze=["3.weight", "3.bias"])
    assert_equal(results(model, random_tensor(2, 3, 9, 8)), results(stock, random_tensor(2, 3, 9, 8)))


@pytest.mark.parametrize("method", [HOSVD(0.5), ASI(2)], ids=repr)
def test_a_scale_behind_a_frozen_weight_is_approximated_as_that_weight_would_be(method):
    stock, trained = pair(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), method=method)
    frozen = lowrank.revert(copy.deepcopy(trained))
    frozen[0].weight.requires_grad_(False)
    lowrank.convert(frozen, ["0"], method)
    x = random_tensor(3, 3, 9, 8)
    found, expected, exact = results(frozen, x), results(trained, x), results(stock, x)
    torch.testing.assert_close(found["1.weight"], expected["1.weight"])
    assert not torch.allclose(found["1.weight"], exact["1.weight"])


def test_the_gradient_of_a_scale_follows_from_the_truncated_weight_gradient():
    """Independently: scale and weight enter as gamma W, so gamma dgamma is <W, dW>, less the part of the mean."""
    model = network("sequence", zero_scale=False)
    conv, norm, _ = lowrank.convert(model, ["0"], ASI(2))
    found = results(model, random_tensor(3, 3, 9, 8))
    product = (conv.weight * found["0.weight"]).flatten(1).sum(1)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    expected = (product - norm.running_mean * scale * found["1.bias"]) / norm.weight
    torch.testing.assert_close(found["1.weight"], expected)


def test_statistics_loaded_between_forward_and_backward_are_an_error_as_in_pytorch():
    stock, model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for network_ in (stock, model):
        y = network_(random_tensor(2, 3, 8, 8))
        network_[1].running_var.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["input", "weight", "statistics"])
def test_values_that_are_not_finite_come_through(place, value):
    stock, model = pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), method=Vanilla())
    x = random_tensor(2, 3, 9, 8)
    with torch.no_grad():
        for network_ in (stock, model):
            {"input": x[1], "weight": network_[0].weight[1], "statistics": network_[1].running_mean}[place][0] = value
    torch.testing.assert_close(model(x), stock(x), equal_nan=True)


@pytest.mark.parametrize("batch_statistics", [True, False])
def test_a_normalisation_of_another_width_is_an_error_as_in_pytorch(batch_statistics):
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(4)).train(batch_statistics)
    model = lowrank.convert(copy.deepcopy(stock), ["0"], HOSVD(1.0))
    errors = []
    for network_ in (stock, model):
        with pytest.raises(RuntimeError) as error:
            network_[1](network_[0](torch.ones(2, 3, 6, 5)))
        errors.append(str(error.value))
    assert errors[1] == errors[0]


def mixed(network_, x, dtype, norm_inside):
    """The convolution outside of autocast, the normalisation within or the other way round."""
    with torch.autocast(DEVICE, dtype):
        with torch.autocast(DEVICE, enabled=not norm_inside):
            y = network_[0](x)
        if norm_inside:
            return network_[1](y)
    return network_[1](y)


@pytest.mark.parametrize("norm_inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_autocast_begins_or_ends_between_the_two(norm_inside, dtype):
    stock, model = (network_.float() for network_ in pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    x = random_tensor(2, 3, 9, 8).float()
    outputs = [mixed(network_, x, dtype, norm_inside) for network_ in (stock, model)]
    assert outputs[1].dtype == outputs[0].dtype
    tolerance = 1e-5 if norm_inside else 0.05
    torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
    gradients = []
    for network_, y in zip((stock, model), outputs, strict=True):
        y.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network_.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_what_the_convolution_keeps_serves_the_scale_as_well():
    """No byte more than for the convolution alone."""
    stock = frozen_statistics(with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())))
    model = lowrank.convert(stock, ["0"], ASI((1, 2, 2, 2)))
    x = torch.randn(2, 3, 9, 8)
    compressed = 4 * (1 * 2 * 2 * 2 + 2 * 1 + 3 * 2 + 9 * 2 + 8 * 2)
    assert lowrank.saved_bytes(model, lambda m, b: m(b).sum(), x) == compressed


@pytest.mark.parametrize(
    "carried", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_convolution_read_by_batch_statistics_is_merged_again_once_these_are_frozen(carried):
    def loss(model, x):
        return model(x).square().sum()

    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).train()
    used = lowrank.convert(copy.deepcopy(stock), ["0", "3"], lowrank.Vanilla())
    fresh, x = copy.deepcopy(used), torch.randn(4, 3, 9, 9)
    for _ in range(2):
        loss(used, x).backward()
    used = carried(used)
    fresh[1].eval()
    used[1].eval()
    held_bytes(fresh, loss, x)  # the first time with what is made once, such as eps as a tensor
    assert held_bytes(used, loss, x) == held_bytes(fresh, loss, x)
