"""Inputs that follow by dearer convolutions and over several blocks, where `derive` says by how many products."""

import copy

import pytest
import torch
import torch.nn.functional as F
from derived_cases import SEEN, Noted, Sine, derived, gradients, layers_of, loss_of, settled
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, Rounded, SettingError, Vanilla

FAR = 100_000
SAME = {"1.short.0"}  # which has the first layer's own input


class Basic(nn.Module):
    """A residual block of two 3 x 3 convolutions, as ResNets have it."""

    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.short = None
        if stride > 1 or inside != outside:
            self.short = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.short is None else self.short(x)))


class Pyramid(nn.Module):
    """Pooled at two sizes, convolved, enlarged and put beside the input, as in PSPNet."""

    def __init__(self, inside):
        super().__init__()
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(inside, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
            for size in (1, 2)
        )
        self.joined = nn.Conv2d(inside + 8, 6, 3, padding=1)

    def forward(self, x):
        size = x.shape[2:]
        parts = [F.interpolate(each(x), size=size, mode="bilinear", align_corners=False) for each in self.pooled]
        return self.joined(torch.cat([x, *parts], dim=1))


def network(*blocks):
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), Sine())
    return settled(nn.Sequential(stem, *blocks, nn.Conv2d(6, 3, 1)))


NETWORKS = {
    "residual": lambda: network(Basic(32, 32), Basic(32, 32), nn.Conv2d(32, 6, 3)),
    "smaller": lambda: network(Basic(32, 48, 2), Basic(48, 48), nn.Conv2d(48, 6, 3)),
    "pooled": lambda: network(Basic(32, 32), nn.MaxPool2d(3, 2, 1), Basic(32, 32), nn.Conv2d(32, 6, 3)),
    "pyramid": lambda: network(Basic(32, 32), Pyramid(32)),
}


def named(model):
    """All convolutions of the blocks but those of a pyramid's branches, whose inputs are small."""
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return [name for name in found[1:-1] if "pooled" not in name]


def by_hand(stock, x, names, first):
    """Weight gradients of these layers, all of whose inputs follow from `first` in the place of what the stem gives."""
    grads, inputs = {}, {}

    def note(name, seen):
        def hook(layer, given, output):
            seen.setdefault(name, given[0].detach())
            if output.requires_grad:
                output.register_hook(lambda grad: grads.setdefault(name, grad))

        return hook

    def run(function, seen):
        handles = [stock.get_submodule(name).register_forward_hook(note(name, seen)) for name in names]
        function()
        for handle in handles:
            handle.remove()

    run(lambda: loss_of(stock, x).backward(), {})
    with torch.no_grad():
        run(lambda: stock[1:](first), inputs)
    found = {}
    for name in names:
        layer = stock.get_submodule(name)
        form = (layer.weight.shape, grads[name], layer.stride, layer.padding, layer.dilation, layer.groups)
        found[f"{name}.weight"] = torch.nn.grad.conv2d_weight(inputs[name], *form)
    return found


def exactly(gradients, names):
    """All but the weights of these layers, and of normalisations, which are computed with them."""
    weights = {f"{name}.weight" for name in names}
    return [
        name
        for name in gradients
        if name not in weights and not name.endswith(("bn1.weight", "bn2.weight", "short.1.weight"))
    ]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("storage", ["input", "int8"])
def test_gradients_are_those_of_what_follows_from_the_form(kind, storage):
    stock, x = NETWORKS[kind](), random_tensor(4, 3, 9, 8)
    names, model = named(stock), copy.deepcopy(stock)
    lowrank.convert(model, names, Noted(0.7, storage=storage, derive=FAR), everywhere=True)
    SEEN.clear()
    found = gradients(model, x)
    first = SEEN[0]
    assert len(SEEN) == 1, "the form is expanded once, for all that need it"
    assert set(derived(model)) == set(names[1:]) - SAME
    exact, wanted = gradients(copy.deepcopy(stock), x), by_hand(copy.deepcopy(stock), x, names, first)
    if kind == "pooled":  # which of a window's numbers is the greatest is kept, not looked for among the near ones
        wanted = {name: gradient for name, gradient in wanted.items() if name.startswith("1.")}
    for name, gradient in wanted.items():
        if name == "2.joined.weight":  # what a branch makes of a few pixels is kept, or follows from what is: exact
            found[name], exact[name], gradient = (each[:, :32] for each in (found[name], exact[name], gradient))
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))
        assert not torch.allclose(found[name], exact[name], rtol=1e-6), "the form is no exact input"
    for name in exactly(exact, names):
        torch.testing.assert_close(found[name], exact[name])
    kept = {name: state.kept_bytes for name, state in layers_of(model).items()}
    assert [name for name in names if kept[name]] == names[:1]


@pytest.mark.parametrize("kind", NETWORKS)
def test_without_the_number_nothing_of_it_follows(kind):
    """By a 3 x 3 convolution of 32 channels, 288 products, and a smaller tensor from a larger one."""
    stock, x = NETWORKS[kind](), random_tensor(4, 3, 9, 8)
    model = lowrank.convert(copy.deepcopy(stock), named(stock), HOSVD(0.7, derive=True), everywhere=True)
    gradients(model, x)
    assert not set(derived(model)) - {"1.short.0", "2.joined"}


def test_the_number_counts_the_products_on_the_costliest_way():
    """Each convolution of 32 channels takes 288; the last input is behind four of them."""
    stock, x = NETWORKS["residual"](), random_tensor(4, 3, 9, 8)
    names = named(stock)
    for products, behind in ((287, 0), (288, 1), (575, 1), (576, 2), (1151, 3), (1152, 4)):
        model = lowrank.convert(copy.deepcopy(stock), names, Rounded(derive=products), everywhere=True)
        gradients(model, x)
        assert [name for name, ahead in derived(model).items() if ahead == names[0]] == names[1 : 1 + behind]


def test_what_is_far_larger_than_all_inputs_is_not_there_once_more():
    """Of a stem, whose output no layer is given before it is pooled: nothing follows from the image, and the peak is
    that of exact layers, or hardly more."""

    class Stem(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 32, 7, 2, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(4))

    stock = network(Basic(32, 32), Basic(32, 32), nn.Conv2d(32, 6, 3))
    stock[0] = Stem().double().eval()
    x = random_tensor(4, 3, 40, 40)
    names = ["0.0", *named(stock)]
    exact = lowrank.convert(copy.deepcopy(stock), names, Vanilla())
    model = lowrank.convert(stock, names, Rounded(derive=FAR), everywhere=True)
    gradients(model, x)
    assert derived(model) == dict.fromkeys(names[2:], names[1])
    peaks = [lowrank.peak_bytes(each, loss_of, x) for each in (exact, model)]
    assert peaks[1] <= 1.05 * peaks[0]


def test_whoever_needs_the_exact_tensor_keeps_it():
    """A gate's derivative needs what follows; from the exact first input, by dear convolutions, it is not computed."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.last = Basic(32, 32), nn.Conv2d(32, 6, 3)

        def forward(self, x):
            y = self.block(x)
            return self.last(y * torch.sigmoid(y) + F.silu(y))

    stock, x = network(Gated()), random_tensor(4, 3, 9, 8)
    names = ["1.block.conv1", "1.block.conv2"]
    plain = lowrank.convert(copy.deepcopy(stock), names, Rounded(), everywhere=True)
    model = lowrank.convert(copy.deepcopy(stock), names, Rounded(derive=FAR), everywhere=True)
    less = lowrank.saved_bytes(plain, loss_of, x) - lowrank.saved_bytes(model, loss_of, x)
    gradients(plain, x)
    assert less == layers_of(plain)[names[1]].kept_bytes
    found, exact = gradients(model, x), gradients(stock, x)
    for name in exactly(exact, names):
        torch.testing.assert_close(found[name], exact[name])


def test_what_follows_from_an_input_that_is_kept_as_it_is_is_exact():
    """A form that would take no less than the input gives way to it."""
    stock, x = NETWORKS["smaller"](), random_tensor(4, 3, 9, 8)
    names = named(stock)
    model = lowrank.convert(copy.deepcopy(stock), names, ASI((4, 32, 9, 8), derive=FAR), everywhere=True)
    found, exact = gradients(model, x), gradients(stock, x)
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient)
    assert set(derived(model)) == set(names[1:]) - SAME
    assert {name for name, state in layers_of(model).items() if state.kept_bytes} == {names[0], *SAME}


def test_layers_that_keep_their_input_derive_nothing():
    stock, x = NETWORKS["residual"](), random_tensor(4, 3, 9, 8)
    first, *others = named(stock)
    methods = {first: Rounded(derive=FAR), **dict.fromkeys(others, Vanilla())}
    found, exact = gradients(lowrank.convert(copy.deepcopy(stock), methods), x), gradients(stock, x)
    for name in exactly(exact, [first]):
        torch.testing.assert_close(found[name], exact[name])


@pytest.mark.parametrize("allowed", [0, 1, 256, -5, 2.5, "far", 1 << 24])
def test_what_is_no_number_of_products_is_refused(allowed):
    with pytest.raises(SettingError, match="or a number of products between 256 and"):
        ASI(4, derive=allowed)


def test_a_method_says_so():
    assert ASI(4, derive=5000).tag == "asi_derived_5000_rank4"
    assert "derive=5000" in repr(Rounded(derive=5000))
