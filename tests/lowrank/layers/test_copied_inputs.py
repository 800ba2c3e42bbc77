"""Layers that PyTorch hands a copy of their input, which is then changed in place where nobody counts the changes."""

import copy

import pytest
import torch
from references import DEVICE, random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank

METHODS = lowrank.Vanilla(), lowrank.ASI(99), lowrank.HOSVD(1.0)  # all of which keep an input that hardly compresses


class Changes(nn.Module):
    """Changes the input of a layer in place behind it; one more layer follows, so that a checkpoint runs that far."""

    def __init__(self, layer, given):
        super().__init__()
        self.layer, self.given, self.behind = layer, given, nn.PReLU()

    def forward(self, x):
        x = x.roll(1, -1)  # a tensor of its own that nothing keeps
        y = self.layer(self.given(x))
        x.mul_(3)
        return self.behind(y)


LAYERS = {
    "circular padding": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), lambda x: x),
    "reflected padding": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), lambda x: x.flatten(2)),
    "uneven padding": (lambda: nn.Conv2d(4, 6, 2, padding="same"), lambda x: x),
    "channels last by a view": (lambda: nn.Linear(4, 6), lambda x: x.permute(0, 2, 3, 1)),
}


def under_hooks(module, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return module(x)


def checkpointed(module, x):
    return checkpoint(module, x, use_reentrant=False)


@pytest.mark.parametrize("run", [under_hooks, checkpointed])
@pytest.mark.parametrize("method", METHODS, ids=["exact", "asi", "hosvd"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_its_gradient_is_of_what_the_layer_read(name, method, run):
    build, given = LAYERS[name]
    torch.manual_seed(5)
    stock = Changes(build(), given).to(DEVICE, torch.float64)
    changed = copy.deepcopy(stock)
    lowrank.convert(changed, ["layer"], method, everywhere=True)
    x = random_tensor(2, 4, 5, 5)
    upstream = torch.randn_like(stock(x))
    for model in (stock, changed):
        (run(model, x.clone().requires_grad_()) * upstream).sum().backward()
    torch.testing.assert_close(changed.layer.weight.grad, stock.layer.weight.grad, rtol=1e-8, atol=1e-10)
