"""Attention that is written out as products of matrices: exact, and computed again from its normalisation's input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, Vanilla

TOKENS, WIDTH, HEADS = 24, 16, 4
UNIT = 2 * TOKENS * WIDTH * 8  # bytes of an activation (2, TOKENS, WIDTH) in double precision
SCORES = 2 * HEADS * TOKENS**2 * 8


def operators(q, k, v, bias):
    return ((q * 0.5) @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v


def methods(q, k, v, bias):
    return torch.softmax(torch.matmul(q, k.mT) + bias, -1).matmul(v)


def batched(q, k, v, bias):
    joint = [one.flatten(0, 1) for one in (q, k, v)]
    scores = torch.bmm(joint[0], joint[1].mT).unflatten(0, (2, HEADS)) + bias
    return torch.bmm(F.softmax(scores, -1).flatten(0, 1), joint[2]).unflatten(0, (2, HEADS))


def sums(q, k, v, bias):
    scores = torch.einsum("bhnd,bhmd->bhnm", F.normalize(q, dim=-1), F.normalize(k, dim=-1))
    return torch.einsum("bhnm,bhmd->bhnd", (scores + bias).softmax(-1), v)


WAYS = [operators, methods, batched, sums]


class Written(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.norm, self.qkv, self.out = (
            way,
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 48),
            nn.Linear(WIDTH, WIDTH),
        )
        self.bias = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self.way(q, k, v, self.bias).transpose(1, 2).reshape(x.shape)
        return x + self.out(mixed @ self.mix)


def network(way):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Written(way), Written(way)).double()


def steps(model, x):
    found = []
    for _ in range(2):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(random_tensor(*y.shape, seed=1))
        found.append([y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())])
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=1e-3)
    return found


def kept(model):
    return lowrank.saved_bytes(model, lambda model, x: model(x).sum(), random_tensor(2, TOKENS, WIDTH))


@pytest.mark.parametrize("method", [Vanilla(), ASI(999)], ids=["vanilla", "full ranks"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_two_steps_are_stocks_and_no_scores_are_kept(way, method):
    stock, x = network(way), random_tensor(2, TOKENS, WIDTH)
    model = copy.deepcopy(stock)
    lowrank.convert(model, lowrank.trailing_layers(model, "all", "linear"), method)
    torch.testing.assert_close(steps(model, x), steps(stock, x), rtol=1e-9, atol=1e-11)
    assert kept(stock) >= 2 * SCORES
    assert kept(model) <= kept(stock)
    if method == Vanilla():
        assert kept(model) < SCORES + 6 * UNIT  # of both blocks


def test_its_gradient_is_differentiated_again():
    found = []
    for model in (network(operators), network(operators)):
        if found:
            lowrank.convert(model, ["0"], Vanilla())
        x = random_tensor(2, TOKENS, WIDTH).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])


PRODUCTS = {
    "@": lambda q, k: q @ k.mT,
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (2, HEADS)),
    "einsum": lambda q, k: torch.einsum("bhnd,bhmd->bhnm", q, k),
    "einsum, other order": lambda q, k: torch.einsum("...nhd,...mhd->...hnm", q.transpose(1, 2), k.transpose(1, 2)),
}
CHANGES = {
    "added to": lambda scores, bias: scores.add_(bias),
    "scaled": lambda scores, bias: scores.mul_(0.5),
    "masked": lambda scores, bias: scores.masked_fill_(torch.eye(TOKENS, dtype=torch.bool), -1e4),
    "a part set": lambda scores, bias: scores[..., 0].zero_(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_scores_and_sums_may_be_changed_in_place(product, change):
    """As LongT5 adds its positions to them; a product may be a view of what was computed in another shape."""

    def way(q, k, v, bias):
        scores = PRODUCTS[product](q, k)
        CHANGES[change](scores, bias)
        v = v + bias.mean()  # which every one of them reads so
        return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v).mul_(2)

    model = network(way)
    x = random_tensor(2, TOKENS, WIDTH)
    expected = steps(copy.deepcopy(model), x)
    lowrank.convert(model, lowrank.trailing_layers(model, "all", "linear"), Vanilla())
    for found, wanted in zip(steps(model, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
