"""What the tests of converted layers share: the methods, a model of one layer, a step, the carried bases."""

import copy

import pytest
import torch
from references import TOLERANCE, autograd, random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, GradientFilter, Vanilla

EXACT = [Vanilla(), SVD(1.0), HOSVD(1.0), ASI(99), ASI(99, algorithm="published")]
EVERY = [Vanilla(), SVD(0.8), HOSVD(0.8), ASI(2), ASI(2, algorithm="published"), ASI(2, warm_start=False)]
EVERY_CONV = [*EVERY, GradientFilter(2)]
BOTH = pytest.mark.parametrize("algorithm", ["sequential", "published"])


def converted(layer, method):
    return lowrank.convert(nn.Sequential(copy.deepcopy(layer)), ["0"], method)


def bases_of(layer):
    """The carried basis of every mode that has one; of held bases also the entry that says when they are due."""
    return {mode: basis.clone() for mode, basis in enumerate(layer._lowrank.bases) if basis is not None}


def whole_state(model):
    """All that a checkpoint has to hold."""
    return {**model.state_dict(), **lowrank.training_state(model)}


def step(model, x, seed=0):
    """One forward and backward pass with a random gradient; the parameter gradients."""
    model.zero_grad()
    y = model(x)
    y.backward(random_tensor(*y.shape, seed=seed, dtype=y.dtype))
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def conv_model(method, **options):
    return converted(nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64, **options), method)


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def assert_exact_but_for_the_weight(layer, model, x, grad, kept_input):
    """Output, input and bias gradient are the stock layer's; the weight gradient is autograd's on `kept_input`."""
    y, grad_x, gradients = autograd(layer, x, grad)
    expected = {"0." + name: gradient for name, gradient in gradients.items()}
    expected["0.weight"] = autograd(layer, kept_input, grad)[2]["weight"]
    result_y, result_x, results = autograd(model, x, grad)
    torch.testing.assert_close(result_y, y, **TOLERANCE)
    torch.testing.assert_close(result_x, grad_x, **TOLERANCE)
    torch.testing.assert_close(results, expected, **TOLERANCE)
