"""The folder of one run: whether it is done, interrupted or new, and a lock so that only one process works in it."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from experiment.errors import ExperimentError
from experiment.files import write_whole
from experiment.record import RESULT, Record

CONFIG = "config.yaml"


class Status(enum.Enum):
    """What a run's folder holds."""

    NEW = "new"
    INTERRUPTED = "interrupted"
    DONE = "done"


def config_hash(config: Mapping[str, Any]) -> str:
    """A short fingerprint of a resolved config."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


class RunFolder:
    """One run's folder.

    Args:
        path: the folder; need not exist.
        config: the resolved config of the run that is asked for, without what has no influence on its result.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config = path, config
        self.checkpoints = path / "checkpoints"

    @property
    def config_hash(self) -> str:
        """Fingerprint of the config that is asked for."""
        return config_hash(self.config)

    def status(self) -> Status:
        """What the folder holds of this very run.

        Raises:
            ExperimentError: it holds a run of other settings, or a damaged record.
        """
        stored = self._stored_config()
        if stored is not None and config_hash(stored) != self.config_hash:
            raise ExperimentError(
                f"{self.path} holds a run with other settings ({_difference(stored, self.config)}); "
                f"delete it or give another runs folder"
            )
        if (self.path / RESULT).exists():
            Record.load(self.path / RESULT)
            return Status.DONE
        return Status.INTERRUPTED if self.last_checkpoint is not None else Status.NEW

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, if there is one."""
        path = self.checkpoints / "last.ckpt"
        return path if path.exists() else None

    def _stored_config(self) -> dict[str, Any] | None:
        path = self.path / CONFIG
        if not path.exists():
            return None
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ExperimentError(f"{path} cannot be read ({error}); delete {self.path}") from None
        return content if isinstance(content, dict) else {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, write the config, and hold the folder's lock.

        Raises:
            ExperimentError: the folder cannot be written, or another process is at work in it.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise ExperimentError(
                f"the run folder {self.path} cannot be written ({error.strerror}); give another runs folder"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ExperimentError(f"another process is at work in {self.path}; wait for it or stop it") from None
            write_whole(self.path / CONFIG, yaml.safe_dump(dict(self.config), sort_keys=True))
            yield


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _difference(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    there, here = _flat(stored), _flat(asked)
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    shown = [f"{key}: {there.get(key)!r} there, {here.get(key)!r} asked" for key in keys[:3]]
    return "; ".join(shown) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")
