"""Where a result comes from: code, packages, hardware and data."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "torchvision", "pytorch-lightning", "onedl-mmengine", "onedl-mmcv", "onedl-mmsegmentation"),
    *("numpy", "lowrank"),
)
CODE = ("lowrank", "experiment", "classification", "segmentation")


def provenance(config_hash: str, data_fingerprint: str, allocator: str) -> dict[str, Any]:
    """The provenance of a run on this machine, by this code.

    Args:
        config_hash: hash of the run's identity.
        data_fingerprint: hash of its data.
        allocator: what `experiment.allocator.keep_freed_memory` returned.
    """
    return {
        "config_hash": config_hash,
        "code_version": code_version(Path(__file__).parent.parent),
        "data_fingerprint": data_fingerprint,
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": hardware(),
        "allocator": allocator,
    }


def plain(value: Any) -> Any:
    """A setting as a record has it: a number, a text or a truth value as it is, of anything else a fingerprint."""
    if isinstance(value, int | float | str):
        return value
    return fingerprint([json.dumps(value, sort_keys=True, default=str).encode()])


LONGEST = 200  # letters of a setting that is kept as it is


def untold(identity: Mapping[str, Any], told: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All settings of an identity by their full names, such as "model.method.init_args.ranks", without those of which
    `told` has what `plain` gives.

    None is left out, as it stands for what is not given. Long values are told by a fingerprint.
    """
    found: dict[str, Any] = {}
    for key, value in identity.items():
        name = f"{prefix}{key}"
        if value is None or told.get(name) == plain(value):
            continue
        if isinstance(value, list | tuple) and value and all(isinstance(one, Mapping) for one in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            found |= untold({str(inner): one for inner, one in value.items()}, told, f"{name}.")
        else:
            text = json.dumps(value, sort_keys=True, default=str)
            found[name] = json.loads(text) if len(text) <= LONGEST else fingerprint([text.encode()])
    return found


def code_version(root: Path) -> str:
    """A hash of the suite's own Python files, and the commit if there is one."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "no commit"
    return f"{commit} sources {digest.hexdigest()[:12]}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def hardware() -> str:
    """Processor, number of threads and, where there is one, accelerator."""
    import torch

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([f"{processor}, {torch.get_num_threads()} threads", *devices])


def fingerprint(parts: Iterable[bytes]) -> str:
    """A short hash of data, given as bytes in a fixed order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]
