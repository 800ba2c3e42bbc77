"""Weights truncated on inputs: no other weight of the rank has outputs that are nearer, and WSI starts from them."""

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank.conversion.truncate import whitened_truncation


def case(tokens=40, inputs=9, outputs=7, seed=0):
    """A weight, and inputs that are correlated and of very different sizes."""
    torch.manual_seed(seed)
    x = (
        torch.randn(tokens, inputs).double()
        @ torch.randn(inputs, inputs).double()
        * torch.logspace(0, 2, inputs).double()
    )
    return torch.randn(outputs, inputs).double(), x


def output_error(x, weight, factors):
    return torch.linalg.norm(x @ (weight - factors.dense()).mT)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("tokens", [40, 5])
def test_the_output_error_is_the_least_that_the_rank_allows(tokens, rank):
    weight, x = case(tokens)
    found = whitened_truncation(weight, x.mT @ x, rank)
    error = output_error(x, weight, found)
    # Eckart and Young, of the outputs themselves: no matrix of the rank is nearer, whatever it comes from.
    values = torch.linalg.svdvals(x @ weight.mT)
    optimum = values[rank:].square().sum().sqrt()
    torch.testing.assert_close(error, optimum, rtol=1e-6, atol=1e-4 * float(values[0]))
    plain = torch.linalg.svd(weight)
    plain_error = torch.linalg.norm(x @ (weight - plain.U[:, :rank] * plain.S[:rank] @ plain.Vh[:rank]).mT)
    assert error < 0.9 * plain_error
    assert found.left.shape == (7, rank)


def test_it_is_the_truncation_of_the_whitened_weight_with_the_whitening_taken_back():
    weight, x = case()
    whitening = torch.linalg.cholesky(x.mT @ x)
    u, s, v = torch.linalg.svd(weight @ whitening, full_matrices=False)
    expected = u[:, :3] * s[:3] @ v[:3] @ torch.linalg.inv(whitening)
    torch.testing.assert_close(whitened_truncation(weight, x.mT @ x, 3).dense(), expected, rtol=1e-6, atol=1e-6)


def network():
    """Two linear layers on inputs of very different sizes, with a batch of tokens."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 7), nn.Dropout(0.5))
    return model, torch.randn(4, 30, 9) @ torch.randn(9, 9) * torch.logspace(0, 2, 9)


def loss_fn(model, batch):
    return model(batch).square().mean()


def outputs_apart(layer, other, x):
    return float(torch.linalg.norm(layer(x) - other(x)).detach())


def test_layers_get_the_ranks_of_wsi_and_the_nearest_outputs_on_the_inputs_that_they_had():
    model, batch = network()
    before, plain = copy.deepcopy(model), copy.deepcopy(model)
    random = torch.get_rng_state()
    ranks = lowrank.truncate_weights(model, ["0", "2"], loss_fn, batch, energy=0.8)
    assert torch.equal(torch.get_rng_state(), random)
    lowrank.convert(plain, ["0", "2"], lowrank.WSI(energy=0.8))
    inputs = {"0": batch, "2": torch.tanh(before[0](batch))}
    for name, x in inputs.items():
        layer, cut, stock = (each.get_submodule(name) for each in (model, plain, before))
        assert ranks[name] == cut.left.shape[1] == torch.linalg.matrix_rank(layer.weight) < min(layer.weight.shape)
        values = torch.linalg.svdvals(x.reshape(-1, x.shape[-1]).double() @ stock.weight.double().mT)
        least = float(values.detach()[ranks[name] :].square().sum().sqrt())  # Eckart and Young, of the outputs
        assert outputs_apart(layer, stock, x) == pytest.approx(least, rel=1e-3)
        assert outputs_apart(layer, stock, x) < 0.9 * outputs_apart(cut, stock, x)
        assert torch.equal(layer.bias, stock.bias)


@pytest.mark.parametrize("method", [lowrank.WSI(energy=1), lowrank.WASI(ranks=[4, 30, 16], energy=1)])
def test_converted_at_energy_one_they_keep_rank_and_outputs(method):
    model, batch = network()
    ranks = lowrank.truncate_weights(model, ["0", "2"], loss_fn, batch, energy=0.8)
    expected = model.eval()(batch)
    lowrank.convert(model, ["0", "2"], method)
    assert {name: model.get_submodule(name).left.shape[1] for name in ranks} == ranks
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_padding_has_no_part_in_it():
    model, batch = network()
    other, padded = copy.deepcopy(model), torch.cat([batch, 1e3 * torch.randn(4, 5, 9)], 1)
    lowrank.truncate_weights(model, ["0"], loss_fn, batch, energy=0.8)
    with lowrank.token_mask(torch.arange(35).expand(4, 35) < 30):
        lowrank.truncate_weights(other, ["0"], loss_fn, padded, energy=0.8)
    torch.testing.assert_close(other[0].weight, model[0].weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "change", "error", "message"),
    [
        (["0", "1"], None, lowrank.ConversionError, "layer '1' is a Tanh"),
        (["0", "5"], None, lowrank.ConversionError, "no layer '5'"),
        (["0", "2"], "converted", lowrank.ConversionError, "ahead of convert"),
        (["0", "2"], "not called", lowrank.ConversionError, "layer '2' is not called"),
        (["0", "2"], "nan", lowrank.NonFiniteError, "input of layer '0'"),
    ],
)
def test_what_cannot_be_truncated_is_refused_and_nothing_changes(names, change, error, message):
    model, batch = network()
    if change == "converted":
        lowrank.convert(model, ["2"], lowrank.WSI(energy=0.8))
    before = copy.deepcopy(model.state_dict())
    batch = batch * float("nan") if change == "nan" else batch
    called = (lambda m, b: m[0](b).sum()) if change == "not called" else loss_fn
    with pytest.raises(error, match=message):
        lowrank.truncate_weights(model, names, called, batch)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
