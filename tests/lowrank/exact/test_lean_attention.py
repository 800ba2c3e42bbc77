"""Attention in lean blocks: nothing of it is kept, its output neither, and it is computed again once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from references import TOLERANCE, random_tensor
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

import lowrank
from lowrank import ASI, WSI, ChangedError, Vanilla
from lowrank.exact.watched import watch

BATCH, SIDE, SIZE = 3, 4, 8
UNIT = BATCH * SIDE * SIDE * SIZE * 8  # bytes of an activation in double precision


class Multihead(nn.Module):
    """Normalisation, self-attention with a mask, residual."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(SIZE), nn.MultiheadAttention(SIZE, 2, batch_first=True)
        self.mask = random_tensor(SIDE * SIDE, SIDE * SIDE, seed=8)

    def forward(self, x):
        normal = self.norm(x * 1)
        mixed, _ = self.attention(normal, normal, normal, need_weights=False, attn_mask=self.mask)
        return x + mixed


class Windows(nn.Module):
    """Normalisation, attention in shifted windows, residual; of `padded` ones the last are filled up."""

    def __init__(self, padded=False):
        super().__init__()
        window = [3, 3] if padded else [2, 2]
        self.norm, self.attention = nn.LayerNorm(SIZE), ShiftedWindowAttention(SIZE, window, [1, 1], 2)

    def forward(self, x):
        x = x.unflatten(1, (SIDE, SIDE))
        return (x + self.attention(self.norm(x * 1))).flatten(1, 2)


BLOCKS = {"multihead": Multihead, "windows": Windows, "padded windows": lambda: Windows(padded=True)}
LAST = {"multihead": "attention.out_proj"}  # of the others "attention.proj"


def pair(kind, method):
    torch.manual_seed(0)
    stock = BLOCKS[kind]().double()
    for parameter in stock.parameters():
        nn.init.normal_(parameter)
    model = copy.deepcopy(stock)
    lowrank.open_attention(model)
    return stock, lowrank.convert(model, [LAST.get(kind, "attention.proj")], method)


def inputs():
    return random_tensor(BATCH, SIDE * SIDE, SIZE).requires_grad_(True)


def loss_of(model, x):
    return (model(x) * random_tensor(BATCH, SIDE * SIDE, SIZE, seed=3)).sum()


def parameters(model):
    return {name.replace("lowrank_in_proj.", "in_proj_"): p for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", BLOCKS)
def test_gradients_are_autograds(kind):
    stock, model = pair(kind, Vanilla())
    found = {}
    for network in (stock, model):
        x = inputs()
        loss_of(network, x).backward()
        found[network] = {"x": x.grad, **{name: p.grad for name, p in parameters(network).items()}}
    torch.testing.assert_close(found[model], found[stock], **TOLERANCE)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("method", [Vanilla(), WSI(energy=1)], ids=lambda method: method.tag)
def test_the_input_of_the_normalisation_is_all_that_is_kept(kind, method):
    stock, model = pair(kind, method)
    kept, before = (lowrank.saved_bytes(network, lambda m, x: m(x).sum(), inputs()) for network in (model, stock))
    statistics = 2 * BATCH * SIDE * SIDE * 8  # mean and deviation of the normalisation
    masks = model.mask.nbytes if kind == "multihead" else 2 * 9**2 * 8  # the bias of a position at another, per head
    assert before > 6 * UNIT
    assert UNIT + statistics < kept <= UNIT + statistics + masks


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("method", [Vanilla(), WSI(energy=1), ASI(2)], ids=lambda method: method.tag)
def test_it_is_computed_again_once(kind, method, monkeypatch):
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: calls.append(1) or attention(*a, **o))
    _, model = pair(kind, method)
    loss = loss_of(model, inputs())
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("kind", BLOCKS)
def test_parts_of_a_retained_graph_in_any_order(kind):
    stock, model = pair(kind, Vanilla())
    last = f"{LAST.get(kind, 'attention.proj')}.weight"
    orders = [(last,), ("norm.weight",), (last, "norm.weight"), ("norm.weight", last), (last,)]
    results = []
    for network in (stock, model):
        loss, own = loss_of(network, inputs()), parameters(network)
        results.append([torch.autograd.grad(loss, [own[n] for n in names], retain_graph=True) for names in orders])
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)


def test_a_source_that_was_changed_is_an_error():
    _, model = pair("multihead", Vanilla())
    loss = loss_of(model, inputs())
    torch.autograd.grad(loss, model.attention.out_proj.weight, retain_graph=True)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    with pytest.raises(ChangedError, match=r"attention.*modified by an inplace operation"):
        torch.autograd.grad(loss, model.norm.weight)


def test_in_the_backward_pass_functions_are_pytorchs_own():
    """One that keeps less there would compute itself again for ever."""
    results = []
    for keeps_less in (False, True):
        x = inputs()
        parts = [(x * factor).unflatten(-1, (2, -1)).transpose(1, 2) for factor in (2, 3, 4)]
        parts[0] = parts[0].detach()  # a leaf is saved as the object that it is
        parts = [watch(part) for part in parts] if keeps_less else parts
        y = F.scaled_dot_product_attention(*parts)
        y.square().sum().backward()
        results.append((y.detach().as_subclass(torch.Tensor), x.grad))
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)
