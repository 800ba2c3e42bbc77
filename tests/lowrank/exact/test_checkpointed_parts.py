"""A checkpoint around any part of a network: it begins and ends between layers that tell each other what they keep."""

import copy
from functools import partial
from itertools import combinations

import pytest
import torch
from references import random_tensor
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lowrank
from lowrank import ASI, HOSVD, Vanilla

SHAPE = (3, 4, 8, 8)
NETWORKS = {
    "batch statistics": lambda: [
        *(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        *(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU6()),
        *(nn.Conv2d(6, 4, 1), nn.MaxPool2d(2), nn.Flatten(1), nn.Linear(36, 5)),
    ],
    "smooth": lambda: [
        *(nn.Conv2d(4, 6, 1), nn.GroupNorm(2, 6), nn.SiLU()),
        *(nn.Conv2d(6, 4, 3, stride=2), nn.GELU(), nn.AvgPool2d(3)),
        *(nn.Flatten(1), nn.LayerNorm(4), nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5)),
    ],
}
METHODS = {"exact": Vanilla(), "ranks": ASI(ranks=100)}  # ranks of all that there is: as exact


class Network(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers, self.part = nn.Sequential(*layers), (0, 0)

    def forward(self, x):
        start, end = self.part
        x = checkpoint(self.layers[start:end], self.layers[:start](x), use_reentrant=False)
        return self.layers[end:](x)


def gradients(model):
    model.zero_grad()
    y = model(random_tensor(*SHAPE, seed=1))
    y.backward(random_tensor(*y.shape, seed=2))
    return [y.detach(), *[parameter.grad for parameter in model.parameters()]]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_checkpoint_between_any_two_layers_changes_no_gradient(kind, method, training):
    torch.manual_seed(0)
    stock = Network(NETWORKS[kind]()).double().train(training)
    model = copy.deepcopy(stock)
    lowrank.convert(model, lowrank.trailing_layers(model, "all"), METHODS[method], everywhere=True)
    for part in combinations(range(len(stock.layers) + 1), 2):
        if getattr(stock.layers[part[0]], "inplace", False):  # a checkpoint's own input may not be changed
            continue
        stock.part = model.part = part
        for found, wanted in zip(gradients(model), gradients(stock), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, at=part: f"{at}: {text}")


class Branching(nn.Module):
    """Several layers of one input, of which some are read at once and some later."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1)
        self.norm, self.other, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)


class Gated(Branching):
    def forward(self, x):
        h = self.first(x)
        y = self.norm(h)
        return self.last(y) + (y * torch.sigmoid(h)).mean(1, keepdim=True)


class ReadLater(Branching):
    def forward(self, x):
        h, z = self.first(x), self.second(x)
        y = self.narrow(nn.functional.silu(self.wide(h.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.norm(h) + y * z.sigmoid()


class BothUnread(Branching):
    def forward(self, x):
        h, z = self.first(x), self.second(x)
        y = x * x.mean()  # keeps the input of both
        return self.last(self.other(z) * self.norm(h)) + y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Gated, ReadLater, BothUnread])
def test_outputs_that_are_unread_when_their_input_is_taken(kind, method, training):
    torch.manual_seed(0)
    stock = kind().double().train(training)
    model = lowrank.convert(copy.deepcopy(stock), lowrank.trailing_layers(stock, "all"), METHODS[method])
    for _ in range(2):
        found = []
        for network in (stock, model):
            network.zero_grad()
            x = random_tensor(*SHAPE, seed=1).requires_grad_()
            y = checkpoint(network, x, use_reentrant=False)
            y.backward(random_tensor(*y.shape, seed=2))
            found.append([y.detach(), x.grad, *[p.grad for p in network.parameters() if p.grad is not None]])
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


def trained_in_a_checkpoint(model, steps=3):
    """Gradients of the first step, and what an ordinary call in between forward and backward pass leaves them."""
    found = []
    for seed in range(steps):
        model.zero_grad()
        x = random_tensor(*SHAPE, seed=seed)
        y = checkpoint(model, x, use_reentrant=False)
        model(x)
        y.backward(random_tensor(*y.shape, seed=9))
        found += [parameter.grad.clone() for parameter in model.parameters()]
    return found


class Residual(nn.Module):
    """A convolution and a normalisation beside a shortcut."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + x)


@pytest.mark.parametrize("kind", ["residual", *NETWORKS])
def test_a_checkpoint_around_layers_that_were_never_called_keeps_the_same_when_it_is_run_again(kind):
    """Who reads a convolution's output is known once it was called: what is kept may not hang on that."""
    torch.manual_seed(0)
    residual = [nn.Conv2d(4, 6, 3, padding=1), nn.MaxPool2d(2), Residual(), Residual()]
    stock = nn.Sequential(*(residual if kind == "residual" else NETWORKS[kind]())).double()
    for fuse in (True, False):
        model = lowrank.convert(copy.deepcopy(stock), lowrank.trailing_layers(stock, "all"), Vanilla(), fuse=fuse)
        wanted = trained_in_a_checkpoint(copy.deepcopy(stock))
        torch.testing.assert_close(trained_in_a_checkpoint(model), wanted, rtol=1e-9, atol=1e-11)


class Branches(nn.Module):
    """Two layers on one input, which nothing else keeps."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        x = x * 1
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("method", [ASI, lowrank.FixedBases])
def test_layers_of_other_ranks_on_one_input_keep_the_same_when_a_checkpoint_is_run_again(method):
    """The first one's form serves the second while it is there: when the pass is run again it is, before it is not."""
    ranks = {"first": (3, 3, 4, 4), "second": (2, 2, 3, 3)}
    torch.manual_seed(0)
    model = lowrank.convert(Branches().double(), list(ranks), method(ranks))
    assert all(grad.isfinite().all() for grad in trained_in_a_checkpoint(model))
    keeps = {name: model.get_submodule(name)._lowrank.kept_bytes for name in ranks}
    alike = lowrank.convert(Branches().double(), list(ranks), method((2, 2, 3, 3)))
    trained_in_a_checkpoint(alike)
    assert keeps["first"] > 0
    assert alike.second._lowrank.kept_bytes == 0, "of the same ranks one form serves both"


def test_other_hooks_than_a_checkpoints_change_nothing_of_what_is_shared():
    """Such as those by which memory is measured."""
    ranks = {"first": (3, 3, 4, 4), "second": (2, 2, 3, 3)}
    model = lowrank.convert(Branches().double(), list(ranks), ASI(ranks))
    kept = lowrank.saved_bytes(model, lambda model, x: model(x).sum(), random_tensor(*SHAPE))
    alone = lowrank.convert(Branches().double(), {"first": ASI(ranks["first"]), "second": ASI(1)})
    assert kept == lowrank.saved_bytes(alone, lambda model, x: model(x).sum(), random_tensor(*SHAPE))


class Inner(nn.Module):
    """A module in a checkpoint."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=False)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_checkpoint_around_any_layer_within_one_around_all_changes_no_gradient(kind, training):
    torch.manual_seed(0)
    stock = nn.Sequential(*NETWORKS[kind]()).double().train(training)
    wanted = trained_in_a_checkpoint(copy.deepcopy(stock))
    for at, layer in enumerate(stock):
        if getattr(layer, "inplace", False):  # a checkpoint's own input may not be changed
            continue
        model = lowrank.convert(copy.deepcopy(stock), lowrank.trailing_layers(stock, "all"), Vanilla())
        model[at] = Inner(model[at])
        found = trained_in_a_checkpoint(model)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, at=at: f"{at}: {text}")


def products_are_kept(context, operator, *arguments, **options):
    name = str(operator)
    return CheckpointPolicy.MUST_SAVE if "conv" in name or "mm" in name else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", [Vanilla(), ASI(2), ASI(2, refresh=2), HOSVD(0.8)], ids=repr)
@pytest.mark.parametrize("kind", ["branches", *NETWORKS])
def test_a_checkpoint_that_keeps_the_results_of_chosen_operators_is_given_the_stock_layers(kind, method, training):
    torch.manual_seed(0)
    stock = Branches() if kind == "branches" else nn.Sequential(*NETWORKS[kind]())
    stock = stock.double().train(training)
    model = lowrank.convert(copy.deepcopy(stock), lowrank.trailing_layers(stock, "all"), method)
    contexts = partial(create_selective_checkpoint_contexts, products_are_kept)
    results = []
    for network in (stock, model):
        for seed in range(2):
            x = random_tensor(*SHAPE, seed=seed)
            checkpoint(network, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
        results.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)
