"""A forward and backward pass asks for no number of a tensor: on a GPU the host would wait for it."""

import pytest
import torch
import torch.nn.functional as F
from references import DEVICE
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank

WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}


class Waiting(TorchDispatchMode):
    """Notes the operators whose result the host waits for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def convolutional():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(8, 6, 1), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    return model, torch.randn(4, 3, 16, 16), "conv"


def linear():
    blocks = (nn.LayerNorm(12), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8), nn.SiLU())
    return nn.Sequential(*blocks), torch.randn(4, 5, 12), "linear"


CASES = {
    "lean": (convolutional, lowrank.Vanilla()),
    "ASI": (convolutional, lowrank.ASI([3, 4, 3, 3])),
    "ASI in int8": (convolutional, lowrank.ASI([3, 4, 3, 3], storage="int8")),
    "gradient filter": (convolutional, lowrank.GradientFilter(2)),
    "linear, ASI": (linear, lowrank.ASI([3, 3, 4])),
    "WASI": (linear, lowrank.WASI(energy=0.9, ranks=[3, 3, 4])),
}


@pytest.mark.parametrize("case", CASES)
def test_no_number_is_asked_for(case):
    build, method = CASES[case]
    model, x, kind = build()
    lowrank.convert(model, lowrank.trailing_layers(model, "all", kind=kind), method)
    optimizer = lowrank.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        y = model(x)
        F.mse_loss(y, torch.zeros_like(y)).backward()

    step()  # the first makes the bases
    optimizer.step()
    with Waiting() as waiting:
        step()
    assert waiting.found == []
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_what_waits_is_noticed():
    with Waiting() as waiting:
        torch.ones(()).item()
    assert waiting.found
