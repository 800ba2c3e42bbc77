"""What MMEngine says of a part of a config that it cannot build, as one line for who wrote the config."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping

from mmengine.config import Config
from mmengine.registry import OPTIMIZERS, build_from_cfg
from mmengine.runner import Runner

from experiment import ExperimentError

_OF_RUNNER = (Runner.build_dataloader, Runner.build_log_processor, Runner.build_train_loop, Runner.build_val_loop)
_BUILDERS = {build_from_cfg.__code__, *(one.__code__ for one in _OF_RUNNER)}
_THEIRS = (
    "mmengine",
    "mmcv",
    "mmseg",
    "torch.optim",
    "segmentation.adafactor",
)  # packages whose errors tell of the config, and not of code of one's own


def require_optimizer(config: Config) -> None:
    """Refuse an optimizer of no type that there is, which MMEngine would take for a function to call.

    Raises:
        ExperimentError: see above; names the type.
    """
    wrapper = config.optim_wrapper
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
