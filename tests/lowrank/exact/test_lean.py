"""Lean functions against the stock ones: the same values, gradients and random numbers, and how much less they keep."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from references import random_tensor
from torch import nn

from lowrank.exact import bits, lean
from lowrank.exact.recompute import RECOMPUTING_MODULES

FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


def compare(stock, own, x):
    """Outputs and input gradients of two functions of the same input, with a random upstream gradient."""
    results = []
    for function in (stock, own):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(True)
        torch.manual_seed(7)
        y = function(leaf * 1)  # a function may not change a leaf in place
        y.backward(random_tensor(*y.shape, seed=3, dtype=y.dtype))
        results.append((y.detach(), leaf.grad))
    (y, grad), (own_y, own_grad) = results
    assert torch.equal(y, own_y)
    torch.testing.assert_close(own_grad, grad, rtol=1e-12, atol=1e-12)


def kept(function, x):
    """Bytes of distinct storages saved by a function of an intermediate tensor."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaf = x.clone().requires_grad_(True) * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(leaf)
    assert y.requires_grad
    return sum(sizes.values())


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
    stock, own = getattr(F, name), getattr(lean, name)
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
    for function in (getattr(F, name), getattr(lean, name)):
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
    compare(lambda v: F.dropout(v, p, True, inplace), lambda v: lean.dropout(v, p, True, inplace), x)
    if 0 < p < 1:
        assert kept(lambda v: lean.dropout(v, p), x) == -(-x.numel() // 8)


def test_dropout_does_nothing_in_evaluation():
    x = random_tensor(4, 4).requires_grad_(True)
    assert torch.equal(lean.dropout(x, 0.5, training=False), x)


SIDES = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=SIDES,
    stride=st.none() | SIDES,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ceil_mode=st.booleans(),
    channels_last=st.booleans(),
)
def test_pooling_of_every_geometry(size, kernel, stride, padding, dilation, ceil_mode, channels_last):
    assume(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))
    x = random_tensor(2, 3, *size)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if all(n + 2 * p >= span for n, p, span in zip(size, padding, spans, strict=True)):
        settings = (kernel, stride, padding, dilation, ceil_mode)
        compare(lambda v: F.max_pool2d(v, *settings), lambda v: lean.max_pool2d(v, *settings), x)
    if all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)):
        for count_include_pad, divisor in ((True, None), (False, None), (True, 3)):
            average = (kernel, stride, padding, ceil_mode, count_include_pad, divisor)
            compare(lambda v, a=average: F.avg_pool2d(v, *a), lambda v, a=average: lean.avg_pool2d(v, *a), x)


def test_ties_go_to_the_element_that_pytorch_takes():
    x = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    compare(lambda v: F.max_pool2d(v, 3, 2, 1), lambda v: lean.max_pool2d(v, 3, 2, 1), x)


@pytest.mark.parametrize("size", [1, 2, (3, 5), (None, 4)])
def test_adaptive_pooling(size):
    x = random_tensor(2, 3, 7, 8)
    compare(lambda v: F.adaptive_avg_pool2d(v, size), lambda v: lean.adaptive_avg_pool2d(v, size), x)
    assert kept(lambda v: lean.adaptive_avg_pool2d(v, size), x) == 0


def test_pooling_keeps_a_byte_per_output_or_nothing():
    x = random_tensor(2, 3, 8, 8)
    assert kept(lambda v: lean.max_pool2d(v, 2), x) == 2 * 3 * 4 * 4
    assert kept(lambda v: lean.avg_pool2d(v, 2), x) == 0


def test_what_a_byte_cannot_number_is_left_to_pytorch():
    x = random_tensor(1, 1, 40, 40)
    compare(lambda v: F.max_pool2d(v, 17), lambda v: lean.max_pool2d(v, 17), x)
    _y, indices = lean.max_pool2d(x.requires_grad_(True), 2, return_indices=True)
    assert torch.equal(indices, F.max_pool2d(x, 2, return_indices=True)[1])


STOCK_MODULES = [
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.Hardtanh(-0.5, 2.0),
    nn.Hardsigmoid(),
    nn.LeakyReLU(0.2),
    nn.Dropout(0.4),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d(2, count_include_pad=False),
    nn.AdaptiveAvgPool2d((2, 3)),
]


@pytest.mark.parametrize("module", STOCK_MODULES, ids=lambda module: type(module).__name__)
def test_a_module_with_the_lean_class_is_the_same_module(module):
    own = copy.deepcopy(module)
    own.__class__ = lean.LEAN_MODULES[type(module)]
    for copied in (own, copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        compare(module, copied, 3 * random_tensor(2, 3, 9, 8))
        x = 3 * random_tensor(2, 3, 9, 8)
        assert torch.equal(copied.eval()(x.clone()), copy.deepcopy(module).eval()(x.clone()))
        copied.train()


def test_every_lean_module_is_tried_here():
    assert {type(module) for module in STOCK_MODULES} == set(lean.LEAN_MODULES) - set(RECOMPUTING_MODULES)


@pytest.mark.parametrize("name", [*CURVES, "dropout"])
def test_without_a_gradient_nothing_is_kept(name):
    x = random_tensor(4, 4)
    assert not getattr(lean, name)(x).requires_grad
    with torch.no_grad():
        assert not getattr(lean, name)(x.requires_grad_(True)).requires_grad


def test_a_second_derivative_is_refused():
    x = random_tensor(3).requires_grad_(True)
    (grad,) = torch.autograd.grad(lean.relu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
