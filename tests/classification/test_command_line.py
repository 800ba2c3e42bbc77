"""A run from the command line: what it leaves, that it is done once, and that its numbers are right."""

import json
import math
import re
import statistics

import pytest
import torch
import torch.nn.functional as F
from commands import ROOT, Finished, arguments, execute, finish, metrics, only_file

from classification.backbones import build_model
from classification.cli import main
from classification.data import load_splits, registry
from classification.identity import further_settings
from experiment import Record


@pytest.fixture(scope="module")
def best_first(tmp_path_factory, weights):
    """A run whose best epoch is its first: the second one's learning rate destroys the network."""
    runs = tmp_path_factory.mktemp("best_first")
    command = arguments(
        *("fit", runs, "--model.layers", 2, "--model.weights", weights, "--data.partition", "all"),
        *("--model.learning_rate", 25, "--model.warmup_epochs", 1, "--model.warmup_start", 1e-5),
        *("--trainer.max_epochs", 3, "--trainer.limit_val_batches", "1.0", "--trainer.limit_test_batches", "1.0"),
        *("--data.eval_batch_size", 256),
    )
    assert main(command) == 0
    done = Finished(command, only_file(runs, "result.json").parent, "")
    best, *later = [row["val_accuracy"] for row in done.rows]
    assert best > max(later) + 0.1, "the fixture's run is not what it has to be"
    return done


def test_a_run_leaves_config_history_checkpoints_and_record(best_first):
    assert {str(path.relative_to(best_first.folder)) for path in best_first.folder.rglob("[!.]*.*")} >= {
        *("config.yaml", "metrics.csv", "result.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"),
    }
    assert best_first.folder.parts[-7:] == ("classification", "B", "mcunet", "digits", "vanilla", "layers2", "seed233")
    assert list(best_first.folder.rglob("*.part")) == []
    assert [row["epoch"] for row in best_first.rows] == [0, 1, 2]


@pytest.mark.slow
def test_a_warm_up_beyond_the_end_is_said(tmp_path, weights, capsys):
    command = arguments("fit", tmp_path, "--model.layers", 2, "--model.weights", weights, "--model.warmup_epochs", 2)
    assert "note: of 2 epochs of warm-up (--model.warmup_epochs) there are 1 only\n" in execute(command, capsys)


def test_the_record_has_every_key_of_the_design(best_first):
    record = best_first.record
    assert (record["schema"], record["status"]) == (1, "done")
    assert {key: set(value) for key, value in record.items() if isinstance(value, dict)} == {
        "run": {"task", "setup", "model", "dataset", "method", "layers", "seed"},
        "accuracy": {"val_best", "val_last", "test"},
        "memory_bytes": {"activation_formula", "saved_measured", "peak_measured", "peak_inference"}
        | {"weight_measured", "weight_gradient_measured", "weight_optimizer_measured"},
        "flops": {"paper", "corrected"},
        "time_s": {"step_median", "total"},
        "loss": {"train_last"},
        "recipe": {"epochs", "steps", "learning_rate", "batch_size", "image_size", "precision"}
        | {"processes", "joined_batch_size"},
        "provenance": set(record["provenance"]),
    }
    assert set(record["provenance"]) >= {"config_hash", "code_version", "data_fingerprint", "packages", "hardware"}
    assert Record.load(best_first.folder / "result.json").provenance == record["provenance"]


def test_the_record_says_what_the_history_says(best_first):
    rows, record = best_first.rows, best_first.record
    assert record["accuracy"]["val_best"] == rows[0]["val_accuracy"]
    assert record["accuracy"]["val_last"] == rows[-1]["val_accuracy"]
    assert record["time_s"]["total"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert record["memory_bytes"]["activation_formula"] == max(row["activation_bytes"] for row in rows)


def test_the_record_holds_the_recipe(best_first):
    told = {"epochs": 3, "steps": 6, "learning_rate": 25, "batch_size": 8, "image_size": 32, "precision": "32-true"}
    assert best_first.record["recipe"] == told | {"processes": 1, "joined_batch_size": 8}


def test_the_record_says_every_setting_that_the_recipe_does_not(best_first):
    """So that a table never takes runs of different settings for one recipe."""
    identity = json.loads((best_first.folder / "identity.json").read_text())
    further = best_first.record["provenance"]["further_settings"]
    assert further == further_settings(identity)
    assert further["model.momentum"] == identity["model"]["momentum"]
    for part, key, value in (
        *[("model", "momentum", 0.5), ("model", "weights", "another"), ("model", "optimizer", "adamw")],
        *[("data", "augment", True), ("data", "mean", [0, 0, 0]), ("trainer", "gradient_clip_val", 1.0)],
    ):
        assert further_settings(identity | {part: identity[part] | {key: value}}) != further, key
    for part, key, value in (("model", "method", {"class_path": "lowrank.SVD"}), ("model", "layers", 4)):
        assert further_settings(identity | {part: identity[part] | {key: value}}) == further, key


@pytest.mark.slow
def test_a_callback_that_may_do_more_than_watch_makes_another_run(best_first, capsys):
    callback = "--trainer.callbacks+"
    averaging = "pytorch_lightning.callbacks.EMAWeightAveraging"
    words = [*best_first.arguments, callback, averaging, "--trainer.callbacks.decay", "0.9"]
    capsys.readouterr()
    assert main(words) == 2
    refused = capsys.readouterr().err
    assert "holds a run with other settings" in refused
    assert averaging in refused
    watching = [*best_first.arguments, callback, "pytorch_lightning.callbacks.LearningRateMonitor"]
    assert execute(watching, capsys).startswith("done already: mcunet on digits")
    own = [*best_first.arguments, callback, "commands.CrashInEpoch", "--trainer.callbacks.epoch", "0"]
    assert execute(own, capsys).startswith("done already: mcunet on digits"), "it says of itself that it only watches"


@pytest.mark.slow
def test_a_run_reads_its_data_set_once_and_every_run_anew(tmp_path, capsys, monkeypatch):
    read = []
    digits = registry.dataset.find("digits")
    monkeypatch.setitem(registry.dataset.entries, "digits", lambda root: read.append(root) or digits(root))
    for times, command in ((1, "fit"), (2, "fit"), (3, "measure"), (4, "measure")):  # each is done at the second time
        execute(arguments(command, tmp_path, "--model.layers", 1), capsys)
        assert len(read) == times


def test_the_time_of_a_step_is_the_median_over_all_steps(best_first):
    (history,) = (state for key, state in best_first.checkpoint("last")["callbacks"].items() if "History" in key)
    assert len(history["step_seconds"]) == 3 * 2
    assert best_first.record["time_s"]["step_median"] == statistics.median(history["step_seconds"])


def test_the_history_holds_the_learning_rate_that_the_epoch_had(best_first):
    assert [row["learning_rate"] for row in best_first.rows] == pytest.approx([25e-5, 25, 12.5])


def test_the_formula_memory_is_that_of_the_trained_inputs(best_first):
    # Two inputs of 8 x 576 x 1 x 1 in float32: images of 32 pixels are 1 pixel there.
    assert best_first.record["memory_bytes"]["activation_formula"] == 2 * 8 * 576 * 4
    measured = best_first.record["memory_bytes"]
    assert measured["activation_formula"] < measured["saved_measured"] < measured["peak_measured"]


@pytest.mark.parametrize(("name", "epoch"), [("best", 0), ("last", 2)])
def test_a_checkpoint_is_of_the_epoch_that_its_name_says(best_first, name, epoch):
    assert best_first.checkpoint(name)["epoch"] == epoch


@pytest.mark.slow
def test_the_formula_memory_of_a_tucker_form_counts_core_and_factors(tmp_path, capsys):
    # AMC, sec. 3: the product of the ranks and, for each mode, dimension times rank; a mode left whole has no factor.
    # Such is the batch mode here: the core's unfolding has no more columns than 3, by the others' ranks.
    command = arguments("fit", tmp_path, "--model.layers", 2, "--model.method.init_args.ranks", 3, method="asi")
    shape, ranks = (8, 576, 1, 1), (8, 3, 1, 1)
    factors = sum(size * rank for size, rank in zip(shape, ranks, strict=True) if rank < size)
    formula = 4 * (math.prod(ranks) + factors)
    assert finish(command, tmp_path, capsys).record["memory_bytes"]["activation_formula"] == 2 * formula


def accuracy_of(checkpoint, part):
    """Accuracy by plain PyTorch, with a transform of its own."""
    state = {key.removeprefix("backbone."): value for key, value in checkpoint["state_dict"].items()}
    network = build_model("mcunet", num_classes=10)
    network.load_state_dict({key: state[key] for key in state if not key.startswith("accuracy")})
    images = torch.from_numpy(part.images).float()[:, None] / 255
    images = (F.interpolate(images, (32, 32), mode="bilinear", antialias=True) - 0.5) / 0.5
    with torch.no_grad():
        predicted = network.eval()(images.expand(-1, 3, -1, -1)).argmax(1)
    return float((predicted == torch.from_numpy(part.labels)).double().mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "name", "part"), [("test", "best", "test"), ("val_best", "best", "val"), ("val_last", "last", "val")]
)
def test_an_accuracy_in_the_record_is_that_of_its_checkpoint(best_first, key, name, part):
    expected = accuracy_of(best_first.checkpoint(name), getattr(load_splits("digits", ROOT), part))
    assert best_first.record["accuracy"][key] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "key", "printed"), [("validate", "val_best", "val"), ("test", "test", "test")])
@pytest.mark.parametrize("stored", [False, True])
def test_validate_and_test_give_what_the_record_holds(best_first, capsys, command, key, printed, stored):
    options = ["--config", str(best_first.folder / "config.yaml")] if stored else best_first.arguments[1:]
    before = (best_first.folder / "result.json").read_bytes()
    found = re.search(rf"{printed}_accuracy\W+([\d.]+)", execute([command, *options], capsys))
    assert float(found[1]) == pytest.approx(best_first.record["accuracy"][key], abs=1e-6)
    assert (best_first.folder / "result.json").read_bytes() == before


@pytest.mark.slow
def test_a_checkpoint_can_be_chosen(best_first, capsys):
    chosen = str(best_first.folder / "checkpoints" / "last.ckpt")
    printed = execute(["validate", *best_first.arguments[1:], "--ckpt_path", chosen], capsys)
    found = re.search(r"val_accuracy\W+([\d.]+)", printed)
    assert float(found[1]) == pytest.approx(best_first.rows[-1]["val_accuracy"], abs=1e-6)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("way", ["same arguments", "stored config", "no influence on the result"])
def test_a_finished_run_is_not_run_again(best_first, capsys, monkeypatch, way):
    monkeypatch.setattr("classification.lightning_cli.Trainer.fit", lambda *_, **__: pytest.fail("trained again"))
    command = {
        "same arguments": best_first.arguments,
        "stored config": ["fit", "--config", str(best_first.folder / "config.yaml")],
        "no influence on the result": [*best_first.arguments, "--data.eval_batch_size", "64", "--data.cache", "false"],
    }[way]
    before = content(best_first.folder)
    assert execute(command, capsys).startswith("done already: mcunet on digits")
    assert "is done, would skip" in execute([*command, "--dry_run"], capsys)
    assert content(best_first.folder) == before


@pytest.mark.parametrize(
    ("option", "value", "difference"),
    [
        ("--model.learning_rate", "0.125", r"model\.learning_rate is 25 there and 0\.125 here"),
        ("--model.momentum", "0.5", r"model\.momentum is 0\.9 there and 0\.5 here"),
        ("--trainer.max_epochs", "4", r"trainer\.max_epochs is 3 there and 4 here"),
        ("--data.batch_size", "4", r"data\.batch_size is 8 there and 4 here"),
        ("--data.partition", "finetune", r"data\.partition is 'all' there and 'finetune' here"),
        ("--model.freeze_statistics", "false", r"model\.freeze_statistics is True there and False here"),
    ],
)
def test_other_settings_in_the_folder_are_refused_with_the_difference(best_first, capsys, option, value, difference):
    before = content(best_first.folder)
    assert main([*best_first.arguments, option, value]) == 2
    assert re.search(difference, capsys.readouterr().err)
    assert content(best_first.folder) == before


@pytest.mark.parametrize(
    "option",
    [
        ("--trainer.overfit_batches", "1"),
        ("--trainer.max_steps", "1"),
        ("--trainer.fast_dev_run", "true"),
        ("--trainer.check_val_every_n_epoch", "2"),
    ],
    ids=lambda option: option[0],
)
def test_a_setting_that_changes_the_result_is_not_taken_for_the_same_run(best_first, capsys, option):
    code = main([*best_first.arguments, *option, "--dry_run"])
    printed = capsys.readouterr()
    assert code == 2, printed.out
    assert printed.err.startswith("error: ")


def test_a_weights_file_counts_by_its_content(best_first, tmp_path, capsys, weights):
    copy = tmp_path / "moved.pt"
    state = torch.load(weights)
    torch.save({"state_dict": state, "more": 1}, copy)
    assert "done already" in execute([*best_first.arguments, "--model.weights", str(copy)], capsys)
    state["stem.0.weight"][0] += 1
    torch.save(state, copy)
    assert main([*best_first.arguments, "--model.weights", str(copy)]) == 2
    assert "model.weights is" in capsys.readouterr().err


@pytest.mark.slow
def test_the_run_does_not_depend_on_the_random_state_before_it(tmp_path, capsys):
    states = []
    for number in (1, 2):
        torch.manual_seed(number)
        runs = tmp_path / str(number)
        states.append(
            finish(arguments("fit", runs, "--model.layers", 2), runs, capsys).checkpoint("last")["state_dict"]
        )
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# Measure and ASI.


def test_the_history_is_a_table_with_a_row_for_each_epoch(best_first):
    assert list(metrics(best_first.folder)[0]) == [
        *("epoch", "learning_rate", "train_loss", "val_loss", "val_accuracy"),
        *("activation_bytes", "step_seconds", "seconds"),
    ]
    (history,) = (state for key, state in best_first.checkpoint("last")["callbacks"].items() if "History" in key)
    of_epochs = [statistics.median(history["step_seconds"][first : first + 2]) for first in (0, 2, 4)]
    assert [row["step_seconds"] for row in metrics(best_first.folder)] == of_epochs
    assert json.loads((best_first.folder / "identity.json").read_text())["trainer"]["max_epochs"] == 3
