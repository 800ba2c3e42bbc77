"""Parts that a config has to have for a command, looked for before anything is built or written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from experiment import ExperimentError
from segmentation.compose import datasets

NEEDED = {
    "measure": ("model", "train_dataloader.batch_size", "train_dataloader.dataset.type"),
    "train": (
        *("model", "train_dataloader.batch_size", "train_dataloader.dataset.type", "train_cfg", "optim_wrapper"),
        *("val_dataloader.dataset.type", "val_evaluator", "val_cfg"),
    ),
}
METRIC, MEASURE = "IoUMetric", "mIoU"  # MMSegmentation's; others give what they give


def check_parts(config: Mapping[str, Any], command: str) -> None:
    """Check that a composed config has what `train` or `measure` needs of it.

    Raises:
        ExperimentError: something is missing; names all of it. Or no validation would tell the mIoU.
    """
    missing = [key for key in NEEDED[command] if at(config, key) in (None, {}, [])]
    if missing:
        what = "it" if len(missing) == 1 else "them"
        why = "; a run is judged by its validations" if any(key.startswith("val_") for key in missing) else ""
        if any(key.endswith("dataset.type") for key in missing):
            why += "; a data set is given by its type and its folders, as in the files of configs/segmentation/data"
        raise ExperimentError(f"the config has no {', '.join(missing)}, and {command} needs {what}{why}")
    for loader in ("train_dataloader", "val_dataloader") if command == "train" else ("train_dataloader",):
        if not datasets(config[loader]):
            raise ExperimentError(f"{loader}.dataset does not say where it is: it has no data_root and no data_prefix")
    if command == "train":
        _check_validation(config)


def _check_validation(config: Mapping[str, Any]) -> None:
    settings = config["train_cfg"]
    length, begin = settings.get("max_iters") or settings.get("max_epochs"), settings.get("val_begin", 1)
    if length is not None and begin > length:
        raise ExperimentError(f"train_cfg.val_begin is {begin}, and the run ends at {length}, without a validation")
    evaluators = list(_evaluators(config["val_evaluator"]))
    others = any(_kind(one) != METRIC for one in evaluators)  # which may give it
    if not others and not any(_tells(one) for one in evaluators):
        raise ExperimentError(
            f"no val_evaluator gives the {MEASURE}, by which a run is judged; give an {METRIC} with {MEASURE!r} among "
            f"its iou_metrics, and without prefix and format_only"
        )


def _evaluators(given: Any) -> Iterator[Mapping[str, Any]]:
    for one in [given] if isinstance(given, Mapping) else given:
        yield from _evaluators(one["metrics"]) if "metrics" in one else [one]


def _kind(evaluator: Mapping[str, Any]) -> str:
    return str(evaluator.get("type")).rpartition(".")[2]


def _tells(evaluator: Mapping[str, Any]) -> bool:
    hidden = evaluator.get("prefix") or evaluator.get("format_only")
    return MEASURE in evaluator.get("iou_metrics", [MEASURE]) and not hidden


def at(config: Mapping[str, Any], key: str) -> Any:
    """What is at a place in a config, such as "train_cfg.max_iters"; None if nothing is."""
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value
