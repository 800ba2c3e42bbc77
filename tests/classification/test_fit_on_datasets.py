"""`fit` on every data set, with its shipped config, on a miniature; and on data that has changed since."""

import re
import shutil

import numpy as np
import pytest
from commands import TINY, Interruption, config, execute, finish
from miniatures import CLASSES, TEST, TRAIN, WRITERS, write_image_folder, write_prepared
from PIL import Image
from torch import nn

from classification.backbones.registry import backbone
from classification.cli import main, run

WHOLE = ("--trainer.limit_val_batches", "1.0", "--trainer.limit_test_batches", "1.0")


def tiny(num_classes, pretrained):
    """Two convolutions and a classifier."""
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, num_classes))


@pytest.fixture(autouse=True)
def _tiny_network(monkeypatch):
    monkeypatch.setitem(backbone.entries, "tiny", tiny)


def command(root, runs, name, *options, setups=("a",), subcommand="fit"):
    """One epoch of a tiny network on a miniature."""
    words = [word for setup in setups for word in config("setups", setup)] + config("methods", "vanilla")
    words += config("data", name) if name in WRITERS else ["--data.dataset", name]
    words += ["--model.backbone", "tiny", "--model.layers", "1", "--data.root", str(root), *TINY]
    return [subcommand, *words, "--runs_dir", str(runs), *map(str, options)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WRITERS, "my_fish"])
def test_a_run_trains_on_it_and_is_recorded(tmp_path, capsys, name):
    if name in WRITERS:
        write_prepared(name, tmp_path / "data")
    else:
        write_image_folder(tmp_path / "data" / name)
    done = finish(command(tmp_path / "data", tmp_path / "runs", name, *WHOLE), tmp_path / "runs", capsys)
    assert done.record["run"]["dataset"] == name
    assert len(done.record["provenance"]["data_fingerprint"]) == 16
    held = done.checkpoint("last")["state_dict"]["backbone.5.weight"]
    assert held.shape == (CLASSES, 4)
    # Every test image counts: the share is a whole number of them.
    hits = done.record["accuracy"]["test"] * TEST * CLASSES
    assert hits == pytest.approx(round(hits), abs=1e-4)
    assert "done already" in execute(done.arguments, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["b_pretrain", "b"])
def test_setup_b_on_imagenet_takes_a_published_split_and_random_crops(tmp_path, capsys, stage):
    write_prepared("imagenet", tmp_path / "data")
    rows = np.arange(TRAIN * CLASSES, dtype=np.float64).reshape(2, -1)  # two classes each
    np.save(tmp_path / "usr_group_13.10.npy", np.insert(rows, 0, [0, 1], axis=1))
    setups = (stage, f"{stage}_imagenet")
    options = ["--data.split_file", tmp_path / "usr_group_13.10.npy", "--data.workers", 1, *WHOLE]
    words = command(tmp_path / "data", tmp_path / "runs", "imagenet", *options, setups=setups)
    done = finish(words, tmp_path / "runs", capsys)
    assert done.record["run"]["setup"] == ("B" if stage == "b" else "B-pretrain")
    assert "augment: true" in (done.folder / "config.yaml").read_text()
    with np.load(done.folder / "split.npz") as split:
        assert split["test"].tolist() == [0] * 2 * TEST + [1] * 2 * TEST
        assert sorted([*split["train"], *split["val"]]) == [0] * 20 + [1] * 20


def refused(words, capsys, message):
    capsys.readouterr()
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", printed), printed
    assert re.search(message, printed), printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("subcommand", ["fit", "measure", "test"])
def test_a_data_set_that_is_not_there_says_what_to_run(tmp_path, capsys, subcommand):
    words = command(tmp_path / "data", tmp_path / "runs", "pets", subcommand=subcommand)
    refused(words, capsys, r"run: python -m classification prepare pets --root .*data")
    assert not (tmp_path / "runs").exists()
    if subcommand != "test":
        assert "would run" in execute([*words, "--dry_run"], capsys)  # which reads no data


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line(tmp_path, capsys, workers):
    write_image_folder(tmp_path / "data" / "fish")
    for path in (tmp_path / "data" / "fish" / "train").rglob("*.jpg"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + b"x" * (len(content) - len(content) // 2))
    words = command(tmp_path / "data", tmp_path / "runs", "fish", "--data.workers", workers)
    refused(words, capsys, r"^error: image \S+\.jpg cannot be read .*; replace it by one that can, or remove it$")
    assert not list(tmp_path.rglob("result.json"))


def test_prepared_images_that_changed_since_are_one_line(tmp_path, capsys):
    folder = write_prepared("pets", tmp_path / "data")
    for path in (folder / "images").iterdir():
        Image.new("RGB", (9, 9)).save(path)
    refused(command(tmp_path / "data", tmp_path / "runs", "pets"), capsys, r"^error: the data set has changed since .*")
    assert not list(tmp_path.rglob("result.json"))


# What was trained on other data is neither skipped nor resumed.


def change(folder):
    path = sorted((folder / "train").rglob("*.jpg"))[0]
    path.rename(path.with_name("another.jpg"))


@pytest.mark.slow
def test_a_finished_run_is_not_skipped(tmp_path, capsys):
    write_image_folder(tmp_path / "data" / "fish")
    words = command(tmp_path / "data", tmp_path / "runs", "fish")
    done = finish(words, tmp_path / "runs", capsys)
    before = (done.folder / "result.json").read_bytes()
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    assert "done already" in execute([*words, "--data.root", str(tmp_path / "moved")], capsys)
    change(tmp_path / "data" / "fish")
    message = r"holds a run on other data \(fingerprint \w{16} there, \w{16} here\); restore the data set, or delete"
    refused(words, capsys, message)
    refused([*words, "--dry_run"], capsys, message)
    assert (done.folder / "result.json").read_bytes() == before


def test_an_interrupted_run_is_not_resumed(tmp_path, capsys):
    write_image_folder(tmp_path / "data" / "fish")
    words = command(tmp_path / "data", tmp_path / "runs", "fish", "--trainer.max_epochs", 2)
    with pytest.raises(Interruption):
        run([*words, "--trainer.callbacks+", "commands.CrashInEpoch", "--trainer.callbacks.epoch", "1"])
    change(tmp_path / "data" / "fish")
    refused(words, capsys, "holds a run on other data")


@pytest.mark.slow
def test_a_finished_run_whose_data_is_gone_is_skipped(tmp_path, capsys):
    folder = write_prepared("pets", tmp_path / "data")
    words = command(tmp_path / "data", tmp_path / "runs", "pets")
    finish(words, tmp_path / "runs", capsys)
    shutil.rmtree(folder)
    assert "done already" in execute(words, capsys)


@pytest.mark.slow
def test_a_table_of_perplexity_is_measured_on_its_data(tmp_path, capsys):
    write_image_folder(tmp_path / "data" / "fish")
    words = command(tmp_path / "data", tmp_path / "runs", "fish", subcommand="measure")
    execute(words, capsys)
    assert "done already" in execute(words, capsys)
    change(tmp_path / "data" / "fish")
    refused(words, capsys, "holds a run on other data")
