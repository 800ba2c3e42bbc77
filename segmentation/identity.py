"""From a composed config to the run that it describes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from experiment import ExperimentError, Run, fingerprint
from lowrank import PerplexityTable
from segmentation.compose import hook_settings
from segmentation.hook import LowRankHook
from segmentation.planning import Budget

# What has an influence on a perplexity table, and what besides on a trained network.
_BOTH = ("model", "train_dataloader", "custom_hooks", "randomness")
MEASURED = (*_BOTH, "perplexity")
TRAINED = (
    *_BOTH,
    "val_dataloader",
    "val_evaluator",
    "optim_wrapper",
    "param_scheduler",
    "train_cfg",
    "auto_scale_lr",
    "processes",
)
NO_INFLUENCE = {"data_root", "num_workers", "persistent_workers", "pin_memory", "prefetch_factor"}


def method_tag(config: Config) -> str:
    """The method's name in records and folders; says so where `fuse` is not the method's default."""
    settings = hook_settings(config)
    if settings is None:
        return "vanilla"
    hook = LowRankHook(**settings)
    usual = LowRankHook(**{**settings, "fuse": None})
    return hook.method.tag if hook.fuse == usual.fuse else f"{hook.method.tag}_{'fused' if hook.fuse else 'unfused'}"


def run_of(config: Config, method: str) -> Run:
    """The run's identity in records and folders.

    Raises:
        ExperimentError: a setting that no run can have.
    """
    files = config.get("config_files") or ["config"]
    try:
        return Run(
            task="segmentation",
            setup=config.get("stage", "finetune"),
            model=config.get("network", Path(files[-1]).stem),
            dataset=config.get("dataset", config.train_dataloader.dataset.type),
            method=method,
            layers=config.get("layers", "all"),
            seed=config.randomness.seed,
        )
    except ValueError as error:
        raise ExperimentError(str(error)) from None


def identity_of(config: Config, keys: Sequence[str] = TRAINED) -> dict[str, Any]:
    """Everything in a config that has an influence on the result, files by their content."""
    identity = {key: _without(config.get(key)) for key in keys if config.get(key) is not None}
    if identity.get("processes") == 1:
        del identity["processes"]  # as in runs of before there were several
    identity["load_from"] = _weights(config.get("load_from"))
    for hook in identity.get("custom_hooks", []):
        if hook.get("budget"):
            hook["budget"] = _budget(config, hook["budget"])
    return identity


def _without(value: Any) -> Any:
    """A copy of plain dictionaries and lists without what has no influence."""
    if isinstance(value, dict):
        return {key: _without(inner) for key, inner in value.items() if key not in NO_INFLUENCE}
    if isinstance(value, list | tuple):
        return [_without(inner) for inner in value]
    return value


def _weights(source: str | None) -> str | None:
    if source is None or "://" in source:
        return source
    try:
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ExperimentError(f"weights {source} cannot be read: {error.strerror}") from None


def _budget(config: Config, settings: dict[str, Any]) -> dict[str, Any]:
    """The budget by its content, after a check that the table was measured for this very run."""
    budget = Budget(**settings)
    table = PerplexityTable.load(budget.table)
    asked = (config.get("network"), (config.train_dataloader.batch_size, 3, *config.crop_size))
    if (table.model, table.batch_shape) != asked:
        raise ExperimentError(
            f"the perplexity table {budget.table} is of {table.model} on batches {table.batch_shape}, this run of "
            f"{asked[0]} on batches {asked[1]}; measure it again"
        )
    content = json.dumps(json.loads(Path(budget.table).read_text()), sort_keys=True)
    return {"table": fingerprint([content.encode()]), "bytes": budget.nbytes}
