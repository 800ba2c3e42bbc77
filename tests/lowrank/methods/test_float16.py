"""In float16, whose largest number is 65504: the norm of an activation, which a core holds, may be larger."""

import pytest
import torch
from references import random_tensor
from torch import nn

import lowrank
from lowrank.tensors.storage import STORAGES

SHAPES = {nn.Conv2d: (8, 6, 12, 10), nn.Linear: (8, 30, 12)}
METHODS = {
    "ASI": lambda ranks, storage: lowrank.ASI(ranks, storage=storage),
    "ASI, published": lambda ranks, storage: lowrank.ASI(ranks, algorithm="published", storage=storage),
    "ASI, refreshed": lambda ranks, storage: lowrank.ASI(ranks, refresh=2, storage=storage),
    "ASI, by energy": lambda ranks, storage: lowrank.ASI(ranks, refresh="energy", storage=storage),
    "HOSVD": lambda ranks, storage: lowrank.HOSVD(0.8, storage=storage),
    "SVD": lambda ranks, storage: lowrank.SVD(0.8, storage=storage),
    "fixed bases": lambda ranks, storage: lowrank.FixedBases(ranks, storage=storage),
    "WASI": lambda ranks, storage: lowrank.WASI(energy=1, ranks=ranks, storage=storage),
}


def gradients(method, kind, size, dtype):
    """Of the second step, in a layer's own dtype, with inputs of this mean and output gradients of 1 / size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1) if kind is nn.Conv2d else nn.Linear(12, 4))
    lowrank.convert(model, ["0"], method).to(dtype)
    for seed in range(2):
        model.zero_grad()
        x = (size * (1 + random_tensor(*SHAPES[kind], seed=seed) / 8)).to(dtype)
        y = model(x)
        y.backward((random_tensor(*y.shape, seed=9) / size).to(dtype))
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("size", [2.0**-9, 1.0, 2.0**13])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_are_those_of_float32(kind, name, storage, size):
    if kind is nn.Conv2d and name == "WASI":
        pytest.skip("of linear layers alone")
    ranks = [3, 2, 4, 3] if kind is nn.Conv2d else [3, 5, 4]
    method = METHODS[name](ranks, storage)
    wanted, found = (gradients(method, kind, size, dtype) for dtype in (torch.float32, torch.float16))
    for own, half in zip(wanted, found, strict=True):
        assert half.dtype == torch.float16
        allowed = (0.03 if storage in ("int8", "bfloat16") else 0.004) * own.abs().max()
        torch.testing.assert_close(half.float(), own, rtol=0, atol=float(allowed))


def test_gradients_far_below_one_do_not_vanish():
    """Where they are in range: of small output gradients and small inputs."""
    method = lowrank.ASI([3, 2, 4, 3])
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        model = lowrank.convert(nn.Sequential(nn.Conv2d(6, 4, 3, padding=1)), ["0"], method).to(dtype)
        y = model((1 + random_tensor(*SHAPES[nn.Conv2d]) / 8).to(dtype))
        y.backward((random_tensor(*y.shape, seed=9) * 2.0**-16).to(dtype))
        if dtype == torch.float32:
            wanted = model[0].weight.grad
    torch.testing.assert_close(model[0].weight.grad.float(), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
