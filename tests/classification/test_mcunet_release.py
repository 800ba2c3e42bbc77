"""MCUNet's release becomes weights of this suite, or is refused with the first thing that does not fit."""

import copy
import json
import re

import pytest
import torch
from local_server import serving
from released import Released, described, trained, weights

from classification import convert_weights
from classification.backbones import build_model
from classification.backbones.published import check_config, convert
from experiment import ExperimentError


@pytest.fixture(scope="module")
def released():
    torch.manual_seed(3)
    return trained(Released())


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mcunet.json"
    path.write_text(json.dumps(described()))
    return path


def test_the_release_in_small_is_the_release():
    with torch.device("meta"):
        network = Released()
    assert sum(parameter.numel() for parameter in network.parameters()) == 636_232
    keys = list(network.state_dict())
    assert keys[0] == "first_conv.conv.weight"
    assert "blocks.1.mobile_inverted_conv.inverted_bottleneck.conv.weight" in keys
    assert "blocks.0.mobile_inverted_conv.inverted_bottleneck.conv.weight" not in keys


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_mcunet_computes_what_the_release_computes(tmp_path, monkeypatch, epsilon):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.manual_seed(3)
    network = trained(Released(epsilon=epsilon))
    torch.save({"epoch": 120, "state_dict": network.state_dict()}, tmp_path / "mcunet.pth")
    (tmp_path / "mcunet.json").write_text(json.dumps(described(epsilon)))
    assert weights("mcunet", "--from", tmp_path / "mcunet.pth", "--config", tmp_path / "mcunet.json") == 0
    # In double precision, since in single the kernels' order of sums shows. What the file rounds are the variances.
    ours, images = build_model("mcunet", pretrained=True).eval().double(), torch.randn(4, 3, 64, 64).double()
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(images)
        error = (ours(images) - expected).abs().max() / expected.abs().max()
    assert error <= (1e-12 if epsilon == 1e-5 else 1e-5)
    other = build_model("mcunet", num_classes=37, pretrained=True)  # setup A: a new classifier on published features
    assert other.classifier.out_features == 37
    assert torch.equal(other.stem[0].weight, network.first_conv.conv.weight)


@pytest.mark.slow
def test_the_release_is_downloaded_unless_it_is_given(tmp_path, monkeypatch, released, config):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.save({"state_dict": released.state_dict()}, tmp_path / "mcunet.pth")
    with serving() as server:
        for suffix in ("pth", "json"):
            server.files[f"/mcunet.{suffix}"] = (tmp_path / f"mcunet.{suffix}").read_bytes()
        monkeypatch.setattr(convert_weights, "RELEASE", f"{server.address}/mcunet")
        assert weights("mcunet") == 0
        assert sorted(path for path, _ in server.asked) == ["/mcunet.json", "/mcunet.pth"]
    assert torch.equal(build_model("mcunet", pretrained=True).classifier.bias, released.classifier.linear.bias)


CHANGES = {
    "kernel_size of block 3": lambda config: config["blocks"][3]["mobile_inverted_conv"].update(kernel_size=5),
    "stride of block 5": lambda config: config["blocks"][5]["mobile_inverted_conv"].update(stride=1),
    "mid_channels of block 13": lambda config: config["blocks"][13]["mobile_inverted_conv"].update(mid_channels=480),
    "out_channels of block 0": lambda config: config["blocks"][0]["mobile_inverted_conv"].update(out_channels=16),
    "use_se of block 2": lambda config: config["blocks"][2]["mobile_inverted_conv"].update(use_se=True),
    "act_func of block 2": lambda config: config["blocks"][2]["mobile_inverted_conv"].update(act_func="h_swish"),
    "shortcut of block 2": lambda config: config["blocks"][2].update(shortcut=None),
    "out_channels of first_conv": lambda config: config["first_conv"].update(out_channels=32),
    "feature_mix_layer of the network": lambda config: config.update(feature_mix_layer={"name": "ConvLayer"}),
    "in_features of classifier": lambda config: config["classifier"].update(in_features=320),
    "describes 13 blocks, mcunet has 14": lambda config: config["blocks"].pop(),
    "KeyError: 'bn'": lambda config: config.pop("bn"),
    "KeyError: 'blocks'": lambda config: config.pop("blocks"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_description_of_another_network_names_the_layer(tmp_path, message):
    content = described()
    CHANGES[message](content)
    (tmp_path / "mcunet.json").write_text(json.dumps(content))
    with pytest.raises(ExperimentError, match=re.escape(message)) as raised:
        check_config(tmp_path / "mcunet.json")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_damaged_description_is_refused(tmp_path, content):
    (tmp_path / "mcunet.json").write_text(content)
    with pytest.raises(ExperimentError, match="no description of a network"):
        check_config(tmp_path / "mcunet.json")


def without(state, key):
    del state[key]


TENSORS = {
    "another shape": lambda state: state.update({"first_conv.conv.weight": torch.zeros(16, 3, 5, 5)}),
    "a tensor less": lambda state: without(state, "blocks.7.mobile_inverted_conv.depth_conv.bn.running_mean"),
    "a tensor more": lambda state: state.update(
        {"blocks.14.mobile_inverted_conv.depth_conv.conv.weight": torch.ones(1)}
    ),
    "another name": lambda state: state.update({"head.weight": state.pop("first_conv.bn.bias")}),
    "no classifier": lambda state: without(state, "classifier.linear.weight"),
}


@pytest.mark.parametrize("change", TENSORS)
def test_a_release_that_does_not_fit_is_refused(released, config, change):
    state = dict(released.state_dict())
    TENSORS[change](state)
    with pytest.raises(ExperimentError, match=r"of another network than mcunet: 1|no classifier|2 tensors") as raised:
        convert("mcunet", state, config)
    assert "\n" not in str(raised.value)


def test_a_release_of_another_size_has_another_number_of_parameters(config):
    state = Released(classes=999).state_dict()
    with pytest.raises(ExperimentError, match=r"636071 parameters; MCUNet's release has 636232"):
        convert("mcunet", state, config)


def test_the_release_wants_its_description(released):
    with pytest.raises(ExperimentError, match="--config"):
        convert("mcunet", released.state_dict())
