"""What MMEngine says of a part of a config that it cannot build, as one line for who wrote the config."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

from mmengine.registry import build_from_cfg
from mmengine.runner import Runner

from experiment import ExperimentError

_BUILDERS = {build_from_cfg.__code__, Runner.build_dataloader.__code__}
_THEIRS = ("mmengine", "mmcv", "mmseg")  # packages whose errors tell of the config, and not of code of one's own


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
        package = str(frames[-1].f_globals.get("__name__")).partition(".")[0]
        if not while_building or package not in _THEIRS:
            raise
        said = str(error.args[0]) if error.args else type(error).__name__  # of a KeyError, without the quotes
        reason = " ".join(said.partition(" Please check")[0].split()).rstrip(".")
        raise ExperimentError(
            f"a part of the config cannot be built: {reason}; mend its type or settings, or name the module that "
            f"registers it in custom_imports"
        ) from None
