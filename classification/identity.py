"""From a resolved config to the run that it describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.cli import instantiate_class

from classification.backbones.weights import weights_fingerprint
from classification.planning import Budget
from experiment import Run, fingerprint
from lowrank import Method, PerplexityTable, Vanilla

# What a run's result depends on. Everything else (folders, workers, progress bar) may change between two tries.
MODEL_KEYS = (
    *("backbone", "pretrained", "method", "layers", "freeze_statistics", "channels_last"),
    *("learning_rate", "momentum", "weight_decay", "warmup_epochs", "warmup_start", "final_learning_rate"),
)
DATA_KEYS = (*("dataset", "image_size", "mean", "std", "batch_size", "drop_last", "partition", "partition_seed"),)
TRAINER_KEYS = (
    *("max_epochs", "gradient_clip_val", "gradient_clip_algorithm", "precision", "accumulate_grad_batches"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches"),
)


def configured_method(config: Mapping[str, Any]) -> Method:
    """The method of a resolved `model` config."""
    method = config.get("method")
    return Vanilla() if method is None else instantiate_class((), dict(method))


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in a resolved config that has an influence on the result, files by their content."""
    model, data, trainer = config["model"], config["data"], config["trainer"]
    return {
        "setup": config["setup"],
        "seed": config["seed_everything"],
        "model": {key: model[key] for key in MODEL_KEYS}
        | {"weights": model["weights"] and weights_fingerprint(model["weights"]), "budget": _budget(model["budget"])},
        "data": {key: data[key] for key in DATA_KEYS},
        "trainer": {key: trainer[key] for key in TRAINER_KEYS},
    }


def _budget(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if config is None:
        return None
    budget = Budget(**config)
    PerplexityTable.load(budget.table)
    content = json.dumps(json.loads(Path(budget.table).read_text()), sort_keys=True)
    return {"table": fingerprint([content.encode()]), "bytes": budget.nbytes}


def run_of(config: Mapping[str, Any], method: str) -> Run:
    """The run's identity in records and folders."""
    return Run(
        task="classification",
        setup=config["setup"],
        model=config["model"]["backbone"],
        dataset=config["data"]["dataset"],
        method=method,
        layers=config["model"]["layers"],
        seed=config["seed_everything"],
    )
