"""Files from elsewhere and files after a crash: nothing in them is run, and no run goes on from what is not whole."""

from __future__ import annotations

import collections
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from segmentors import TINY, files
from torch import nn

from experiment import ExperimentError, Record
from segmentation import saving
from segmentation.checkpoints import check_fit, newest, read, read_safely_everywhere
from segmentation.cli import main
from segmentation.compose import read_run_config
from segmentation.history import KEY
from segmentation.identity import further_settings
from segmentation.saving import WholeCheckpoints
from segmentation.training import FINAL

IDENTITY = "lowrank_run"


class Touch:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class ByName:
    """The same by way of what checkpoints of MMEngine may ask for."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init__")


@pytest.fixture
def trap(tmp_path):
    """A file that runs a command where it is unpickled; whether it did is checked at the end."""
    path = tmp_path / "foreign.pth"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Touch(tmp_path / "EXECUTED")}, path)
    yield path
    assert not (tmp_path / "EXECUTED").exists()


def published(path, state, **beside):
    """A file in the form of OpenMMLab's published checkpoints: weights, numpy's numbers, buffers of losses."""
    hub = {"log_scalars": {"train/loss": HistoryBuffer([1.0, 2.0], [1, 1])}, "runtime_info": {"best": np.float32(3)}}
    meta = {
        "dataset_meta": {"CLASSES": ("a", "b"), "PALETTE": np.array([[0, 1, 2], [3, 4, 5]], np.uint8)},
        "mIoU": np.float64(77.85),
        "iter": np.int64(80000),
        "CLASSES": ["a", "b"],
    }
    content = {"meta": meta, "state_dict": collections.OrderedDict(state), "message_hub": hub, **beside}
    torch.save(content, path)
    return content


def test_a_checkpoint_in_the_published_form_is_read(tmp_path):
    weights = {"conv.weight": torch.randn(2, 2)}
    published(tmp_path / "a.pth", weights)
    found = read(tmp_path / "a.pth")
    assert torch.equal(found["state_dict"]["conv.weight"], weights["conv.weight"])
    assert found["meta"]["mIoU"] == 77.85
    assert found["message_hub"]["log_scalars"]["train/loss"].mean() == 1.5
    with zipfile.ZipFile(tmp_path / "a.pth") as now, zipfile.ZipFile(tmp_path / "b.pth", "w") as then:
        for name in now.namelist():  # by an older numpy, whose module had another name
            then.writestr(name, now.read(name).replace(b"numpy._core.", b"numpy.core."))
    older = read(tmp_path / "b.pth")["meta"]
    assert older["mIoU"] == 77.85
    assert older["dataset_meta"]["PALETTE"].tolist() == [[0, 1, 2], [3, 4, 5]]
    torch.save(weights, tmp_path / "c.pth", _use_new_zipfile_serialization=False)  # before PyTorch 1.6
    assert torch.equal(read(tmp_path / "c.pth")["conv.weight"], weights["conv.weight"])


@pytest.mark.parametrize(
    "thing", [ByName(), nn.Linear(2, 2), Path("x"), print], ids=["name", "module", "path", "print"]
)
def test_what_is_neither_tensor_nor_plain_value_is_refused(tmp_path, thing):
    torch.save({"state_dict": {}, "x": thing}, tmp_path / "a.pth")
    with pytest.raises(ExperimentError, match=r"a\.pth cannot be read: it ") as raised:
        read(tmp_path / "a.pth")
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_mmengine_itself_runs_no_pickle(tmp_path, trap, legacy):
    if legacy:
        torch.save({"x": Touch(tmp_path / "EXECUTED")}, trap, _use_new_zipfile_serialization=False)
    read_safely_everywhere()
    with pytest.raises(ExperimentError, match=r"it holds posix.system, which is code"):
        CheckpointLoader.load_checkpoint(str(trap), "cpu", logger="silent")
    for name in ("s3://x/y.pth", "petrel://x/y.pth", "pavi://x", "open-mmlab://nonsense"):
        with pytest.raises(ExperimentError, match="give a file"):
            CheckpointLoader.load_checkpoint(name, "cpu", logger="silent")


def test_the_program_in_a_checkpoint_is_left_out(tmp_path):
    """MMEngine runs it when it resumes."""
    torch.save({"meta": {"config": "import os", "cfg": "text"}}, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth")["meta"] == {"cfg": "text"}


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04 no zip", b"<html>log in</html>", None])
def test_a_damaged_file_of_weights_is_one_line(tmp_path, content):
    path = tmp_path / "a.pth"
    if content is None:
        torch.save([1, 2], path)
    else:
        path.write_bytes(content)
    with pytest.raises(ExperimentError, match=r"weights file .*a\.pth") as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_a_config_of_a_run_runs_nothing(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"a: !!python/object/apply:os.system ['touch {tmp_path}/EXECUTED']\n")
    with pytest.raises(ExperimentError, match=r"config\.yaml cannot be read"):
        read_run_config(path)
    assert main(["train", str(path), "--runs-dir", str(tmp_path / "runs")]) == 2
    assert not (tmp_path / "EXECUTED").exists()
    path.write_text("a: !!python/tuple [1, !!python/tuple [2, [3]]]\n")
    assert read_run_config(path).a == (1, (2, [3]))


# Weights of another network.


class Net(nn.Module):
    def __init__(self, classes=3, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1))
        self.head = nn.Module()
        self.head.conv_seg = nn.Conv2d(width, classes, 1)


def test_weights_that_fit_too_little_are_refused_with_the_number_that_fits(capsys):
    own = Net()
    check_fit(own, {"state_dict": Net(classes=7).state_dict()}, "w")
    check_fit(own, {f"module.{key}": value for key, value in own.state_dict().items()}, "w")
    assert capsys.readouterr().out == ""
    part = {key: value for key, value in own.state_dict().items() if not key.startswith("body.2")}
    check_fit(own, part, "w")
    assert "4 of 6 tensors of the network fit; 'body.2.weight'" in capsys.readouterr().out
    foreign = {"state_dict": {"layer.weight": torch.ones(2)}}
    for content, count in ((foreign, 0), ({}, 0), (Net(width=8).state_dict(), 0), ({"body.0.bias": torch.ones(4)}, 1)):
        with pytest.raises(ExperimentError, match=f"are of another network: {count} of 6 tensors of the network fit"):
            check_fit(own, content, "w")
    with pytest.raises(ExperimentError, match="of another network: 6 of 8"):
        check_fit(own, Net(classes=7).state_dict(), "w", whole=True)


# Whole commands.


def arguments(command, data, runs, *extra):
    composed = map(str, files("pspnet_small", "digit_scenes", "finetune", "vanilla"))
    length = [] if command == "measure" else ["--iterations", "4"]
    where = ["--layers", "10", "--data-dir", str(data), "--runs-dir", str(runs), *length, *extra]
    often = ["train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]
    return [command, *composed, *where, *TINY, *(often if command == "train" else [])]


def refused(capsys, words, message):
    capsys.readouterr()
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.strip().splitlines() if "OneDL" not in line]
    assert line.startswith("error: ")
    assert message in line, line


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder of a finished run."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(arguments("train", data_dir, runs)) == 0
    return next(runs.rglob("result.json")).parent


@pytest.fixture
def stopped(finished, tmp_path):
    """Copies of that run's folder as it is when the run was killed after its last checkpoint, and of all runs."""
    runs = tmp_path / "moved"
    folder = runs / finished.relative_to(finished.parents[6])
    shutil.copytree(finished, folder)
    for name in ("result.json", FINAL):
        (folder / name).unlink()
    return folder, runs


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "measure"])
def test_foreign_weights_are_refused(command, trap, data_dir, tmp_path, capsys):
    words = arguments(command, data_dir, tmp_path / "runs", "--load-from", str(trap))
    refused(capsys, words, "it holds posix.system, which is code and is not run")
    torch.save({"state_dict": {"layer.weight": torch.ones(2)}}, tmp_path / "other.pth")
    words = arguments(command, data_dir, tmp_path / "runs", "--load-from", str(tmp_path / "other.pth"))
    refused(capsys, words, "are of another network: 0 of ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_picture_of_foreign_weights_is_refused(finished, tmp_path, trap, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.copy(trap, run / FINAL)
    refused(capsys, ["picture", str(run), "--output", str(tmp_path / "p.png")], "which is code and is not run")
    torch.save({"state_dict": {"layer.weight": torch.ones(2)}}, run / FINAL)
    refused(capsys, ["picture", str(run), "--output", str(tmp_path / "p.png")], "are of another network: 0 of ")


@pytest.mark.slow
def test_a_record_holds_the_recipe(finished):
    recipe = Record.load(finished / "result.json").recipe
    assert recipe == {
        **{"epochs": None, "steps": 4, "learning_rate": recipe["learning_rate"], "batch_size": 2},
        **{"image_size": [32, 32], "precision": "32-true", "processes": 1, "joined_batch_size": 2},
    }
    assert 0 < recipe["learning_rate"] < 1


@pytest.mark.slow
def test_a_record_says_every_setting_that_the_recipe_does_not(finished):
    identity = json.loads((finished / "identity.json").read_text())
    del identity["data_fingerprint"], identity["dataset"]  # which the record has by itself
    further = Record.load(finished / "result.json").provenance["further_settings"]
    assert further == further_settings(identity)
    optimizer = identity["optim_wrapper"] | {"clip_grad": {"max_norm": 9}}
    for change in ({"optim_wrapper": optimizer}, {"load_from": "another"}, {"custom_hooks": [{"type": "EMAHook"}]}):
        assert further_settings(identity | change) != further, change
    method = {"type": "LowRankHook", "method": {"type": "SVD"}, "layers": ["a"], "freeze": []}
    hooks = [hook | (method if hook["type"] == "LowRankHook" else {}) for hook in identity["custom_hooks"]]
    for same in ({"custom_hooks": hooks}, {"randomness": {"seed": 5}}):
        assert further_settings(identity | same) == further, same


def rows(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()
    return [line.split(",")[:4] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["nothing", "flipped bit", "cut", "empty", "pickle", "foreign", "other run", "gone"])
def test_a_moved_run_goes_on_from_its_own_newest_whole_checkpoint(damage, stopped, finished, data_dir, trap, capsys):
    folder, runs = stopped
    last = folder / "iter_4.pth"
    raw = last.read_bytes()
    if damage == "flipped bit":
        place = raw.index(
            torch.load(last, weights_only=False)["state_dict"]["backbone.stem.0.weight"].numpy().tobytes()
        )
        last.write_bytes(raw[: place + 3] + bytes([raw[place + 3] ^ 1]) + raw[place + 4 :])
    elif damage in ("cut", "empty"):
        last.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"")
    elif damage == "pickle":
        shutil.copy(trap, last)
    elif damage in ("foreign", "other run"):
        content = torch.load(last, weights_only=False)
        torch.save(content | {IDENTITY: "0" * 16} if damage == "other run" else {"state_dict": {}}, last)
    elif damage == "gone":
        last.unlink()
    assert (folder / "last_checkpoint").read_text().startswith(str(finished))  # where it was before
    (finished / "best_mIoU_iter_2.pth").touch()  # the best at that checkpoint, which the resumed run is about to beat
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert main(arguments("train", data_dir, runs, "--resume")) == 0
    said = capsys.readouterr().out
    assert ("going on from iter_2.pth" in said) == (damage not in ("nothing", "gone"))
    assert rows(folder) == rows(finished)
    weights = [torch.load(path / FINAL, weights_only=True)["state_dict"] for path in (folder, finished)]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@pytest.mark.slow
def test_steps_before_a_resume_are_counted_once(stopped, finished, data_dir):
    """Killed after the first validation's row, whose checkpoint was saved before it: the validation is made again."""
    folder, runs = stopped
    content = torch.load(folder / "iter_2.pth", weights_only=False)
    first = content[KEY]["rows"][0]
    pending = [[first["activation_bytes"]] * 2, [first["train_loss"]] * 2, 9.0]
    content[KEY] = {"rows": [], "step_seconds": [4.0, 5.0], "pending": pending}  # as no best one replaced it
    torch.save(content, folder / "iter_2.pth")
    (folder / "iter_4.pth").unlink()
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(lines[:2]))
    assert main(arguments("train", data_dir, runs, "--resume")) == 0
    assert rows(folder) == rows(finished)


def test_the_newest_checkpoint_is_found_whatever_the_note_says(stopped, finished, capsys):
    folder, _ = stopped
    identity = torch.load(folder / "iter_4.pth", weights_only=False)[IDENTITY]
    for note in ("", "nonsense\0\xff", "/etc/passwd", "../../iter_2.pth.bak", "C:\\runs\\iter_4.pth", "iter_9.pth"):
        (folder / "last_checkpoint").write_text(note)
        assert newest(folder, identity).name == "iter_4.pth"
    (folder / "last_checkpoint").write_text("/gone/iter_2.pth")
    assert newest(folder, identity).name == "iter_2.pth"
    assert capsys.readouterr().out == ""


def test_no_whole_checkpoint_is_one_line(stopped, data_dir, capsys):
    folder, runs = stopped
    for path in folder.glob("iter_*.pth"):
        path.write_bytes(path.read_bytes()[:-100])
    refused(capsys, arguments("train", data_dir, runs, "--resume"), f"delete {folder} to start afresh")
    for path in folder.glob("*.pth"):
        path.unlink()
    refused(capsys, arguments("train", data_dir, runs, "--resume"), f"{folder} has no checkpoint")
    assert not (folder / "result.json").exists()


# Saving.


@pytest.mark.slow
def test_a_full_disk_takes_no_checkpoint_away(stopped, data_dir, monkeypatch, capsys):
    folder, runs = stopped
    (folder / "iter_4.pth").unlink()
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}

    whole = saving.write_whole

    def full(path, content):
        if path.suffix == ".pth":
            raise OSError(28, "No space left on device")
        whole(path, content)

    monkeypatch.setattr(saving, "write_whole", full)
    refused(
        capsys,
        arguments("train", data_dir, runs, "--resume"),
        "(No space left on device); what was saved before is whole",
    )
    assert {path.name: path.read_bytes() for path in folder.glob("*.pth")} == before
    assert (folder / "last_checkpoint").exists()


@pytest.mark.slow
def test_an_old_checkpoint_goes_only_when_the_new_one_is_there(data_dir, tmp_path, monkeypatch):
    """With one to be kept MMEngine deletes it first; here there are at all times as many as were saved, up to two."""
    seen = []
    save = WholeCheckpoints._save_checkpoint_with_step

    def watched(self, runner, step, meta):
        ahead = runner.save_checkpoint
        runner.save_checkpoint = lambda *words, **options: (
            seen.append(len(list(Path(runner.work_dir).glob("iter_*.pth")))),
            ahead(*words, **options),
        )
        save(self, runner, step, meta)
        runner.save_checkpoint = ahead

    monkeypatch.setattr(WholeCheckpoints, "_save_checkpoint_with_step", watched)
    words = arguments("train", data_dir, tmp_path)
    words += ["default_hooks.checkpoint.max_keep_ckpts=1", "default_hooks.checkpoint.interval=1"]
    assert main([*words, "default_hooks.checkpoint.save_best=None"]) == 0
    assert seen == [0, 1, 2, 2]
    assert len(list(tmp_path.rglob("iter_*.pth"))) == 2
    assert issubclass(WholeCheckpoints, CheckpointHook)
