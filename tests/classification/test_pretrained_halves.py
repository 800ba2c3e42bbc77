"""Published checkpoints of networks that were pretrained on one half of a data set."""

import tarfile

import numpy as np
import pytest
import torch
from released import Half, Released, refused, trained, weights
from torch import nn

from classification.backbones import build_model
from classification.options import PUBLISHED


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


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_pretrained_on_a_half_is_taken_over_whole(tmp_path, name):
    torch.manual_seed(1)
    network = trained(Released(100) if name == "mcunet" else build_model(name, num_classes=100), size=64)
    torch.save(older_checkpoint(half_of(name, network)), tmp_path / "epoch=155-val-acc=0.743.ckpt")
    assert weights(name, "--from", tmp_path / "epoch=155-val-acc=0.743.ckpt", "--to", tmp_path / "new" / "half.pt") == 0
    ours = build_model(name, num_classes=100, weights=str(tmp_path / "new" / "half.pt")).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
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


def test_mistakes_are_one_line_and_write_nothing(tmp_path, capsys):
    torch.save({"state_dict": Released().state_dict()}, tmp_path / "mcunet.pth")
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


@pytest.mark.slow
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
