"""What all tests of the folder share: no weights of this machine, and weights whose outputs mean something."""

from __future__ import annotations

import pytest
import torch
from commands import arguments

from classification.backbones import build_model
from classification.cli import main
from classification.data import ImageDataModule


@pytest.fixture(autouse=True)
def _no_weights_of_this_machine(monkeypatch, tmp_path_factory):
    """Networks are looked for in an empty folder, not among those that were downloaded on this machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "torch"))


@pytest.fixture(autouse=True)
def _one_folder_of_fronts(request, monkeypatch, tmp_path_factory):
    """Runs of all tests find there what a frozen front makes of their images, as runs of one folder do."""
    if request.module.__name__ != "test_front":
        monkeypatch.setattr("classification.lightning_cli.FRONTS", str(tmp_path_factory.getbasetemp() / "fronts"))


@pytest.fixture(scope="session")
def digits_32():
    """All digits at 32 x 32, in [-1, 1]."""
    return ImageDataModule("digits", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=8, cache=True)


@pytest.fixture(scope="session")
def weights(tmp_path_factory, digits_32):
    """A file with an MCUNet that tells digits apart without training: random features, a classifier by least squares.

    From random weights a network this small at 32 x 32 answers one class for everything, whatever is done to it.
    """
    torch.manual_seed(0)
    network = build_model("mcunet", num_classes=10)
    images = torch.stack([digits_32.train[index][0] for index in range(len(digits_32.train))])
    labels = torch.as_tensor(digits_32.train.part.labels)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # a plain average over what is seen
    with torch.no_grad():
        network.train()(images)
        network.eval()
        features = network.blocks(network.stem(images)).mean((2, 3))
        centred = features - features.mean(0)
        targets = torch.nn.functional.one_hot(labels, 10) - 0.1
        ridge = centred.T @ centred + 1e-2 * torch.eye(features.shape[1])
        network.classifier.weight.copy_(10 * torch.linalg.solve(ridge, centred.T @ targets.float()).T)
        network.classifier.bias.copy_(-network.classifier.weight @ features.mean(0))
    path = tmp_path_factory.mktemp("weights") / "mcunet.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory, weights):
    """A folder with an HOSVD run and a perplexity table of the same two layers."""
    runs = tmp_path_factory.mktemp("measured")
    options = ("--model.layers", 2, "--model.weights", weights, "--data.image_size", 64)
    assert main(arguments("fit", runs, *options, method="hosvd_0.8")) == 0
    assert main(arguments("measure", runs, *options)) == 0
    return runs, options
