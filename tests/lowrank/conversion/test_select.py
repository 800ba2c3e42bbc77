"""Which layers a model has of a kind, by place, and what is frozen ahead of them."""

import pytest
import timm
import torch
import torchvision
import transformers
from conversion_cases import Zoo
from references import TwoConvolutions
from torch import nn
from transformers.pytorch_utils import Conv1D

import lowrank
from lowrank import HOSVD, ConversionError, SettingError

NAMES = ["first", "second", "head"]


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


class Named(nn.Conv2d):
    """Computes what its base does."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_all_layers_of_a_kind_that_can_be_converted_count():
    padded = timm.layers.create_conv2d(4, 4, 3, stride=2, padding="same")
    model = nn.Sequential(padded, Named(4), nn.Conv1d(4, 4, 1), Conv1D(8, 4), Scaled(4, 4))
    assert lowrank.trailing_layers(model, "all") == ["0", "1"]
    assert lowrank.trailing_layers(model, "all", "linear") == ["3"]
    lowrank.convert(model, ["0", "1", "3"], HOSVD(0.8))
    assert lowrank.trailing_layers(model, "all") == ["0", "1"]
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=8, n_embd=8, n_layer=2, n_head=2))
    blocks = [f"transformer.h.{block}.mlp.{name}" for block in range(2) for name in ("c_fc", "c_proj")]
    assert lowrank.trailing_layers(gpt2, "all", "linear", "mlp") == blocks
    assert len(lowrank.trailing_layers(gpt2, "all", "linear")) == 9


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Linear(2, 2), "has 0; it has 1 of kind 'linear'"),
        (nn.Conv1d(2, 2, 1), "has 0; name the convolutions of other dimensions, such as '0'"),
        (nn.ReLU(), "has 0; it has none of any kind"),
    ],
)
def test_a_kind_that_the_model_does_not_have_is_refused(layer, said):
    with pytest.raises(SettingError, match=said):
        lowrank.trailing_layers(nn.Sequential(layer), "all")


def test_a_part_that_no_name_tells_of_is_refused():
    with pytest.raises(SettingError, match="has 0; of its 1 none is named so; give names of layers, such as 'head'"):
        lowrank.trailing_layers(TwoConvolutions(), "all", "linear", "mlp")


def test_an_unknown_kind_is_refused():
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
