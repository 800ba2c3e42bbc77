"""Inputs that several layers are given are kept once, where one layer can use what the other keeps."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from block_cases import convolutions, network, results
from references import DEVICE, random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD


class Branches(nn.Module):
    """Two layers on one input; `change` is done to it in between."""

    def __init__(self, change=lambda x: x):
        super().__init__()
        self.first, self.second, self.change = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), change

    def forward(self, x):
        x = x * 1
        y = self.first(x)
        return y + self.second(self.change(x))


def kept_bytes(model):
    return [layer._lowrank.kept_bytes for layer in lowrank.converted_layers(model)]


def test_an_input_of_two_layers_is_kept_once():
    model = network("bottleneck")
    x = random_tensor(2, 3, 13, 12)
    names = ["reduce", "shortcut"]
    for method in (ASI((2, 2, 3, 3)), HOSVD(0.8), SVD(0.3)):
        lowrank.convert(model, names, method)
        found = results(model, x)
        states = [model.get_submodule(name)._lowrank for name in names]
        assert [state.kept_bytes > 0 for state in states] == [True, False]
        assert states[0].formula_bytes == states[1].formula_bytes > 0, "by the papers' formula each counts"
        for name in names:
            assert found[f"{name}.weight"].abs().sum() > 0


def test_a_layer_uses_what_is_kept_at_larger_ranks_but_not_at_smaller_ones():
    model, x = network("bottleneck"), random_tensor(2, 3, 13, 12)
    for first, second, shared in (((2, 3, 4, 4), (1, 2, 4, 4), True), ((1, 2, 4, 4), (2, 3, 4, 4), False)):
        lowrank.convert(model, ["reduce", "shortcut"], ASI({"reduce": first, "shortcut": second}))
        y = model(x)
        assert (model.shortcut._lowrank.kept_bytes == 0) == shared
        del y


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ASI(2), HOSVD(0.5)),
        (HOSVD(0.5), HOSVD(0.6)),
        (SVD(0.3), HOSVD(0.3)),
        (ASI(2), ASI(2, algorithm="published")),
        (ASI(2), ASI(2, refresh=3)),
    ],
    ids=repr,
)
def test_what_another_method_or_setting_keeps_is_not_used(first, second):
    model = lowrank.convert(Branches().double(), {"first": first, "second": second})
    y = model(random_tensor(6, 3, 9, 8))
    assert all(kept_bytes(model))
    del y


@dataclass(frozen=True)
class Doubled(HOSVD):
    """Keeps twice the input, as a method of the user's own may."""

    def compress(self, x, geometry, state, name):
        return super().compress(2 * x, geometry, state, name)


@dataclass(frozen=True)
class DoubledASI(ASI):
    def compress(self, x, geometry, state, name):
        return super().compress(2 * x, geometry, state, name)


@pytest.mark.parametrize("plain", [HOSVD(1.0), ASI(99)], ids=lambda method: method.tag)
@pytest.mark.parametrize("first", ["base", "subclass"])
def test_a_subclass_shares_nothing_with_its_base(plain, first):
    own = Doubled(1.0) if isinstance(plain, HOSVD) else DoubledASI(99)
    methods = (plain, own) if first == "base" else (own, plain)
    model, x = Branches().double(), random_tensor(4, 3, 5, 4)
    x[:, 1] = x[:, 0]  # so that there is something to decompose
    lowrank.convert(model, dict(zip(("first", "second"), methods, strict=True)))
    y = model(x)
    grad = random_tensor(*y.shape, seed=2)
    y.backward(grad)
    exact = torch.einsum("bohw,bihw->oi", grad, x)
    for layer, method in zip((model.first, model.second), methods, strict=True):
        torch.testing.assert_close(layer.weight.grad[:, :, 0, 0], exact * (2 if method is own else 1))


CHANGES = {
    "in place": (lambda x: x.mul_(2), 2),
    "through a view": (lambda x: (x.view(-1).mul_(2), x)[1], 2),
    "another tensor": (lambda x: x * 2, 2),
    "a view": (lambda x: x.view_as(x), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changed_in_between_is_not_shared(change):
    act, factor = CHANGES[change]
    model, x = Branches(act).double(), random_tensor(2, 3, 5, 4)
    x[:, 1] = x[:, 0]  # so that the exact core is a tensor of its own
    lowrank.convert(model, ["first", "second"], HOSVD(1.0))
    y = model(x)
    grad = random_tensor(*y.shape, seed=2)
    y.backward(grad)
    for layer, scale in ((model.first, 1), (model.second, factor)):
        expected = torch.einsum("bohw,bihw->oi", grad, scale * x)
        torch.testing.assert_close(layer.weight.grad[:, :, 0, 0], expected)


@pytest.mark.parametrize("first", [True, False])
def test_what_is_kept_under_autocast_is_not_used_outside_of_it(first):
    """It is of half the precision."""
    model, x = lowrank.convert(Branches(), ["first", "second"], HOSVD(1.0)), random_tensor(6, 3, 9, 8).float()
    x[:, 1] = x[:, 0]
    outputs = []
    for layer, half in ((model.first, first), (model.second, not first)):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            outputs.append(layer(x).float())
    grad = random_tensor(*outputs[0].shape, seed=2).float()
    torch.autograd.backward(outputs, [grad, grad])
    exact = torch.einsum("bohw,bihw->oi", grad.double(), x.double())
    for layer, half in ((model.first, first), (model.second, not first)):
        error = (layer.weight.grad[:, :, 0, 0].double() - exact).norm() / exact.norm()
        assert (error < 1e-5) != half


def test_sharing_holds_nothing_alive():
    model, x = network("bottleneck"), random_tensor(6, 3, 13, 12)
    lowrank.convert(model, convolutions(model), ASI(2))
    cores = []

    def pack(tensor):
        cores.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x * 1)
        carried = [b.untyped_storage()._cdata for b in _bases(model)]
        parameters = [p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())]
        y.sum().backward()
        del y
        held = [core() for core in cores if core() is not None]
        assert all(storage._cdata in (*carried, *parameters) for storage in held)
        assert len(held) < len(cores)
    finally:
        gc.enable()


def _bases(model):
    return [basis for layer in lowrank.converted_layers(model) for basis in layer._lowrank.bases if basis is not None]


def test_after_a_backward_pass_the_same_input_is_compressed_anew():
    """What was kept is gone with its graph, though the input is still there."""
    x = random_tensor(6, 3, 9, 8)
    for energy in (0.7, 1.0):  # at 1 the input is kept as it is
        model = lowrank.convert(Branches().double(), ["first", "second"], HOSVD(energy))
        for _ in range(2):
            model.first(x).sum().backward()
            assert model.first._lowrank.kept_bytes > 0
