"""Mistakes of a user: exit code 2, one line that says what to do, and nothing half-written."""

import json
import re

import numpy as np
import pytest
import torch
from commands import CONFIGS, arguments, only_file

from classification.backbones import build_model
from classification.cli import main

CONFIGS_OF_NOTHING = {
    **{"empty": "", "comment": "# nothing\n", "null": "null\n", "list": "- a\n", "text": "hello\n"},
    **{"two": "a: 1\n---\nb: 1\n", "no_name": "1: 2\n", "key": "model: {? {a: 1} : 2}\n", "model": "model: 5\n"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A perplexity table of two layers at this size, and damaged or foreign files, by name."""
    folder = tmp_path_factory.mktemp("files")
    assert main(arguments("measure", folder / "runs", "--model.layers", 2)) == 0
    table = only_file(folder, "perplexity.json").read_text()
    (folder / "table.json").write_text(table)
    (folder / "truncated.json").write_text(table[: len(table) // 2])
    (folder / "list.json").write_text("[]")
    content = json.loads(table)
    for layer in content["layers"]:
        layer["name"] = f"foreign.{layer['name']}"
    (folder / "foreign.json").write_text(json.dumps(content))
    torch.save(build_model("resnet18", num_classes=10).state_dict(), folder / "resnet18.pt")
    (folder / "damaged.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    (folder / "unknown_key.yaml").write_text("model:\n  colour: red\n")
    (folder / "broken.yaml").write_text("model: [1,\n")
    for name, content in CONFIGS_OF_NOTHING.items():
        (folder / f"{name}.yaml").write_text(content)
    (folder / "layers.yaml").write_text("model: {layers: two}\n")
    (folder / "linked.yaml").write_text("data: {shuffle_seed: 5}\n")
    (folder / "seed.yaml").write_text("seed_everything: yes\n")
    np.save(folder / "ten.npy", np.arange(10.0).reshape(2, 5))
    (folder / "in_the_way").write_text("a file")
    return folder


def table(name, *budget):
    """ASI with this perplexity table."""
    return [
        "--model.method",
        "lowrank.ASI",
        "--model.budget.table",
        f"FILES/{name}",
        *(budget or ["--model.budget.mib", 1]),
    ]


def in_method(name, **settings):
    """A method with settings."""
    options = [f"--model.method.init_args.{key}={value}" for key, value in settings.items()]
    return ["--model.method", f"lowrank.{name}", *options]


NO_USE = ["--model.budget.table", "FILES/table.json", "--model.budget.mib", 1]
MISTAKES = {
    "unknown option": (["--model.colour", "red"], "--model.colour"),
    "unknown key in a file": (["--config", "FILES/unknown_key.yaml"], "model.colour"),
    "a config that is not there": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "a config that is no YAML": (["--config", "FILES/broken.yaml"], "config"),
    "energy": (in_method("HOSVD", energy=1.5), r"energy is 1\.5; allowed"),
    "energy 0": (in_method("SVD", energy=0), "energy is 0"),
    "patch": (in_method("GradientFilter", patch=0), "patch is 0; allowed"),
    "ranks": (in_method("ASI", ranks=0), "ranks are 0; allowed"),
    "unknown method": (["--model.method", "lowrank.Nothing"], "lowrank.Nothing"),
    "a class that is no method": (["--model.method", "lowrank.Tucker"], "lowrank.Tucker"),
    "a setting that the method has not": (in_method("Vanilla", energy=0.8), "energy"),
    "too many layers": (["--model.layers", 99], "99 .* has 42; allowed: 1 to 42"),
    "no layers": (["--model.layers", 0], "layers .* 0"),
    "layers in words": (["--model.layers", "some"], "some"),
    "unknown network": (["--model.backbone", "lenet"], "'lenet'; allowed: .*mcunet"),
    "unknown data set": (["--data.dataset", "mnist"], "'mnist'; allowed: .*digits"),
    "unknown partition": (["--data.partition", "third"], "partition"),
    "data set that is not prepared": (["--data.dataset", "pets"], "python -m classification prepare pets"),
    "split file not there": (["--data.split_file", "nowhere.npy"], r"split file nowhere\.npy cannot be read"),
    "split file of something else": (["--data.split_file", "FILES/ten.npy"], r"ten\.npy is of another data set"),
    "split file for all data": (
        ["--data.split_file", "FILES/ten.npy", "--data.partition", "all"],
        r"--data\.partition to pretrain or finetune",
    ),
    "crops that are kept": (["--data.augment", "true"], r"--data\.cache"),
    "batch too large": (["--data.batch_size", 9999], r"449 training samples .* --data\.batch_size"),
    "batch of nothing": (["--data.batch_size", 0], "batch_size"),
    "image of nothing": (["--data.image_size", 0], "image_size"),
    "image below a patch": (
        ["--config", "CONFIGS/models/vit_b_32.yaml", "--data.image_size", 16],
        r"image_size is 16, which vit_b_32 does not take \(.*; give another one, such as 32",
    ),
    "a pixel of a crop": (
        ["--data.augment", "true", "--data.cache", "false", "--data.image_size", 1],
        r"image_size is 1; allowed with --data\.augment are whole numbers from 2",
    ),
    "less than no images": (["--data.limit", -1], r"--data\.limit is -1\.0; allowed are whole numbers from 1, or"),
    "less than a batch": (["--data.limit", 3], r"--data\.limit is 3, which does not fill one batch of 8; raise it"),
    "a share below a batch": (["--data.limit", 0.016], r"7 training samples do not fill one batch of 8; lower"),
    "half an image": (["--data.limit", 20.5], r"--data\.limit is 20\.5; allowed are whole numbers from 1, or"),
    "limit of time in words": (["--trainer.max_time", "soon"], r"max_time is soon; allowed are .* DD:HH:MM:SS"),
    "limit of time in the past": (["--trainer.max_time.hours", -1], r"max_time is \{'hours': -1\}; allowed are times"),
    "selected from behind the end": (["--model.select_from", 1], r"select_from is 1\.0; allowed are numbers from 0"),
    "momentum of AdamW": (["--model.optimizer", "adamw", "--model.momentum", 0.9], r"momentum is 0\.9, and AdamW has"),
    "a quick run": (["--trainer.fast_dev_run", "true"], r"leaves no record; give --trainer\.max_epochs 1"),
    "negative learning rate": (["--model.learning_rate", -1], "learning_rate"),
    "no epochs": (["--trainer.max_epochs", 0], "max_epochs"),
    "fewest epochs above all": (["--trainer.min_epochs", 2], "min_epochs is 2, above the 1 of --trainer.max_epochs"),
    "no validation": (["--trainer.limit_val_batches", 0], "limit_val_batches"),
    "table not there": (
        table("nowhere.json"),
        r"nowhere\.json cannot be read: there is no .*; measure it first, by .* of this run$",
    ),
    "table truncated": (table("truncated.json"), r"truncated\.json is not whole JSON"),
    "table of something else": (table("list.json"), "not a perplexity table"),
    "table of other layers": (table("foreign.json"), r"has no layer 'blocks\.13"),
    "table of fewer layers": ([*table("table.json"), "--model.layers", 4], "has no layer"),
    "a budget of no use": ([*in_method("SVD", energy=0.5), *NO_USE], "budget would have no effect, as SVD leaves no"),
    "a budget of vanilla": (NO_USE, "budget would have no effect, as Vanilla leaves no ranks to a budget; leave it"),
    "a choice of no use": (["--model.rank_choice", "random"], "rank_choice random would have no effect, as Vanilla"),
    "clipping by what there is not": (["--trainer.gradient_clip_algorithm", "x"], r"is x; allowed: norm, value"),
    "a profiler that there is not": (["--trainer.profiler", "x"], "is x; allowed: simple, advanced"),
    "budget twice": (table("table.json", "--model.budget.mib", 1, "--model.budget.run", "x"), "not both"),
    "no budget": (["--model.method", "lowrank.ASI", "--model.budget.table", "FILES/table.json"], "budget"),
    "no ranks": (["--model.method", "lowrank.ASI"], r"ASI needs ranks: .* budget\.table, and budget\.mib"),
    "budget of a run that is not there": (
        table("table.json", "--model.budget.run", "FILES/nowhere"),
        r"not done: there is no .*/nowhere/result\.json",
    ),
    "weights not there": (["--model.weights", "nowhere.pt"], r"no weights file nowhere\.pt"),
    "weights without a name": (["--model.weights", ""], r"--model\.weights is empty; give a file, or leave"),
    "data without a name": (["--data.root", ""], r"--data\.root is empty; give a folder"),
    "weights of another network": (["--model.weights", "FILES/resnet18.pt"], "another network: .* such as"),
    "weights damaged": (["--model.weights", "FILES/damaged.pt"], r"damaged\.pt cannot be read"),
    "pretrained weights that there are not": (["--model.pretrained", "true"], r"--model\.weights"),
    "setup that is a path": (["--setup", "../x"], r"\.\./x"),
    "setup above the folder": (["--setup", ".."], r"'\.\.'"),
    "seed": (["--seed_everything", "x"], "seed"),
    "runs below a file": (["--runs_dir", "FILES/in_the_way"], r"in_the_way.* cannot be written .*--runs-dir"),
    "runs in a system folder": (["--runs_dir", "/proc/nowhere"], "cannot be written"),
}


HOSVD = ("--model.method", "lowrank.HOSVD")
SAID = {  # in full, of what the parser refuses
    ("--seed_everything", "true"): "--seed_everything is True; allowed: a whole number",
    ("--data.shuffle_seed", "5"): "--data.shuffle_seed is what seed_everything is, whatever is given; leave it out",
    ("--model.rank_seed", "5"): "--model.rank_seed is what seed_everything is, whatever is given; leave it out",
    ("--config", "FILES/linked.yaml"): "data.shuffle_seed in --config FILES/linked.yaml is what seed_everything is, "
    "whatever is given; leave it out",
    ("--model", "{num_classes: 3}"): "model.num_classes in --model {num_classes: 3} is what data.num_classes is, "
    "whatever is given; leave it out",
    ("--config", "FILES/seed.yaml"): "seed_everything in --config FILES/seed.yaml is True; allowed: a whole number",
    ("--model.layers", "two"): "--model.layers is two; allowed: a whole number or all",
    ("--model.layers="): "--model.layers is empty; allowed: a whole number or all",
    (
        "--config",
        "FILES/layers.yaml",
    ): "model.layers in --config FILES/layers.yaml is two; allowed: a whole number or all",
    ("--trainer.max_epochs", "1.5"): "--trainer.max_epochs is 1.5; allowed: a whole number or null",
    ("--model.optimizer", "lion"): "--model.optimizer is lion; allowed: sgd, adamw",
    ("--data.mean", "[1, 2]"): "--data.mean is [1, 2]; allowed: a list of 3 elements",
    ("--model.budget.mib", "x"): "--model.budget.mib is x; allowed: a number or null",
    (*HOSVD, "--model.method.energy", "x"): "--model.method.energy is x; allowed: a number",
    HOSVD: "--model.method: lowrank.HOSVD needs energy, as --model.method.energy or in `init_args` of a config",
    (*HOSVD, "--model.method.energi", "1"): "--model.method: lowrank.HOSVD has no setting 'energi'; allowed: energy, "
    "storage, derive",
    (
        "--model.method",
        "lowrank.Nothing",
    ): "--model.method is lowrank.Nothing, which is not to be had: module 'lowrank' has no attribute 'Nothing'",
    ("--model.method", "lowrank.Tucker"): "--model.method is lowrank.Tucker; allowed: a class that is a Method or null",
    ("--config", "FILES/unknown_key.yaml"): "model.colour in --config FILES/unknown_key.yaml: fit has no such setting; "
    "see python -m classification fit --help",
}


def refused(command, capsys, message):
    capsys.readouterr()
    code = main(command)
    printed = capsys.readouterr()
    assert code == 2, printed
    assert re.fullmatch(r"error: [^\n]+\n", printed.err), printed.err
    assert "Traceback" not in printed.err
    assert re.search(message, printed.err), printed.err


def half_written(folder):
    return [path for path in folder.rglob("*") if path.name == "result.json" or path.suffix == ".part"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_half_written(files, tmp_path, capsys, mistake):
    options, message = MISTAKES[mistake]
    options = [str(option).replace("FILES", str(files)).replace("CONFIGS", str(CONFIGS)) for option in options]
    if "--model.layers" not in options:
        options = ["--model.layers", 2, *options]
    refused(arguments("fit", tmp_path, *options), capsys, message)
    assert half_written(tmp_path) == []
    assert half_written(files / "in_the_way") == []


@pytest.mark.parametrize(
    "mistake",
    [
        *("split file for all data", "crops that are kept", "batch of nothing", "image of nothing"),
        *("a pixel of a crop", "less than no images", "half an image", "limit of time in words"),
        *("limit of time in the past", "no ranks", "selected from behind the end", "momentum of AdamW"),
        *("no validation", "a quick run", "less than a batch", "a share below a batch", "batch too large"),
        *("runs below a file", "runs in a system folder", "too many layers", "no layers", "image below a patch"),
        *("table of other layers", "table of fewer layers", "weights of another network"),
    ],
)
def test_a_dry_run_refuses_settings_that_the_run_would(files, tmp_path, capsys, mistake):
    options, message = MISTAKES[mistake]
    options = [str(option).replace("FILES", str(files)).replace("CONFIGS", str(CONFIGS)) for option in options]
    refused(arguments("fit", tmp_path, "--model.layers", 2, "--dry_run", *options), capsys, message)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_more_batches_to_measure_on_than_there_are(tmp_path, capsys):
    options = ["--batches", "60", "--model.layers", 2, "--dry_run"]
    refused(arguments("measure", tmp_path, *options), capsys, "449 training samples do not fill 60 batches of 8; lower")


@pytest.mark.parametrize("options", SAID)
def test_what_the_parser_refuses_is_said_in_words(files, tmp_path, capsys, options):
    words = [word.replace("FILES", str(files)) for word in ([options] if isinstance(options, str) else options)]
    said = SAID[options].replace("FILES", str(files))
    refused(arguments("fit", tmp_path, *words), capsys, rf"^error: {re.escape(said)}\n$")


@pytest.mark.parametrize("name", CONFIGS_OF_NOTHING)
def test_a_config_that_holds_no_settings_is_named(files, tmp_path, capsys, name):
    command = [*arguments("fit", tmp_path), "--config", str(files / f"{name}.yaml")]
    refused(command, capsys, rf"^error: config {files}/{name}\.yaml .*it has to hold settings by name")


def test_a_config_that_is_no_file_is_said(tmp_path, capsys):
    for path, what in ((tmp_path, "is a folder"), (tmp_path / "x.yaml", "is not there"), ("", "is not there")):
        command = [*arguments("fit", tmp_path), "--config", str(path)]
        refused(command, capsys, rf"^error: config {path or repr('')} {what}; give a file of settings")


@pytest.mark.slow
def test_what_a_command_asked_of_the_parser_is_not_asked_by_the_next(tmp_path, capsys):
    refused([*arguments("fit", tmp_path, "--print_config"), "what"], capsys, "what")
    refused(arguments("measure", tmp_path, "--batches", 0), capsys, "--batches is 0")


@pytest.mark.parametrize("mistake", ["unknown option", "too many layers", "unknown data set", "weights damaged"])
@pytest.mark.parametrize("command", ["measure", "test"])
def test_other_commands_refuse_mistakes_as_well(files, tmp_path, capsys, command, mistake):
    options, message = MISTAKES[mistake]
    options = [str(option).replace("FILES", str(files)) for option in options]
    if mistake == "too many layers" and command == "test":
        message = "99|no checkpoint"
    refused(arguments(command, tmp_path, *options), capsys, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "subcommand"),
        (["train"], "'train'"),
        (["fit"], "required: .*backbone"),
        (["fit", "--model.backbone"], "backbone"),
    ],
)
def test_a_command_that_is_not_whole_is_refused(capsys, command, message):
    refused(command, capsys, message)


def test_a_budget_too_small_states_the_least_that_is_needed(files, tmp_path, capsys):
    rows = json.loads((files / "table.json").read_text())["layers"]
    least = sum(min(row["nbytes"]) for row in rows)
    options = ["--model.layers", 2, "--model.method", "lowrank.ASI", "--model.budget.table", files / "table.json"]
    refused(
        arguments("fit", tmp_path, *options, "--model.budget.mib", (least - 1) / 2**20),
        capsys,
        rf"minimum .*{least} bytes",
    )
    assert half_written(tmp_path) == []


def test_validate_and_test_want_a_checkpoint(tmp_path, capsys):
    for command in ("validate", "test"):
        refused(arguments(command, tmp_path, "--model.layers", 2), capsys, r"no checkpoint .*best\.ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "foreign", "of an earlier version"])
def test_a_damaged_checkpoint_to_resume_from_is_one_line(tmp_path, capsys, weights, damage):
    command = arguments("fit", tmp_path, "--model.layers", 2, "--model.weights", weights)
    assert main(command) == 0
    only_file(tmp_path, "result.json").unlink()
    last = only_file(tmp_path, "last.ckpt")
    if damage == "truncated":
        last.write_bytes(last.read_bytes()[:1000])
    elif damage == "foreign":
        torch.save({"state_dict": {}}, last)
    else:
        checkpoint = torch.load(last, weights_only=True)
        checkpoint["state_dict"]["backbone.blocks.13.layers.3.lowrank_state_0"] = torch.ones(8, 2)
        torch.save(checkpoint, last)
    only_file(tmp_path, "best.ckpt").unlink()  # from which the run would go on
    message = r"last\.ckpt is of an earlier version .*start afresh" if "version" in damage else r"last\.ckpt"
    before = last.read_bytes()
    refused(command, capsys, message)
    assert half_written(tmp_path) == []
    assert last.read_bytes() == before
    refused([*arguments("test", tmp_path, "--model.layers", 2), "--ckpt_path", str(last)], capsys, message)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_line(tmp_path, capsys, weights):
    state = torch.load(weights)
    state["stem.0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    command = arguments("fit", tmp_path / "runs", "--model.layers", 2, "--model.weights", tmp_path / "nan.pt")
    refused(command, capsys, "loss is nan in epoch 0, batch 0")
    assert half_written(tmp_path) == []
