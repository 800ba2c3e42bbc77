"""From a resolved config to the run that it describes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from classification.backbones.weights import weights_fingerprint
from classification.data.partition import split_fingerprint
from classification.data.prepared import load_ahead
from classification.data.registry import MissingDataError
from classification.data.text import TEXTS, is_there
from experiment import Run
from experiment.folder import IDENTITY
from experiment.method import build_method, leaves_ranks
from experiment.method import method_tag as tag_of
from experiment.provenance import plain
from experiment.ranks import Budget
from experiment.record import is_result
from experiment.sources import source_of

# Settings that have no influence on a run's result, so that they may change between two tries. Which devices train has
# none, but how many of them at once has: it is part of the identity by itself.
NO_INFLUENCE = {
    "model": {"num_classes", "rank_choice", "rank_seed"},  # the ranks' own are of the budget
    "data": {"root", "eval_batch_size", "workers", "cache", "shuffle_seed"},
    "trainer": {
        *("accelerator", "devices", "logger", "default_root_dir", "enable_progress_bar"),
        *("enable_model_summary", "log_every_n_steps", "num_sanity_val_steps", "profiler", "detect_anomaly"),
        *("inference_mode", "model_registry", "enable_autolog_hparams", "enable_checkpointing"),
    },
}

# What has no influence on the accuracy of a checkpoint beside: what it was trained from, and in how many processes.
UNTESTED = ("model.weights", "model.pretrained", "processes", "trainer.strategy")
NO_INFLUENCE_MARK = "no_influence"  # true of the class of a callback of your own that says so of itself
# Callbacks of Lightning that show, time and save; a run that one of them ends early is not done.
_WATCHING = {
    *("DeviceStatsMonitor", "EarlyStopping", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "Timer"),
    *("OnExceptionCheckpoint", "ProgressBar", "RichModelSummary", "RichProgressBar", "ThroughputMonitor"),
    "TQDMProgressBar",
}
# What of an identity is said otherwise (in names, by the method or the recipe), or changes results by rounding alone.
_SAID = {
    "model": {
        *("backbone", "method", "fuse", "layers", "budget", "energies", "learning_rate"),
        *("channels_last", "cache_front", "mode_energies", "storages", "derive"),
    },
    "data": {"dataset", "batch_size", "image_size", "limit"},
    "trainer": {"max_epochs", "max_time", "precision", "strategy", "num_nodes"},
}


def method_tag(config: Mapping[str, Any]) -> str:
    """The method's name in records and folders, of a resolved `model` config; see `experiment.method.method_tag`."""
    budget = config.get("budget")
    return tag_of(
        build_method(config.get("method")), config["fuse"], config["rank_choice"], Budget(**budget) if budget else None
    )


def weights_of_done(config: Mapping[str, Any], result: Path) -> str | None:
    """The fingerprint of the weights that a finished run was trained from, as its folder has it, where they are gone.

    Args:
        config: of the run.
        result: what it leaves when it is done.
    """
    weights = config["model"]["weights"]
    if not weights or Path(weights).exists() or not is_result(result):
        return None
    try:
        stored = json.loads(result.with_name(IDENTITY).read_text(encoding="utf-8"))["model"]["weights"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return stored if isinstance(stored, str) else None


def identity_of(config: Mapping[str, Any], measures: bool = False, weights: str | None = None) -> dict[str, Any]:
    """Everything in a resolved config that has an influence on the result, files by their content.

    Args:
        config: of a training run, or of one that measures perplexity.
        measures: whether it is the latter.
        weights: the fingerprint of the weights that it starts from, where these are not there to be read.
    """
    identity: dict[str, Any] = {"setup": config["setup"], "seed": config["seed_everything"]}
    for part, without in NO_INFLUENCE.items():
        identity[part] = {key: value for key, value in config[part].items() if key not in without}
    identity["trainer"] |= _acting(identity["trainer"].pop("callbacks"))
    model = identity["model"]
    model["weights"] = model["weights"] and (weights or weights_fingerprint(model["weights"]))
    model["budget"] = model["budget"] and _budget(config)
    model["method"] = _without_new(model["method"])
    identity["trainer"]["max_time"] = None  # a run that it ends has no result
    identity["trainer"]["num_nodes"] = 1  # on how many machines its processes are has no influence
    if not (measures and model["mode_energies"]):
        del model["mode_energies"]  # it has no influence, or is not used, as before it was there
    if not measures or list(model["storages"]) == ["input", "int8"]:
        del model["storages"]
    if not (measures and model["derive"]):
        del model["derive"]
    if measures and config["batches"] > 1:
        identity["batches"] = config["batches"]
    if config.get("processes", 1) > 1:
        identity["processes"] = config["processes"]
        identity["trainer"]["strategy"] = "ddp"  # all that are allowed give the same
    if model["optimizer"] == "sgd":
        del model["optimizer"]  # as before it was there
    data = identity["data"]
    if data["limit"] is None:
        del data["limit"], data["limit_seed"]  # records of before these settings stay valid
    data["split_file"] = data["split_file"] and split_fingerprint(Path(data["split_file"]))
    return identity


_NEW = {"derive": False}  # settings of methods that records of before do not have, with what these were trained by


def _without_new(method: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A method's config, which has every default, without those of settings that were not there before."""
    if method is None:
        return None
    settings = dict(method.get("init_args") or {})
    kept = {key: value for key, value in settings.items() if key not in _NEW or value != _NEW[key]}
    return {**method, **({"init_args": kept} if "init_args" in method else {})}


def _acting(callbacks: Any) -> dict[str, Any]:
    """Those of a trainer's callbacks that may do more than watch; no word of it, as before they were looked at, where
    none does."""
    given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    found = [one for one in given if not _watches(path_of(one))]
    return {"callbacks": found} if found else {}


def path_of(callback: Any) -> str:
    """The path of a callback's class, of its settings or of its name alone."""
    return str(callback["class_path"] if isinstance(callback, Mapping) else callback)


def _watches(path: str) -> bool:
    if path.rpartition(".")[2] in _WATCHING and is_lightnings(path):
        return True
    return bool(getattr(_imported(path), NO_INFLUENCE_MARK, False))


def is_lightnings(path: str) -> bool:
    """Whether a class is one of Lightning's own, by its path."""
    return path.split(".")[0] in ("pytorch_lightning", "lightning")


def _imported(path: str) -> Any:
    """The class of this path, which the parser has imported."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def callback_sources(identity: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The files that hold the callbacks of one's own that an identity names; see `experiment.sources`."""
    paths = [path for path in map(path_of, identity["trainer"].get("callbacks", [])) if not is_lightnings(path)]
    found = {f"callback {path}": source_of(_imported(path)) for path in paths}
    return {what: source for what, source in found.items() if source}


def further_settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that are said nowhere else in its record, but have an influence on its result."""
    found = {
        f"{part}.{key}": value
        for part, said in _SAID.items()
        for key, value in identity[part].items()
        if key not in said and value is not None
    }
    return {key: plain(value) for key, value in sorted(found.items())}


def weights_of(identity: Mapping[str, Any]) -> str:
    """Which weights the network of an identity starts from, in words."""
    model = identity.get("model")
    told = model if isinstance(model, Mapping) else {}
    if told.get("weights"):
        return f"fingerprint {told['weights']}"
    return "published ones" if told.get("pretrained") else "none"


def budget_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """What ranks are chosen by, of a resolved `model` config; empty where none are. See `experiment.ranks.Budget`."""
    chosen = model["budget"] and model["method"] and leaves_ranks(model["method"])
    return Budget(**model["budget"]).settings if chosen else {}


def data_fingerprint(config: Mapping[str, Any]) -> str | None:
    """The fingerprint of a run's data set; None if that is not there, also if it is still to be downloaded.

    What is read for it is the run's; see `classification.data.prepared.load_ahead`.
    """
    name, root = config["data"]["dataset"], Path(config["data"]["root"])
    if not is_there(name, root):
        return None
    try:
        return load_ahead(name, root).fingerprint
    except MissingDataError:
        return None


def _budget(config: Mapping[str, Any]) -> dict[str, Any]:
    """The budget by its content."""
    model, data = config["model"], config["data"]
    sample = (data["max_length"],) if data["dataset"] in TEXTS else (3, data["image_size"], data["image_size"])
    told = (model["backbone"], (data["batch_size"], *sample), model["rank_choice"], config["seed_everything"])
    return Budget(**model["budget"]).identity(*told, dataset=data["dataset"])


def run_of(config: Mapping[str, Any], method: str) -> Run:
    """The run's identity in records and folders.

    Raises:
        ExperimentError: a setting that no run can have.
    """
    return Run(
        task="classification",
        setup=config["setup"],
        model=config["model"]["backbone"],
        dataset=config["data"]["dataset"],
        method=method,
        layers=config["model"]["layers"],
        seed=config["seed_everything"],
    )
