"""Every shipped config is used: all together in a dry run, every method and every network in one training step."""

import functools
import json
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import yaml
from commands import CONFIGS, TINY, execute, finish, only_file

from classification import built, image_size
from classification.data.registry import source
from classification.data.text import TEXTS
from classification.plans import is_transformer
from experiment.method import derives, leaves_ranks

KINDS = ("setups", "models", "data", "methods")
SHIPPED = {kind: sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml")) for kind in KINDS}


def setup_files(setup, model, data):
    """A setup, and what it sets differently for this data set and model."""
    return [name for name in (setup, f"{setup}_{data}", f"{setup}_{data}_{model}") if name in SHIPPED["setups"]]


def specific(name):
    return any(f"_{data}_" in f"{name}_" for data in SHIPPED["data"])


SETUPS = [name for name in SHIPPED["setups"] if not specific(name)]
CONV_ONLY, LINEAR_ONLY = ("gradient_filter",), ("wsi", "wasi")  # how the names of such methods start
PRETRAINING = "b_pretrain"  # trains a whole network with no method but ordinary training
LANGUAGE = {"llama_mini", "minilm", "tinyllama"}
TOO_LARGE = {"tinyllama"}  # 4 GiB of random weights; llama_mini is of the same class
# Trained in one setup; smaller ones of the same classes are in all of them.
LARGE = {"swin_t", "vit_b_32", "resnet34", "minilm"}


def fits(model, data, method):
    """Whether a network can be trained on a data set, and its layers with a method."""
    unfit = CONV_ONLY if is_transformer(model) else LINEAR_ONLY
    return (model in LANGUAGE) == (data in TEXTS) and not method.startswith(unfit)


# Every method on digits or sentences, every data set with one method and network: no config knows of the others.
# Methods are combined with one setup; in the other each of them trains in `test_every_method_takes_a_training_step`.
SMALLEST = ("mcunet", "vit_mini", "llama_mini")
COMBINATIONS = [
    (setup, model, data, method)
    for setup, model, data, method in product(SETUPS, SHIPPED["models"], SHIPPED["data"], SHIPPED["methods"])
    if fits(model, data, method)
    and (
        (method == "vanilla" and (data in ("digits", "sentences") or model in ("mcunet", "llama_mini")))
        or (setup == "a" and data in ("digits", "sentences") and model in SMALLEST)
    )
]


def files(setup, model, data, method):
    chosen = [("setups", setup), ("data", data)]
    chosen += [("setups", name) for name in setup_files(setup, model, data)[1:] if name == f"{setup}_{data}"]
    chosen += [("models", model)]
    chosen += [("setups", name) for name in setup_files(setup, model, data)[1:] if name != f"{setup}_{data}"]
    chosen += [("methods", method)]
    return [CONFIGS / kind / f"{name}.yaml" for kind, name in chosen]


def command(chosen, runs, root="nowhere"):
    words = [word for path in chosen for word in ("--config", str(path))]
    options = ["--model.pretrained", "false", "--data.root", root, "--data.tokenizer", "bytes"]
    return ["fit", *words, *options, *TINY, "--runs_dir", str(runs)]


def test_every_config_file_is_in_a_combination():
    there = {Path(folder) / name for folder, _, inside in os.walk(CONFIGS) for name in inside}
    measuring = set((CONFIGS / "perplexity").iterdir())  # of `measure` alone; tests of sweeps use them
    assert there - measuring == {path for combination in COMBINATIONS for path in files(*combination)}


def _with_some_ranks(method):
    return replace(method, ranks=1) if getattr(method, "ranks", 1) is None else method


@pytest.mark.slow
@pytest.mark.parametrize(("setup", "model"), list(product(SETUPS, SHIPPED["models"])))
def test_every_combination_describes_a_run_of_its_own(tmp_path, capsys, monkeypatch, setup, model):
    # Configs of methods leave ranks to a budget, which is no part of them.
    monkeypatch.setattr("classification.settings.require_own_ranks", lambda method: None)
    monkeypatch.setattr("classification.built.with_ranks", lambda method, *told: _with_some_ranks(method))
    monkeypatch.setattr("classification.built._network", functools.cache(built._network))
    monkeypatch.setattr("classification.image_size._tried", functools.cache(image_size._tried))
    folders = set()
    chosen = [combination for combination in COMBINATIONS if combination[:2] == (setup, model)]
    for combination in chosen:
        printed = execute([*command(files(*combination), tmp_path), "--dry_run"], capsys)
        assert printed.startswith(f"would run: {model} on ")
        folders.add(printed.partition("folder: ")[2])
    assert len(folders) == len(chosen)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def measured_once(tmp_path_factory):
    """Gives the perplexity table for a network, options and what is derived, measured where it is not there yet."""
    folder = tmp_path_factory.mktemp("measured")

    def table(model, options, derived, capsys):
        runs = folder / f"{model}_{derived}"
        if not runs.exists():
            measure = command(files("b", model, "digits", "vanilla"), runs)
            execute(["measure", *measure[1:], *options, "--model.derive", str(derived).lower()], capsys)
        return only_file(runs, "perplexity.json")

    return table


@pytest.mark.slow
@pytest.mark.parametrize("method", SHIPPED["methods"])
def test_every_method_takes_a_training_step(tmp_path, capsys, weights, measured_once, method):
    model = "vit_mini" if method.startswith(LINEAR_ONLY) else "mcunet"
    chosen = files("b", model, "digits", method)
    config = yaml.safe_load((CONFIGS / "methods" / f"{method}.yaml").read_text())["model"]["method"]
    ranked, derived = leaves_ranks(config), derives(config)
    options = ["--model.layers", "4" if derived else "2"]  # a whole bottleneck, where inputs are to follow from one
    options += ["--model.weights", str(weights)] if model == "mcunet" else []
    if ranked:
        table = measured_once(model, options, derived, capsys)
        options += ["--model.budget.table", str(table), "--model.budget.mib", "1"]
    done = finish([*command(chosen, tmp_path / "runs"), *options], tmp_path / "runs", capsys)
    assert done.record["run"]["method"] == (f"{method}_1mib" if ranked else method)
    assert done.record["memory_bytes"]["activation_formula"] > 0
    assert len(done.rows) == 1
    layers = json.loads((done.folder / "ranks.json").read_text())["layers"]
    assert sum(layer.get("derived") is not None for layer in layers) == (2 if derived else 0)


OWN = {"digits", "fashion_mnist"}  # not of the papers
TRAINED = [
    (setup, model)
    for setup, model in product(SETUPS, sorted({*SHIPPED["models"]} - TOO_LARGE))
    if setup == "b" or model not in LARGE
]


@pytest.mark.slow
@pytest.mark.parametrize(("setup", "model"), TRAINED)
def test_every_network_takes_a_training_step_in_every_setup(tmp_path, capsys, setup, model):
    layers = [] if setup == PRETRAINING else ["--model.layers", "2"]
    data = "sentences" if model in LANGUAGE else "digits"
    done = finish([*command(files(setup, model, data, "vanilla"), tmp_path), *layers], tmp_path, capsys)
    assert done.record["run"]["model"] == model
    assert done.record["run"]["setup"] == {"a": "A", "b": "B", PRETRAINING: "B-pretrain"}[setup]


@pytest.mark.parametrize("data", [name for name in SHIPPED["data"] if name not in {*OWN, *TEXTS}])
def test_every_data_set_is_normalised_as_in_the_papers(data):
    config = yaml.safe_load((CONFIGS / "data" / f"{data}.yaml").read_text())["data"]
    statistics = [0.5] * 6 if data.startswith("cifar") else [0.485, 0.456, 0.406, 0.229, 0.224, 0.225]
    assert config == {"dataset": data, "image_size": 224, "mean": statistics[:3], "std": statistics[3:]}


@pytest.mark.parametrize("data", [name for name in SHIPPED["data"] if name in source.names()])
def test_the_sizes_that_a_config_states_are_the_official_ones(data):
    official = source.find(data)
    stated = (CONFIGS / "data" / f"{data}.yaml").read_text().splitlines()[0].replace(",", "")
    assert f"{official.test} " in stated or f"{official.test}." in stated
    if data != "flowers102":  # its validation part is official
        val = -(-official.train // 5)  # 20 %, rounded up
        assert f" {official.train - val} " in stated
        assert f" {val} to validate" in stated
