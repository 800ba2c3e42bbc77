"""Parts of a model that are compiled on their own, among others that are not."""

import copy

import pytest
import torch
from elsewhere_cases import Net, images
from networks import frozen_statistics, with_statistics
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI

pytestmark = pytest.mark.slow
OPTIONS = {"backend": "aot_eager_decomp_partition", "fullgraph": True}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.last_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.last_norm(self.second(self.act(self.norm(self.first(x))))) + x)


class Blocks(nn.Module):
    """Blocks between a stem and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.one, self.two = Block(), Block()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.two(self.one(self.act(self.norm(self.stem(x))))).mean((2, 3)))


def _with_forward(part):
    part.forward = torch.compile(part.forward, **OPTIONS)


def _as_a_module(part):
    part.compile(**OPTIONS)


WAYS = [pytest.param(_as_a_module, id="compile"), pytest.param(_with_forward, id="forward")]


def loss(model, x):
    return model(x).square().mean()


def gradients(model, x):
    model.zero_grad()
    loss(model, x).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("way", WAYS)
def test_compiled_blocks_are_one_graph_each_and_train_and_keep_as_the_model_itself(way):
    torch._dynamo.reset()
    stock = frozen_statistics(with_statistics(Blocks()))
    model, x = copy.deepcopy(stock), random_tensor(4, 3, 16, 16, dtype=torch.float32)
    way(model.one)
    way(model.two)
    names = lowrank.trailing_layers(stock, "all")
    eager = lowrank.convert(stock, names, ASI(2))
    lowrank.convert(model, names, ASI(2))
    for _ in range(2):
        for found, wanted in zip(gradients(model, x), gradients(eager, x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert lowrank.saved_bytes(model, loss, x) <= lowrank.saved_bytes(eager, loss, x)


@pytest.mark.parametrize("part", ["conv", "norm", "act", "last", "layer_norm", "first", "gelu", "second"])
def test_any_part_is_one_graph_if_it_is_compiled_ahead_of_the_conversion(part):
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock = frozen_statistics(with_statistics(Net()))
    model, x = copy.deepcopy(stock), images(dtype=torch.float32)
    setattr(model, part, torch.compile(getattr(model, part), **OPTIONS))
    lowrank.convert(model, lowrank.trailing_layers(model, "all"), ASI(99))
    for found, wanted in zip(gradients(model, x), gradients(stock, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["norm", "act", "gelu"])
def test_a_part_that_is_compiled_later_is_told_of(part):
    """Norms and layers, given an output that nobody has read, or one that functions are watched for."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = frozen_statistics(with_statistics(Net())), images(dtype=torch.float32)
    wanted = gradients(model, x)
    lowrank.convert(model, lowrank.trailing_layers(model, "all"), ASI(99))
    setattr(model, part, torch.compile(getattr(model, part), backend="aot_eager"))
    with pytest.warns(UserWarning, match=r"Compile the part ahead of lowrank\.convert"):
        found = gradients(model, x)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
