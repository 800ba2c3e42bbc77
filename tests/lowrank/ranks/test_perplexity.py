"""Measuring perplexity: against a slow one, on any layer, and with the model left as it was."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from references import (
    TOLERANCE,
    TwoConvolutions,
    autograd,
    cross_entropy,
    hosvd_input,
    labelled_batch,
    low_rank_tensor,
    random_tensor,
    svd_rank,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI, ConversionError, NonFiniteError, SettingError

NAMES = ["first", "second", "head"]
ENERGIES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def double_batch():
    x, labels = labelled_batch(6, 8, torch.float64)
    return low_rank_tensor(*x.shape, decay=0.7), labels


def inputs_and_output_gradients(model, names, batch):
    """What each layer gets in the forward and in the backward pass."""
    model, found = copy.deepcopy(model), {}

    def hook(name):
        def keep(layer, inputs, output):
            x = inputs[0].detach().clone()
            # A clone hands the layer's output on, so that nothing in place touches the tensor that is watched.
            output = output.clone()
            output.register_hook(lambda grad: found.update({name: (x, grad.clone())}))
            return output

        return keep

    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    cross_entropy(model, batch).backward()
    return found


def measured_bytes(layer, x, ranks, storage="input"):
    """What a layer keeps of an input at these ranks, as autograd saves it."""
    model = nn.Sequential(copy.deepcopy(layer)).requires_grad_(True)
    lowrank.convert(model, ["0"], ASI(list(ranks), storage=storage))
    return lowrank.saved_bytes(model, lambda m, b: m(b).sum(), x)


def slow_row(layer, x, grad, energies):
    """ranks, bytes and perplexity by a full HOSVD and two backward passes per energy (papers, A4)."""
    exact = autograd(layer, x, grad)[2]["weight"]
    ranks = [tuple(svd_rank(x, mode, energy) for mode in range(x.ndim)) for energy in energies]
    nbytes = [measured_bytes(layer, x, each) for each in ranks]
    low = [autograd(layer, hosvd_input(x, energy), grad)[2]["weight"] for energy in energies]
    return ranks, nbytes, [float((gradient - exact).norm()) for gradient in low]


def test_the_table_equals_a_slow_one():
    model, batch = TwoConvolutions().double(), double_batch()
    table = lowrank.measure_perplexity(model, NAMES, cross_entropy, batch, ENERGIES)
    assert table.energies == ENERGIES
    assert table.names == NAMES
    assert table.batch_shape == (6, 3, 8, 8)
    assert table.model == "TwoConvolutions"
    found = inputs_and_output_gradients(model, NAMES, batch)
    for row in table.layers:
        x, grad = found[row.name]
        ranks, nbytes, perplexity = slow_row(model.get_submodule(row.name), x, grad, ENERGIES)
        assert row.input_shape == tuple(x.shape)
        assert row.ranks == tuple(ranks)
        assert row.nbytes == tuple(nbytes)
        torch.testing.assert_close(row.perplexity, tuple(perplexity), **TOLERANCE)
        assert row.perplexity[0] >= row.perplexity[-1] > 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="reflect"),
        nn.Conv2d(4, 6, (2, 3), stride=2, groups=2, padding=(1, 0)),
        nn.Conv2d(4, 6, 1, stride=2, bias=False),
    ],
)
def test_rows_of_other_convolutions_equal_slow_ones(layer):
    model, x = nn.Sequential(layer).double(), low_rank_tensor(5, 4, 7, 6, decay=0.6)
    weights = random_tensor(*model(x).shape)
    table = lowrank.measure_perplexity(model, ["0"], lambda m, b: (m(b) * weights).sum(), x, ENERGIES)
    ranks, nbytes, perplexity = slow_row(layer, x, weights, ENERGIES)
    row = table.layers[0]
    assert (row.ranks, row.nbytes) == (tuple(ranks), tuple(nbytes))
    torch.testing.assert_close(row.perplexity, tuple(perplexity), **TOLERANCE)


def test_energy_one_has_no_perplexity():
    model, batch = TwoConvolutions().double(), double_batch()
    table = lowrank.measure_perplexity(model, NAMES, cross_entropy, batch, (0.5, 1.0))
    assert all(row.perplexity[1] < 1e-10 < row.perplexity[0] for row in table.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_that_asi_keeps_at_these_ranks(dtype):
    model = TwoConvolutions().to(dtype)
    x, labels = labelled_batch(6, 8, dtype)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    table = lowrank.measure_perplexity(model, NAMES[:2], loss, (x, labels), (0.3,))
    plan = {row.name: row.ranks[0] for row in table.layers}
    lowrank.convert(model, NAMES[:2], ASI(plan))
    model(x)
    assert all(r < n for row in table.layers for r, n in zip(row.ranks[0], row.input_shape, strict=True))
    assert [row.nbytes[0] for row in table.layers] == [
        layer._lowrank.kept_bytes for layer in (model.first, model.second)
    ]


def test_energies_are_sorted_and_named_once():
    table = lowrank.measure_perplexity(TwoConvolutions(), NAMES, cross_entropy, labelled_batch(), [0.8, 0.4, 0.8])
    assert table.energies == (0.4, 0.8)


def test_a_converted_model_gives_the_table_of_the_stock_one():
    model, batch = TwoConvolutions().double(), double_batch()
    stock = lowrank.measure_perplexity(model, NAMES, cross_entropy, batch)
    lowrank.convert(model, NAMES, ASI(2))
    assert lowrank.measure_perplexity(model, NAMES, cross_entropy, batch) == stock


def test_frozen_layers_are_measured_as_if_trained():
    model, batch = TwoConvolutions().double(), double_batch()
    stock = lowrank.measure_perplexity(model, NAMES, cross_entropy, batch)
    model.requires_grad_(False)
    assert lowrank.measure_perplexity(model, NAMES, cross_entropy, batch) == stock


class Restless(nn.Module):
    """Everything that a forward pass changes: running statistics, random numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.last(self.drop(F.relu(self.norm(self.conv(x))))).mean((2, 3)))


def failing_loss(model, batch):
    cross_entropy(model, batch).backward()
    raise KeyError("labels")


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(convert, fails):
    model, batch = Restless(), labelled_batch()
    if convert:
        lowrank.convert(model, ["conv", "last"], ASI(2))
    model.conv.weight.requires_grad_(False)
    model(batch[0]).square().sum().backward()
    model.last.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    generators = torch.get_rng_state(), random.getstate()
    if fails:
        with pytest.raises(KeyError):
            lowrank.measure_perplexity(model, ["conv", "last"], failing_loss, batch)
    else:
        lowrank.measure_perplexity(model, ["conv", "last"], cross_entropy, batch)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        grad, value = grads[name]
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("model", [nn.Conv2d(3, 4, 3), nn.Linear(8, 4)])
def test_an_input_without_a_batch_is_a_batch_of_one(model):
    x, model = random_tensor(3, 8, 8), nn.Sequential(model).double()
    x = x if isinstance(model[0], nn.Conv2d) else x[0, 0]

    def loss(m, b):
        return m(b).square().sum()

    single = lowrank.measure_perplexity(model, ["0"], loss, x)
    assert single.layers == lowrank.measure_perplexity(model, ["0"], loss, x[None]).layers


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layer"], "'layer' is called more than once"),
        (["unused"], "does not depend on 'unused'"),
        (["layr"], "did you mean 'layer'"),
        ([""], "Twice"),
    ],
)
def test_layers_that_cannot_be_measured_are_named(names, message):
    with pytest.raises(ConversionError, match=message):
        lowrank.measure_perplexity(Twice(), names, lambda m, b: m(b).sum(), torch.randn(2, 4))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_in_a_checkpoint_cannot_be_measured_and_that_is_said(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.part = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x):
            return checkpoint(self.part, self.first(x), use_reentrant=reentrant)

    said = "called without gradients" if reentrant else "as gradient checkpointing does; switch that off"
    with pytest.raises(ConversionError, match=rf"'part\.0' is .*{said}"):
        lowrank.measure_perplexity(Checkpointed(), ["part.0"], lambda m, b: m(b).square().sum(), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("energies", "message"), [((0.5, 1.2), r"1\.2"), ((), "no energy"), (None, "None"), ((0.5, "a"), "'a'")]
)
def test_an_energy_out_of_range_is_refused(energies, message):
    with pytest.raises(SettingError, match=message):
        lowrank.measure_perplexity(TwoConvolutions(), NAMES, cross_entropy, labelled_batch(), energies)


def test_a_loss_that_is_not_finite_is_refused():
    x, labels = labelled_batch()
    with pytest.raises(NonFiniteError, match="loss"):
        lowrank.measure_perplexity(TwoConvolutions(), NAMES, cross_entropy, (x * float("nan"), labels))


def test_a_gradient_that_is_not_finite_is_refused():
    # The square root of zero is finite and its derivative is not.
    def loss(model, batch):
        return (model(batch) * 0).abs().sqrt().sum()

    with pytest.raises(NonFiniteError):
        lowrank.measure_perplexity(nn.Sequential(nn.Linear(4, 3)), ["0"], loss, torch.randn(5, 4))
