"""No method keeps more than the input itself, measured as well as by its formula."""

import copy
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import converted
from references import TOLERANCE, autograd, random_tensor
from strategies import ENERGIES, LAYERS
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, GradientFilter, Vanilla

METHODS = st.one_of(
    st.builds(SVD, ENERGIES | st.just(1.0)),
    st.builds(HOSVD, ENERGIES | st.just(1.0)),
    st.builds(ASI, st.integers(1, 8), algorithm=st.sampled_from(["sequential", "published"])),
    st.builds(ASI, st.integers(1, 8), refresh=st.sampled_from([2, "energy"])),
)


def loss(model, x):
    return (model(x * 1) * 2).sum()


@pytest.mark.slow
@given(setting=LAYERS, method=METHODS)
def test_of_any_layer_and_method(setting, method):
    stock = nn.Sequential(setting.layer())
    model, x = converted(stock[0], method), setting.x().requires_grad_()
    for _ in range(2):  # with bases, where there are any
        assert lowrank.saved_bytes(model, loss, x) <= lowrank.saved_bytes(stock, loss, x)
        model(x * 1)
        state = model[0]._lowrank
        assert 0 < state.kept_bytes <= x.nbytes
        assert 0 < state.formula_bytes <= x.nbytes
    assert lowrank.account(model, ["0"], x).total.activation_bytes <= x.nbytes


@pytest.mark.parametrize(
    ("layer", "shape", "ranks"),
    [
        (nn.Linear(4096, 10), (8, 4096), [8, 16]),
        (nn.Linear(64, 10), (8, 64), [7, 60]),
        (nn.Conv2d(512, 8, 3, padding=1), (2, 512, 2, 2), [2, 16, 2, 2]),
        (nn.Conv2d(6, 8, 1), (1, 6, 1, 1), [1, 6, 1, 1]),
        (nn.Linear(6, 3), (5, 4, 6), [5, 4, 6]),
    ],
)
@pytest.mark.parametrize("algorithm", ["sequential", "published"])
def test_ranks_above_what_the_other_modes_allow(layer, shape, ranks, algorithm):
    stock, x = nn.Sequential(copy.deepcopy(layer).double()), random_tensor(*shape)
    model = converted(stock[0], ASI(ranks, algorithm=algorithm))
    grad = random_tensor(*stock(x).shape, seed=1)
    results = [autograd(network, x, grad) for network in (stock, model)]
    assert lowrank.saved_bytes(model, loss, x.requires_grad_()) <= lowrank.saved_bytes(stock, loss, x)
    if all(rank >= min(size, prod(shape) // size) for rank, size in zip(ranks, shape, strict=True)):
        for found, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, expected, **TOLERANCE)


SIZES = st.lists(st.integers(1, 7), min_size=2, max_size=4)


@given(shape=SIZES, data=st.data())
def test_ranks_are_the_largest_that_a_tensor_can_have(shape, data):
    """Of all choices up to the given ranks, the one whose every rank is at most the product of the others."""
    ranks = [data.draw(st.integers(1, 9)) for _ in shape]
    found = ASI(ranks).ranks_for(shape)
    limits = [range(1, min(rank, size) + 1) for rank, size in zip(ranks, shape, strict=True)]
    possible = [c for c in product(*limits) if all(rank**2 <= prod(c) for rank in c)]
    assert found in possible
    assert all(rank >= other for choice in possible for rank, other in zip(found, choice, strict=True))


@pytest.mark.parametrize("method", [SVD(1.0), HOSVD(1.0), ASI(99), ASI(99, refresh=3)], ids=repr)
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4)])
def test_an_input_that_is_kept_itself_is_not_copied(method, shape):
    """Its memory is shared with whoever keeps it as well, and no basis is carried."""
    model, x = converted(nn.Linear(shape[-1], 4).double(), method), random_tensor(*shape) * 1
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    assert x.data_ptr() in {tensor.data_ptr() for tensor in saved}
    assert sum(tensor.nbytes for tensor in saved) == x.nbytes
    assert lowrank.training_state(model) == {}


def test_a_bases_carrier_goes_on_behind_an_input_that_was_kept_itself():
    """An odd last batch is small enough to be kept; the full batches behind it start from where those before were."""
    model = converted(nn.Linear(9, 4).double(), ASI([3, 3]))
    model(random_tensor(12, 9))
    before = lowrank.training_state(model)
    model(random_tensor(3, 9))
    torch.testing.assert_close(lowrank.training_state(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("patch", [1, 2, 7])
@given(setting=LAYERS.filter(lambda setting: "kernel_size" in dict(setting.options)))
def test_patches(patch, setting):
    options = dict(setting.options)
    if options["padding_mode"] != "zeros":
        return
    model, x = converted(setting.layer(), GradientFilter(patch)), setting.x()
    model(x)
    outputs = prod(model(x).shape[2:])
    assert model[0]._lowrank.kept_bytes <= 8 * x.shape[0] * x.shape[1] * outputs


def test_vanilla_keeps_the_input_and_not_a_copy():
    model, x = converted(nn.Conv2d(3, 4, 3).double(), Vanilla()), random_tensor(2, 3, 6, 5) * 1
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr()}
