"""Parts of a model that are compiled on their own, among others that are not."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from elsewhere_cases import Net, images
from networks import frozen_statistics, with_statistics
from references import random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI, Vanilla

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


class Around(nn.Module):
    """A part, and layers beside it whose outputs and inputs eager training leaves for later."""

    def __init__(self, way):
        super().__init__()
        self.stem, self.beside = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.part, self.norm, self.head = Residual(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.around = nn.Sequential(nn.ReLU(), self.part, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.way = way

    def forward(self, x):
        return self.head(getattr(self, self.way)(self.stem(x)))

    def unread(self, x):
        return self.norm(self.part(x))

    def held(self, x):
        x = F.relu(x)
        y = self.beside(x)
        z = self.part(x)
        return self.norm(y) + z

    def keyword(self, x):
        y = self.beside(F.silu(x))
        return self.part(self.norm(y), further={"of": [y]})

    def watched(self, x):
        return self.norm(self.part(F.silu(x) + 1))

    def changed(self, x):
        x = x * 1
        y = self.beside(x)
        z = self.part(x, change=True)
        return self.norm(y) + z

    def within_another(self, x):
        return self.norm(self.part(self.around(self.around(x))))

    def checkpointed(self, x):
        return self.norm(checkpoint(self.part, x, use_reentrant=False))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x, further=None, change=False):
        x = x.mul_(2) if change else x
        return F.relu(self.norm(self.conv(x))) + (x if further is None else further["of"][0])


AROUND = ["unread", "held", "keyword", "watched", "changed", "within_another", "checkpointed"]


@pytest.mark.parametrize("compiled", [*WAYS, pytest.param(lambda part: None, id="not compiled")])
@pytest.mark.parametrize("way", AROUND)
def test_whatever_is_ahead_of_a_part_it_is_given_ordinary_tensors(way, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock, x = frozen_statistics(with_statistics(Around(way))).double(), random_tensor(4, 3, 8, 8)
    if way == "changed":  # otherwise PyTorch refuses the change
        stock.beside.requires_grad_(False)
        stock.stem.requires_grad_(False)
    model = copy.deepcopy(stock)
    compiled(model.part)
    if way == "within_another":
        compiled(model.around)
    lowrank.convert(model, lowrank.trailing_layers(model, "all"), Vanilla())
    torch.testing.assert_close(gradients(model, x), gradients(stock, x))
    bytes_of_both = [lowrank.saved_bytes(each, loss, x) for each in (model, stock)]
    assert bytes_of_both[0] < bytes_of_both[1]


def test_a_wrapped_part_that_is_shared_has_one_door_until_all_is_reverted():
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock, x = frozen_statistics(with_statistics(Around("within_another"))).double(), random_tensor(4, 3, 8, 8)
    model = copy.deepcopy(stock)
    model.around[1] = model.part = torch.compile(model.part, **OPTIONS)
    model.around.compile(**OPTIONS)
    call, hooks = model.around._compiled_call_impl, model.part._forward_pre_hooks
    for method in (ASI(2), Vanilla()):
        lowrank.convert(model, lowrank.trailing_layers(model, "all"), method)
        assert len(hooks) == 1
    torch.testing.assert_close(gradients(model, x), gradients(stock, x))
    lowrank.revert(model)
    assert model.around._compiled_call_impl is call
    assert not hooks
    torch.testing.assert_close(gradients(model, x), gradients(stock, x))


def test_a_copy_of_a_model_with_parts_trains_as_the_model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock, x = frozen_statistics(with_statistics(Around("held"))).double(), random_tensor(4, 3, 8, 8)
    model = copy.deepcopy(stock)
    model.part.compile(**OPTIONS)
    lowrank.convert(model, lowrank.trailing_layers(model, "all"), Vanilla())
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(gradients(same, x), gradients(stock, x))


def test_functions_ahead_of_a_part_keep_less():
    """As they do without it, also ahead of what a compiler is to leave alone."""
    stock, x = frozen_statistics(with_statistics(Around("watched"))).double(), random_tensor(4, 3, 8, 8)
    kept = []
    for compiled in (lambda part: part, torch.compiler.disable, lambda part: torch.compile(part, **OPTIONS)):
        torch._dynamo.reset()
        model = copy.deepcopy(stock)
        model.part = compiled(model.part)
        lowrank.convert(model, lowrank.trailing_layers(model, "all"), Vanilla())
        kept.append(lowrank.saved_bytes(model, loss, x))
    assert kept[0] == kept[1]
    assert kept[2] < lowrank.saved_bytes(stock, loss, x)


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


@pytest.mark.parametrize("method", [ASI(99), Vanilla()], ids=repr)
@pytest.mark.parametrize("way", ["unread", "held"])
def test_a_part_that_is_compiled_later_and_begins_with_a_layer_is_told_of(way, method):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = frozen_statistics(with_statistics(Around(way))).double(), random_tensor(4, 3, 8, 8)
    wanted = gradients(model, x)
    lowrank.convert(model, lowrank.trailing_layers(model, "all"), method)
    model.part.compile(backend="aot_eager")
    with pytest.warns(UserWarning, match=r"Compile the part ahead of lowrank\.convert"):
        found = gradients(model, x)
    torch.testing.assert_close(found, wanted)
