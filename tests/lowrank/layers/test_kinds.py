"""Convolutions of one and three dimensions, GPT-2's linear layer, and layers of one's own: exact, and as lean."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, ConversionError, ConvGeometry, SettingError, Tucker, Vanilla
from lowrank.tensors import gradients

LAYERS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 9)),
    "1d same": (lambda: nn.Conv1d(4, 4, 4, padding="same", dilation=2), (3, 4, 9)),
    "1d circular": (lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular", bias=False), (3, 4, 9)),
    "1d pointwise": (lambda: nn.Conv1d(4, 6, 1, stride=2), (3, 4, 9)),
    "3d": (lambda: nn.Conv3d(4, 6, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 4, 3, 6, 5)),
    "3d pointwise": (lambda: nn.Conv3d(4, 6, 1, stride=(1, 2, 2)), (2, 4, 3, 6, 5)),
    "3d reflect": (lambda: nn.Conv3d(4, 8, 3, padding=(1, 1, 1), padding_mode="reflect", groups=4), (2, 4, 3, 6, 5)),
}


def results(layer, x):
    layer.zero_grad()
    leaf = x.clone().requires_grad_(True)
    y = layer(leaf * 1)
    y.backward(random_tensor(*y.shape, seed=3))
    return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]


def assert_the_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", [Vanilla(), HOSVD(1.0), ASI(99)], ids=lambda method: method.tag)
@pytest.mark.parametrize("name", LAYERS)
def test_exact_at_full_rank_with_and_without_a_batch_dimension(name, method):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    stock = make().double()
    layer = lowrank.convert(nn.Sequential(copy.deepcopy(stock)), ["0"], method)[0]
    for x in (random_tensor(*shape), random_tensor(*shape)[0]):
        assert_the_same(results(layer, x), results(stock, x))
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)
    assert type(lowrank.revert(layer)) is type(stock)


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_from_factors_is_autograds_on_the_compressed_input(name):
    make, shape = LAYERS[name]
    stock = make().double()
    geometry = ConvGeometry.of(stock)
    ranks = [2, 3, *[2] * (len(shape) - 2)]
    for factored in (range(len(shape)), (0,), (1,), range(2, len(shape))):
        sizes = [rank if mode in factored else size for mode, (size, rank) in enumerate(zip(shape, ranks, strict=True))]
        factors = [
            random_tensor(n, r) if m in factored else None for m, (n, r) in enumerate(zip(shape, ranks, strict=True))
        ]
        tucker = Tucker(random_tensor(*sizes), tuple(factors))
        y = stock(tucker.dense())
        grad = random_tensor(*y.shape, seed=2)
        (wanted,) = torch.autograd.grad(y, stock.weight, grad)
        torch.testing.assert_close(gradients.weight_gradient(tucker, grad, geometry), wanted, rtol=1e-10, atol=1e-10)


def test_a_three_dimensional_convolution_keeps_five_factors():
    model = lowrank.convert(nn.Sequential(nn.Conv3d(4, 6, 3)), ["0"], ASI([1, 2, 2, 2, 2]))
    x = random_tensor(4, 4, 6, 6, 6).float().requires_grad_()
    kept = lowrank.saved_bytes(model, lambda m, x: m(x * 1).sum(), x)
    weight_of_input_gradient, numbers = 0, 16 + 4 * 1 + (4 + 6 + 6 + 6) * 2
    assert kept <= 4 * numbers + weight_of_input_gradient
    cost = lowrank.account(model, ["0"], x)["0"]
    assert cost.activation_bytes == 4 * numbers


def test_ranks_of_another_number_of_modes_are_refused_ahead():
    with pytest.raises(ConversionError, match="3 modes"):
        lowrank.convert(nn.Sequential(nn.Conv1d(4, 6, 3)), ["0"], ASI([1, 2, 2, 2]))


class Transposed(nn.Module):
    """As GPT-2's Conv1D: a linear layer whose weight is (I, O)."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(7))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 5), self.weight).view(*x.shape[:-1], 7)


class Scaled(nn.Conv2d):
    """A weight that is computed: standardised, and scaled per output."""

    def __init__(self):
        super().__init__(4, 6, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(6))

    def standardised(self):
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True) * self.scale[:, None]
        return flat.view_as(self.weight)

    def forward(self, x):
        return nn.functional.conv2d(x, self.standardised(), self.bias, self.stride, self.padding)


@pytest.mark.parametrize("method", [Vanilla(), HOSVD(1.0)], ids=lambda method: method.tag)
def test_a_layer_of_ones_own_joins_by_registration(method):
    lowrank.register_layer(Transposed, weight=lambda layer: layer.weight.mT)
    lowrank.register_layer(Scaled, geometry=ConvGeometry.of, weight=Scaled.standardised)
    for kind, shape in ((Transposed, (2, 3, 5)), (Scaled, (2, 4, 5, 6))):
        torch.manual_seed(0)
        stock = kind().double()
        model = lowrank.convert(nn.Sequential(copy.deepcopy(stock)), ["0"], method)
        assert_the_same(results(model, random_tensor(*shape)), results(stock, random_tensor(*shape)))
        assert type(copy.deepcopy(model)[0]) is type(model[0])
        assert type(lowrank.revert(model)[0]) is kind


class Doubled(nn.Linear):
    """As no linear layer computes it, with a weight (I, O) besides."""

    def __init__(self):
        super().__init__(7, 5)
        self.bias = nn.Parameter(torch.randn(7))

    def forward(self, x):
        return 2 * (x @ self.weight + self.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_does_not_compute_what_it_is_registered_as_is_told_at_the_first_step_and_can_be_registered_anew(dtype):
    """It trained another function, without a word."""
    torch.manual_seed(0)
    stock, x = Doubled().to(dtype), random_tensor(3, 5).to(dtype)
    for weight in (None, lambda layer: layer.weight.mT, lambda layer: 2 * layer.weight.mT):
        lowrank.register_layer(Doubled, weight=weight)
        model = lowrank.convert(nn.Sequential(copy.deepcopy(stock)), ["0"], Vanilla())
        with torch.no_grad():
            torch.testing.assert_close(model(x), stock(x))
        for given in (x, x[0]):
            with pytest.raises(SettingError, match=r"layer '0': Doubled does not compute what register_layer was told"):
                model(given)
    stock.bias.data.zero_()  # of which the outputs are those of a linear layer, though not the gradients
    model = lowrank.convert(nn.Sequential(stock), ["0"], Vanilla())
    with pytest.raises(SettingError, match="register_layer"):
        model(x)


@pytest.mark.slow
@pytest.mark.parametrize("method", [ASI(2), HOSVD(0.9)], ids=str)
def test_what_does_not_compute_what_it_is_registered_as_is_told_where_it_is_compiled_too(method):
    """Its output was another one than before it was converted."""
    torch._dynamo.reset()
    for kind, weight in ((Doubled, lambda layer: layer.weight.mT), (Transposed, lambda layer: layer.weight.mT)):
        lowrank.register_layer(kind, weight=weight)
        model = lowrank.convert(nn.Sequential(kind(), nn.Tanh()), ["0"], method)
        fast = torch.compile(model, backend="aot_eager", fullgraph=kind is Transposed and not method.chooses_by_data)
        with pytest.raises(SettingError, match="Doubled does not") if kind is Doubled else nullcontext():
            for size in (3, 4, 2):
                fast(random_tensor(size, 5).float()).sum().backward()
        assert model[0]._lowrank.proven == (kind is Transposed)


def test_outputs_that_are_none_or_not_finite_prove_nothing():
    lowrank.register_layer(Transposed, weight=lambda layer: layer.weight.mT)
    model = lowrank.convert(nn.Sequential(Transposed()), ["0"], Vanilla())
    for x, proven in ((torch.full((2, 5), torch.inf), False), (torch.ones(0, 5), False), (torch.ones(2, 5), True)):
        model(x)
        assert model[0]._lowrank.proven == proven


def test_what_has_no_weight_cannot_be_converted_though_it_is_registered():
    lowrank.register_layer(nn.Softsign)
    with pytest.raises(ConversionError, match=r"layer '0' \(Softsign\): it has no weight as register_layer was told"):
        lowrank.convert(nn.Sequential(nn.Softsign()), ["0"], Vanilla())


class Simple(nn.Conv3d):
    """As in torchvision's networks for video: a constructor of its own, and nothing else."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, (3, 3, 3), padding=1, bias=False)


def test_a_subclass_that_computes_the_same_is_converted_and_one_that_does_not_is_refused():
    torch.manual_seed(0)
    stock = Simple(4, 6).double()
    model = lowrank.convert(nn.Sequential(copy.deepcopy(stock)), ["0"], Vanilla())
    assert_the_same(results(model, random_tensor(2, 4, 3, 4, 5)), results(stock, random_tensor(2, 4, 3, 4, 5)))
    assert type(pickle.loads(pickle.dumps(model))[0]) is type(model[0])
    assert type(lowrank.revert(model)[0]) is Simple
    doubled = type("Doubled", (Simple,), {"forward": lambda self, x: 2 * nn.Conv3d.forward(self, x)})
    with pytest.raises(ConversionError, match=r"subclass of nn\.Conv3d that may compute something else"):
        lowrank.convert(nn.Sequential(doubled(4, 6)), ["0"], Vanilla())


def test_what_is_not_registered_is_refused_with_a_word_of_how_to():
    class Another(nn.Module):
        pass

    (problem,) = lowrank.check(nn.Sequential(Another()), ["0"], Vanilla())
    assert "register_layer" in problem
    with pytest.raises(SettingError, match="no class of modules"):
        lowrank.register_layer(Another())


class Timed(nn.Conv2d):
    """Calls its input by another name, and takes a second argument."""

    def forward(self, x, times=2.0):
        return self._conv_forward(x, times * self.weight, self.bias)


def test_an_input_may_be_given_by_the_name_that_the_layer_has_for_it():
    lowrank.register_layer(Timed, ConvGeometry.of, lambda layer: 2 * layer.weight)
    stock, x = Timed(3, 4, 3).double(), random_tensor(4, 3, 6, 6)
    layer = lowrank.convert(nn.Sequential(copy.deepcopy(stock)), ["0"], ASI(2))[0]
    for given, named in (((x,), {}), ((), {"x": x}), ((x,), {"times": 3.0}), ((), {"x": x, "times": 3.0})):
        y = layer(*given, **named)
        torch.testing.assert_close(y, stock(*given, **named))
        assert (layer._lowrank.kept_bytes == x.nbytes) == ("times" in named)  # then it is the stock layer
    with pytest.raises(TypeError, match="'time'"):
        lowrank.convert(nn.Sequential(copy.deepcopy(stock)), ["0"], ASI(99))[0](x, time=3.0)
    stock, x = nn.Linear(3, 4).double(), random_tensor(4, 3)
    torch.testing.assert_close(
        lowrank.convert(nn.Sequential(copy.deepcopy(stock)), ["0"], ASI(99))[0](input=x), stock(input=x)
    )
