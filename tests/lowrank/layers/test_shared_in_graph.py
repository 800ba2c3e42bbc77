"""Layers that are given the same input in a compiled graph: one form for all, as in eager training."""

import copy

import pytest
import torch
from references import random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI, Rounded

pytestmark = pytest.mark.slow


class Attention(nn.Module):
    """Three layers of one input, and something ahead of the last of them."""

    def __init__(self, between=None, whole=False):
        super().__init__()
        self.norm, self.between, self.whole = nn.LayerNorm(8), between, whole
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(x)
        if self.whole:
            return checkpoint(self.layers, x, use_reentrant=False)
        return self.layers(x)

    def layers(self, x):
        y = self.q(x).relu_() * self.k(x)
        if self.between is not None:
            x = self.between(x)
        return torch.cat([y, self.v(x)], -1)


def _train(model, forward, x, steps=2):
    """Gradients and bases of the last step."""
    for step in range(steps):
        model.zero_grad()
        forward(x + step).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, lowrank.training_state(model)


def _view(x):
    x.view(-1).mul_(2)
    return x


def _detached(x):
    x.detach().mul_(2)
    return x


BETWEEN = {
    "nothing": None,
    "mul_": lambda x: x.mul_(2),
    "a view": _view,
    "detach": _detached,
    "another tensor": lambda x: x * 2,
    "read": lambda x: x + x.sum() * 0,
}


def _forms(model, x):
    """How many inputs are compressed in the compiled graph."""
    found = []

    def count(graph, inputs):
        found.append(sum(node.target is torch.ops.lowrank.compress.default for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=count, fullgraph=True)(x)
    return found


CASES = [(name, ASI(2), False) for name in BETWEEN]
CASES += [("nothing", Rounded(), False), ("nothing", ASI(2), True), ("another tensor", ASI(2), True)]


@pytest.mark.parametrize(("between", "method", "whole"), CASES, ids=str)
def test_gradients_and_bases_are_eager_trainings(between, method, whole):
    """And as stock's the output of a layer may be changed in place; `whole`: within a checkpoint."""
    torch._dynamo.reset()
    between = BETWEEN[between]
    names = ["q", "k", "v"]
    model = lowrank.convert(Attention(between, whole), names, method, fuse=False, recompute=False, smallest=0)
    twin, x = copy.deepcopy(model), random_tensor(4, 6, 8, dtype=torch.float32)
    found, expected = _train(model, torch.compile(model, backend="aot_eager"), x), _train(twin, twin, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_form_of_an_input_that_is_only_read():
    x, names = random_tensor(4, 6, 8, dtype=torch.float32), ["q", "k", "v"]
    for between, forms in ((None, 1), (BETWEEN["mul_"], 2), (BETWEEN["a view"], 2), (BETWEEN["another tensor"], 2)):
        assert _forms(lowrank.convert(Attention(between), names, ASI(2), fuse=False, smallest=0), x) == [forms]


def test_nothing_is_left_on_a_tensor_that_the_graph_was_given():
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    lowrank.convert(model, ["0", "1"], ASI(2), fuse=False, smallest=0)
    x = random_tensor(4, 6, 8, dtype=torch.float32)
    torch.compile(lambda x: model[0](x) * model[1](x), backend="aot_eager", fullgraph=True)(x)
    assert not vars(x)


def test_layers_that_differ_keep_a_form_each():
    model = Attention()
    x = random_tensor(4, 6, 8, dtype=torch.float32)
    lowrank.convert(model, ["q"], ASI(2), fuse=False, smallest=0)
    lowrank.convert(model, ["k"], ASI(3), fuse=False, smallest=0)
    assert _forms(model, x) == [2]
