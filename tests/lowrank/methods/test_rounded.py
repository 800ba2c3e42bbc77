"""Inputs that are rounded and not cut: their bytes, and how far gradients are from exact ones."""

import copy

import pytest
import torch
from references import random_tensor
from torch import nn

import lowrank
from lowrank import Rounded


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 10)).float()


def gradients(model, x):
    model.zero_grad()
    (model(x) * random_tensor(16, 10, seed=1, dtype=torch.float32)).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(("storage", "error"), [("int8", 2**-7), ("bfloat16", 2**-8), ("input", 1e-6)])
def test_gradients_of_the_weights_are_exact_to_the_rounding_and_all_others_exact(storage, error):
    model, x = network(), random_tensor(16, 3, 6, 6, dtype=torch.float32)
    exact = gradients(model, x)
    found = gradients(lowrank.convert(copy.deepcopy(model), ["0", "2"], Rounded(storage=storage)), x)
    for at, (own, expected) in enumerate(zip(found, exact, strict=True)):
        tolerance = error if at in (0, 2) else 1e-6  # weights; biases need no input
        distance = (own - expected).norm() / expected.norm()
        assert distance < tolerance
        assert at in (1, 3) or storage == "input" or distance > tolerance / 100


def test_in_int8_an_input_takes_a_byte_a_number_and_a_scale_for_every_32():
    model, x = network(), random_tensor(16, 3, 6, 6, dtype=torch.float32)
    lowrank.freeze_before(model, ["2"])
    loss = lambda model, x: model(x).square().mean()  # noqa: E731
    exact = lowrank.saved_bytes(model, loss, x)
    lowrank.convert(model, ["2"], Rounded())
    numbers = 16 * 8 * 36
    assert exact - lowrank.saved_bytes(model, loss, x) == 4 * numbers - (numbers + numbers // 32 * 2)
    assert lowrank.account(model, ["2"], x).total.activation_bytes == numbers + numbers // 32 * 2


def test_its_tag_and_description_name_the_storage():
    assert Rounded().tag == "rounded_int8"
    assert repr(Rounded()) == "Rounded(storage='int8')"
