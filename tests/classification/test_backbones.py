"""The networks: size, shapes and layer counts; weights files; weights that cannot be downloaded."""

import email.message
import io
import urllib.error
import urllib.response

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

import lowrank
from classification.backbones import build_model, names
from classification.backbones.transformers import resized_positions
from classification.backbones.weights import load_weights, read_state_dict, weights_fingerprint
from experiment import ExperimentError


def meta(name, **options):
    """A network without memory."""
    with torch.device("meta"):
        return build_model(name, **options)


def test_mcunet_has_the_published_number_of_parameters():
    assert sum(parameter.numel() for parameter in meta("mcunet").parameters()) == 636_232


def test_mcunet_takes_the_published_number_of_multiply_adds_at_96():
    model, images = meta("mcunet"), torch.empty(1, 3, 96, 96, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert round(counter.get_total_flops() / 2e6, 2) == 12.79  # the counter takes two for a multiply-add


@pytest.mark.parametrize(("size", "last"), [(32, 1), (64, 2), (96, 3), (224, 7), (225, 8)])
def test_the_features_of_mcunet_are_a_32nd_of_the_image(size, last):
    model = meta("mcunet", num_classes=5)
    images = torch.empty(2, 3, size, size, device="meta")
    assert model.blocks(model.stem(images)).shape == (2, 160, last, last)
    assert model(images).shape == (2, 5)


@pytest.mark.parametrize(("name", "count"), [("mcunet", 42), ("mobilenet_v2", 52), ("resnet18", 20), ("resnet34", 36)])
def test_the_networks_have_the_published_number_of_convolutions(name, count):
    model = meta(name)
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) == count
    assert len(lowrank.trailing_layers(model, "all")) == count


LANGUAGE = {"llama_mini", "minilm", "tinyllama"}  # take token numbers; see test_language.py and test_minilm.py
LARGE = {"tinyllama", "vit_b_32"}  # gigabytes of random weights


@pytest.mark.parametrize("name", sorted({*names()} - LANGUAGE))
@pytest.mark.parametrize("classes", [1, 37, 1000])
def test_every_network_has_as_many_outputs_as_classes(name, classes):
    assert meta(name, num_classes=classes)(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, classes)


@pytest.mark.parametrize("name", ["swin_t", "vit_b_32"])
def test_transformers_have_24_linear_layers_in_their_mlps(name):
    model = meta(name)
    assert len(lowrank.trailing_layers(model, "all", "linear", "mlp")) == 24
    lowrank.open_attention(model)
    assert len(lowrank.trailing_layers(model, "all", "linear", "attention")) == 24


def test_a_vision_transformer_is_torchvisions_at_its_own_size_and_works_at_others():
    model = build_model("vit_mini", num_classes=5).eval()
    nn.init.normal_(model.encoder.pos_embedding)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), VisionTransformer.forward(model, images))
    whole = resized_positions(model.encoder.pos_embedding, 4, 4)
    assert whole is model.encoder.pos_embedding
    larger = resized_positions(whole, 8, 6)
    assert larger.shape == (1, 49, 80)
    assert torch.equal(larger[:, 0], whole[:, 0])
    torch.testing.assert_close(larger[:, 1:].mean(1), whole[:, 1:].mean(1), rtol=0, atol=0.3)
    assert model(torch.randn(2, 3, 64, 48)).shape == (2, 5)


@pytest.mark.parametrize("name", ["vit_mini", "swin_mini", "llama_mini"])
def test_small_networks_have_no_published_weights(name):
    with pytest.raises(ExperimentError, match=f"{name} has no"):
        build_model(name, pretrained=True)


def test_mobilenet_is_without_dropout():
    assert all(layer.p == 0 for layer in meta("mobilenet_v2").modules() if isinstance(layer, nn.Dropout))


def test_an_unknown_network_is_refused_with_the_names_that_there_are():
    with pytest.raises(ExperimentError, match=r"'lenet'.*mcunet.*resnet18"):
        build_model("lenet")


# Weights files.


def equal(first, second):
    """Whether two state dicts are the same, bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def network():
    """A network with weights and statistics of its own."""
    torch.manual_seed(1)
    model = build_model("mcunet", num_classes=10)
    model.train()(torch.randn(4, 3, 32, 32))
    return model


def suite_checkpoint(state):
    """What a run with ASI leaves, reduced to what matters here."""
    held = {f"backbone.{key}": value for key, value in state.items()}
    held["accuracy.val_accuracy.tp"] = torch.zeros(1)
    bases = {"blocks.13.layers.6.bases.0": torch.randn(8, 2)}
    return {"state_dict": held, "lowrank": bases, "epoch": 3, "optimizer_states": [{"param_groups": [{"lr": 0.1}]}]}


FORMS = {
    "state dict": lambda state: state,
    "under state_dict": lambda state: {"state_dict": state},
    "checkpoint of this suite": suite_checkpoint,
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_loaded_in_every_form(tmp_path, network, form):
    torch.save(FORMS[form](network.state_dict()), tmp_path / "file.pt")
    loaded = build_model("mcunet", num_classes=10, weights=str(tmp_path / "file.pt"))
    assert equal(loaded.state_dict(), network.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_a_classifier_of_another_size_is_new_and_the_rest_is_loaded(tmp_path, network, form):
    torch.save(FORMS[form](network.state_dict()), tmp_path / "file.pt")
    torch.manual_seed(5)
    fresh = build_model("mcunet", num_classes=7).state_dict()
    torch.manual_seed(5)
    state = build_model("mcunet", num_classes=7, weights=str(tmp_path / "file.pt")).state_dict()
    head = ("classifier.weight", "classifier.bias")
    assert all(torch.equal(state[key], fresh[key]) for key in head)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items() if key not in head)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*names()} - LARGE))
def test_every_network_takes_weights_of_another_number_of_classes(tmp_path, name):
    before = build_model(name, num_classes=3).state_dict()
    torch.save(before, tmp_path / "file.pt")
    after = build_model(name, num_classes=4, weights=str(tmp_path / "file.pt")).state_dict()
    different = [key for key in before if not torch.equal(before[key], after[key])]
    assert {after[key].shape[0] for key in different} == {4}
    assert len(different) == (1 if name in LANGUAGE - {"minilm"} else 2)  # a generating model's classifier has no bias


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: build_model("resnet18", num_classes=10).state_dict(), id="another network"),
        pytest.param(lambda: nn.Linear(2, 2).state_dict(), id="a layer"),
        pytest.param(dict, id="nothing"),
        pytest.param(lambda: [torch.ones(2)], id="list"),
        pytest.param(lambda: torch.ones(2), id="tensor"),
        pytest.param(lambda: {0: torch.ones(2)}, id="numbers for names"),
        pytest.param(lambda: torch.optim.SGD([torch.ones(2)], 0.1).state_dict(), id="optimizer"),
        pytest.param(lambda: nn.Linear(2, 2), id="pickled module"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path, content):
    torch.save(content(), tmp_path / "file.pt")
    with pytest.raises(ExperimentError, match=r"weights file .*file\.pt") as raised:
        build_model("mcunet", num_classes=10, weights=str(tmp_path / "file.pt"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["blocks.13.layers.6.lowrank_state_0", "blocks.13.layers.6.lowrank_left"])
def test_what_an_earlier_version_saved_is_refused_in_one_line(tmp_path, network, key):
    torch.save({"state_dict": network.state_dict() | {key: torch.ones(8, 2)}}, tmp_path / "file.pt")
    with pytest.raises(ExperimentError, match=r"file\.pt is of an earlier version .*start afresh") as raised:
        build_model("mcunet", num_classes=10, weights=str(tmp_path / "file.pt"))
    assert "\n" not in str(raised.value)


def test_weights_of_other_shapes_name_a_tensor_and_change_nothing(tmp_path, network):
    state = network.state_dict()
    state["stem.0.weight"] = torch.zeros(16, 3, 5, 5)
    torch.save(state, tmp_path / "file.pt")
    other = build_model("mcunet", num_classes=10)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ExperimentError, match=r"1 of another shape, such as 'stem\.0\.weight'"):
        load_weights(other, str(tmp_path / "file.pt"))
    assert equal(other.state_dict(), before)


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"text"])
def test_a_damaged_file_is_refused(tmp_path, network, damage):
    path = tmp_path / "file.pt"
    torch.save(network.state_dict(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ExperimentError, match="cannot be read") as raised:
        build_model("mcunet", num_classes=10, weights=str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["nowhere.pt", "."])
def test_a_missing_file_is_refused(tmp_path, path):
    with pytest.raises(ExperimentError, match="there is no weights file"):
        read_state_dict(str(tmp_path / path))


def test_the_fingerprint_of_weights_is_that_of_the_tensors_alone(tmp_path, network):
    path, state = tmp_path / "file.pt", network.state_dict()
    found = set()
    reordered = {key: state[key] for key in reversed(state)}
    for content in (*(form(state) for form in FORMS.values()), suite_checkpoint(reordered)):
        torch.save(content, path)
        found.add(weights_fingerprint(str(path)))
    assert len(found) == 1


@pytest.mark.parametrize(
    "key", ["stem.0.weight", "classifier.bias", "stem.1.running_var", "stem.1.num_batches_tracked"]
)
def test_the_fingerprint_of_weights_changes_with_one_number(tmp_path, network, key):
    path, state = tmp_path / "file.pt", network.state_dict()
    torch.save(state, path)
    before = weights_fingerprint(str(path))
    state[key].view(-1)[-1:] += 1
    torch.save(state, path)
    assert weights_fingerprint(str(path)) != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_loaded_and_have_a_fingerprint(tmp_path, network, dtype):
    path = tmp_path / "file.pt"
    state = {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in network.state_dict().items()
    }
    torch.save(state, path)
    loaded = build_model("mcunet", num_classes=10, weights=str(path))
    assert torch.equal(loaded.stem[0].weight, state["stem.0.weight"].float())
    assert len(weights_fingerprint(str(path))) == 16


# Downloads.


def cannot(error):
    """A connection that fails."""

    def urlopen(*_, **__):
        raise error

    return urlopen


def cut_short(*_, **__):
    """A server, or something in between, that sends something else than the file."""
    return urllib.response.addinfourl(io.BytesIO(b"<html>please log in</html>"), email.message.Message(), "https://x")


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "resnet34"])
@pytest.mark.parametrize(
    "urlopen",
    [
        pytest.param(cannot(urllib.error.URLError("no route to host")), id="no network"),
        pytest.param(cannot(urllib.error.HTTPError("https://x", 403, "Forbidden", None, None)), id="forbidden"),
        pytest.param(cannot(TimeoutError("timed out")), id="timeout"),
        pytest.param(cut_short, id="another file"),
    ],
)
def test_weights_that_cannot_be_downloaded_are_one_clear_error(tmp_path, monkeypatch, name, urlopen):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    with pytest.raises(ExperimentError, match=r"cannot be downloaded .*https://\S+\.pth.*--model\.weights") as raised:
        build_model(name, pretrained=True)
    assert "\n" not in str(raised.value)


def test_mcunet_says_that_its_weights_are_given_as_a_file():
    with pytest.raises(ExperimentError, match=r"--model\.weights"):
        build_model("mcunet", pretrained=True)


@pytest.mark.slow
def test_given_weights_are_taken_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.urlopen", cannot(AssertionError("a download")))
    state = build_model("resnet18", num_classes=3).state_dict()
    torch.save(state, tmp_path / "file.pt")
    loaded = build_model("resnet18", num_classes=3, pretrained=True, weights=str(tmp_path / "file.pt"))
    assert equal(loaded.state_dict(), state)
