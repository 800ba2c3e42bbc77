"""Inputs that follow from what a layer ahead keeps of its own are not kept; gradients are those of what follows."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from derived_cases import (
    DEPTHWISE,
    EXPAND,
    METHODS,
    NAMES,
    PROJECT,
    SEEN,
    Inverted,
    Noted,
    by_hand,
    derived,
    gradients,
    layers_of,
    loss_of,
    network,
)
from references import random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI, HOSVD, ConversionError, Rounded, SettingError, Vanilla


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", [nn.ReLU6, nn.ReLU, nn.LeakyReLU, nn.Identity])
@pytest.mark.parametrize("storage", ["input", "int8"])
def test_gradients_are_those_of_what_follows_from_the_form(activation, stride, storage):
    stock, x = network(activation, stride), random_tensor(4, 3, 9, 8)
    model = copy.deepcopy(stock)
    lowrank.convert(model, NAMES, Noted(0.7, storage=storage, derive=True), everywhere=True)
    SEEN.clear()
    found = gradients(model, x)
    narrow = SEEN[0]
    assert len(SEEN) == 1, "the form is expanded once, for both that need it"
    exact, wanted = gradients(copy.deepcopy(stock), x), by_hand(copy.deepcopy(stock), x, narrow)
    assert derived(model) == {DEPTHWISE: EXPAND, PROJECT: EXPAND}
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))
        assert not torch.allclose(found[name], exact[name], rtol=1e-6), "the form is no exact input"
    torch.testing.assert_close(found["input"], exact["input"])
    for name in ("0.weight", "2.weight", "1.expand.0.bias", "1.depthwise.1.bias", "1.project.1.bias"):
        torch.testing.assert_close(found[name], exact[name])


@pytest.mark.parametrize("products", [True, 20_000])
@pytest.mark.parametrize("activation", [nn.Hardswish, nn.SiLU, nn.Mish])
def test_what_an_activation_needs_as_it_was_serves_the_layers_behind_it(activation, products):
    """It is computed again from the narrow input, which is kept as it was: so nothing has to be near it."""
    stock, x = network(activation), random_tensor(4, 3, 9, 8)
    plain = lowrank.convert(copy.deepcopy(stock), NAMES, HOSVD(0.7), everywhere=True)
    model = lowrank.convert(copy.deepcopy(stock), NAMES, HOSVD(0.7, derive=products), everywhere=True)
    found, exact = gradients(model, x), gradients(stock, x)
    gradients(plain, x)
    assert not derived(model)
    assert [layers_of(model)[name].kept_bytes for name in (DEPTHWISE, PROJECT)] == [0, 0]
    forms = sum(layers_of(plain)[name].kept_bytes for name in (DEPTHWISE, PROJECT))
    assert lowrank.saved_bytes(plain, loss_of, x) - lowrank.saved_bytes(model, loss_of, x) == forms > 0
    for name in exact.keys() - {f"{EXPAND}.weight", "1.expand.1.weight"}:  # the normalisation is computed with it
        torch.testing.assert_close(found[name], exact[name])


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_wide_inputs_take_nothing(method):
    model, x = network(), random_tensor(4, 3, 9, 8)
    plain = copy.deepcopy(model)
    lowrank.convert(model, NAMES, method, everywhere=True)
    gradients(model, x, passes=2)
    states = layers_of(model)
    assert derived(model) == {DEPTHWISE: EXPAND, PROJECT: EXPAND}
    assert states[EXPAND].kept_bytes > 0 == states[DEPTHWISE].kept_bytes == states[PROJECT].kept_bytes
    lowrank.convert(plain, NAMES, replace(method, derive=False), everywhere=True)
    gradients(plain, x, passes=2)
    others = sum(layers_of(plain)[name].kept_bytes for name in (DEPTHWISE, PROJECT))
    saved = lowrank.saved_bytes(plain, loss_of, x) - lowrank.saved_bytes(model, loss_of, x)
    assert saved == others > 0


def test_slopes_are_those_of_the_near_tensor():
    """By hand: the gradient of the block's input through masks that follow from the restored narrow input."""
    stock, x = network(), random_tensor(4, 3, 9, 8)
    model, bits = copy.deepcopy(stock), copy.deepcopy(stock)
    lowrank.convert(bits, NAMES, Noted(0.7, derive=True), everywhere=True)
    lowrank.convert(model, NAMES, Noted(0.7, derive="slopes"), everywhere=True)
    SEEN.clear()
    found, exact = gradients(model, x), gradients(copy.deepcopy(stock), x)
    (narrow,) = SEEN
    block, outputs = stock[1], []
    y = block(stock[0](x).detach())
    y.register_hook(outputs.append)
    stock[2](y).square().sum().backward()
    grad = _through(block.project, outputs[0], None, None)
    with torch.no_grad():
        wide = block.expand(narrow)
        last = block.depthwise(wide)
    grad = _through(block.depthwise, grad, last, wide.shape)
    grad = _through(block.expand, grad, wide, narrow.shape)
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(stock[0](x), x, outputs[0] + grad)
    torch.testing.assert_close(found["input"], wanted)
    assert not torch.allclose(found["input"], exact["input"], rtol=1e-3)
    size = 4 * 24 * 9 * 8 // 8
    assert lowrank.saved_bytes(bits, loss_of, x) - lowrank.saved_bytes(model, loss_of, x) == 2 * size


def _through(layers, grad, output, shape):
    """The gradient of a convolution's input, from that of what a ReLU6 behind its normalisation gives, if one is."""
    conv, norm = layers[0], layers[1]
    if output is not None:
        grad = grad * ((output > 0) & (output < 6))
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shape = (len(grad), conv.in_channels, *grad.shape[2:]) if shape is None else shape
    given = (shape, conv.weight, grad * scale[:, None, None], conv.stride, conv.padding, conv.dilation, conv.groups)
    return torch.nn.grad.conv2d_input(*given).detach()


def test_near_slopes_of_eight_bits_are_nearly_exact():
    stock, x = network(), random_tensor(4, 3, 9, 8)
    model = lowrank.convert(copy.deepcopy(stock), NAMES, Rounded(derive="slopes"), everywhere=True)
    found, exact = gradients(model, x), gradients(stock, x)
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() <= 0.1 * gradient.norm(), name
    again = gradients(model, x)
    for name, gradient in found.items():
        assert torch.equal(again[name], gradient)


def test_without_it_every_layer_keeps_its_own_form():
    model, x = network(), random_tensor(4, 3, 9, 8)
    lowrank.convert(model, NAMES, HOSVD(0.7), everywhere=True)
    gradients(model, x)
    assert not derived(model)
    assert all(state.kept_bytes > 0 for state in layers_of(model).values())


def test_a_layer_keeps_its_own_form_where_the_one_ahead_keeps_none():
    """Without a form ahead the depthwise layer keeps one, from which the next input follows."""
    model, x = network(), random_tensor(4, 3, 9, 8)
    model[0].requires_grad_(False)
    model[1].expand.requires_grad_(False)
    lowrank.convert(model, NAMES[1:], HOSVD(0.7, derive=True), everywhere=True)
    loss_of(model, x).backward()
    assert derived(model) == {PROJECT: DEPTHWISE}


def test_exact_inputs_are_taken_ahead_of_near_ones():
    """Where the narrow input is kept as it is, what follows from it is exact."""
    stock, x = network(), random_tensor(4, 3, 9, 8)
    model = copy.deepcopy(stock)
    lowrank.convert(model, {EXPAND: Vanilla(), DEPTHWISE: Rounded(derive=True), PROJECT: Rounded(derive=True)})
    found, exact = gradients(model, x), gradients(stock, x)
    assert not derived(model)
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient)


def test_the_exact_tensor_is_never_given_for_the_near_one_nor_the_other_way_round():
    """A branch reads the wide tensor exactly, by a function that computes it again, beside layers that derive it."""

    class Branching(Inverted):
        def forward(self, x):
            wide = self.expand(x)
            gate = F.silu(wide)  # its derivative needs the exact tensor
            return self.project(self.depthwise(wide) * 1) + self.project(gate)

    torch.manual_seed(1)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Branching(), nn.Conv2d(4, 3, 1)).double().eval()
    x = random_tensor(4, 3, 9, 8)
    model = copy.deepcopy(stock)
    lowrank.convert(model, [EXPAND, DEPTHWISE], Rounded(derive=True), everywhere=True)
    found, exact = gradients(model, x), gradients(stock, x)
    torch.testing.assert_close(found["input"], exact["input"])
    torch.testing.assert_close(found["0.weight"], exact["0.weight"])
    assert (found[f"{EXPAND}.weight"] - exact[f"{EXPAND}.weight"]).norm() < 0.02 * exact[f"{EXPAND}.weight"].norm()


@pytest.mark.parametrize("method", [HOSVD(0.7, derive=True), Rounded(derive=True)], ids=repr)
def test_several_passes_over_one_graph_and_a_part_of_it(method):
    model, x = network(), random_tensor(4, 3, 9, 8)
    lowrank.convert(model, NAMES, method, everywhere=True)
    parameters = [model.get_submodule(name).weight for name in NAMES]
    loss = loss_of(model, x)
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    (project,) = torch.autograd.grad(loss, parameters[2], retain_graph=True)
    (depthwise,) = torch.autograd.grad(loss, parameters[1], retain_graph=True)
    again = torch.autograd.grad(loss, parameters)
    for pair in zip(first, again, strict=True):
        assert torch.equal(*pair)
    assert torch.equal(project, first[2])
    assert torch.equal(depthwise, first[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_within_a_checkpoint(reentrant):
    stock, x = network(), random_tensor(4, 3, 9, 8)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(stock)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    plain, inside = copy.deepcopy(stock), Checkpointed().eval()
    lowrank.convert(plain, NAMES, HOSVD(0.7, derive=True), everywhere=True)
    lowrank.convert(inside, [f"inner.{name}" for name in NAMES], HOSVD(0.7, derive=True), everywhere=True)
    if not reentrant:  # which drops a form before another layer could read it, and refuses to keep less when run again
        lowrank.convert(plain, NAMES, HOSVD(0.7), everywhere=True)
    wanted, found = gradients(plain, x), gradients(inside, x)
    for name in ("input", *[f"{name}.weight" for name in NAMES]):
        torch.testing.assert_close(found[name if name == "input" else f"inner.{name}"], wanted[name])


def test_where_autograd_saves_elsewhere_a_layer_keeps_its_own_form():
    """What is handed to hooks may be anywhere: the form is not there to be read by another layer."""
    stock, x = network(), random_tensor(4, 3, 9, 8)
    lowrank.convert(stock, NAMES, HOSVD(0.7, derive=True), everywhere=True)
    wanted = gradients(copy.deepcopy(stock), x)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(stock, x)
    for name, gradient in wanted.items():
        assert torch.isfinite(found[name]).all()
        assert (found[name] - gradient).norm() <= 0.9 * gradient.norm()


def test_a_weight_that_changes_before_the_backward_pass_is_an_error():
    model, x = network(), random_tensor(4, 3, 9, 8)
    lowrank.convert(model, NAMES, HOSVD(0.7, derive=True), everywhere=True)
    loss = loss_of(model, x)
    with torch.no_grad():
        model[1].expand[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_of_a_step_lives_on():
    model, x = network(), random_tensor(4, 3, 9, 8)
    lowrank.convert(model, NAMES, Noted(0.7, derive=True), everywhere=True)
    SEEN.clear()
    loss_of(model, x).backward()
    references = [weakref.ref(SEEN.pop())]
    loss = loss_of(model, x)  # one that is never taken back
    del loss
    gc.collect()
    assert [reference() for reference in references] == [None]
    assert not SEEN


def test_the_account_counts_what_is_kept_and_the_explanation_says_why():
    model, x = network(), random_tensor(4, 3, 9, 8)
    own = lowrank.account(copy.deepcopy(model), NAMES, x)
    lowrank.convert(model, NAMES, Rounded(derive=True), everywhere=True)
    found = lowrank.account(model, NAMES, x)
    assert found.derived == {DEPTHWISE: EXPAND, PROJECT: EXPAND}
    loss_of(model, x).backward()
    assert {name: cost.activation_bytes for name, cost in found.items()} == {
        name: state.kept_bytes for name, state in layers_of(model).items()
    }
    for name in (DEPTHWISE, PROJECT):
        assert found[name].flops == own[name].flops, "as of exact training"
    told = {row.module: row for row in lowrank.explain(model, loss_of, x)}
    for name in (DEPTHWISE, PROJECT):
        assert told[name].nbytes == 0
        assert repr(EXPAND) in told[name].reason


def test_training_goes_on_as_it_was_from_a_saved_state():
    x = random_tensor(4, 3, 9, 8)
    models = [lowrank.convert(network(), NAMES, ASI((3, 3, 3, 4), derive=True), everywhere=True) for _ in range(2)]
    gradients(models[0], x, passes=3)
    lowrank.load_training_state(models[1], lowrank.training_state(models[0]))
    for name, gradient in gradients(models[0], x).items():
        assert torch.equal(gradient, gradients(copy.deepcopy(models[1]), x)[name])


@pytest.mark.parametrize("value", ["NaN", "inf"])
def test_values_that_are_not_finite_show(value):
    model, x = network(), random_tensor(4, 3, 9, 8)
    lowrank.convert(model, NAMES, Rounded(derive=True), everywhere=True)
    x[0, 0, 0, 0] = float(value)
    found = gradients(model, x)
    assert not torch.isfinite(found[f"{EXPAND}.weight"]).all()


def test_it_is_refused_where_nothing_else_is_converted():
    model = network()
    with pytest.raises(ConversionError, match="derive needs fuse"):
        lowrank.convert(model, NAMES, Rounded(derive=True), fuse=False)
    assert not list(lowrank.converted_layers(model))


def test_a_method_says_so():
    assert ASI(4, derive=True).tag == "asi_derived_rank4"
    assert Rounded(derive=True).tag == "rounded_int8_derived"
    assert "derive=True" in repr(HOSVD(0.8, derive=True))
    assert "derive" not in repr(HOSVD(0.8))
    assert Rounded(derive="slopes").tag == "rounded_int8_derived_slopes"
    with pytest.raises(SettingError, match="allowed: True, False, 'slopes' or a number"):
        ASI(4, derive="bits")


class Changed(nn.Module):
    """A layer's input is changed in place, and given to another one; what the first one made is not used."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.activation, self.second = nn.Conv2d(4, 8, 1), activation, nn.Conv2d(4, 6, 3)

    def forward(self, x):
        x = x * 1.0
        self.first(x)
        return self.second(self.activation(x)).tanh()


IN_PLACE = [nn.LeakyReLU(0.1, True), nn.ReLU(True), nn.Hardtanh(-0.5, 0.7, True), nn.SiLU(True), nn.Hardswish(True)]


@pytest.mark.parametrize("activation", IN_PLACE, ids=str)
@pytest.mark.parametrize("derive", [True, "slopes", 20_000])
@pytest.mark.parametrize("method", [lowrank.SVD(1.0), HOSVD(1.0), ASI(99)], ids=lambda method: method.tag)
def test_a_form_that_is_the_input_itself_is_gone_when_that_is_changed(method, derive, activation):
    torch.manual_seed(0)
    stock = Changed(activation).double()
    model = lowrank.convert(copy.deepcopy(stock), ["first", "second"], replace(method, derive=derive))
    found = []
    for trained in (stock, model):
        x = random_tensor(3, 4, 5, 5).requires_grad_()
        trained(x).square().sum().backward()
        found.append([x.grad, trained.second.weight.grad, trained.second.bias.grad])
    torch.testing.assert_close(found[1], found[0])
