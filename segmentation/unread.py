"""Settings that MMEngine and MMSegmentation take without a word, and that have no effect or stop the run later."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from mmseg.registry import MODELS

from experiment import ExperimentError
from segmentation.parts import at
from segmentation.settings import is_size

LEVELS = logging.getLevelNamesMapping()
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
_READS_TRAIN_CFG = ("PointHead",)  # of MMSegmentation's heads; the others are given model.train_cfg and pass over it
_OF_INFERENCE = ("mode", "crop_size", "stride")
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
    if (level := settings.get("log_level", "INFO")) not in (*LEVELS, *LEVELS.values()):
        raise ExperimentError(f"log_level is {level!r}; allowed: {', '.join(LEVELS)}")
    wrapper = settings["optim_wrapper"]
    _require_clipping(wrapper.get("clip_grad"))
    if wrapper.get("constructor", _CONSTRUCTOR) == _CONSTRUCTOR:
        _require_paramwise(wrapper.get("paramwise_cfg"))
    _require_measures(settings.get("val_evaluator") or [])
    _require_inference(settings["model"])
    _require_no_training(settings["model"])
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
    if model.get("type") not in _ENCODER_DECODERS:
        return
    settings = model.get("test_cfg")
    if not isinstance(settings, Mapping) or "mode" not in settings:
        raise ExperimentError("model.test_cfg has no mode; allowed: 'whole', and 'slide' with crop_size and stride")
    for name in settings:
        near = difflib.get_close_matches(name, _OF_INFERENCE, 1, cutoff=0.75)
        if near and name not in _OF_INFERENCE:  # else a head of one's own may read it
            raise ExperimentError(f"model.test_cfg has the setting {name!r}; did you mean {near[0]!r}?")
    mode = settings["mode"]
    if mode not in _MODES:
        raise ExperimentError(f"model.test_cfg.mode is {mode!r}; allowed: {', '.join(map(repr, _MODES))}")
    if lacking := [name for name in _MODES[mode] if settings.get(name) is None]:
        raise ExperimentError(f"model.test_cfg.mode is {mode!r}, which needs {' and '.join(lacking)}, in pixels")
    sizes = [settings[name] for name in _MODES[mode]]
    for name, size in zip(_MODES[mode], sizes, strict=True):
        if not is_size(size):
            raise ExperimentError(f"model.test_cfg.{name} is {size!r}; allowed are two whole numbers from 1")
    if sizes and any(step > edge for edge, step in zip(*sizes, strict=True)):
        raise ExperimentError(
            f"model.test_cfg.stride is {sizes[1]}, above its crop_size {sizes[0]}, so that pixels between the windows "
            f"would have no prediction; lower it"
        )


def _require_no_training(model: Mapping[str, Any]) -> None:
    """What is set for the training of heads would be passed over where no head reads it."""
    given = [name for name, value in (model.get("train_cfg") or {}).items() if value is not None]
    if not given or model.get("type") not in _ENCODER_DECODERS:
        return
    heads = [one for key in ("decode_head", "auxiliary_head") for one in _each(model.get(key))]
    kinds = [MODELS.get(head["type"]) if isinstance(head.get("type"), str) else head.get("type") for head in heads]
    known = [getattr(kind, "__module__", "").partition(".")[0] == "mmseg" for kind in kinds]  # else it is one's own
    if all(known) and not any(kind.__name__ in _READS_TRAIN_CFG for kind in kinds):
        raise ExperimentError(
            f"model.train_cfg has the setting {given[0]!r}, which no head of this network reads, so that it would have "
            f"no effect; leave it out"
        )


def _each(given: Any) -> Sequence[Any]:
    """The parts of a place in a config that may have one, several or none."""
    return given if isinstance(given, list | tuple) else [] if given is None else [given]


def _require_iterations(config: Mapping[str, Any]) -> None:
    """A run that is counted in iterations is one epoch for MMEngine, at whose end all that counts epochs would act."""
    for where, schedule in _schedules(config.get("param_scheduler")):
        if schedule.get("by_epoch", True) and not schedule.get("convert_to_iter_based"):
            raise ExperimentError(
                f"{where} counts epochs and train_cfg iterations, so that it would have no effect; set "
                f"{where}.by_epoch=False, and its lengths in iterations"
            )
        length = config["train_cfg"]["max_iters"]
        if schedule.get("begin", 0) >= length:
            raise ExperimentError(
                f"{where}.begin is {schedule['begin']}, and the run ends at iteration {length}, so that it would have "
                f"no effect; leave it out, or let it begin before"
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
    if given is not None and not isinstance(given, Mapping | list | tuple):
        raise ExperimentError(f"{where} is {given!r}; allowed are the settings of a scheduler, with its type")
    parts = given.items() if isinstance(given, Mapping) else enumerate(given or [])
    for name, inner in parts:
        yield from _schedules(inner, f"{where}.{name}")
