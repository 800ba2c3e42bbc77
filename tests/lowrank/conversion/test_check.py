"""What speaks against a conversion is listed without touching anything, and a refused conversion changes nothing."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conversion_cases import Zoo, snapshot
from references import TwoConvolutions, random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, WASI, ConversionError, GradientFilter, Vanilla


class Sensitive(nn.Module):
    """Its forward pass counts, ages a buffer, fills a list and a cache, sets another layer's weight, draws numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.make, self.hyper = nn.Linear(4, 8), nn.Linear(4, 2, bias=False)
        del self.hyper.weight
        self.hyper.weight = torch.zeros(2, 4)
        self.calls, self.seen, self.mask = 0, [], None
        self.register_buffer("age", torch.ones(()))

    def forward(self, x):
        self.calls += 1
        self.age.mul_(0.5)
        y = F.relu(self.norm(self.conv(x)))
        self.seen.append(x)
        if self.mask is None:
            self.mask = torch.rand_like(y)
        y = (y * self.mask).mean((2, 3))
        self.hyper.weight = self.make(y).mean(0).view(2, 4)
        return self.head(y) + self.hyper(y)


WORKING = {
    "fine": (["conv", "head"], HOSVD(0.8)),
    "a method each": ({"conv": ASI([2, 2, 2, 2]), "head": WASI(ranks=2, energy=0.9)}, None),
}
REFUSED = {
    "an unknown name": (["conv", "haed"], HOSVD(0.8)),
    "no name": ([], HOSVD(0.8)),
    "a text": ("conv", HOSVD(0.8)),
    "a normalisation": (["conv", "norm"], HOSVD(0.8)),
    "no method": (["conv"], None),
    "a class": (["conv"], HOSVD),
    "both": ({"conv": HOSVD(0.8)}, ASI(2)),
    "the wrong kind": (["conv", "head"], GradientFilter(2)),
    "no ranks": (["conv", "head"], ASI({"conv": [1, 1, 1, 1]})),
    "too few ranks": (["head", "conv"], ASI([2, 2])),
    "factors of a convolution": (["head", "conv"], WASI(ranks=2, energy=0.9)),
    "factors of a weight that is computed": (["head", "hyper"], WASI(ranks=2, energy=0.9)),
    "one of several methods": ({"head": WASI(ranks=2, energy=0.9), "conv": WASI(ranks=2, energy=0.9)}, None),
}


def random_states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def same_random_states(first, second):
    return torch.equal(first[0], second[0]) and first[1:] == second[1:]


def everything(model):
    """All that a conversion may not touch, values of tensors included."""
    values = {key: value.clone() for key, value in model.state_dict(keep_vars=False).items()}
    return snapshot(model), values, list(model.state_dict()), model.state_dict()._metadata, list(model.seen)


def assert_untouched(before, after):
    assert after[0] == before[0]
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0, equal_nan=True)
    assert after[2:] == before[2:]


@pytest.mark.parametrize("case", [*WORKING, *REFUSED])
def test_checking_touches_nothing_and_says_what_convert_says(case):
    names, method = {**WORKING, **REFUSED}[case]
    model, before_random = Sensitive(), random_states()
    before = everything(model)
    problems = lowrank.check(model, names, method)
    assert_untouched(before, everything(model))
    assert bool(problems) == (case in REFUSED)
    assert all(isinstance(problem, str) and problem for problem in problems)
    assert lowrank.check(model, names, method) == problems
    if problems:
        with pytest.raises(ConversionError) as error:
            lowrank.convert(model, names, method)
        assert all(problem in str(error.value) for problem in problems)
        assert_untouched(before, everything(model))
    assert same_random_states(random_states(), before_random)


@pytest.mark.parametrize("case", WORKING)
def test_converting_does_not_run_the_model_nor_draw_a_number(case):
    """Counters, lists, caches, buffers and the weight that the forward pass sets are as they were."""
    names, method = WORKING[case]
    model = Sensitive()
    weight = model.hyper.weight
    before_random = random_states()
    lowrank.convert(model, names, method)
    lowrank.convert(model, names, method)
    lowrank.revert(model)
    assert same_random_states(random_states(), before_random)
    assert (model.calls, model.seen, model.mask, float(model.age)) == (0, [], None, 1.0)
    assert model.hyper.weight is weight


def test_a_converted_sensitive_model_trains_as_the_stock_one():
    stock = Sensitive().double()
    stock.hyper.weight = stock.hyper.weight.double()
    model = lowrank.convert(copy.deepcopy(stock), ["conv", "head", "make"], HOSVD(1.0))
    for network in (stock, model):
        for seed in range(2):
            torch.manual_seed(0)
            network.zero_grad()
            network(random_tensor(3, 3, 8, 7, seed=seed)).square().sum().backward()
    assert model.calls == stock.calls == 2
    for (_, found), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_every_problem_is_listed_in_one_go():
    problems = lowrank.check(Zoo(), ["conv", "odd", "xyzzy", "norm", "bilinear", "linear"], GradientFilter(2))
    assert len(problems) == 5
    for name in ("odd", "xyzzy", "norm", "bilinear", "linear"):
        assert sum(f"{name!r}" in problem for problem in problems) == 1
    assert not any("'conv'" in problem for problem in problems)


def test_each_problem_names_layer_kind_reason_and_what_to_do():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 2),
            "odd": type("Odd", (nn.Linear,), {"forward": lambda layer, x: x})(4, 4),
        }
    )
    closed, odd = lowrank.check(model, ["attention.out_proj", "odd"], Vanilla())
    assert "'attention.out_proj'" in closed
    assert "lowrank.open_attention(model)" in closed
    assert "'odd' (Odd)" in odd
    assert "nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d" in odd


class HandsOn(nn.Module):
    """Code that takes a layer's weight and never calls the layer, as Swin V2's attention does."""

    def __init__(self):
        super().__init__()
        self.qkv, self.bias, self.proj = nn.Linear(8, 24, bias=False), nn.Parameter(torch.zeros(24)), nn.Linear(24, 8)

    def forward(self, x):
        return self.proj(F.linear(x, self.qkv.weight, self.bias))


def test_a_layer_whose_weight_is_only_handed_on_is_refused():
    (problem,) = lowrank.check(nn.Sequential(HandsOn()), ["0.qkv", "0.proj"], HOSVD(0.8))
    assert "'0.qkv'" in problem
    assert "no effect" in problem
    assert lowrank.check(HandsOn(), ["proj"], HOSVD(0.8)) == []


class InALoop(nn.Module):
    """The weight is read for a penalty; the layer is called, but not by its name."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def penalty(self):
        return self.first.weight.square().sum()

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def test_a_layer_that_is_called_in_a_loop_is_not_refused_for_a_penalty_on_its_weight():
    assert lowrank.check(InALoop(), ["first", "second"], HOSVD(0.8)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_cannot_be_factorised_is_found_ahead_of_everything(value):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    with torch.no_grad():
        model[2].weight[1, 1] = value
    before = snapshot(model)
    with pytest.raises(ConversionError, match=r"'2' \(Linear\).*NaN or infinite"):
        lowrank.convert(model, ["0", "2"], WASI(energy=0.9, ranks=4))
    assert snapshot(model) == before


def test_a_weight_that_two_modules_share_cannot_be_factors():
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 6), "body": nn.Linear(6, 6), "head": nn.Linear(6, 7)})
    model["head"].weight = model["embedding"].weight
    (problem,) = lowrank.check(model, ["body", "head"], WASI(energy=0.9, ranks=2))
    assert "'head' (Linear)" in problem
    assert "another module" in problem
    assert lowrank.check(model, ["body", "head"], HOSVD(0.9)) == []


def test_a_failure_while_checking_leaves_an_earlier_conversion_as_it_is():
    model = lowrank.convert(TwoConvolutions(), ["first", "head"], ASI(2))
    model(random_tensor(4, 3, 8, 8, dtype=torch.float32))
    before, state = snapshot(model), lowrank.training_state(model)
    for names, method in ((["first", "nothing"], HOSVD(0.8)), (["head", "first"], WASI(energy=0.9, ranks=2))):
        with pytest.raises(ConversionError):
            lowrank.convert(model, names, method)
        assert snapshot(model) == before
        torch.testing.assert_close(lowrank.training_state(model), state, rtol=0, atol=0)


def test_a_method_of_the_users_own_that_objects_is_heard():
    class Picky(Vanilla):
        def reason_against(self, layer):
            return None if layer.bias is not None else "it has no bias"

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    assert lowrank.check(model, ["0", "1"], Picky()) == ["layer '1' (Linear): it has no bias"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "layers are given as None; give a list of names"),
        (2, "layers are given as 2; give a list"),
        ([nn.Conv2d(1, 1, 1)], "given as Conv2d; give its name"),
        (["first", 1], "given as 1; give its name"),
        (["first", ["second"]], r"given as \['second'\]; give its name"),
    ],
)
def test_what_is_no_list_of_names_is_told_in_one_line(names, message):
    with pytest.raises(ConversionError, match=message) as caught:
        lowrank.convert(TwoConvolutions(), names, Vanilla())
    assert "\n" not in str(caught.value)
    with pytest.raises(ConversionError, match=r"the model is a list; give a torch\.nn\.Module"):
        lowrank.convert([], ["first"], Vanilla())
