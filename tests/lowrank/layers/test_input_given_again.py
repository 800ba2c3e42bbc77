"""A batch that is one tensor in every step: what a step before kept of it is no longer kept."""

import copy

import pytest
import torch
from references import random_tensor
from torch import nn

import lowrank
from lowrank.layers.layer import can_be_converted, converted_layers

NETWORKS = {
    "curves behind linear layers": (
        lambda: [nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 5)],
        (4, 7, 12),
    ),
    "a normalisation first": (
        lambda: [nn.LayerNorm(12), nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 5)],
        (4, 7, 12),
    ),
    "curves behind convolutions": (
        lambda: [
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8).eval(), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
            *(nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 6)),
        ],
        (4, 3, 8, 8),
    ),
}
METHODS = [lowrank.ASI(3), lowrank.ASI(3, storage="int8"), lowrank.HOSVD(0.5), lowrank.Vanilla()]


def steps(model, batches):
    """Per step all gradients, and what each layer kept of its input."""
    found = []
    for x in batches:
        model.zero_grad()
        y = model(x)
        kept = [layer._lowrank.kept_bytes for layer in converted_layers(model)]
        y.square().sum().backward()
        found.append((kept, [parameter.grad.clone() for parameter in model.parameters()]))
    return found


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("wanted", [False, True], ids=["batch", "leaf"])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_are_those_of_new_tensors(name, method, wanted, fuse):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = nn.Sequential(*make()).double()
    names = [name for name, layer in model.named_modules() if can_be_converted(layer)]
    one, other = (lowrank.convert(copy.deepcopy(model), names, method, fuse=fuse) for _ in range(2))
    x = random_tensor(*shape).requires_grad_(wanted)
    lowrank.saved_bytes(one, lambda net, x: net(x).square().sum(), x)
    lowrank.load_training_state(one, {})
    again = steps(one, [x] * 3)
    anew = steps(other, [x.detach().clone().requires_grad_(wanted) for _ in range(3)])
    for (kept, found), (kept_anew, found_anew) in zip(again, anew, strict=True):
        assert kept == kept_anew
        assert all(map(torch.equal, found, found_anew))
