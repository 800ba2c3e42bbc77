"""Accuracy and gradient error at equal memory, on small Fashion-MNIST files: what is measured, and what is written."""

import gzip
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import lowrank
from benchmarks import fashion, gradient_error, tails
from classification.backbones import build_model
from classification.data.fashion_mnist import FOLDER
from classification.data.prepared import Mark, read


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a small Fashion-MNIST, ready to be used, and random weights of the network."""
    root = tmp_path_factory.mktemp("data")
    (root / FOLDER).mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, count in (("train", 300), ("t10k", 40)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = random.integers(0, 60, (count, 28, 28), np.uint8) + labels[:, None, None] * np.uint8(15)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
            content = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
            (root / FOLDER / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    Mark.of("fashion_mnist", root).write(read("fashion_mnist", root))
    torch.manual_seed(0)
    torch.save(build_model("efficientnet_lite0").state_dict(), root / "weights.pt")
    return root


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    module.main()


def shrink(monkeypatch):
    monkeypatch.setattr(tails, "PER_CLASS", 16)
    monkeypatch.setattr(tails, "SIZE", 32)
    monkeypatch.setattr(tails, "BATCH", 16)
    monkeypatch.setattr(fashion, "BATCH", 16)
    monkeypatch.setattr(fashion, "EPOCHS", 1)
    monkeypatch.setattr(fashion, "MODE_ENERGIES", (0.3, 0.7, 0.95))


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["2", "8", "all"])
def test_the_tail_gives_what_the_network_gives_wherever_training_begins(small, monkeypatch, layers):
    shrink(monkeypatch)
    data, weights = tails.Data(small, tested=6), str(small / "weights.pt")
    test = data.ahead(fashion.NETWORK, weights, layers)[1]
    task = fashion.Task(fashion.Run(layers, "vanilla", 1, 1), weights, data.sample)
    assert len(test[0]) == (2 if layers == "8" else 1)  # the last 8 begin within a residual block
    with torch.no_grad():
        found, whole = task.tail(*test[0]), task.model(tails.pictures(np.asarray(data.parts[1].images)))
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert fashion.accuracy(task, test) == pytest.approx(float((whole.argmax(1) == test[1]).float().mean()))


@pytest.mark.slow
def test_runs_are_written_as_they_end_and_not_run_again(small, tmp_path, monkeypatch, capsys):
    shrink(monkeypatch)
    out = tmp_path / "fashion.csv"
    methods = ["vanilla", "micro_batch_4", "asi", "asi_int8", "asi_int8_derived", "fixed_bases"]
    options = ["--root", small, "--weights", small / "weights.pt", "--parts", 4, "--out", out, "--layers", 2]
    options += ["--methods", *methods, "--seeds"]
    run(monkeypatch, fashion, *options, 1)
    rows = pd.read_csv(out)
    assert sorted(rows.method) == sorted(methods)
    whole, low = rows[rows.method == "vanilla"], rows[rows.method != "vanilla"]
    assert (low.formula_bytes <= whole.formula_bytes.item() / 4).all()
    assert (low.kept_bytes < whole.kept_bytes.item()).all()
    assert rows.test_accuracy.between(0, 100).all()
    assert np.isfinite(rows.train_loss).all()
    capsys.readouterr()
    run(monkeypatch, fashion, *options, 1)
    assert capsys.readouterr().out == ""
    text = out.with_suffix(".md").read_text()
    gap = low.test_accuracy.iloc[0] - whole.test_accuracy.item()
    assert f"{gap:+.2f}" in text
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_errors_are_those_of_the_gradients_and_int8_has_the_smaller_one(small, tmp_path, monkeypatch):
    monkeypatch.setattr(tails, "PER_CLASS", 16)
    monkeypatch.setattr(tails, "BATCH", 16)
    for setting, value in (("BATCH", 16), ("COUNT", 6), ("PARTS", (8,)), ("EPOCHS", 1), ("DEPTHS", (8,))):
        monkeypatch.setattr(gradient_error, setting, value)
    monkeypatch.setattr(gradient_error, "MODE_ENERGIES", (0.3, 0.7, 0.95))
    monkeypatch.setitem(gradient_error.NETWORKS, "resnet18", 32)
    options = ["--root", small, "--trained", tmp_path, "--out", tmp_path / "error.csv", "--pairs", 1]
    monkeypatch.setattr(gradient_error, "pretrained", lambda *_: pretrained(tmp_path))
    run(monkeypatch, gradient_error, *options, "--networks", "resnet18")
    rows = pd.read_csv(tmp_path / "error.csv")
    counts = rows.groupby("method").size().to_dict()
    assert set(counts) == {"asi", "asi_int8", "asi_mixed", "asi_int8_every4", "asi_int8_derived"}
    assert set(counts.values()) == {8}
    assert (rows.plan_bytes <= rows.input_bytes / 8).all()
    for column in ("error", "together"):
        means = rows.groupby("method")[column].mean()
        assert 0 < means["asi_int8"] < means["asi"] < 1
    assert f"{gradient_error.geometric(rows[rows.method == 'asi'].error):.3f}" in (tmp_path / "error.md").read_text()


def pretrained(folder):
    torch.manual_seed(0)
    torch.save(build_model("resnet18", 10).state_dict(), folder / "weights.pt")
    return str(folder / "weights.pt")


def test_a_relative_error_is_of_the_difference_of_the_gradients():
    exact = [{"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([0.0, 1.0])}]
    low = [{"a": torch.tensor([3.0, 3.0])}, {"a": torch.tensor([0.0, 1.0])}]
    assert gradient_error.errors(low, exact) == {"a": pytest.approx(0.1)}


def test_a_network_trained_here_is_kept_and_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_error, "EPOCHS", 1)
    images = ((torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)),), torch.arange(64) % 10)
    path = gradient_error.pretrained("mcunet", images, tmp_path)
    first = torch.load(path)
    torch.manual_seed(233)
    start = build_model("mcunet", 10).state_dict()
    assert not torch.equal(first["classifier.weight"], start["classifier.weight"])
    assert gradient_error.pretrained("mcunet", images, tmp_path) == path
    assert lowrank.trailing_layers(build_model("mcunet", 10, weights=path), 1)
