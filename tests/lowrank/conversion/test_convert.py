"""Conversion in place: what changes and what does not, what is refused, and that it is all or none."""

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from conversion_cases import Zoo, snapshot
from layer_cases import assert_equal_states
from references import TwoConvolutions, labelled_batch
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, WSI, ConversionError, GradientFilter, Vanilla
from lowrank.layers.classes import LowRankConv2d, LowRankLinear
from lowrank.layers.layer import LowRankLayer

NAMES = ["first", "second", "head"]


REFUSED = ["odd", "bilinear", "norm", "attention", "lazy", ""]


@pytest.mark.parametrize("method", [Vanilla(), SVD(0.8), HOSVD(0.8), ASI(2)])
def test_conversion_changes_classes_and_nothing_else(method):
    model = TwoConvolutions()
    modules, parameters, keys = list(model.modules()), list(model.parameters()), list(model.state_dict())
    values = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(model.get_submodule(name))) for name in NAMES}
    assert lowrank.convert(model, NAMES, method) is model
    assert {name: set(vars(model.get_submodule(name))) - {"_lowrank"} for name in NAMES} == attributes
    assert [type(model.first), type(model.second), type(model.head)] == [LowRankConv2d, LowRankConv2d, LowRankLinear]
    assert isinstance(model.first, nn.Conv2d)
    assert all(one is two for one, two in zip(model.modules(), modules, strict=True))
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(dict(model.state_dict()), dict(values), rtol=0, atol=0)


def test_only_the_named_layers_are_converted():
    model = lowrank.convert(TwoConvolutions(), ["second"], HOSVD(0.8))
    assert list(lowrank.converted_layers(model)) == [model.second]


def test_hooks_flags_and_mode_survive_conversion_and_revert():
    model, calls = TwoConvolutions().eval(), []
    model.first.weight.requires_grad_(False)
    model.first.register_forward_hook(lambda *_: calls.append(1))
    for change in (lambda: lowrank.convert(model, NAMES, HOSVD(0.8)), lambda: lowrank.revert(model)):
        change()
        model(labelled_batch()[0])
        assert not model.first.training
        assert not model.first.weight.requires_grad
    assert len(calls) == 2


def test_attributes_of_the_users_own_on_a_layer_stay():
    model = TwoConvolutions()
    mine = {"norm": 1, "method": "mine", "geometry": [2], "chosen": None, "kept_bytes": 3, "activation": "relu"}
    for name, value in mine.items():
        setattr(model.first, name, value)
    for change in (lambda: lowrank.convert(model, NAMES, ASI(2)), lambda: lowrank.revert(model)):
        change()
        model(labelled_batch()[0]).sum().backward()
        assert {name: getattr(model.first, name) for name in mine} == mine


def test_a_model_that_says_itself_what_is_pickled_of_it():
    """As LightningModule does."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.trainer = nn.Conv2d(3, 4, 3), lambda: 0  # cannot be pickled

        def __getstate__(self):
            return {**self.__dict__, "trainer": None}

        def forward(self, x):
            return F.relu(self.conv(x))

    sys.modules[__name__].Net = Net
    Net.__qualname__ = "Net"
    model = lowrank.convert(Net(), ["conv"], HOSVD(0.8))
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin) is Net
    assert twin.trainer is None
    x = labelled_batch()[0]
    torch.testing.assert_close(twin(x), model(x))
    assert list(lowrank.converted_layers(twin)) == [twin.conv]


def test_an_optimizer_made_before_trains_the_converted_model():
    model = TwoConvolutions()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.second.weight.detach().clone()
    lowrank.convert(model, NAMES, HOSVD(0.8))
    model(labelled_batch()[0]).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.second.weight, before)


def test_converting_again_changes_the_method_and_drops_the_old_state():
    model = lowrank.convert(TwoConvolutions(), NAMES, ASI(2))
    model(labelled_batch()[0])  # the head's input, 4 x 6, is kept as it is
    lowrank.convert(model, ["second"], HOSVD(0.8))
    assert [layer._lowrank.method for layer in lowrank.converted_layers(model)] == [ASI(2), HOSVD(0.8), ASI(2)]
    assert {key.partition(".")[0] for key in lowrank.training_state(model)} == {"first"}
    lowrank.revert(model)
    assert type(model.second) is nn.Conv2d


def test_a_method_per_layer():
    methods = {"second": HOSVD(0.8), "head": ASI({"head": [2, 3]}), "first": Vanilla()}
    model = lowrank.convert(TwoConvolutions(), methods)
    found = {layer._lowrank.name: layer._lowrank.method for layer in lowrank.converted_layers(model)}
    assert found == {**methods, "head": ASI([2, 3])}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"first": HOSVD(0.8), "head": GradientFilter(2)}, r"'head' \(Linear\).*convolution"),
        ({"first": HOSVD(0.8), "haed": HOSVD(0.8)}, "'haed'; did you mean 'head'"),
        ({"first": HOSVD(0.8), "head": HOSVD}, r"'head'.*HOSVD\(energy=0\.8\)"),
        ({}, "no layer is named"),
    ],
)
def test_a_wrong_method_for_one_layer_changes_none(methods, message):
    model = TwoConvolutions()
    before = snapshot(model)
    with pytest.raises(ConversionError, match=message):
        lowrank.convert(model, methods)
    assert snapshot(model) == before


def test_a_method_beside_one_per_layer_is_refused():
    with pytest.raises(ConversionError, match="give either"):
        lowrank.convert(TwoConvolutions(), {"first": HOSVD(0.8)}, ASI(2))


@pytest.mark.parametrize("ranks", [[2, 2], [2, 2, 2], [2, 2, 2, 2, 2]])
def test_a_wrong_number_of_ranks_for_a_convolution_is_refused(ranks):
    model = TwoConvolutions()
    before = snapshot(model)
    with pytest.raises(ConversionError, match=rf"'second' \(Conv2d\): {len(ranks)} ranks.*4 modes"):
        lowrank.convert(model, {"first": ASI(2), "second": ASI(ranks)})
    assert snapshot(model) == before


def test_a_module_under_two_names_is_converted_once():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(3, 3)})
    lowrank.convert(model, ["a", "b"], ASI(2))
    assert model["a"] is model["b"] is shared
    assert list(lowrank.converted_layers(model)) == [shared]
    lowrank.revert(model)
    assert type(shared) is nn.Linear


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_plain_convolution_or_linear_layer_is_refused(name):
    model = Zoo()
    before = snapshot(model)
    with pytest.raises(ConversionError, match=r"nn\.Conv3d, nn\.ConvTranspose1d.*, nn\.Linear") as error:
        lowrank.convert(model, ["conv", name, "linear"], HOSVD(0.8))
    assert repr(name) in str(error.value)
    assert snapshot(model) == before


def test_a_weight_that_is_computed_is_not_held_as_two_factors():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ConversionError, match=r"'0'.*its weight is no parameter of its own"):
        lowrank.convert(model, ["0"], WSI(0.9))


def test_every_problem_is_listed_at_once_and_nothing_is_changed():
    model = Zoo()
    before = snapshot(model)
    with pytest.raises(ConversionError) as error:
        lowrank.convert(model, ["conv", "odd", "norm", "bilinear", "linear"], GradientFilter(2))
    assert all(repr(name) in str(error.value) for name in ("odd", "norm", "bilinear", "linear"))
    assert "'conv'" not in str(error.value)
    assert snapshot(model) == before


def test_every_unknown_name_is_listed_with_names_that_are_near():
    model = TwoConvolutions()
    with pytest.raises(ConversionError) as error:
        lowrank.convert(model, ["frist", "second", "haed", "xyzzy"], HOSVD(0.8))
    message = str(error.value)
    assert "'frist'; did you mean 'first'?" in message
    assert "'haed'; did you mean 'head'?" in message
    assert "'xyzzy'" in message
    assert not list(lowrank.converted_layers(model))


def test_the_gradient_filter_on_a_linear_layer_is_refused():
    model = TwoConvolutions()
    with pytest.raises(ConversionError, match=r"'head' \(Linear\).*convolution"):
        lowrank.convert(model, NAMES, GradientFilter(2))
    assert not list(lowrank.converted_layers(model))


@pytest.mark.parametrize("ranks", [{"first": [2, 2, 2, 2]}, {}])
def test_a_layer_without_ranks_is_refused_before_anything_is_changed(ranks):
    model = TwoConvolutions()
    with pytest.raises(ConversionError, match="'second'"):
        lowrank.convert(model, ["first", "second"], ASI(ranks))
    assert not list(lowrank.converted_layers(model))


def test_asi_without_ranks_is_refused():
    with pytest.raises(ConversionError, match="select_ranks"):
        lowrank.convert(TwoConvolutions(), ["first"], ASI())


def test_a_refused_conversion_leaves_an_earlier_one_in_place():
    model = lowrank.convert(TwoConvolutions(), ["first"], ASI(2))
    model(labelled_batch()[0])
    state = lowrank.training_state(model)
    with pytest.raises(ConversionError):
        lowrank.convert(model, ["first", "nothing"], HOSVD(0.8))
    assert model.first._lowrank.method == ASI(2)
    assert_equal_states(lowrank.training_state(model), state)


@pytest.mark.parametrize("names", [[], "first"])
def test_names_are_a_list_that_is_not_empty(names):
    with pytest.raises(ConversionError, match="name"):
        lowrank.convert(TwoConvolutions(), names, HOSVD(0.8))


@pytest.mark.parametrize("method", [HOSVD, "hosvd", None])
def test_a_method_is_an_instance(method):
    with pytest.raises(ConversionError, match=r"HOSVD\(energy=0\.8\)"):
        lowrank.convert(TwoConvolutions(), NAMES, method)


def test_names_may_come_from_a_generator():
    model = lowrank.convert(TwoConvolutions(), (name for name in NAMES), HOSVD(0.8))
    assert len(list(lowrank.converted_layers(model))) == 3


def test_freezing_and_converting_trains_only_what_is_left():
    model = TwoConvolutions()
    lowrank.freeze_before(model, ["second"])
    lowrank.convert(model, ["second"], HOSVD(0.8))
    model(labelled_batch()[0]).square().sum().backward()
    assert model.first.weight.grad is None
    assert model.second.weight.grad is not None
    assert isinstance(model.second, LowRankLayer)


def test_every_error_type_is_one_of_the_packages():
    kinds = [value for value in vars(lowrank.errors).values() if isinstance(value, type)]
    assert len(kinds) > 6
    assert all(issubclass(kind, lowrank.LowRankError) for kind in kinds)
    assert all(kind.__name__ in lowrank.__all__ for kind in kinds)


MADE = {
    nn.Conv2d: (3, 4, 3),
    nn.ConvTranspose1d: (3, 4, 3),
    nn.Linear: (5, 4),
    nn.ReLU: (),
    nn.BatchNorm2d: (4,),
    nn.Dropout: (0.0,),
    nn.GELU: ("tanh",),
    nn.MultiheadAttention: (8, 2),
}


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.__name__)
def test_who_makes_a_module_of_a_converted_ones_class_gets_a_stock_one(kind):
    """As adapters do: a low-rank convolution beside a convolution is of the same class."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), kind(*MADE[kind]), nn.LayerNorm(4), nn.ReLU())
    if kind is nn.MultiheadAttention:
        lowrank.open_attention(model)
    layer = kind in (nn.Conv2d, nn.ConvTranspose1d, nn.Linear)
    lowrank.convert(model, ["0", "1"] if layer else ["0"], Vanilla())
    if kind is nn.Linear:
        lowrank.convert(model, ["1"], lowrank.WASI(ranks=2))
    before, after = type(model[1]), []
    for made in (before, kind):
        torch.manual_seed(0)
        after.append(made(*MADE[kind]))
    assert before is type(model[1]) is not kind
    assert type(after[0]) is kind
    assert vars(after[0]).keys() == vars(after[1]).keys()
    torch.testing.assert_close(dict(after[0].state_dict()), dict(after[1].state_dict()), rtol=0, atol=0)
