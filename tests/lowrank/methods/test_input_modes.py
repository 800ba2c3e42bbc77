"""What is carried serves inputs of its own modes: linear layers get others, and modes that are whole have no basis."""

from itertools import permutations, product

import pytest
import torch
from layer_cases import conv_model, step
from references import autograd, low_rank_tensor, random_tensor
from torch import nn

import lowrank
from lowrank import ASI, WASI, FixedBases

METHODS = [
    ASI(4),
    ASI(4, storage="int8"),
    ASI(4, refresh=2),
    ASI(4, refresh="energy", storage="int8"),
    WASI(4, energy=1.0),
    FixedBases(4),
    FixedBases(4, storage="int8"),
]
SHAPES = [(30, 12), (6, 9, 12), (5, 6, 7, 12), (30, 9, 12), (2, 3, 4, 5, 12), (12,)]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_linear_layer_may_be_given_inputs_of_more_modes_and_fewer(method):
    torch.manual_seed(0)
    for shapes in permutations(SHAPES, 2):
        layer = nn.Linear(12, 5)
        model = lowrank.convert(nn.Sequential(nn.Linear(12, 5)), ["0"], method, everywhere=True)
        model.load_state_dict({f"0.{name}": value for name, value in layer.state_dict().items()})
        for shape in (*shapes, *shapes, shapes[0]):
            model.zero_grad()
            y = model(random_tensor(*shape).float())
            y.backward(torch.ones_like(y))
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("method", [method for method in METHODS if not isinstance(method, WASI)], ids=str)
@pytest.mark.parametrize("other", SHAPES[1:5], ids=str)
def test_the_gradient_of_each_is_that_of_its_own_input(method, other):
    torch.manual_seed(0)
    layer, shape = nn.Linear(12, 5), (30, 12)
    model = lowrank.convert(nn.Sequential(nn.Linear(12, 5)), ["0"], method, everywhere=True)
    model[0].load_state_dict(layer.state_dict())
    for number, size in enumerate((shape, other, shape, other)):
        x = low_rank_tensor(*size, decay=0.1, seed=number % 2).float()
        grad = random_tensor(*size[:-1], 5, seed=2).float()
        exact = autograd(layer, x, grad)[2]["weight"]
        model.zero_grad()
        model(x).backward(grad)
        assert (model[0].weight.grad - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("kind", [ASI, FixedBases])
@pytest.mark.parametrize("storage", ["input", "int8"])
@pytest.mark.parametrize("ranks", [*product((2, 99), repeat=4)], ids=str)
def test_a_run_goes_on_bit_for_bit_whichever_modes_are_whole(kind, storage, ranks):
    model, resumed = (conv_model(kind(ranks, storage=storage)).float() for _ in range(2))
    step(model, random_tensor(5, 4, 7, 6).float())
    resumed.load_state_dict(model.state_dict())
    lowrank.load_training_state(resumed, lowrank.training_state(model))
    for seed in (1, 2):
        x = random_tensor(5, 4, 7, 6, seed=seed).float()
        torch.testing.assert_close(step(resumed, x), step(model, x), rtol=0, atol=0)
