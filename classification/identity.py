"""From a resolved config to the run that it describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.cli import instantiate_class

from classification.backbones.weights import weights_fingerprint
from classification.data import load_splits
from classification.data.module import FRONT_OF_AUGMENTED
from classification.data.partition import split_fingerprint
from classification.data.registry import MissingDataError
from classification.data.text import TEXTS, is_there
from classification.module import fuses
from classification.planning import Budget
from experiment import ExperimentError, Run, fingerprint
from lowrank import ASI, Method, PerplexityTable, Vanilla

# Settings that have no influence on a run's result, so that they may change between two tries.
NO_INFLUENCE = {
    "model": {"num_classes", "rank_choice", "rank_seed"},  # the ranks' own are of the budget
    "data": {"root", "eval_batch_size", "workers", "cache", "shuffle_seed"},
    "trainer": {
        *("accelerator", "devices", "logger", "callbacks", "default_root_dir", "enable_progress_bar"),
        *("enable_model_summary", "log_every_n_steps", "num_sanity_val_steps", "profiler", "detect_anomaly"),
        *("inference_mode", "model_registry", "enable_autolog_hparams", "enable_checkpointing"),
    },
}


def configured_method(config: Mapping[str, Any]) -> Method:
    """The method of a resolved `model` config."""
    method = config.get("method")
    return Vanilla() if method is None else instantiate_class((), dict(method))


def method_tag(config: Mapping[str, Any]) -> str:
    """The method's name in records and folders; says so where ranks or `fuse` are not chosen as usual."""
    method = configured_method(config)
    fused = fuses(method, config["fuse"])
    chosen = isinstance(method, ASI) and method.ranks is None and config["rank_choice"] != "perplexity"
    tag = f"{method.tag}_{config['rank_choice']}" if chosen else method.tag
    if fused == fuses(method, None):
        return tag
    return f"{tag}_{'fused' if fused else 'unfused'}"


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in a resolved config that has an influence on the result, files by their content."""
    identity: dict[str, Any] = {"setup": config["setup"], "seed": config["seed_everything"]}
    for part, without in NO_INFLUENCE.items():
        identity[part] = {key: value for key, value in config[part].items() if key not in without}
    model = identity["model"]
    model["weights"] = model["weights"] and weights_fingerprint(model["weights"])
    model["budget"] = model["budget"] and _budget(config)
    identity["trainer"]["max_time"] = None  # a run that it ends has no result
    for setting, absent in (("mode_energies", []), ("storages", ["input", "int8"])):
        if list(model[setting]) == absent:
            del model[setting]  # records of before that setting stay valid
    data = identity["data"]
    data["split_file"] = data["split_file"] and split_fingerprint(Path(data["split_file"]))
    return identity


def data_fingerprint(config: Mapping[str, Any]) -> str | None:
    """The fingerprint of a run's data set; None if that is not there, also if it is still to be downloaded."""
    name, root = config["data"]["dataset"], Path(config["data"]["root"])
    if not is_there(name, root):
        return None
    try:
        return load_splits(name, root).fingerprint
    except MissingDataError:
        return None


def _budget(config: Mapping[str, Any]) -> dict[str, Any]:
    """The budget by its content, after a check that the table was measured for this very run."""
    budget, data = Budget(**config["model"]["budget"]), config["data"]
    table = PerplexityTable.load(budget.table)
    measured = (table.model, table.batch_shape)
    sample = (data["max_length"],) if data["dataset"] in TEXTS else (3, data["image_size"], data["image_size"])
    asked = (config["model"]["backbone"], (data["batch_size"], *sample))
    if measured != asked:
        raise ExperimentError(
            f"the perplexity table {budget.table} is of {measured[0]} on batches {measured[1]}, this run of {asked[0]} "
            f"on batches {asked[1]}; measure it again"
        )
    content = json.dumps(json.loads(Path(budget.table).read_text()), sort_keys=True)
    choice = config["model"]["rank_choice"]
    ways = {} if choice == "perplexity" else {"choice": choice, "seed": config["seed_everything"]}
    return {"table": fingerprint([content.encode()]), "bytes": budget.nbytes, **ways}


def run_of(config: Mapping[str, Any], method: str) -> Run:
    """The run's identity in records and folders.

    Raises:
        ExperimentError: a setting that no run can have.
    """
    trainer = config["trainer"]
    if trainer["fast_dev_run"]:
        raise ExperimentError("--trainer.fast_dev_run leaves no record; use --trainer.max_epochs 1")
    if config["data"]["augment"] and config["model"]["cache_front"]:
        raise ExperimentError(FRONT_OF_AUGMENTED)
    for key in ("max_epochs", "limit_train_batches", "limit_val_batches", "limit_test_batches"):
        if trainer[key] is not None and not trainer[key] > 0:
            raise ExperimentError(f"--trainer.{key} is {trainer[key]}; a run needs more than 0")
    try:
        return Run(
            task="classification",
            setup=config["setup"],
            model=config["model"]["backbone"],
            dataset=config["data"]["dataset"],
            method=method,
            layers=config["model"]["layers"],
            seed=config["seed_everything"],
        )
    except ValueError as error:
        raise ExperimentError(str(error)) from None
