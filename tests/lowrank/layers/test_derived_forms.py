"""Which form stands for an input, and that nothing more is kept, in whatever order and precision layers are called."""

import copy

import pytest
import torch
import torch.nn.functional as F
from derived_cases import (
    DEPTHWISE,
    EXPAND,
    METHODS,
    NAMES,
    PROJECT,
    Inverted,
    Stem,
    derived,
    gradients,
    layers_of,
    loss_of,
    network,
)
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, FixedBases, Rounded


class Shortcut(Inverted):
    """A block with a second layer on its input, called after the first."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        wide = self.expand(x)
        return self.down(x) + self.project(self.depthwise(wide))


def test_of_two_layers_with_one_input_the_first_ones_form_stands_for_it():
    """As ranks were chosen; the other one may keep hardly anything."""
    torch.manual_seed(0)
    stock = nn.Sequential(Stem(3, 4, 3, padding=1), nn.ReLU(), Shortcut(), nn.Conv2d(4, 3, 1)).double().eval()
    names, down, x = [name.replace("1.", "2.", 1) for name in NAMES], "2.down", random_tensor(4, 3, 9, 8)
    model = copy.deepcopy(stock)
    crude = FixedBases((1, 1, 1, 1), derive=True)
    lowrank.convert(model, {**dict.fromkeys(names, Rounded(derive=True)), down: crude}, everywhere=True)
    found, exact = gradients(model, x), gradients(stock, x)
    assert derived(model) == {names[1]: names[0], names[2]: names[0]}
    for name in names:
        assert (found[f"{name}.weight"] - exact[f"{name}.weight"]).norm() < 0.02 * exact[f"{name}.weight"].norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[5]], ids=repr)
def test_in_less_than_double_precision(method, dtype):
    stock, x = network().to(dtype), random_tensor(4, 3, 9, 8).to(dtype)
    twin = lowrank.convert(network(), NAMES, method, everywhere=True)
    model = lowrank.convert(stock, NAMES, method, everywhere=True)
    found, wanted = gradients(model, x), gradients(twin, x.double())
    assert derived(model) == {DEPTHWISE: EXPAND, PROJECT: EXPAND}
    for name in NAMES:
        near, gradient = found[f"{name}.weight"].double(), wanted[f"{name}.weight"]
        assert (near - gradient).norm() < 0.2 * gradient.norm()


def test_a_layer_that_is_called_twice_keeps_what_its_calls_keep():
    class Twice(Inverted):
        def __init__(self):
            super().__init__()
            self.other = nn.Conv2d(4, 24, 3, padding=1)

        def forward(self, x):
            own = self.depthwise(self.other(x).sin())  # keeps a form
            return self.project(own + self.depthwise(self.expand(x)))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Twice(), nn.Conv2d(4, 3, 1)).double().eval()
    x = random_tensor(4, 3, 9, 8)
    lowrank.convert(model, [EXPAND, DEPTHWISE], Rounded(derive=True), everywhere=True)
    loss_of(model, x)
    assert derived(model) == {DEPTHWISE: EXPAND}, "of the later call"
    found = lowrank.account(model, [EXPAND, DEPTHWISE], x)
    assert found.derived == {}
    assert found[DEPTHWISE].activation_bytes == Rounded().form_bytes(random_tensor(4, 24, 9, 8), (4, 24, 9, 8))


def test_a_layer_that_is_frozen_later_derives_nothing():
    model, x = network(), random_tensor(4, 3, 9, 8)
    lowrank.convert(model, NAMES, Rounded(derive=True), everywhere=True)
    loss_of(model, x).backward()
    assert derived(model) == {DEPTHWISE: EXPAND, PROJECT: EXPAND}
    model[1].project.requires_grad_(False)
    loss_of(model, x).backward()
    assert derived(model) == {DEPTHWISE: EXPAND}
    assert lowrank.account(model, NAMES, x).derived == {DEPTHWISE: EXPAND}
    assert PROJECT not in [row.module for row in lowrank.explain(model, loss_of, x)]


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("method", [ASI((4, 4, 9, 8), derive=True), HOSVD(1.0, derive=True)], ids=repr)
def test_where_a_form_would_take_no_less_all_follows_from_the_input_itself(method, everywhere):
    """Otherwise a layer behind it, whose ranks a plan leaves whole, would keep its wide input as it is."""
    stock, x = network(), random_tensor(4, 3, 9, 8)
    model = lowrank.convert(copy.deepcopy(stock), NAMES, method, everywhere=everywhere)
    found, exact = gradients(model, x), gradients(stock, x)
    states = layers_of(model)
    assert states[DEPTHWISE].kept_bytes == states[PROJECT].kept_bytes == 0
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient)


def test_a_layer_that_keeps_its_own_form_is_on_the_way_of_those_that_do_not():
    """Through a block whose layers do not derive, the input of the next layer follows from the narrow one."""
    torch.manual_seed(0)
    block = Inverted(nn.ReLU6, wide=8)
    block.shortcut = False
    stock = nn.Sequential(Stem(3, 4, 3, padding=1), block, nn.Conv2d(4, 3, 1)).double().eval()
    x, wide = random_tensor(4, 3, 9, 8), {name: Rounded() for name in (DEPTHWISE, PROJECT)}
    model = copy.deepcopy(stock)
    narrow = Rounded(derive=True)
    lowrank.convert(model, {EXPAND: narrow, **wide, "2": narrow}, everywhere=True)
    found, exact = gradients(model, x), gradients(stock, x)
    assert derived(model) == {"2": EXPAND}
    torch.testing.assert_close(found["input"], exact["input"])
    for name in ("2.weight", f"{EXPAND}.weight"):
        assert (found[name] - exact[name]).norm() < 0.02 * exact[name].norm()


def test_a_normalisation_behind_a_depthwise_layer_keeps_no_more_than_without():
    """From the layer's input, which it keeps in the place of the output, what is ahead of a GELU can be computed."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)
            self.norm, self.rise, self.fall = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            return x + self.fall(F.gelu(self.rise(y))).permute(0, 3, 1, 2)

    stock, x = nn.Sequential(nn.Conv2d(3, 8, 1), Block(), Block()), torch.randn(2, 3, 9, 9)
    names = ["1.depthwise", "2.depthwise"]
    kept = {}
    for derive in (False, True):
        model = lowrank.convert(copy.deepcopy(stock), names, Rounded(derive=derive))
        kept[derive] = lowrank.saved_bytes(model, loss_of, x)
    assert kept[True] == kept[False]


def test_the_account_sees_what_a_step_sees_of_an_output_that_nobody_has_read():
    """By the first reader alone it is known how it comes about; that is the layer, and not who counts."""
    model, x = network(), random_tensor(4, 3, 9, 8).requires_grad_()
    lowrank.convert(model, NAMES, Rounded(derive=True), everywhere=True)
    model[1].expand[0].weight.requires_grad_(False)  # so that it keeps its form after its output was noted
    loss_of(model, x)
    found = lowrank.account(model, NAMES, x)
    assert found.derived == derived(model) == {PROJECT: DEPTHWISE}
    assert found[DEPTHWISE].activation_bytes == layers_of(model)[DEPTHWISE].kept_bytes > 0
