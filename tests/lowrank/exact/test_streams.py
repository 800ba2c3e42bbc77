"""Residual streams as ConvNeXt, vision transformers and ResMLP write them: all else comes about from what is kept."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from references import TOLERANCE, random_tensor
from torch import nn

import lowrank
from lowrank import ASI, Vanilla

WIDTH, SIDE, BATCH = 8, 6, 3
UNIT = BATCH * SIDE * SIDE * WIDTH * 8  # bytes of an activation, in double precision
STATISTICS = 2 * BATCH * SIDE * SIDE * 8  # what a normalisation of the channels keeps beside its input


class ChannelNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


class Permute(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return torch.permute(x, self.dims)


class Block(nn.Module):
    """ConvNeXt's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH, 1, 1))
        self.body = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(),
            nn.Linear(4 * WIDTH, WIDTH),
            Permute(0, 3, 1, 2),
        )

    def forward(self, x):
        y = self.scale * self.body(x)
        y += x
        return y


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(1, WIDTH)), nn.Parameter(torch.rand(1, WIDTH))

    def forward(self, x):
        return torch.addcmul(self.shift, self.scale, x)


class AffineBlock(nn.Module):
    """ResMLP's."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale = Affine(), nn.Parameter(torch.rand(WIDTH))
        self.first, self.second = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.scale * self.second(F.gelu(self.first(self.norm(x))))


class Tokens(nn.Module):
    """A class token ahead of all others, and their positions."""

    def __init__(self):
        super().__init__()
        self.token, self.places = nn.Parameter(torch.rand(1, 1, WIDTH)), nn.Parameter(torch.rand(1, 36, WIDTH))
        self.project, self.norm, self.layer = nn.Linear(3, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = self.project(x.flatten(2).transpose(1, 2)[:, 1:])
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.last(x + self.layer(self.norm(x)))


def networks():
    torch.manual_seed(0)
    yield "channels", nn.Sequential(nn.Conv2d(3, WIDTH, 11, padding=5), ChannelNorm(WIDTH), Block(), Block())
    yield "no normalisation ahead", nn.Sequential(nn.Conv2d(3, WIDTH, 11, padding=5), Block(), Block())
    yield "affine", nn.Sequential(nn.Conv2d(3, WIDTH, 11, padding=5), Permute(0, 2, 3, 1), AffineBlock(), AffineBlock())
    yield "tokens", Tokens()


NETWORKS = {name: network.double() for name, network in networks()}
IMAGE = BATCH * 3 * SIDE * SIDE * 8
# Of the stream what is kept, and how many normalisations keep statistics.
KEPT = {"channels": (3, 3), "no normalisation ahead": (3, 2), "affine": (3, 0), "tokens": (2, 2)}


def batch():
    return random_tensor(BATCH, 3, SIDE, SIDE)


def converted(name, method):
    model = copy.deepcopy(NETWORKS[name])
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return lowrank.convert(model, names, method)


def loss(model, x):
    return model(x).sum()


@pytest.mark.parametrize("method", [Vanilla(), ASI(999)], ids=["vanilla", "full ranks"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_stocks(name, method):
    found = []
    for model in (copy.deepcopy(NETWORKS[name]), converted(name, method)):
        y = model(batch())
        y.backward(random_tensor(*y.shape, seed=1))
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_stream_is_all_that_is_kept(name):
    units, normalisations = KEPT[name]
    kept = lowrank.saved_bytes(converted(name, Vanilla()), loss, batch())
    assert kept <= IMAGE + units * UNIT + normalisations * STATISTICS + 64


@pytest.mark.parametrize("name", NETWORKS)
def test_compressing_keeps_no_more_than_its_forms_beside_that(name):
    model = converted(name, ASI(1))
    kept = lowrank.saved_bytes(model, loss, batch())
    loss(model, batch()).backward()
    forms = sum(layer._lowrank.kept_bytes for layer in lowrank.converted_layers(model))
    assert kept - forms <= lowrank.saved_bytes(converted(name, Vanilla()), loss, batch())


def test_an_input_that_nothing_keeps_is_not_held_for_what_may_come_about_from_it():
    layer = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
    model = lowrank.convert(nn.Sequential(layer, nn.LayerNorm(SIDE)), ["0"], ASI(1))
    x = torch.randn(BATCH, WIDTH, SIDE, SIDE, requires_grad=True) * 1
    reference = weakref.ref(x)
    y = model[0](x)
    del x
    gc.collect()
    assert reference() is None
    model[1](y).sum().backward()
    assert layer.weight.grad is not None
