"""One run in two processes: what it equals, what its record says, how it is killed and goes on, what is refused."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from commands import ROOT, arguments, metrics, only_file
from test_resume import differences

import lowrank
from benchmarks.cluster import Cluster, missing
from benchmarks.kills import differences as differences_of_runs
from classification.cli import main
from classification.data import ImageDataModule
from classification.data.sampler import EpochShuffle
from classification.module import FineTune, classification_loss
from experiment import Record
from experiment.processes import OTHERS, Place
from lowrank import ASI, WASI

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]
TWO = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu")
BATCH, STEPS, SEED, LR, MOMENTUM = 4, 3, 233, 0.05, 0.9
ALL = ("--trainer.limit_val_batches", 1.0, "--trainer.limit_test_batches", 1.0, "--data.eval_batch_size", 64)
RANKS = {"asi": 3, "wasi_0.9": 4}
MODELS = {"vanilla": "mcunet", "asi": "mcunet", "wasi_0.9": "vit_mini"}


class KillSecond(pl.Callback):
    """The second process is killed in the middle of an epoch, as by a system that is out of memory."""

    no_influence = True

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(autouse=True, scope="module")
def _environment():
    """What the processes of a run, which are started anew, find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def words(runs, weights, method, *options, batch=BATCH, epochs=1):
    """A fit whose learning rate does not change."""
    settings = ["--data.batch_size", batch, "--trainer.limit_train_batches", STEPS, "--trainer.max_epochs", epochs]
    settings += ["--model.learning_rate", LR, "--model.momentum", MOMENTUM, "--model.final_learning_rate", 1]
    settings += ["--model.layers", 2, "--model.warmup_epochs", 0, "--trainer.gradient_clip_val", "null"]
    if MODELS[method] == "mcunet":
        settings += ["--model.weights", weights]
    if method in RANKS:
        settings += ["--model.method.init_args.ranks", RANKS[method]]
    return arguments("fit", runs, *settings, *ALL, *options, model=MODELS[method], method=method)


def fit(runs, *others, **more):
    """The folder of a run in two processes."""
    assert main(words(runs, *others, *TWO, **more)) == 0
    return only_file(runs, "result.json").parent


def last(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def trained(checkpoint):
    return {key.removeprefix("backbone."): value for key, value in checkpoint["state_dict"].items()}


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory, weights):
    return fit(tmp_path_factory.mktemp("vanilla"), weights, "vanilla")


@pytest.fixture(scope="module")
def asi(tmp_path_factory, weights):
    return fit(tmp_path_factory.mktemp("asi"), weights, "asi", epochs=2)


@pytest.fixture(scope="module")
def joined(tmp_path_factory, weights):
    """Vanilla in one process, with the joined batch."""
    runs = tmp_path_factory.mktemp("joined")
    assert main(words(runs, weights, "vanilla", "--trainer.accelerator", "cpu", batch=2 * BATCH)) == 0
    return only_file(runs, "result.json").parent


def test_vanilla_trains_as_one_process_on_the_joined_batch(vanilla, joined, weights):
    found, expected = trained(last(vanilla)), trained(last(joined))
    before = torch.load(weights, weights_only=True)
    moved = {key for key in expected if not torch.equal(expected[key], before[key])}
    assert moved == {key for key in found if not torch.equal(found[key], before[key])}
    assert moved
    for key in moved:
        change = expected[key] - before[key]
        assert change.abs().max() > 1e-4
        torch.testing.assert_close(found[key] - before[key], change, rtol=1e-3, atol=5e-7)


def test_its_metrics_are_those_of_one_process_and_count_each_image_once(vanilla, joined, digits_32):
    one, two = metrics(joined), metrics(vanilla)
    for name in ("train_loss", "val_loss"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-4)
    record, expected = (Record.load(folder / "result.json") for folder in (vanilla, joined))
    assert record.accuracy == expected.accuracy
    # Not a multiple of two, so that a sample that is counted twice makes a fraction of one.
    halves = ImageDataModule("digits", image_size=32, batch_size=8, partition="finetune")
    counts = [len(halves.val), len(halves.test)]
    assert any(count % 2 for count in counts)
    for count, share in zip(counts, (record.accuracy["val_last"], record.accuracy["test"]), strict=True):
        assert count * share == pytest.approx(round(count * share), abs=1e-3)


def test_one_record_says_how_many_trained(vanilla, joined):
    assert len(list(vanilla.parents[6].rglob("result.json"))) == 1
    record, expected = (Record.load(folder / "result.json") for folder in (vanilla, joined))
    sizes = ("processes", "batch_size", "joined_batch_size")
    assert [record.recipe[key] for key in sizes] == [2, BATCH, 2 * BATCH]
    assert [expected.recipe[key] for key in sizes] == [1, 2 * BATCH, 2 * BATCH]
    assert record.recipe["steps"] == expected.recipe["steps"] == STEPS
    assert "each has of its own images" in record.provenance["processes"]
    assert "processes" not in expected.provenance
    assert record.memory_bytes["activation_formula"] < expected.memory_bytes["activation_formula"]
    assert list(vanilla.rglob("*.part")) == []


def emulated(method, model, weights, epochs=1):
    """Two networks in this process, each with its own half of every batch; both step by the mean of their gradients."""
    half = (0.5,) * 3
    data = ImageDataModule("digits", image_size=32, mean=half, std=half, batch_size=BATCH, partition="finetune")
    options = {"weights": weights, "layers": 2, "method": method, "channels_last": True}
    if model == "vit_mini":
        options |= {"weights": None, "kind": "linear", "part": "mlp"}
    tuned = []
    for _ in range(2):
        pl.seed_everything(SEED, verbose=False)
        tuned.append(FineTune(model, num_classes=10, **options))
    optimizers = [
        lowrank.SGD([p for p in one.parameters() if p.requires_grad], LR, momentum=MOMENTUM, weight_decay=1e-4)
        for one in tuned
    ]
    for epoch in range(epochs):
        orders = [EpochShuffle(len(data.train), SEED, Place(rank, 2)) for rank in (0, 1)]
        for step in range(STEPS):
            for order, one in zip(orders, tuned, strict=True):
                order.set_epoch(epoch)
                chosen = list(order)[step * BATCH : (step + 1) * BATCH]
                images, labels = zip(*(data.train[index] for index in chosen), strict=True)
                one.zero_grad()
                batch = one.prepare(torch.stack(images)), torch.tensor(labels)
                classification_loss(one.backbone, batch).backward()
            pairs = zip(*(one.parameters() for one in tuned), strict=True)
            for first, second in pairs:
                if first.grad is not None:
                    first.grad = second.grad = (first.grad + second.grad) / 2
            for optimizer in optimizers:
                optimizer.step()
    return tuned


def assert_equal_to(emulation, checkpoint):
    tuned, state = emulation, trained(checkpoint)
    for key, expected in tuned[0].backbone.state_dict().items():
        torch.testing.assert_close(
            state[key], expected, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    carried = [{key: value for key, value in checkpoint["lowrank"].items() if key != OTHERS}]
    carried += checkpoint["lowrank"].get(OTHERS, [])
    assert len(carried) == 2
    for own, one in zip(carried, tuned, strict=True):
        for key, basis in own.items():
            expected = lowrank.training_state(one.backbone)[key]
            # Of a basis the span is what counts: columns of all but equal weight may turn.
            if ".bases." in key:
                torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=1e-3, atol=1e-3)
    return carried


def test_asi_compresses_in_each_process_its_own_half(asi, weights):
    tuned = emulated(ASI(ranks=RANKS["asi"]), "mcunet", weights, epochs=2)
    first, second = assert_equal_to(tuned, last(asi))
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[key], second[key]) for key in first)


def test_wasi_moves_one_weight_by_the_bases_of_each(tmp_path, weights):
    checkpoint = last(fit(tmp_path, weights, "wasi_0.9"))
    tuned = emulated(WASI(energy=0.9, ranks=RANKS["wasi_0.9"]), "vit_mini", None)
    first, second = assert_equal_to(tuned, checkpoint)
    assert {key.rpartition(".")[2] for key in first} >= {"left", "right"}
    assert not any(key.endswith(("left", "right")) for key in second)
    assert second.keys() == {key for key in first if ".bases." in key}


def test_asi_with_full_ranks_is_vanilla(tmp_path, weights, vanilla):
    full = fit(tmp_path, weights, "asi", "--model.method.init_args.ranks", 4096, "--model.fuse", "false")
    found, expected = trained(last(full)), trained(last(vanilla))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)


def test_a_killed_run_goes_on_bit_for_bit_and_its_death_is_one_line(asi, tmp_path, weights, capfd):
    halt = ("--trainer.callbacks+", "test_fit_in_processes.KillSecond", "--trainer.callbacks.epoch", 1)
    again = words(tmp_path, weights, "asi", *TWO, epochs=2)
    assert main([*again, *map(str, halt)]) == 128 + signal.SIGKILL
    said = capfd.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("error: process 1 of 2 was killed (SIGKILL)")
    assert said.out.count("training: ") == 1
    assert main(again) == 0
    assert capfd.readouterr().out.count("resuming: ") == 1
    folder = only_file(tmp_path, "result.json").parent
    for name in ("last", "best"):
        whole, resumed = last(asi, name), last(folder, name)
        for part in ("state_dict", "lowrank", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
            assert differences(whole[part], resumed[part]) == [], part
        states = [
            next(value for key, value in checkpoint["callbacks"].items() if "RandomState" in key)
            for checkpoint in (whole, resumed)
        ]
        assert differences(*states) == []
        assert len(states[0][OTHERS]) == 1
    rows = [
        [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in metrics(path)]
        for path in (asi, folder)
    ]
    assert rows[0] == rows[1]
    records = [Record.load(path / "result.json") for path in (asi, folder)]
    assert records[0].accuracy == records[1].accuracy
    assert records[0].provenance["config_hash"] == records[1].provenance["config_hash"]


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_tasks_of_slurm_are_the_processes_of_a_run(asi, tmp_path, weights):
    program = ["srun", "--ntasks-per-node=2", sys.executable, "-m", "classification"]
    command = [*program, *words(tmp_path, weights, "asi", *TWO, epochs=2)]
    with Cluster(2):
        refused, done = (
            subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
            for more in (("--model.layers", "0"), ())
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training: ") == 1
    unequal = differences_of_runs(asi, only_file(tmp_path, "result.json").parent)
    assert [what for what in unequal if not what.startswith("tensorboard/")] == []  # files named by time and process
    assert refused.returncode == 2
    said = [line for line in refused.stderr.splitlines() if not line.startswith("srun:")]
    assert len(said) == 2
    for line, name in zip(sorted(said), ("", "process 1 of 2: "), strict=True):
        assert line.startswith(f"{name}error: layers is 0")


def test_a_signal_to_the_command_ends_it_in_one_line(tmp_path, weights):
    halt = ("--trainer.callbacks+", "commands.HaltInEpoch", "--trainer.callbacks.epoch", 0)
    command = [sys.executable, "-m", "classification", *words(tmp_path, weights, "vanilla", *TWO, *halt)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any(line == "halted\n" for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert said.startswith("interrupted during mcunet on digits")
    assert said.count("\n") == 1
    saved = torch.load(only_file(tmp_path, "last.ckpt"), weights_only=True)
    assert saved["global_step"] == 2
    for kind in ("History", "RandomState"):
        (state,) = (value for key, value in saved["callbacks"].items() if key.startswith(kind))
        assert len(state[OTHERS]) == 1


def test_another_number_of_processes_is_refused(vanilla, weights, capfd):
    runs = vanilla.parents[6]
    for options in (("--trainer.accelerator", "cpu"), (*TWO, "--trainer.devices", 3)):
        assert main(words(runs, weights, "vanilla", *options)) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "holds a run with other settings (processes is 2 there and" in line
    assert main(words(runs, weights, "vanilla", *TWO)) == 0
    assert "done already: " in capfd.readouterr().out
    assert main(words(runs, weights, "vanilla", *TWO, "--trainer.strategy", "auto")) == 0
    assert "done already: " in capfd.readouterr().out


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook", "fsdp", "deepspeed_stage_2"])
def test_strategies_that_cannot_work_are_refused(strategy, tmp_path, weights, capfd):
    assert main(words(tmp_path, weights, "vanilla", *TWO, "--trainer.strategy", strategy)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: --trainer.strategy is {strategy}; allowed: auto, ddp, ")
    assert not any(tmp_path.iterdir())


def test_a_batch_that_does_not_fill_each_process_is_one_line(tmp_path, weights, capfd):
    assert main(words(tmp_path, weights, "vanilla", *TWO, batch=400)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "training samples do not fill one batch of 400 in each of 2 processes; lower --data.batch_size" in line
    assert not list(tmp_path.rglob("config.yaml"))


def test_checkpoints_of_two_processes_are_tested_by_two_and_by_one(vanilla, weights, capfd):
    test = ["test", *words(vanilla.parents[6], weights, "vanilla", *TWO)[1:]]
    expected = Record.load(vanilla / "result.json").accuracy["test"]
    shown = []
    for options in ((), ("--ckpt_path", vanilla / "checkpoints" / "best.ckpt", "--trainer.devices", 1)):
        assert main([*test, *map(str, options)]) == 0
        shown.append([word for word in capfd.readouterr().out.split() if word.startswith("0.")])
    for numbers in shown:
        assert any(math.isclose(float(number), expected, rel_tol=1e-5) for number in numbers)


def test_a_run_of_one_process_leaves_nothing_of_several_behind(tmp_path, weights):
    """Else the next command of this process would wait for others."""
    names = ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK")
    before = [os.environ.get(name) for name in names]
    one = ("--trainer.devices", 1, "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu")
    assert main(words(tmp_path, weights, "vanilla", *one)) == 0
    assert [os.environ.get(name) for name in names] == before
    assert not torch.distributed.is_initialized()
