"""Builds the library of compiled kernels once per user and keeps it; some seconds for who runs it first."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = (
    "team.c",
    "kernels.c",
    "int8.c",
    "qr.c",
    "subspace.c",
    "depthwise.c",
    "project.c",
    "contract.c",
    "elementwise.c",
    "swap.c",
    "expand.c",
)
HEADERS = ("team.h", "clamp.h", "qr.h", "tile.h", "tiles.h", "project.h", "chains.h", "expand.h")
# For any processor of its kind: homes are shared among machines.
OPTIONS = ("-O3", "-std=c11", "-ffp-contract=fast", "-fPIC", "-shared")
SECONDS = 60  # that a compiler may take


class Unavailable(Exception):
    """There are no compiled kernels, and why."""


def cache_folder() -> Path:
    """Where built libraries lie: `LOWRANK_CACHE`, or `lowrank` in the user's cache folder."""
    own = os.environ.get("LOWRANK_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "lowrank"


def built() -> Path:
    """The library for this source, machine and compiler; built, if it is not there yet.

    Several processes may build it at once: each writes a file of its own, whose last step is a rename. Its name says
    what is in it, so that one that a full disk or a crash has cut, which would end the process, is not loaded.

    Raises:
        Unavailable: no compiler, or it fails, or nothing can be written.
    """
    compiler = _compiler()
    try:
        folder, stem = cache_folder(), f"kernels-{_key(compiler)}"
        whole = next((path for path in folder.glob(f"{stem}-*.so") if path == _named(path, stem)), None)
        if whole is None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            whole = _build(compiler, folder, stem)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        raise Unavailable(f"{error}; LOWRANK_CACHE names a folder to build in") from None
    return whole


def _named(path: Path, stem: str) -> Path:
    """What a library is called, by what is in its file."""
    return path.with_name(f"{stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:24]}.so")


def _compiler() -> list[str]:
    """The command of the C compiler: `CC`, or the first that is there."""
    given = os.environ.get("CC", "")
    try:
        own = shlex.split(given)
    except ValueError as error:
        raise Unavailable(f"CC is {given!r}, no command: {error}") from None
    found = next((path for name in own[:1] or ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if found is None:
        raise Unavailable(f"no C compiler: {f'CC names {own[0]!r}' if own else 'cc, gcc and clang'}, not found")
    return [found, *own[1:]]


def _key(compiler: list[str]) -> str:
    """Of all that the library is made of. PyTorch is no part of it: it is handed bare memory."""
    program = Path(compiler[0]).resolve().stat()
    parts = (*compiler, *OPTIONS, program.st_size, program.st_mtime_ns, sysconfig.get_platform(), *platform.libc_ver())
    text = b"".join((FOLDER / name).read_bytes() for name in (*SOURCES, *HEADERS))
    return hashlib.sha256(text + repr(parts).encode()).hexdigest()[:24]


def _build(compiler: list[str], folder: Path, stem: str) -> Path:
    handle, name = tempfile.mkstemp(prefix=stem, suffix=".part", dir=folder)
    os.close(handle)
    try:
        command = [*compiler, *OPTIONS, *(str(FOLDER / source) for source in SOURCES), "-o", name, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            raise Unavailable(f"{compiler[0]} failed: {' '.join(done.stderr.split())[:300]}")
        return Path(name).replace(_named(Path(name), stem))
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{compiler[0]} took more than {SECONDS} s") from None
    finally:
        Path(name).unlink(missing_ok=True)
