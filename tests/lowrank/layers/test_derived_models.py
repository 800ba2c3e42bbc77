"""Deriving inputs keeps no more than not deriving them, in whatever networks, whatever else these keep."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from references import random_tensor

import lowrank
from lowrank import HOSVD


def loss_of(model, x):
    return F.cross_entropy(model(x), torch.arange(len(x)))


def kept(name, training, derive, everywhere):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=4).train(training)
    names = lowrank.trailing_layers(model, "all")
    lowrank.convert(model, names, HOSVD(0.7, storage="int8", derive=derive), everywhere=everywhere)
    torch.manual_seed(0)
    return lowrank.saved_bytes(model, loss_of, random_tensor(2, 3, 48, 48).float())


@pytest.mark.slow
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet18"])
def test_deriving_never_keeps_more(name, training, everywhere):
    plain, few, many = (kept(name, training, derive, everywhere) for derive in (False, True, 20_000))
    assert few <= plain
    assert many <= plain
    if everywhere and not training:
        assert many < plain
