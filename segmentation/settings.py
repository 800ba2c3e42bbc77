"""Settings that cannot work, refused in one line before anything is built or written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiment import ExperimentError
from experiment.method import check_precision
from experiment.process_group import require_room
from experiment.warned import tell_crowded
from segmentation.compose import HOOK
from segmentation.hook_settings import check_hook, check_perplexity
from segmentation.parts import at

WHOLE = {  # settings that are whole numbers, with the least of each
    "randomness.seed": 0,
    "train_cfg.max_iters": 1,
    "train_cfg.max_epochs": 1,
    "train_cfg.val_interval": 1,
    "train_dataloader.batch_size": 1,
    "train_dataloader.num_workers": 0,
    "val_dataloader.batch_size": 1,
    "val_dataloader.num_workers": 0,
    "model.decode_head.num_classes": 1,
    "optim_wrapper.accumulative_counts": 1,
    "default_hooks.checkpoint.interval": 1,
    "default_hooks.logger.interval": 1,
    "processes": 1,
}
PARTS = (  # settings that hold others
    *("model", "train_cfg", "val_cfg", "optim_wrapper", "default_hooks", "randomness", "lowrank", "lowrank.method"),
    *("train_dataloader", "train_dataloader.dataset", "val_dataloader", "val_dataloader.dataset"),
)
LISTS = ("param_scheduler", "val_evaluator", "test_evaluator")  # of settings, or settings alone
SUITES = {  # what the suite sets itself for each run, and what to give in its place
    "work_dir": "give --runs-dir or --work-dir",
    "resume": "leave it out: an interrupted run goes on by itself",
}
AT_LEAST_0 = (
    *(f"optim_wrapper.optimizer.{name}" for name in ("lr", "momentum", "weight_decay")),
    *("optim_wrapper.clip_grad.max_norm", "optim_wrapper.clip_grad.clip_value"),
)
# Transforms that move pixels: of images whose label maps are not loaded yet, these stay where they are.
MOVING = {
    *("Pad", "RandomFlip", "RandomRotFlip", "RandomRotate", "RandomCrop", "CenterCrop", "RandomCutOut"),
    *("Resize", "RandomResize", "RandomChoiceResize", "ResizeToMultiple", "ResizeShortestEdge"),
}
MOST_SEED = 2**32 - 1  # of numpy's generators


def check_settings(config: Mapping[str, Any]) -> None:
    """Check a composed config.

    Raises:
        ExperimentError: a setting that cannot work; names it and what is allowed.
    """
    for key in PARTS:
        value = at(config, key)
        if value is not None and not isinstance(value, Mapping):
            raise ExperimentError(f"{key} is {str(value)[:200]!r}; allowed are settings by their names, as {key}.NAME")
    for key in LISTS:
        value = config.get(key)
        every = value if isinstance(value, list | tuple) else [value]
        if value is not None and not all(isinstance(one, Mapping) for one in every):
            raise ExperimentError(
                f"{key} is {str(value)[:200]!r}; allowed are settings by their names, or a list of them"
            )
    for key, instead in SUITES.items():
        if config.get(key):
            raise ExperimentError(f"{key} is {config[key]!r}, which the suite sets for each of its runs; {instead}")
    for key, least in WHOLE.items():
        value = at(config, key)
        if value is not None and (type(value) is not int or value < least):
            raise ExperimentError(f"{key} is {value!r}; allowed are whole numbers from {least}")
        if value is not None and key.endswith("num_workers"):
            require_room(f"{key}={value}", value)
            tell_crowded(f"{key}={value}", value)
    seed = at(config, "randomness.seed")
    if seed is not None and seed > MOST_SEED:
        raise ExperimentError(f"randomness.seed is {seed}; allowed are whole numbers from 0 to {MOST_SEED}")
    for key in AT_LEAST_0:
        value = at(config, key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < math.inf):
            raise ExperimentError(f"{key} is {value!r}; allowed are finite numbers from 0")
    check_perplexity(config.get("perplexity") or {})
    hooks = _hooks(config)
    size = config.get("crop_size")
    if size is not None and not is_size(size):
        raise ExperimentError(f"crop_size is {size!r}; allowed are two whole numbers from 1")
    if size is not None:
        _check_crop(config, tuple(size))
    _check_order(config)
    if at(config, "optim_wrapper.type") == "AmpOptimWrapper":
        _need_accelerator()
        own = [hook.get("method") for hook in hooks if hook["type"] == HOOK]
        for method in (at(config, "lowrank.method"), *own):
            check_precision(method, "optim_wrapper.type is AmpOptimWrapper, mixed precision,")


def _hooks(config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    hooks: Any = config.get("custom_hooks") or []
    if not isinstance(hooks, Sequence) or not all(isinstance(hook, Mapping) and "type" in hook for hook in hooks):
        raise ExperimentError(f"custom_hooks is {str(hooks)[:200]}; allowed is a list of settings, each with its type")
    for hook in hooks:
        if hook["type"] == HOOK and not isinstance(hook.get("method"), Mapping):
            method = str(hook.get("method"))[:200]
            raise ExperimentError(f"the method of {HOOK} is {method!r}; allowed are settings with a type, as of HOSVD")
        if hook["type"] == HOOK:
            check_hook(hook)
    return hooks


def is_size(size: Any) -> bool:
    """Whether a setting is a height and a width."""
    return isinstance(size, Sequence) and len(size) == 2 and all(type(one) is int and one > 0 for one in size)


def _check_crop(config: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Refuse a `crop_size` that is not what the config trains on: the record and the budget go by it, and nothing else.

    Only what says it in the usual places is looked at.
    """
    for where, given in _sizes(config):
        other = (given, given) if isinstance(given, int) else given
        if is_size(other) and tuple(other) != size:
            raise ExperimentError(
                f"crop_size is {size}, by which the run's record and budget go, and {where} is {tuple(other)}; set all "
                f"of them alike"
            )


def _steps(config: Mapping[str, Any]) -> tuple[str, Sequence[Any]]:
    """The transforms of images for training, with their place in the config."""
    key = "train_dataloader.dataset"
    while isinstance(at(config, f"{key}.dataset"), Mapping):
        key += ".dataset"
    steps = at(config, f"{key}.pipeline")
    return f"{key}.pipeline", steps if isinstance(steps, list | tuple) else ()


def _check_order(config: Mapping[str, Any]) -> None:
    """Refuse to train on images that are moved before their label maps are there to be moved with them."""
    where, steps = _steps(config)
    kinds = [step.get("type") if isinstance(step, Mapping) else None for step in steps]
    ahead = kinds[: kinds.index("LoadAnnotations")] if "LoadAnnotations" in kinds else []
    if moved := [(number, kind) for number, kind in enumerate(ahead) if kind in MOVING]:
        number, kind = moved[0]
        raise ExperimentError(
            f"{where}.{number} is {kind}, ahead of LoadAnnotations, so that it would move pixels and not their labels; "
            f"put LoadAnnotations ahead of it"
        )


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What images for training are padded and cut to, each with its place in the config."""
    yield "model.data_preprocessor.size", at(config, "model.data_preprocessor.size")
    where, steps = _steps(config)
    sized = [
        (number, step)
        for number, step in enumerate(steps)
        if isinstance(step, Mapping) and step.keys() & {"scale", "size", "crop_size"}
    ]
    if sized and "crop_size" in sized[-1][1]:  # else it is cut before it has its size
        yield f"{where}.{sized[-1][0]}.crop_size", sized[-1][1]["crop_size"]


def _need_accelerator() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ExperimentError(
            "optim_wrapper.type is AmpOptimWrapper, mixed precision, which needs an accelerator, and there is none; "
            "leave --amp out, or set it to OptimWrapper"
        )
