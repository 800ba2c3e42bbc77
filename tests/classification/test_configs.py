"""Every shipped config is used: all together in a dry run, every method and every network in one training step."""

import os
from itertools import product
from pathlib import Path

import pytest
from commands import CONFIGS, TINY, execute, finish, only_file

from classification.data.text import TEXTS
from classification.sweep import CONV_ONLY, LINEAR_ONLY, is_ranked

KINDS = ("setups", "models", "data", "methods")
SHIPPED = {kind: sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml")) for kind in KINDS}


def setup_files(setup, data):
    """A setup, and what it sets differently for this data set."""
    specific = f"{setup}_{data}"
    return [setup, specific] if specific in SHIPPED["setups"] else [setup]


def specific(name):
    return any(name.endswith(f"_{data}") for data in SHIPPED["data"])


SETUPS = [name for name in SHIPPED["setups"] if not specific(name)]
PRETRAINING = "b_pretrain"  # trains a whole network with no method but ordinary training
LANGUAGE = {"llama_mini", "tinyllama"}


def fits(model, data, method):
    """Whether a network can be trained on a data set, and its layers with a method."""
    unfit = CONV_ONLY if model in TRANSFORMERS else LINEAR_ONLY
    return (model in LANGUAGE) == (data in TEXTS) and not method.startswith(unfit)


TRANSFORMERS = {model for model in SHIPPED["models"] if "linear" in (CONFIGS / "models" / f"{model}.yaml").read_text()}
COMBINATIONS = [
    (setup, model, data, method)
    for setup, model, data, method in product(SETUPS, SHIPPED["models"], SHIPPED["data"], SHIPPED["methods"])
    if (setup != PRETRAINING or method == "vanilla") and fits(model, data, method)
]


def files(setup, model, data, method):
    first, *rest = setup_files(setup, data)
    chosen = [("setups", first), ("data", data), *(("setups", name) for name in rest)]
    chosen += [("models", model), ("methods", method)]
    return [CONFIGS / kind / f"{name}.yaml" for kind, name in chosen]


def command(chosen, runs):
    words = [word for path in chosen for word in ("--config", str(path))]
    return ["fit", *words, "--model.pretrained", "false", *TINY, "--runs_dir", str(runs)]


def test_every_config_file_is_in_a_combination():
    there = {Path(folder) / name for folder, _, inside in os.walk(CONFIGS) for name in inside}
    assert there == {path for combination in COMBINATIONS for path in files(*combination)}


@pytest.mark.parametrize(("setup", "model"), list(product(SETUPS, SHIPPED["models"])))
def test_every_combination_describes_a_run_of_its_own(tmp_path, capsys, setup, model):
    folders = set()
    chosen = [combination for combination in COMBINATIONS if combination[:2] == (setup, model)]
    for combination in chosen:
        printed = execute([*command(files(*combination), tmp_path), "--dry_run"], capsys)
        assert printed.startswith(f"would run: {model} on ")
        folders.add(printed.partition("folder: ")[2])
    assert len(folders) == len(chosen)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", SHIPPED["methods"])
def test_every_method_takes_a_training_step(tmp_path, capsys, weights, method):
    model = "vit_mini" if method.startswith(LINEAR_ONLY) else "mcunet"
    chosen = files("b", model, "digits", method)
    options = ["--model.layers", "2", *(["--model.weights", str(weights)] if model == "mcunet" else [])]
    if is_ranked(method):
        measure = command(files("b", model, "digits", "vanilla"), tmp_path / "measured")
        execute(["measure", *measure[1:], *options], capsys)
        table = only_file(tmp_path / "measured", "perplexity.json")
        options += ["--model.budget.table", str(table), "--model.budget.mib", "1"]
    done = finish([*command(chosen, tmp_path / "runs"), *options], tmp_path / "runs", capsys)
    assert done.record["run"]["method"] == method
    assert done.record["memory_bytes"]["activation_formula"] > 0
    assert len(done.rows) == 1


TOO_LARGE = {"tinyllama"}  # 4 GiB of random weights; llama_mini is of the same class


@pytest.mark.parametrize("model", sorted({*SHIPPED["models"]} - TOO_LARGE))
def test_every_network_takes_a_training_step(tmp_path, capsys, model):
    chosen = files("a", model, "sentences" if model == "llama_mini" else "digits", "vanilla")
    options = ["--model.layers", "2"]
    done = finish([*command(chosen, tmp_path), *options], tmp_path, capsys)
    assert done.record["run"]["model"] == model
    assert done.record["run"]["setup"] == "A"
