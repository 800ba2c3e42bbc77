"""The C allocator's setting that all commands of the suite run with.

With glibc's defaults every large tensor is mapped from the kernel and given back at once, so each step faults its pages
in again; that can take most of a step's time on a CPU. Raising two thresholds keeps freed memory in the process. It
holds for every method alike, and can be turned off with the environment variable `LOWRANK_ALLOCATOR=default`.
"""

from __future__ import annotations

import ctypes
import os

from experiment.errors import ExperimentError

_SWITCH = "LOWRANK_ALLOCATOR"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> str:
    """Apply the setting, where the C library has it. Returns what is in force, for the record.

    Raises:
        ExperimentError: the environment variable is something else.
    """
    asked = os.environ.get(_SWITCH)
    if asked == "default":
        return "default"
    if asked:
        raise ExperimentError(f"the environment variable {_SWITCH} is {asked!r}; allowed is default, or leave it out")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not mallopt(_M_MMAP_THRESHOLD, _LARGEST) or not mallopt(_M_TRIM_THRESHOLD, _LARGEST):
        return "default"
    return "freed memory kept"
