"""Activations and dropout that keep bits: PyTorch's values, gradients and random numbers, and how much is kept."""

import pytest
import torch
import torch.nn.functional as F
from function_cases import compare, kept
from references import random_tensor

from lowrank.exact import activations, bits

FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])

CURVES = {
    "relu": {},
    "relu6": {},
    "hardtanh": {"min_val": -0.5, "max_val": 2.0},
    "hardsigmoid": {},
    "leaky_relu": {"negative_slope": 0.2},
}


@FORMATS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", CURVES)
def test_functions_with_two_slopes(name, inplace, memory_format):
    x = (4 * random_tensor(3, 5, 7, 9)).contiguous(memory_format=memory_format)
    x[0, 0, 0, :5] = torch.tensor([0.0, 6.0, -3.0, 3.0, -0.5])  # the corners
    stock, own = getattr(F, name), getattr(activations, name)
    settings = CURVES[name]
    compare(lambda v: stock(v, **settings, inplace=inplace), lambda v: own(v, **settings, inplace=inplace), x)
    assert kept(lambda v: own(v, **settings), x) == -(-x.numel() // 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CURVES)
def test_infinities_and_nan_become_what_they_become_in_pytorch(monkeypatch, name, dtype):
    monkeypatch.setattr(bits, "CHUNK", 64)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -1e-3, 0.0, 1e-3, 3.0, 6.0, -3.0, -0.5, 2.0])
    pairs = torch.cartesian_prod(special, special).to(dtype)  # 121, so the last byte is not full
    results = []
    for function in (getattr(F, name), getattr(activations, name)):
        leaf = pairs[:, 0].clone().requires_grad_(True)
        y = function(leaf, **CURVES[name])
        y.backward(pairs[:, 1].contiguous())  # PyTorch's own Hardtanh treats NaN in another way where it has gaps
        results.append((y.detach(), leaf.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@FORMATS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_draws_what_pytorch_draws(p, inplace, memory_format):
    x = random_tensor(3, 5, 7, 9).contiguous(memory_format=memory_format)
    compare(lambda v: F.dropout(v, p, True, inplace), lambda v: activations.dropout(v, p, True, inplace), x)
    if 0 < p < 1:
        assert kept(lambda v: activations.dropout(v, p), x) == -(-x.numel() // 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_of_dropout_in_half_precision_is_that_of_its_output(inplace, dtype):
    results = []
    for function in (F.dropout, activations.dropout):
        torch.manual_seed(0)
        leaf = random_tensor(16, 16).to(dtype).requires_grad_(True)
        y = function(leaf.clone(), 0.1, True, inplace)
        y.backward(y.detach())
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_dropout_does_nothing_in_evaluation():
    x = random_tensor(4, 4).requires_grad_(True)
    assert torch.equal(activations.dropout(x, 0.5, training=False), x)


@pytest.mark.parametrize("name", [*CURVES, "dropout"])
def test_without_a_gradient_nothing_is_kept(name):
    x = random_tensor(4, 4)
    assert not getattr(activations, name)(x).requires_grad
    with torch.no_grad():
        assert not getattr(activations, name)(x.requires_grad_(True)).requires_grad
