"""Matrix products of a backward pass: one linear layer deep at most again, and none with recompute=False."""

import copy

import pytest
import torch
from references import TOLERANCE, random_tensor
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank

PRODUCTS = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}


class Block(nn.Module):
    """A block of a transformer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.wide, self.narrow = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.second(x))))


class Products(TorchDispatchMode):
    """Counts matrix products and forward passes of attention."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in PRODUCTS
        return func(*args, **(kwargs or {}))


def stock():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Block()).double()


def converted(recompute):
    model = stock()
    names = lowrank.trailing_layers(model, "all", kind="linear")
    return lowrank.convert(model, names, lowrank.Vanilla(), recompute=recompute)


def backward(model):
    """Products of the backward pass, and the gradients."""
    y = model(random_tensor(2, 5, 16))
    with Products() as products:
        y.backward(random_tensor(*y.shape, seed=1))
    return products.count, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [True, False])
def test_the_gradients_are_stocks_and_copies_know_the_choice(recompute):
    model = converted(recompute)
    count, found = backward(model)
    torch.testing.assert_close(found, backward(stock())[1], **TOLERANCE)
    assert backward(copy.deepcopy(model))[0] == count


@pytest.mark.cpu_only("attention on a GPU is of other operators")
def test_products_and_bytes():
    plain, (none, some) = backward(stock())[0], (backward(converted(recompute))[0] for recompute in (False, True))
    assert none == plain
    assert some == plain + 3 * 3  # per block queries, keys and values, attention, and the layer ahead of GELU
    kept = [
        lowrank.saved_bytes(model, lambda m, x: m(x).sum(), random_tensor(2, 5, 16))
        for model in (converted(True), converted(False), stock())
    ]
    assert kept == sorted(kept)
    assert len(set(kept)) == 3
