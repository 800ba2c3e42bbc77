"""The node of a factored weight: outputs and gradients against autograd, and what may be done with its output."""

import pytest
import torch
import torch.nn.functional as F
from references import TOLERANCE, random_tensor

from lowrank.errors import ChangedError, DoubleBackwardError
from lowrank.layers.factored_function import FactoredFunction, FactoredSettings

SETTINGS = FactoredSettings("fc", torch.float64, keeps_input=True)
SHAPES = {"1-D": (6,), "2-D": (20, 6), "3-D": (4, 5, 6), "4-D": (2, 3, 4, 6), "no rows": (0, 6)}


def leaves(shape, outputs=9, rank=3, bias=True):
    x, left, right = random_tensor(*shape), random_tensor(outputs, rank, seed=1), random_tensor(rank, 6, seed=2)
    given = [x, left, right, random_tensor(outputs, seed=3) if bias else None]
    return [None if tensor is None else tensor.requires_grad_() for tensor in given]


def kept_of(x):
    """As a layer keeps it: with a batch dimension; nothing of an empty batch."""
    return (x.detach().reshape(-1, 6) if x.ndim < 2 else x.detach(),) if x.numel() else ()


def apply(x, left, right, bias, settings=SETTINGS, kept=None):
    return FactoredFunction.apply(x, left, right, bias, settings, *(kept_of(x) if kept is None else kept))


def stock(x, left, right, bias):
    return F.linear(x, left @ right, bias)


def present(tensors):
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_are_autograds(shape, bias):
    given = leaves(shape, bias=bias)
    y, expected = apply(*given), stock(*given)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    grad = random_tensor(*y.shape, seed=4)
    found = torch.autograd.grad(y, present(given), grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, present(given), grad), **TOLERANCE)


def test_gradients_are_of_the_input_that_was_kept():
    x, left, right, bias = leaves((4, 5, 6))
    other = random_tensor(4, 5, 6, seed=7)
    grad = random_tensor(4, 5, 9, seed=4)
    core, factor = random_tensor(4, 5, 2, seed=8), random_tensor(6, 2, seed=9)
    tucker = FactoredSettings("fc", torch.float64, keeps_input=False)
    doubled = FactoredSettings("fc", torch.float64, keeps_input=True, rebuild=lambda half, half_too: half + half_too)
    for settings, kept, dense in (
        (SETTINGS, (other,), other),
        (tucker, (core, None, None, factor), core @ factor.mT),
        (doubled, (other / 2, other / 2), other),
    ):
        y = apply(x, left, right, bias, settings, kept)
        torch.testing.assert_close(y, stock(x, left, right, bias), **TOLERANCE)
        found = torch.autograd.grad(y, (left, right), grad)
        expected = torch.autograd.grad(stock(dense, left, right, bias), (left, right), grad)
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 1, 2}, {1, 2, 3}], ids=str)
def test_only_what_is_asked_for_gets_a_gradient(frozen):
    given = leaves((4, 5, 6))
    for index in frozen:
        given[index].requires_grad_(False)
    kept = () if {1, 2} <= frozen else None
    apply(*given, kept=kept).backward(random_tensor(4, 5, 9, seed=4))
    assert {index for index, tensor in enumerate(given) if tensor.grad is None} == frozen


@pytest.mark.parametrize("shape", [(6,), (20, 6), (4, 5, 6)], ids=str)
def test_the_output_is_its_own_tensor_and_may_be_changed_in_place(shape):
    given = leaves(shape)
    y = apply(*given)
    assert not y._is_view()
    found = torch.autograd.grad(y.mul_(2).relu_(), given, random_tensor(*y.shape, seed=4))
    expected = torch.autograd.grad((stock(*given) * 2).relu(), given, random_tensor(*y.shape, seed=4))
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("shape", [(6,), (4, 5, 6)], ids=str)
def test_a_gradient_penalty_is_right(shape):
    given, results = leaves(shape), []
    for layer in (apply, stock):
        y = layer(*given).tanh()
        (grad,) = torch.autograd.grad(y, given[0], random_tensor(*y.shape, seed=5), create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), given))
    torch.testing.assert_close(*results, **TOLERANCE)


@pytest.mark.parametrize("wanted", [1, 2])
def test_a_factors_gradient_cannot_be_differentiated_and_says_so(wanted):
    given = leaves((4, 5, 6))
    for output in (apply(*given).square().sum(), apply(*given).sum()):
        (grad,) = torch.autograd.grad(output, given[wanted], create_graph=True)
        with pytest.raises(DoubleBackwardError, match="fc"):
            (grad.square().sum() + given[0].sum()).backward()


def test_the_gradient_of_the_bias_can_be_differentiated():
    given, results = leaves((4, 5, 6)), []
    for layer in (apply, stock):
        (grad,) = torch.autograd.grad(layer(*given).tanh().square().sum(), given[3], create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), given))
    torch.testing.assert_close(*results, **TOLERANCE)


def test_a_factor_that_was_changed_before_the_backward_pass_is_noticed():
    given = leaves((4, 5, 6))
    y = apply(*given)
    with torch.no_grad():
        given[1].mul_(2)
    with pytest.raises(ChangedError, match="fc"):
        y.sum().backward()


def test_half_precision_computes_in_it_and_gives_gradients_in_the_factors_own():
    given = [tensor.detach().float().requires_grad_() for tensor in leaves((4, 5, 6))]
    x = given[0].detach().bfloat16()
    y = FactoredFunction.apply(x, *given[1:], FactoredSettings("fc", torch.bfloat16, True), x)
    y.backward(torch.ones_like(y))
    assert y.dtype == torch.bfloat16
    assert all(tensor.grad.dtype == torch.float32 for tensor in given[1:])
