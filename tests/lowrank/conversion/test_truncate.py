"""Weights truncated on inputs: no other weight of the rank has outputs that are nearer, and WSI starts from them."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

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


def weighed_error(x, weight, factors, weighing):
    """Of the outputs' change, each direction by its square root of importance."""
    return torch.linalg.norm(x @ (weight - factors.dense()).mT @ weighing)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("pulls", [30, 2])
def test_weighed_by_gradients_the_error_is_the_least_in_their_metric(rank, pulls):
    weight, x = case()
    g = torch.randn(pulls, 7).double() * torch.logspace(0, 2, 7).double()
    found = whitened_truncation(weight, x.mT @ x, rank, g.mT @ g)
    metric = g.mT @ g + 0.5 * (g.mT @ g).diagonal().mean() * torch.eye(7).double()  # as documented
    values, vectors = torch.linalg.eigh(metric)
    weighing = vectors * values.sqrt()
    error = weighed_error(x, weight, found, weighing)
    lengths = torch.linalg.svdvals(x @ weight.mT @ weighing)  # Eckart and Young, of the outputs in that metric
    torch.testing.assert_close(error, lengths[rank:].square().sum().sqrt(), rtol=1e-6, atol=1e-4 * float(lengths[0]))
    assert error < 0.98 * weighed_error(x, weight, whitened_truncation(weight, x.mT @ x, rank), weighing)
    assert found.left.shape == (7, rank)


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


class Calls(nn.Module):
    """A frozen layer, whose output is changed in place, ahead of one that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.ahead, self.twice = nn.Linear(9, 8).requires_grad_(False), nn.Linear(8, 8)

    def forward(self, x):
        y = self.ahead(x).relu_()
        return self.twice(torch.tanh(self.twice(y)))


def test_weighing_is_by_the_gradients_at_the_outputs_of_all_calls_of_all_batches():
    model, _ = Calls(), torch.manual_seed(3)
    batches = [torch.randn(5, 6, 9) * torch.logspace(0, 1, 9) for _ in range(2)]
    loss_fn = lambda model, x: (model(x) * torch.linspace(0, 3, 8)).square().sum()  # noqa: E731
    expected = {}
    for name, calls in (("ahead", 1), ("twice", 2)):  # with zeros added to each call's output, whose gradients are read
        inputs, zeros = [], [torch.zeros(5, 6, 8, requires_grad=True) for _ in range(2 * calls)]
        add = iter(zeros)
        layer = copy.deepcopy(model).get_submodule(name)
        other = copy.deepcopy(model)

        class Read(nn.Module):
            def forward(self, x, layer=layer, inputs=inputs, add=add):
                inputs.append(x.detach())
                return layer(x) + next(add)

        other.set_submodule(name, Read())
        for x in batches:
            loss_fn(other, x).backward()
        x, g = (
            torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).double()
            for parts in (inputs, [zero.grad for zero in zeros])
        )
        expected[name] = (x.mT @ x, g.mT @ g)
    stock = copy.deepcopy(model)
    ranks = lowrank.truncate_weights(
        model, ["ahead", "twice"], loss_fn, batches[0], energy=0.7, weigh_outputs=True, further=batches[1:]
    )
    for name, grams in expected.items():
        weight = stock.get_submodule(name).weight
        best = whitened_truncation(weight.detach(), grams[0], ranks[name], grams[1]).dense()
        torch.testing.assert_close(model.get_submodule(name).weight.detach(), best, rtol=1e-3, atol=1e-4)
        assert ranks[name] < 8
    assert not model.ahead.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weighing_moves_the_network_less():
    model, batch = network()
    model.eval()
    expected, plain = model(batch), copy.deepcopy(model)
    probe = lambda model, batch: (out := model(batch)).mul(torch.randn_like(out)).sum()  # noqa: E731
    torch.manual_seed(0)
    lowrank.truncate_weights(model, ["0"], probe, batch, energy=0.8, weigh_outputs=True)
    lowrank.truncate_weights(plain, ["0"], probe, batch, energy=0.8)
    moved, moved_plain = (torch.linalg.norm(cut(batch) - expected).item() for cut in (model, plain))
    assert moved < 0.95 * moved_plain


@pytest.mark.parametrize(
    ("names", "change", "error", "message"),
    [
        (["0", "1"], None, lowrank.ConversionError, "layer '1' is a Tanh"),
        (["0", "5"], None, lowrank.ConversionError, "no layer '5'"),
        (["0", "2"], "converted", lowrank.ConversionError, "ahead of convert"),
        (["0", "2"], "not called", lowrank.ConversionError, "layer '2' is not called"),
        (["0", "2"], "nan", lowrank.NonFiniteError, "input of layer '0'"),
        (["0", "2"], "no gradient", lowrank.ConversionError, "layer '2' gets no gradient"),
        (["0", "2"], "nan gradient", lowrank.NonFiniteError, "gradient at the output of layer '0'"),
        (["2", "0"], "pruned", lowrank.ConversionError, "layer '0' has a weight that is computed"),
        (["2", "0"], "normalised", lowrank.ConversionError, "layer '0' has a weight that is computed"),
        (["0", "2"], "tied", lowrank.ConversionError, "layer '2' has the weight of layer '0'"),
        (["0"], "vector", lowrank.SettingError, r"loss_fn gave a tensor of shape \(4, 30, 7\)"),
        (["0"], "number", lowrank.SettingError, "loss_fn gave a float"),
    ],
)
def test_what_cannot_be_truncated_is_refused_and_nothing_changes(names, change, error, message):
    model, batch = network()
    if change == "converted":
        lowrank.convert(model, ["2"], lowrank.WSI(energy=0.8))
    if change == "pruned":
        prune.l1_unstructured(model[0], "weight", amount=0.2)
    if change == "normalised":
        with warnings.catch_warnings(action="ignore"):  # it is the old way
            nn.utils.weight_norm(model[0])
    if change == "tied":
        model = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9))
        model[2].weight = model[0].weight
    before = copy.deepcopy(model.state_dict())
    batch = batch * float("nan") if change == "nan" else batch
    called = {
        "not called": lambda m, b: m[0](b).sum(),
        "no gradient": lambda m, b: m[0](b).sum() + m(b).detach().sum(),
        "nan gradient": lambda m, b: m(b).sum() * float("inf") * 0,
        "vector": lambda m, b: m(b),
        "number": lambda m, b: m(b).sum().item(),
    }.get(change, loss_fn)
    weigh = change in ("no gradient", "nan gradient", "vector", "number")
    with pytest.raises(error, match=message):
        lowrank.truncate_weights(model, names, called, batch, weigh_outputs=weigh)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_may_be_changed_in_place_and_layers_called_by_keyword(bias):
    class Called(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            torch.manual_seed(4)
            self.first, self.act = nn.Linear(9, 8, bias=bias), nn.ReLU(inplace=inplace)
            self.second = nn.Linear(8, 3, bias=bias)

        def forward(self, x):
            return self.second(input=self.act(self.first(x)))

    x, models = torch.randn(4, 30, 9), (Called(False), Called(True))
    for model in models:
        lowrank.truncate_weights(model, ["first", "second"], loss_fn, x, energy=0.7, weigh_outputs=True)
    torch.testing.assert_close(dict(models[1].named_parameters()), dict(models[0].named_parameters()))


def test_batches_are_taken_one_by_one_and_none_for_a_wrong_energy():
    model, batch = network()
    taken, seen = [], []
    batches = (taken.append(number) or batch for number in range(1, 4))
    counted = lambda model, batch: (seen.append(len(taken)), loss_fn(model, batch))[1]  # noqa: E731
    with pytest.raises(lowrank.SettingError, match=r"energy is 1\.5"):
        lowrank.truncate_weights(model, ["0"], counted, batch, energy=1.5, further=batches)
    assert seen == []
    lowrank.truncate_weights(model, ["0"], counted, batch, further=batches)
    assert seen == [0, 1, 2, 3]


def test_processes_would_get_weights_that_differ():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, batch = network()
        with pytest.raises(lowrank.ConversionError, match="truncate the weights, then wrap it"):
            lowrank.truncate_weights(DistributedDataParallel(model), ["module.0"], loss_fn, batch)
    finally:
        dist.barrier()  # its threads are done with every tensor then, and can be joined
        dist.destroy_process_group()
