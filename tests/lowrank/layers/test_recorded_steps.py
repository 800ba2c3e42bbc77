"""A step that is recorded as a CUDA graph reads and writes bases in one place, where every replay finds the latest."""

import copy

import pytest
import torch
import torch.nn.functional as F
from references import DEVICE, random_tensor
from torch import nn

import lowrank
from lowrank.layers.layer import converted_layers

METHODS = {
    "ASI": lowrank.ASI([3, 4, 3, 3]),
    "ASI in int8": lowrank.ASI([3, 4, 3, 3], storage="int8"),
    "published": lowrank.ASI([3, 4, 3, 3], algorithm="published"),
    "exact": lowrank.Vanilla(),
}
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="of a GPU: --device cuda")


def network(method):
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten())
    model = nn.Sequential(*parts, nn.Linear(6 * 10 * 10, 4))
    return lowrank.convert(model, ["0", "3"], method)


def images(seed, count=4):
    return random_tensor(count, 3, 12, 12, seed=seed, dtype=torch.float32)


def step(model, x):
    model.zero_grad()
    loss = F.mse_loss(y := model(x), torch.zeros_like(y))
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def bases(model):
    return [basis for layer in converted_layers(model) for basis in layer._lowrank.bases if basis is not None]


def pinned(model):
    """As if a step were recorded now."""
    for layer in converted_layers(model):
        layer._lowrank.recorded = layer._lowrank.bases
    return [basis.data_ptr() for basis in bases(model)]


@pytest.mark.parametrize("method", METHODS)
def test_bases_stay_in_their_memory_and_are_those_of_other_steps(method):
    """Through images of other sizes, a loaded state and a measurement, too."""
    model = network(METHODS[method])
    step(model, images(0))
    other = copy.deepcopy(model)
    places = pinned(model)
    for seed, count in ((1, 4), (2, 3), (3, 4)):
        for one, expected in zip(step(model, images(seed, count)), step(other, images(seed, count)), strict=True):
            assert torch.equal(one, expected)
        assert [basis.data_ptr() for basis in bases(model)] == places
    before = lowrank.training_state(model)
    lowrank.saved_bytes(model, lambda model, x: model(x).square().mean(), images(4))
    assert [basis.data_ptr() for basis in bases(model)] == places
    assert all(torch.equal(basis, before[key]) for key, basis in lowrank.training_state(model).items())
    step(model, images(5))
    lowrank.load_training_state(model, before)
    assert [basis.data_ptr() for basis in bases(model)] == places
    assert all(torch.equal(basis, before[key]) for key, basis in lowrank.training_state(model).items())


def test_a_copy_is_not_of_the_graph():
    model = network(METHODS["ASI"])
    step(model, images(0))
    places = pinned(model)
    twin = copy.deepcopy(model)
    before = [basis.clone() for basis in bases(model)]
    step(twin, images(1))
    assert [basis.data_ptr() for basis in bases(model)] == places
    assert all(map(torch.equal, bases(model), before))


def test_a_backward_pass_that_is_still_to_come_is_not_given_other_bases():
    """Two forward passes, then both backward passes."""
    model, other = network(METHODS["ASI"]), network(METHODS["ASI"])
    for one in (model, other):
        step(one, images(0))
    pinned(model)
    found = []
    for one in (model, other):
        one.zero_grad()
        for loss in [one(images(seed)).square().mean() for seed in (1, 2)]:
            loss.backward()
        found.append([parameter.grad for parameter in one.parameters()])
    assert all(map(torch.equal, *found))


@on_gpu
@pytest.mark.parametrize("method", METHODS)
def test_replays_are_the_steps_that_they_stand_for(method):
    model = network(METHODS[method])
    x = images(0)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(model, x)
    torch.cuda.current_stream().wait_stream(aside)
    other = copy.deepcopy(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = F.mse_loss(y := model(x), torch.zeros_like(y))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    for seed in range(1, 5):
        x.copy_(images(seed))
        graph.replay()
        for one, expected in zip(gradients, step(other, images(seed)), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-5)
    for one, expected in zip(step(model, images(9)), step(other, images(9)), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-5)
    graph.replay()  # of what the eager step left
