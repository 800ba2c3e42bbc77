"""Products that an activation makes for the layer ahead: with and without them, steps are the same to the last bit."""

import copy
import gc
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from references import random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import kernels
from lowrank.exact import activations
from lowrank.tensors import gradient_start, gradients
from lowrank.tensors.owned import counts_alone

pytestmark = [
    pytest.mark.cpu_only("compiled kernels work in its memory"),
    pytest.mark.skipif(not kernels.status().active, reason=str(kernels.status())),
    pytest.mark.skipif(not counts_alone(), reason="this version of PyTorch does not count references"),
]
SHAPE = (32, 6, 44, 40)  # large enough, of enough samples
RANKS = (4, 4, 4, 4)


def norm(channels):
    return nn.BatchNorm2d(channels).eval()


class Residual(nn.Module):
    """Its last activation's gradient is handed on to the last layer and to the input."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), norm(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), norm(8), nn.ReLU6(True))
        self.last = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, bias=False), norm(6))

    def forward(self, x):
        return F.relu(self.last(self.depthwise(self.first(x))) + x)


NETWORKS = {
    "residual": Residual,
    "no normalisation": lambda: nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU6()),
    "no bias": lambda: nn.Sequential(
        nn.Conv2d(6, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False), nn.ReLU()
    ),
    "strided": lambda: nn.Sequential(
        nn.Conv2d(6, 24, 1), norm(24), nn.ReLU(), nn.Conv2d(24, 24, 3, 2, 1), norm(24), nn.ReLU()
    ),
    "padded otherwise": lambda: nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), norm(6), nn.ReLU()
    ),
    "in groups": lambda: nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=2), norm(6), nn.ReLU(True)),
}


def converted(network, **options):
    torch.manual_seed(1)
    model = NETWORKS[network]()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias)
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    return lowrank.convert(model, names, lowrank.ASI(RANKS, **options))


def stepped(model, step, steps=3):
    """All gradients of some steps, and how many products were made and taken."""
    made, taken = [], []
    mask, product_of = gradient_start.mask, gradients.product_of

    def noted(into, function):
        def call(*arguments):
            found = function(*arguments)
            into.append(found is not None and found is not False)
            return found

        return call

    found = []
    with (
        mock.patch.object(gradient_start, "mask", noted(made, mask)),
        mock.patch.object(gradients, "product_of", noted(taken, product_of)),
    ):
        for at in range(steps):
            model.zero_grad()
            x = random_tensor(*SHAPE, seed=at).float().requires_grad_()
            step(model, x)
            found += [x.grad, *(parameter.grad for parameter in model.parameters())]
    return found, sum(made), sum(taken)


def loss_of(y):
    """For which nobody keeps `y`, so that the activation that gave it has bits of its own."""
    return (y * random_tensor(*y.shape, seed=9).float()).sum()


def plainly(model, x):
    loss_of(model(x)).backward()


def without_products(model, step):
    with mock.patch.object(gradient_start.passes, "masked_project", return_value=None):
        found, made, _ = stepped(model, step)
    assert not made
    return found


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("storage", ["input", "int8"])
@pytest.mark.parametrize("network", NETWORKS)
def test_steps_are_the_same_with_products_and_without(network, storage):
    model = converted(network, storage=storage)
    wanted = without_products(copy.deepcopy(model), plainly)
    found, made, taken = stepped(model, plainly)
    assert made == taken
    assert (made > 0) == (
        network != "padded otherwise"
    )  # whose gradient is not projected on the batch ahead of all else
    assert_same(found, wanted)


def with_frozen_normalisations(model, x):
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(False)
    plainly(model, x)


def with_frozen_weights(model, x):
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.requires_grad_(False)
    plainly(model, x)


def with_hooks(change):
    def step(model, x):
        layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
        layers = layers or [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        handles = [layer.register_forward_hook(lambda _, __, y: y.register_hook(change) and None) for layer in layers]
        plainly(model, x)
        for handle in handles:
            handle.remove()

    return step


def twice(model, x):
    loss = loss_of(model(x))
    loss.backward(retain_graph=True)
    loss.backward()


def within_a_checkpoint(model, x):
    loss_of(checkpoint(model, x, use_reentrant=False)).backward()


def with_hooks_for_saved_tensors(model, x):
    with torch.autograd.graph.save_on_cpu():
        plainly(model, x)


def with_another_reader(model, x):
    kept, layers = [], [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    handles = [layer.register_forward_hook(lambda _, __, y: kept.append(y * 1.0)) for layer in layers]
    (loss_of(model(x)) + sum(one.sin().sum() for one in kept)).backward()
    for handle in handles:
        handle.remove()


def unseen(_):
    """What a hook returns that gives no other gradient; PyTorch does not count this change."""


STEPS = {
    "frozen normalisations": with_frozen_normalisations,
    "frozen weights": with_frozen_weights,
    "hooks that look": with_hooks(lambda grad: None),
    "hooks that give another gradient": with_hooks(lambda grad: grad * 2),
    "hooks that change the gradient": with_hooks(lambda grad: grad.mul_(2)),
    "hooks that change it unseen": with_hooks(lambda grad: unseen(grad.data.mul_(2))),
    "hooks that clip it unseen": with_hooks(lambda grad: unseen(grad.data.clamp_(min=0))),
    "hooks that change it as NumPy": with_hooks(lambda grad: unseen(grad.numpy().__imul__(2))),
    "hooks that give it other memory": with_hooks(lambda grad: setattr(grad, "data", grad * 2)),
    "hooks that clip": with_hooks(lambda grad: grad.clamp(-1, 1)),
    "twice": twice,
    "a checkpoint": within_a_checkpoint,
    "hooks for saved tensors": with_hooks_for_saved_tensors,
    "another reader": with_another_reader,
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("network", ["residual", "strided", "no normalisation"])
def test_whatever_happens_to_a_gradient_steps_are_the_same(network, step):
    model = converted(network)
    wanted = without_products(copy.deepcopy(model), STEPS[step])
    assert_same(stepped(model, STEPS[step])[0], wanted)


@pytest.mark.parametrize(("step", "passes"), [("frozen normalisations", 1), ("hooks that look", 1), ("twice", 2)])
def test_products_are_made_and_taken_there_too(step, passes):
    _, made, taken = stepped(converted("residual"), STEPS[step])
    assert made == taken == 3 * 3 * passes  # of three layers, in three steps


class TwoOfOneInput(nn.Module):
    """Layers that share what is kept of their input; the last activation hands its gradient to both."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), norm(6)) for _ in range(2))

    def forward(self, x):
        return F.relu(self.first(x) + F.leaky_relu(self.second(x), 0.5))


def test_a_product_that_nobody_took_ends_where_its_gradient_is_written_to():
    torch.manual_seed(1)
    model = TwoOfOneInput()
    lowrank.convert(model, ["first.0", "second.0"], lowrank.ASI(RANKS))
    asked = [model.second[0].weight, model.second[1].weight]  # so that the first layer's node is not run
    found = []

    def ask(model, x):
        found.append(torch.autograd.grad(loss_of(model(x)), asked))

    without_products(model, ask)
    wanted, found[:] = list(found), []
    lowrank.convert(lowrank.revert(model), ["first.0", "second.0"], lowrank.ASI(RANKS))
    _, made, taken = stepped(model, ask)
    assert made
    assert not taken
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)


def test_gradients_are_those_of_the_stock_network_where_nothing_is_cut():
    """Of whole ranks in all modes but that of the batch, whose samples are of so few kinds."""
    torch.manual_seed(1)
    model = Residual()
    kinds = random_tensor(4, *SHAPE[1:]).float()
    x = kinds.repeat(8, 1, 1, 1)
    target = random_tensor(4, 6, *SHAPE[2:], seed=3).float().repeat(8, 1, 1, 1)
    stock = copy.deepcopy(model)
    F.mse_loss(stock(x), target).backward()
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    lowrank.convert(model, names, lowrank.ASI((4, 44, 44, 44)))
    model.zero_grad()
    F.mse_loss(model(x), target).backward()
    for (name, parameter), wanted in zip(model.named_parameters(), stock.parameters(), strict=True):
        size = wanted.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=0, atol=2e-4 * size, msg=name)


def test_small_batches_and_small_gradients_have_no_products():
    model = converted("residual")
    with mock.patch.object(gradient_start.passes, "masked_project", side_effect=AssertionError):
        for shape in ((11, *SHAPE[1:]), (64, 6, 8, 8)):  # of rank 4 and a column of ones, more than a third of 11
            plainly(model, random_tensor(*shape).float())


def test_nothing_is_left_of_a_product():
    model, products = converted("residual"), []
    masked_project = gradient_start.passes.masked_project

    def noted(*arguments):
        found = masked_project(*arguments)
        products.append(weakref.ref(found.untyped_storage()))
        return found

    with mock.patch.object(gradient_start.passes, "masked_project", noted):
        plainly(model, random_tensor(*SHAPE).float())
    gc.collect()
    assert products
    assert not any(reference() for reference in products)


def test_no_product_waits_beside_the_gradient_of_the_input():
    """Where the weight gradient that it becomes takes less."""
    model, waiting = converted("no normalisation"), []
    input_gradient = lowrank.ASI.input_gradient

    def noted(self, grad, *arguments):
        waiting.append(gradient_start.begun_numbers(grad))
        return input_gradient(self, grad, *arguments)

    with mock.patch.object(lowrank.ASI, "input_gradient", noted):
        _, made, _ = stepped(model, plainly)
    assert made
    assert waiting
    assert not any(waiting)


def test_an_activation_of_its_own_slopes_is_left_to_others():
    x = random_tensor(*SHAPE).float().requires_grad_()
    y = activations.leaky_relu(nn.Conv2d(6, 6, 1)(x))
    with mock.patch.object(gradient_start, "mask", side_effect=AssertionError):
        loss_of(y).backward()
