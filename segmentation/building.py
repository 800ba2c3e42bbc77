"""What MMEngine says of a part of a config that it cannot build, as one line for who wrote the config."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS, build_from_cfg
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric

from experiment import ExperimentError

_CLIPPING: dict[str, Callable[..., Any]] = {
    "norm": torch.nn.utils.clip_grad_norm_,
    "value": torch.nn.utils.clip_grad_value_,
}
# What MMEngine's constructor of optimizers looks for; it passes over all else.
_PARAMWISE = {
    *("custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult", "dwconv_decay_mult", "flat_decay_mult"),
    *("dcn_offset_lr_mult", "bypass_duplicate"),
}
_OF_KEY = {"lr_mult", "decay_mult"}
_CONSTRUCTOR = "DefaultOptimWrapperConstructor"
_OF_RUNNER = (Runner.build_dataloader, Runner.build_log_processor, Runner.build_train_loop, Runner.build_val_loop)
_BUILDERS = {build_from_cfg.__code__, *(one.__code__ for one in _OF_RUNNER)}
_THEIRS = (
    "mmengine",
    "mmcv",
    "mmseg",
    "torch.optim",
)  # packages whose errors tell of the config, and not of code of one's own


def require_optimizer(config: Config) -> None:
    """Refuse an optimizer of no type that there is, which MMEngine would take for a function to call, and settings
    beside it that it would find wrong at the first step, or never.

    Raises:
        ExperimentError: see above; names the type or the setting.
    """
    wrapper = config.optim_wrapper
    _require_clipping(wrapper.get("clip_grad"))
    if wrapper.get("constructor", _CONSTRUCTOR) == _CONSTRUCTOR:
        _require_paramwise(wrapper.get("paramwise_cfg"))
    optimizer = wrapper.get("optimizer")
    if "constructor" in wrapper and not isinstance(optimizer, Mapping):  # which makes them as it likes
        return
    kind = optimizer.get("type") if isinstance(optimizer, Mapping) else None
    if not callable(kind) and (not isinstance(kind, str) or OPTIMIZERS.get(kind) is None):
        there = "missing" if kind is None else repr(kind)
        raise ExperimentError(
            f"optim_wrapper.optimizer.type is {there}; allowed is the name of an optimizer, such as SGD or AdamW, or "
            f"of one of your own, whose module is named in custom_imports"
        )


def require_measures(config: Config) -> None:
    """Refuse settings of MMSegmentation's mIoU that it takes and passes over.

    Raises:
        ExperimentError: there is one; names it.
    """
    given = config.get("val_evaluator") or []
    for evaluator in given if isinstance(given, list | tuple) else [given]:
        if evaluator.get("type") in (IoUMetric, IoUMetric.__name__):
            names = [*inspect.signature(IoUMetric).parameters][:-1]  # the last one takes all others
            _require_names("val_evaluator", evaluator, ["type", *names])


def _require_clipping(settings: Any) -> None:
    """Refuse names that the function which clips gradients does not take, at the first step."""
    if not isinstance(settings, Mapping):
        return
    clip = _CLIPPING.get(settings.get("type", "norm"))
    if clip is not None:  # else MMEngine says so when it is built
        allowed = ["type", *list(inspect.signature(clip).parameters)[1:]]
        _require_names("optim_wrapper.clip_grad", settings, allowed)


def _require_paramwise(settings: Any) -> None:
    """Refuse names that have no effect, of settings of single parameters."""
    if not isinstance(settings, Mapping):
        return
    _require_names("optim_wrapper.paramwise_cfg", settings, sorted(_PARAMWISE))
    keys = settings.get("custom_keys")
    for key, own in keys.items() if isinstance(keys, Mapping) else ():
        if isinstance(own, Mapping):
            _require_names(f"optim_wrapper.paramwise_cfg.custom_keys[{key!r}]", own, sorted(_OF_KEY))


def _require_names(where: str, settings: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for name in settings:
        if name not in allowed:
            raise ExperimentError(f"{where} has the setting {name!r}; allowed: {', '.join(allowed)}")


@contextlib.contextmanager
def mendable_parts() -> Iterator[None]:
    """In this block, a part of a type or with a setting that there is not is an `ExperimentError`.

    An error from within code of one's own stays as it is, with its traceback.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        while_building = any(frame.f_code in _BUILDERS for frame in frames)
        module = f"{frames[-1].f_globals.get('__name__')}."
        if not while_building or not module.startswith(tuple(f"{package}." for package in _THEIRS)):
            raise
        said = str(error.args[0]) if error.args else type(error).__name__  # of a KeyError, without the quotes
        reason = " ".join(said.partition(" Please check")[0].split()).rstrip(".")
        raise ExperimentError(
            f"a part of the config cannot be built: {reason}; mend its type or settings, or name the module that "
            f"registers it in custom_imports"
        ) from None
