"""Settings that MMEngine and MMSegmentation take without a word, and that have no effect or stop the run later."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric

from experiment import ExperimentError
from segmentation.parts import at

_CLIPPING: dict[str, Callable[..., Any]] = {
    "norm": torch.nn.utils.clip_grad_norm_,
    "value": torch.nn.utils.clip_grad_value_,
}
# What MMEngine's constructor of optimizers looks for; it passes over all else.
_CONSTRUCTOR = "DefaultOptimWrapperConstructor"
_PARAMWISE = (
    *("custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult", "dwconv_decay_mult", "flat_decay_mult"),
    *("dcn_offset_lr_mult", "bypass_duplicate"),
)
_OF_KEY = ("lr_mult", "decay_mult")
_ENVIRONMENT = {  # likewise
    "env_cfg": ("cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"),
    "env_cfg.mp_cfg": ("mp_start_method", "opencv_num_threads"),
}
_ENCODER_DECODERS = ("EncoderDecoder", "CascadeEncoderDecoder")
_MODES = {"whole": (), "slide": ("crop_size", "stride")}  # of test_cfg, with what each needs


def require_read(config: Config) -> None:
    """Refuse settings of a training run that nothing would read, or that would stop it after its first steps.

    Raises:
        ExperimentError: there is one; names it and what is allowed.
    """
    settings = config.to_dict()
    for where, allowed in _ENVIRONMENT.items():
        _require_names(where, at(settings, where) or {}, allowed)
    seeding = [*inspect.signature(Runner.set_randomness).parameters][1:]
    _require_names("randomness", settings["randomness"], seeding)
    wrapper = settings["optim_wrapper"]
    _require_clipping(wrapper.get("clip_grad"))
    if wrapper.get("constructor", _CONSTRUCTOR) == _CONSTRUCTOR:
        _require_paramwise(wrapper.get("paramwise_cfg"))
    _require_measures(settings.get("val_evaluator") or [])
    _require_inference(settings["model"])
    if settings["train_cfg"].get("max_iters") is not None:
        _require_iterations(settings)
    elif at(settings, "train_dataloader.sampler.type") in ("InfiniteSampler", "PlacedSampler"):
        raise ExperimentError(
            "train_cfg counts epochs and train_dataloader.sampler is an InfiniteSampler, whose first epoch has no end; "
            "set its type to DefaultSampler, or train_cfg to IterBasedTrainLoop with max_iters"
        )


def _require_names(where: str, settings: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for name in settings:
        if name not in allowed:
            raise ExperimentError(f"{where} has the setting {name!r}; allowed: {', '.join(allowed)}")


def _require_clipping(settings: Any) -> None:
    """The function that clips gradients would refuse other names, at the first step."""
    if not isinstance(settings, Mapping):
        return
    clip = _CLIPPING.get(settings.get("type", "norm"))
    if clip is not None:  # else MMEngine says so when it is built
        allowed = ["type", *list(inspect.signature(clip).parameters)[1:]]
        _require_names("optim_wrapper.clip_grad", settings, allowed)


def _require_paramwise(settings: Any) -> None:
    if not isinstance(settings, Mapping):
        return
    _require_names("optim_wrapper.paramwise_cfg", settings, _PARAMWISE)
    keys = settings.get("custom_keys")
    for key, own in keys.items() if isinstance(keys, Mapping) else ():
        if isinstance(own, Mapping):
            _require_names(f"optim_wrapper.paramwise_cfg.custom_keys[{key!r}]", own, _OF_KEY)


def _require_measures(given: Any) -> None:
    """MMSegmentation's mIoU takes any names."""
    for evaluator in given if isinstance(given, list | tuple) else [given]:
        if evaluator.get("type") in (IoUMetric, IoUMetric.__name__):
            names = [*inspect.signature(IoUMetric).parameters][:-1]  # the last one is for all others
            _require_names("val_evaluator", evaluator, ["type", *names])


def _require_inference(model: Mapping[str, Any]) -> None:
    """How images are validated would be looked at by the first validation."""
    if model.get("type") not in _ENCODER_DECODERS or not isinstance(model.get("test_cfg"), Mapping):
        return
    settings = model["test_cfg"]
    mode = settings.get("mode", "whole")
    if mode not in _MODES:
        raise ExperimentError(f"model.test_cfg.mode is {mode!r}; allowed: {', '.join(map(repr, _MODES))}")
    if lacking := [name for name in _MODES[mode] if settings.get(name) is None]:
        raise ExperimentError(f"model.test_cfg.mode is {mode!r}, which needs {' and '.join(lacking)}, in pixels")


def _require_iterations(config: Mapping[str, Any]) -> None:
    """A run that is counted in iterations is one epoch for MMEngine, at whose end all that counts epochs would act."""
    for where, schedule in _schedules(config.get("param_scheduler")):
        if schedule.get("by_epoch", True) and not schedule.get("convert_to_iter_based"):
            raise ExperimentError(
                f"{where} counts epochs and train_cfg iterations, so that it would have no effect; set "
                f"{where}.by_epoch=False, and its lengths in iterations"
            )
    saving = at(config, "default_hooks.checkpoint") or {}
    if saving.get("type") == "CheckpointHook" and "interval" in saving and saving.get("by_epoch", True):
        raise ExperimentError(
            "default_hooks.checkpoint.interval counts epochs and train_cfg iterations, so that it would have no "
            "effect; set default_hooks.checkpoint.by_epoch=False"
        )


def _schedules(given: Any, where: str = "param_scheduler") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each scheduler with its place, of one, of several, or of several for each optimizer."""
    if isinstance(given, Mapping) and "type" in given:
        yield where, given
        return
    parts = given.items() if isinstance(given, Mapping) else enumerate(given or [])
    for name, inner in parts:
        yield from _schedules(inner, f"{where}.{name}")
