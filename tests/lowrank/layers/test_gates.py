"""Gates of language models, whose gradients are made in one pass and handed on unread, against the stock functions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank
from lowrank.meters import memory


class Gated(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.norm, self.use = nn.LayerNorm(12), use
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        x = self.norm(x)
        return self.use(self, self.gate(x), self.up(x))


SEEN = []


def hooked(hook):
    def use(m, g, u):
        s = F.silu(g)
        s.register_hook(hook)
        return m.down(s * u)

    return use


def retained(m, g, u):
    s = F.silu(g)
    s.retain_grad()
    SEEN.append(s)
    return m.down(s * u)


def in_place(m, g, u):
    s = F.silu(g)
    y = s * u
    return m.down(y.add_(1.0))


USES = {
    "as in a language model": lambda m, g, u: m.down(F.silu(g) * u),
    "by GELU": lambda m, g, u: m.down(F.gelu(g, approximate="tanh") * u),
    "by another GELU": lambda m, g, u: m.down(F.gelu(g) * u),
    "the gate behind": lambda m, g, u: m.down(u * F.silu(g)),
    "a gate that is read again": lambda m, g, u: m.down((s := F.silu(g)) * u) + s[..., :12],
    "a gate with itself": lambda m, g, u: m.down((s := F.silu(g)) * s),
    "a gate of what it multiplies": lambda m, g, u: m.down(F.silu(g) * g),
    "of one row": lambda m, g, u: m.down(F.silu(g[:1]) * u),
    "a gradient that is seen": hooked(lambda grad: SEEN.append(grad.clone())),
    "a gradient that is replaced": hooked(lambda grad: grad * 2),
    "a gradient that is kept": retained,
    "a product that is changed": in_place,
    "a frozen gate": lambda m, g, u: m.down(F.silu(g.detach()) * u),
    "a frozen product": lambda m, g, u: m.down(F.silu(g) * u.detach()),
}


def steps(model, x, again):
    """Output, gradients of two steps over one graph, and, if asked, the second derivative."""
    y = model(x)
    wanted = [x, *model.parameters()]
    if again:
        (found,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return [y, found, *torch.autograd.grad(found.square().sum(), x)]
    first = torch.autograd.grad(y.square().sum(), wanted, retain_graph=True, allow_unused=True)
    return [y, *first, *torch.autograd.grad(y.sum(), wanted, allow_unused=True)]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_stocks(use, dtype, recompute):
    torch.manual_seed(0)
    stock = Gated(USES[use]).to(dtype)
    own = lowrank.convert(copy.deepcopy(stock), ["gate", "up", "down"], lowrank.Vanilla(), recompute=recompute)
    x = torch.randn(3, 7, 12, dtype=dtype, requires_grad=True)
    SEEN.clear()
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(steps(own, x, False), steps(stock, x, False), **close)
    if SEEN:
        found, wanted = SEEN[: len(SEEN) // 2], SEEN[len(SEEN) // 2 :]
        grads = [[one.grad if one.requires_grad else one for one in half] for half in (found, wanted)]
        torch.testing.assert_close(*grads, **close)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_second_derivative_is_stocks_or_refused(recompute):
    torch.manual_seed(0)
    stock = Gated(USES["as in a language model"])
    own = lowrank.convert(copy.deepcopy(stock), ["gate", "up", "down"], lowrank.Vanilla(), recompute=recompute)
    x = torch.randn(3, 7, 12, requires_grad=True)
    torch.testing.assert_close(steps(own, x, True), steps(stock, x, True), rtol=1e-4, atol=1e-5)


def test_a_gate_keeps_no_more_than_without_compiled_passes():
    torch.manual_seed(0)
    own = lowrank.convert(Gated(USES["as in a language model"]), ["gate", "up", "down"], lowrank.Vanilla())
    x = torch.randn(3, 7, 12)
    loss = lambda model, batch: model(batch).sum()  # noqa: E731
    kept = memory.held_bytes(own, loss, x)
    with lowrank.kernels.library.plain():
        assert kept == memory.held_bytes(own, loss, x)
