import copy

import pytest
import torch
import torchvision
from references import TwoConvolutions, labelled_batch
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, ConversionError, GradientFilter, SettingError, Vanilla
from lowrank.layers.layer import LowRankConv2d, LowRankLayer, LowRankLinear

NAMES = ["first", "second", "head"]


class OddConv(nn.Conv2d):
    """A subclass, which may compute anything."""


class Zoo(nn.Module):
    """One of every kind of layer that must be refused, and two that are fine."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.odd = OddConv(4, 4, 3)
        self.transposed = nn.ConvTranspose2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv1d = nn.Conv1d(4, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.lazy = nn.LazyLinear(4)
        self.linear = nn.Linear(4, 4)


REFUSED = ["odd", "transposed", "norm", "conv1d", "attention", "lazy", ""]


def snapshot(model):
    """Class and parameters of every module, and the state."""
    return [(id(module), type(module), sorted(vars(module))) for module in model.modules()]


@pytest.mark.parametrize("method", [Vanilla(), SVD(0.8), HOSVD(0.8), ASI(2)])
def test_conversion_changes_classes_and_nothing_else(method):
    model = TwoConvolutions()
    modules, parameters, keys = list(model.modules()), list(model.parameters()), list(model.state_dict())
    values = copy.deepcopy(model.state_dict())
    assert lowrank.convert(model, NAMES, method) is model
    assert [type(model.first), type(model.second), type(model.head)] == [LowRankConv2d, LowRankConv2d, LowRankLinear]
    assert isinstance(model.first, nn.Conv2d)
    assert all(one is two for one, two in zip(model.modules(), modules, strict=True))
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(dict(model.state_dict()), dict(values), rtol=0, atol=0)


def test_only_the_named_layers_are_converted():
    model = lowrank.convert(TwoConvolutions(), ["second"], HOSVD(0.8))
    assert list(lowrank.converted_layers(model)) == [model.second]


def test_revert_gives_the_original_layers_back():
    model = TwoConvolutions()
    before, modules = snapshot(model), list(model.modules())
    lowrank.convert(model, NAMES, ASI(2))
    model(labelled_batch()[0])
    assert lowrank.revert(model) is model
    assert snapshot(model) == before
    assert all(one is two for one, two in zip(model.modules(), modules, strict=True))
    assert list(model.state_dict()) == list(TwoConvolutions().state_dict())


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
    model(labelled_batch()[0])
    lowrank.convert(model, ["second"], HOSVD(0.8))
    assert [layer.method for layer in lowrank.converted_layers(model)] == [ASI(2), HOSVD(0.8), ASI(2)]
    assert not any(key.startswith("second.lowrank") for key in model.state_dict())
    assert any(key.startswith("first.lowrank") for key in model.state_dict())
    lowrank.revert(model)
    assert type(model.second) is nn.Conv2d


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
    with pytest.raises(ConversionError, match=r"nn\.Conv2d, nn\.Linear") as error:
        lowrank.convert(model, ["conv", name, "linear"], HOSVD(0.8))
    assert repr(name) in str(error.value)
    assert snapshot(model) == before


def test_a_weight_that_is_computed_is_refused():
    # A parametrized layer is of a class of its own, whose weight is no parameter.
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ConversionError, match="'0'"):
        lowrank.convert(model, ["0"], HOSVD(0.8))


def test_every_problem_is_listed_at_once_and_nothing_is_changed():
    model = Zoo()
    before = snapshot(model)
    with pytest.raises(ConversionError) as error:
        lowrank.convert(model, ["conv", "odd", "norm", "transposed", "linear"], GradientFilter(2))
    assert all(repr(name) in str(error.value) for name in ("odd", "norm", "transposed", "linear"))
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
    state = list(model.state_dict())
    with pytest.raises(ConversionError):
        lowrank.convert(model, ["first", "nothing"], HOSVD(0.8))
    assert model.first.method == ASI(2)
    assert list(model.state_dict()) == state


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


# Choosing layers


def test_trailing_layers_of_a_resnet_come_in_the_order_of_registration():
    with torch.device("meta"):
        model = torchvision.models.resnet18(weights=None)
    last = ["layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv1", "layer4.1.conv2"]
    assert lowrank.trailing_layers(model, 4) == last
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert lowrank.trailing_layers(model, "all") == convolutions
    assert len(convolutions) == 20
    assert lowrank.trailing_layers(model, "all", kind="linear") == ["fc"]


def test_trailing_layers_are_the_same_after_conversion():
    model = TwoConvolutions()
    lowrank.convert(model, NAMES, HOSVD(0.8))
    assert lowrank.trailing_layers(model, 2) == ["first", "second"]
    assert lowrank.trailing_layers(model, 1, kind="linear") == ["head"]


def test_trailing_layers_leave_out_what_cannot_be_converted():
    assert lowrank.trailing_layers(Zoo(), "all") == ["conv"]
    assert lowrank.trailing_layers(Zoo(), "all", kind="linear") == ["linear"]


@pytest.mark.parametrize("count", [0, -1, 3, 2.0, "2", None])
def test_a_count_that_the_model_does_not_have_is_refused(count):
    with pytest.raises(SettingError, match=r"which has 2; allowed: 1 to 2, or 'all'"):
        lowrank.trailing_layers(TwoConvolutions(), count)


def test_a_kind_that_the_model_does_not_have_is_refused():
    with pytest.raises(SettingError, match="has 0"):
        lowrank.trailing_layers(nn.Sequential(nn.Linear(2, 2)), "all")
    with pytest.raises(SettingError, match="conv, linear"):
        lowrank.trailing_layers(TwoConvolutions(), 1, kind="norm")


def test_freeze_before_freezes_everything_ahead_and_nothing_behind():
    with torch.device("meta"):
        model = torchvision.models.resnet18(weights=None)
    lowrank.freeze_before(model, lowrank.trailing_layers(model, 4))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {"layer4.0.bn2", "fc", *lowrank.trailing_layers(model, 4)}
    expected |= {"layer4.0.downsample.1", "layer4.1.bn1", "layer4.1.bn2"}
    assert {name.rpartition(".")[0] for name in trained} == expected


def test_freeze_before_leaves_frozen_what_is_frozen_and_takes_names_in_any_order():
    model = TwoConvolutions()
    model.head.bias.requires_grad_(False)
    lowrank.freeze_before(model, ["head", "second"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "second.weight",
        "second.bias",
        "head.weight",
    ]


def test_freeze_before_never_freezes_a_weight_that_a_named_layer_shares():
    # An embedding tied to the classifier is registered first; the classifier is what was asked to train.
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 7)})
    model["head"].weight = model["embedding"].weight
    lowrank.freeze_before(model, ["head"])
    assert model["head"].weight.requires_grad
    assert not model["body"].weight.requires_grad


def test_freeze_before_refuses_an_unknown_name_and_freezes_nothing():
    model = TwoConvolutions()
    with pytest.raises(ConversionError, match="'frist'"):
        lowrank.freeze_before(model, ["second", "frist"])
    assert all(parameter.requires_grad for parameter in model.parameters())


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
    assert len(kinds) == 6
    assert all(issubclass(kind, lowrank.LowRankError) for kind in kinds)
    assert all(kind.__name__ in lowrank.__all__ for kind in kinds)
