"""The built library and the GPU's kernels, loaded at their first use, and whether they are in use."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lowrank.errors import SettingError
from lowrank.kernels.build import Unavailable, built

SWITCH = "LOWRANK_KERNELS"
_ALLOWED = ("", "auto", "off")
_COUNT, _POINTER, _NUMBER, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double, ctypes.c_int
_INT8 = (("round", "float"), ("restore", "int8"))
_SIGNATURES = {
    "clamp_float": (_POINTER, _POINTER, _POINTER, _COUNT, _INT, _NUMBER, _NUMBER, _INT),
    **{f"pack_{kind}": (_POINTER, _POINTER, _COUNT, _INT, _NUMBER, _NUMBER, _INT) for kind in ("float", "double")},
    **{
        f"apply_{kind}": (_POINTER, _POINTER, _POINTER, _COUNT, _INT, _NUMBER, _NUMBER, _INT)
        for kind in ("float", "double")
    },
    "rows_float": (_POINTER, _POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _INT),
    **{f"{way}_blocks_{kind}": (_POINTER, _POINTER, _POINTER, _COUNT, _INT) for way, kind in _INT8},
    **{f"{way}_columns_{kind}": (_POINTER, _POINTER, _POINTER, _COUNT, _COUNT) for way, kind in _INT8},
    "subspace_room_float": (_POINTER,),
    "subspace_float": (_POINTER, _POINTER, _INT),
    "clamped_room_float": (_POINTER,),
    "clamped_float": (_POINTER, _POINTER, _INT, _NUMBER, _NUMBER, _INT),
    "depthwise_room_float": (_POINTER,),
    "depthwise_float": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT),
    "project_float": (_POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _INT),
    "masked_project_float": (_POINTER, _POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _INT),
    "contract_room_float": (_POINTER, _INT),
    "contract_float": (_POINTER, _POINTER, _INT),
    "affine_float": (*[_POINTER] * 5, _COUNT, _COUNT, _COUNT, _NUMBER, _NUMBER, _INT),
    "gate_float": (*[_POINTER] * 3, _COUNT, _INT, _INT),
    "slopes_float": (*[_POINTER] * 5, _COUNT, _INT, _INT),
    **{f"swap_{kind}": (_POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _INT) for kind in ("float", "half")},
    "expand_room_float": (*[_COUNT] * 4, _INT),
    "expand_float": (*[_POINTER] * 4, *[_COUNT] * 4, _INT),
    "set_width": (_INT,),
}


@dataclass(frozen=True)
class Status:
    """Whether compiled kernels are in use.

    Attributes:
        active: whether they are; otherwise PyTorch's operators do the same.
        reason: why not, or which library.
        threads: whether they work with all of PyTorch's threads, or with one.
        gpu: the same of a GPU, in words; empty where there is none.
    """

    active: bool
    reason: str
    threads: bool = False
    gpu: str = ""

    def __str__(self) -> str:
        gpu = f"; on the GPU {self.gpu}" if self.gpu else ""
        if not self.active:
            return f"no compiled kernels: {self.reason}{gpu}"
        return f"compiled kernels, {'with all threads' if self.threads else 'with one thread'}: {self.reason}{gpu}"


def wanted() -> bool:
    """Whether the environment variable `LOWRANK_KERNELS` leaves kernels switched on.

    Raises:
        SettingError: it is another word than those that are allowed, which would have no effect.
    """
    word = os.environ.get(SWITCH, "")
    if word not in _ALLOWED:
        raise SettingError(
            f"the environment variable {SWITCH} is {word!r}; allowed: {', '.join(_ALLOWED[1:])}, or leave it out"
        )
    return word != "off"


def status() -> Status:
    """Whether compiled kernels are in use, which and why; builds them, where that is still to be done.

    `LOWRANK_KERNELS=off` in the environment switches them off. Without them, training is the same and slower.

    Raises:
        SettingError: that environment variable is something else.
    """
    off = "switched off in this process"
    found = Status(False, off) if _OFF else _loaded()[1]
    return replace(found, gpu=off if _OFF else _loaded_gpu()[1]) if torch.cuda.is_available() else found


def library() -> Any | None:
    """Its functions by name, `pack_float` and so on; None where there is none, and while something is compiled, since a
    compiler would look into how it is built."""
    return None if _OFF or torch.compiler.is_compiling() else _loaded()[0]


def gpu() -> Any | None:
    """The module `lowrank.kernels.gpu`; None where it cannot be used."""
    return None if _OFF else _loaded_gpu()[0]


@contextmanager
def plain() -> Iterator[None]:
    """Without compiled kernels, in all threads of this process."""
    _OFF.append(True)
    try:
        yield
    finally:
        _OFF.pop()


_OFF: list[bool] = []


class _Library:
    """Functions of a loaded library, without the prefix of their names."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        for name, types in _SIGNATURES.items():
            function = getattr(loaded, f"lowrank_{name}")
            function.argtypes, function.restype = types, _COUNT if "_room_" in name else None
            setattr(self, name, function)
        team = _team()
        loaded.lowrank_set_team.argtypes = (_POINTER,)
        loaded.lowrank_set_team(team)
        self.threads = team is not None


@lru_cache(maxsize=1)
def _loaded() -> tuple[Any | None, Status]:
    if not wanted():
        return None, Status(False, f"{SWITCH} is off")
    try:
        path = built()
        found = _Library(path)
    except (Unavailable, OSError, AttributeError) as error:  # the two last: not loadable, or not this library
        return None, Status(False, str(error))
    return found, Status(True, str(path), found.threads)


@lru_cache(maxsize=1)
def _loaded_gpu() -> tuple[Any | None, str]:
    """The GPU's kernels, tried once, and what there is to say of them."""
    if not wanted():
        return None, _loaded()[1].reason
    try:
        from lowrank.kernels import gpu as found

        found.try_out()
    except Exception as error:  # whatever a missing Triton, or its compiler, raises
        return None, f"none: {' '.join(str(error).split())[:300]}"
    return found, f"by Triton {found.VERSION}"


def _team() -> int | None:
    """Address of the function that starts a team of the threads that PyTorch's operators work with."""
    folder = Path(torch.__file__).parent
    near = [path for place in (folder / "lib", folder.parent / "torch.libs") for path in place.glob("lib*omp*")]
    for path in near:
        try:  # only what is loaded already: a runtime of one's own would wait against PyTorch's
            runtime = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
