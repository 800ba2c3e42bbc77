"""Weights from files as they are published: MCUNet's release, and networks pretrained on a half."""

import copy
import json
import re
import tarfile

import numpy as np
import pytest
import torch
from local_server import serving
from torch import nn

from classification import convert_weights
from classification.backbones import build_model, names
from classification.backbones.mcunet import BLOCKS
from classification.backbones.published import check_config, convert
from experiment import ExperimentError


def conv_bn(inputs, outputs, kernel, stride=1, groups=1, activation=True):
    """A convolution with normalisation, its parts named as in MCUNet's release."""
    layers = nn.Sequential()
    layers.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(outputs))
    if activation:
        layers.add_module("act", nn.ReLU6())
    return layers


class ReleasedBlock(nn.Module):
    """A block with the names of the release."""

    def __init__(self, inputs, expanded, kernel, stride, outputs):
        super().__init__()
        layers = self.mobile_inverted_conv = nn.Sequential()
        if expanded != inputs:
            layers.add_module("inverted_bottleneck", conv_bn(inputs, expanded, 1))
        layers.add_module("depth_conv", conv_bn(expanded, expanded, kernel, stride, expanded))
        layers.add_module("point_linear", conv_bn(expanded, outputs, 1, activation=False))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        y = self.mobile_inverted_conv(x)
        return x + y if self.residual else y


class Released(nn.Module):
    """MCUNet with the names and the structure of the release."""

    def __init__(self, classes=1000, epsilon=1e-5):
        super().__init__()
        self.first_conv = conv_bn(3, 16, 3, 2)
        self.blocks = nn.ModuleList(ReleasedBlock(*row) for row in BLOCKS)
        self.classifier = nn.Sequential()
        self.classifier.add_module("linear", nn.Linear(160, classes))
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = epsilon

    def forward(self, x):
        x = self.first_conv(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean(3).mean(2))


class Half(nn.Module):
    """MCUNet in a trainer's module, as it was published after pretraining on a half."""

    def __init__(self, released):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.model = nn.Sequential(released.first_conv, *released.blocks)
        self.classifier = released.classifier.linear


def described(epsilon=1e-5):
    """The JSON file of the release."""
    blocks = []
    for inputs, expanded, kernel, stride, outputs in BLOCKS:
        layer = {"name": "MBInvertedConvLayer", "in_channels": inputs, "out_channels": outputs, "kernel_size": kernel}
        layer |= {"stride": stride, "expand_ratio": expanded / inputs, "act_func": "relu6", "use_se": False}
        layer["mid_channels"] = None if expanded == inputs else expanded
        shortcut = {"name": "IdentityLayer", "in_channels": [inputs], "out_channels": [outputs]}
        residual = stride == 1 and inputs == outputs
        blocks.append(
            {
                "name": "MobileInvertedResidualBlock",
                "mobile_inverted_conv": layer,
                "shortcut": shortcut if residual else None,
            }
        )
    first = {"name": "ConvLayer", "kernel_size": 3, "stride": 2, "dilation": 1, "groups": 1, "bias": False}
    first |= {"in_channels": 3, "out_channels": 16, "use_bn": True, "act_func": "relu6", "ops_order": "weight_bn_act"}
    classifier = {"name": "LinearLayer", "in_features": 160, "out_features": 1000, "bias": True, "use_bn": False}
    return {
        "name": "ProxylessNASNets",
        "bn": {"momentum": 0.1, "eps": epsilon, "ws_eps": None},
        "first_conv": first,
        "blocks": blocks,
        "feature_mix_layer": None,
        "classifier": classifier | {"act_func": None, "dropout_rate": 0},
        "resolution": 96,
    }


def trained(network, size=48):
    """The network with statistics of its own, in evaluation mode."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(8, 3, size, size))
    return network.eval()


@pytest.fixture(scope="module")
def released():
    torch.manual_seed(3)
    return trained(Released())


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mcunet.json"
    path.write_text(json.dumps(described()))
    return path


def weights(*arguments):
    return convert_weights.main([str(argument) for argument in arguments])


def refused(capsys, message, *arguments):
    capsys.readouterr()
    assert weights(*arguments) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", printed), printed
    assert re.search(message, printed), printed


def test_the_release_in_small_is_the_release():
    with torch.device("meta"):
        network = Released()
    assert sum(parameter.numel() for parameter in network.parameters()) == 636_232
    keys = list(network.state_dict())
    assert keys[0] == "first_conv.conv.weight"
    assert "blocks.1.mobile_inverted_conv.inverted_bottleneck.conv.weight" in keys
    assert "blocks.0.mobile_inverted_conv.inverted_bottleneck.conv.weight" not in keys


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_mcunet_computes_what_the_release_computes(tmp_path, monkeypatch, epsilon):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.manual_seed(3)
    network = trained(Released(epsilon=epsilon))
    torch.save({"epoch": 120, "state_dict": network.state_dict()}, tmp_path / "mcunet.pth")
    (tmp_path / "mcunet.json").write_text(json.dumps(described(epsilon)))
    assert weights("mcunet", "--from", tmp_path / "mcunet.pth", "--config", tmp_path / "mcunet.json") == 0
    ours, images = build_model("mcunet", pretrained=True).eval(), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), network(images), rtol=1e-4, atol=1e-5)
    other = build_model("mcunet", num_classes=37, pretrained=True)  # setup A: a new classifier on published features
    assert other.classifier.out_features == 37
    assert torch.equal(other.stem[0].weight, network.first_conv.conv.weight)


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


# Networks pretrained on a half.


def half_of(name, network):
    """The state dict of a published checkpoint."""
    if name == "mcunet":
        return Half(network).state_dict()
    head = "fc" if name.startswith("resnet") else "classifier.1"
    state = network.state_dict()
    body = {f"backbone.{key}": value for key, value in state.items() if not key.startswith(f"{head}.")}
    return body | {f"classifier.{leaf}": state[f"{head}.{leaf}"] for leaf in ("weight", "bias")}


def older_checkpoint(state):
    """What an older trainer writes beside the weights, numbers of numpy among them."""
    schedule = {"_last_lr": [np.float64(0.05)], "base_lrs": [0.05], "last_epoch": 155, "lr_lambdas": [None]}
    return {
        "epoch": 155,
        "global_step": 1_561_404,
        "pytorch-lightning_version": "1.6.5",
        "state_dict": state,
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val-acc'}": {"best_model_score": torch.tensor(0.743), "mode": "max"}
        },
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": np.float64(0.05)}]}],
        "lr_schedulers": [schedule],
    }


@pytest.mark.parametrize("name", names())
def test_a_network_pretrained_on_a_half_is_taken_over_whole(tmp_path, name):
    torch.manual_seed(1)
    network = trained(Released(100) if name == "mcunet" else build_model(name, num_classes=100), size=64)
    torch.save(older_checkpoint(half_of(name, network)), tmp_path / "epoch=155-val-acc=0.743.ckpt")
    assert weights(name, "--from", tmp_path / "epoch=155-val-acc=0.743.ckpt", "--to", tmp_path / "new" / "half.pt") == 0
    ours = build_model(name, num_classes=100, weights=str(tmp_path / "new" / "half.pt")).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_a_checkpoint_of_another_network_is_refused(tmp_path, capsys, name):
    torch.save(older_checkpoint(half_of("resnet34", build_model("resnet34", num_classes=10))), tmp_path / "a.ckpt")
    refused(
        capsys,
        f"of another network than {name}: .* such as",
        name,
        "--from",
        tmp_path / "a.ckpt",
        "--to",
        tmp_path / "b.pt",
    )
    assert not (tmp_path / "b.pt").exists()


def test_mistakes_are_one_line_and_write_nothing(tmp_path, capsys, released):
    torch.save({"state_dict": copy.deepcopy(released.state_dict())}, tmp_path / "mcunet.pth")
    target = ["--to", tmp_path / "out" / "b.pt"]
    refused(capsys, "there is no file", "resnet18", "--from", tmp_path / "nowhere", *target)
    refused(capsys, "--config", "mcunet", "--from", tmp_path / "mcunet.pth", *target)
    refused(capsys, "there is no file", "mcunet", "--from", tmp_path / "mcunet.pth", "--config", "nowhere", *target)
    (tmp_path / "text.ckpt").write_text("<html>quota exceeded</html>")
    refused(capsys, "cannot be read", "resnet18", "--from", tmp_path / "text.ckpt", *target)
    torch.save(nn.Linear(2, 2), tmp_path / "module.ckpt")  # a pickled module could run anything
    refused(capsys, "cannot be read", "resnet18", "--from", tmp_path / "module.ckpt", *target)
    assert not (tmp_path / "out").exists()
    for arguments in (["resnet18"], ["resnet18", "--from", "x"], ["lenet", "--from", "x", *target]):
        with pytest.raises(SystemExit) as ended:
            weights(*arguments)
        assert ended.value.code == 2


# From Google Drive, where they are published as an archive.


@pytest.fixture
def archive(tmp_path):
    """An archive with checkpoints of two networks."""
    folder = tmp_path / "packed"
    for name in ("mcunet", "mobilenet_v2"):
        (folder / name).mkdir(parents=True)
        network = Released(10) if name == "mcunet" else build_model(name, num_classes=10)
        state = half_of(name, network)
        torch.save(older_checkpoint(state), folder / name / "epoch=1-val-acc=0.7.ckpt")
    path = tmp_path / "pretrained_ckpts.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(folder, "pretrained_ckpts")
    return path


LINK = "https://drive.google.com/file/d/abc/view"


def test_an_archive_from_google_drive_is_unpacked_and_one_checkpoint_chosen(tmp_path, capsys, monkeypatch, archive):
    asked = []

    def download(url, output, **options):
        asked.append(url)
        return archive.rename(f"{output}{archive.name}")

    monkeypatch.setattr("gdown.download", download)
    content = archive.read_bytes()
    refused(
        capsys,
        r"2 checkpoints; .* of: pretrained_ckpts/mcunet/\S+ckpt, ",
        "mobilenet_v2",
        "--from",
        LINK,
        "--to",
        "x.pt",
    )
    archive.write_bytes(content)
    target = tmp_path / "half.pt"
    chosen = ["--member", "mobilenet_v2/epoch=1-val-acc=0.7.ckpt", "--to", target]
    assert weights("mobilenet_v2", "--from", LINK, *chosen) == 0
    assert asked == [LINK, LINK]
    assert build_model("mobilenet_v2", num_classes=10, weights=str(target)).classifier[1].out_features == 10


def test_google_drive_that_refuses_is_one_line(tmp_path, capsys, monkeypatch):
    def download(*_, **__):
        raise RuntimeError("Too many users\nhave viewed this file")

    monkeypatch.setattr("gdown.download", download)
    refused(
        capsys, "Too many users have .* download it in a browser", "resnet18", "--from", LINK, "--to", tmp_path / "x"
    )
