"""The folder of one run: whether it is done, interrupted or new, and a lock so that only one process works in it."""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiment.checkpoints import BEST, PREVIOUS, UNUSABLE
from experiment.errors import ExperimentError
from experiment.files import remove_all, remove_empty, remove_parts, try_place, write_whole
from experiment.jobs import FAILURE
from experiment.lock import LOCK, hold
from experiment.record import RESULT, TABLE, Record, Run, is_result
from experiment.sources import Sources, method_sources, require_same, save_sources

ANOTHER = "delete that folder or give another --runs-dir"
CONFIG, IDENTITY, DATA, DATASET = "config.yaml", "identity.json", "data_fingerprint", "dataset"
_WEIGHTS = (".ckpt", ".pth", ".pt", ".safetensors", UNUSABLE)  # how files of weights end, also those of one's own hooks
_BESIDE = (DATA, DATASET)  # what the file of the identity holds besides, of which no hash is taken


class Status(enum.Enum):
    """What a run's folder holds."""

    NEW = "new"
    INTERRUPTED = "interrupted"
    DONE = "done"


class RunFolder:
    """One run's folder.

    Args:
        path: the folder; need not exist.
        identity: everything that has an influence on the run's result. Two runs of one identity are the same run.
        result: name of the file that a finished run leaves.
        data_fingerprint: of the data that the run would read; None if that is not there or not to be compared.
        last: name of the file that is there once the run can be resumed.
        run: whose record the result has to be, if it is one.
        sources: of the code of the run's model and of what else is one's own, see `experiment.sources`; those of its
            methods are found by themselves.
        advice: what to do where the folder holds another run.
        earlier_data: what an earlier version noted of the same data, if that was another fingerprint.

    Attributes:
        repeated: images that are tested as well as trained or validated on, once the data set was looked at.

    Raises:
        ExperimentError: the name of the folder is not UTF-8.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        result: str,
        data_fingerprint: str | None = None,
        last: str = "checkpoints/last.ckpt",
        run: Run | None = None,
        sources: Sources | None = None,
        advice: str = ANOTHER,
        earlier_data: str | None = None,
    ) -> None:
        self._run, self._made = run, (identity, result, data_fingerprint, last, run, sources, advice, earlier_data)
        self._earlier_data = earlier_data
        self._advice = advice
        self._model_sources = sources or {}
        self.path, self.result, self._last = path, path / result, path / last
        self.data_fingerprint, self.repeated = data_fingerprint, 0
        self._asked = _as_json(identity)
        self.checkpoints = path / "checkpoints"
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ExperimentError(f"the name of {path} is no UTF-8; rename it, or give another --runs-dir") from None

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """The run's identity; as the folder has it where that is equal, so that its hash stays what it was."""
        stored = _without_beside(self._stored_identity() or {})
        return stored if stored == self._asked else self._asked

    @functools.cached_property
    def sources(self) -> Sources:
        """Files and hashes of the code of the run's methods, model and what else is one's own."""
        return {**method_sources(self._asked), **self._model_sources}

    @property
    def identity_hash(self) -> str:
        """A short hash of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, or the file that names it, if there is one."""
        others = (self.checkpoints / PREVIOUS, self.checkpoints / BEST)  # there without the last after some crashes
        return next((path for path in (self._last, *others) if path.exists()), None)

    def status(self) -> Status:
        """What the folder holds of this very run.

        Raises:
            ExperimentError: it holds a run of another identity, on other data, or of other code.
        """
        self.require_this_run()
        if is_result(self.result, self.identity_hash, self._run):
            return Status.DONE
        return Status.INTERRUPTED if self.last_checkpoint is not None else Status.NEW

    def require_this_run(self, advice: str | None = None, aside: Collection[str] = ()) -> None:
        """Refuse what the folder holds, unless it is of this very run, or nothing that could be lost.

        Args:
            advice: what else to do than to restore what has changed; by default as this was told.
            aside: full names of settings that may differ, such as "model.weights" where only the result is looked at.

        Raises:
            ExperimentError: as of `status`.
        """
        advice = self._advice if advice is None else advice
        stored = self._stored_identity()
        if not self._has_saved:  # as where a run was killed in its first epoch, and is to begin with a smaller batch
            return
        data = (stored or {}).get(DATA)
        stored = None if stored is None else _without_beside(stored)
        if data is not None and self.data_fingerprint not in (None, data) and data != self._earlier_data:
            raise ExperimentError(
                f"{self.path} holds a run on other data (fingerprint {data} there, {self.data_fingerprint} here); "
                f"restore the data set, or {advice}"
            )
        if stored is not None and stored != self.identity:
            difference = _difference(stored, self.identity, aside)
            if difference or not aside:
                raise ExperimentError(f"{self.path} holds a run with other settings ({difference}); {advice}")
        require_same(self.path, self.sources, advice)

    @property
    def _has_saved(self) -> bool:
        """Whether the folder holds anything that training or measuring led to: a result, or weights of any name."""
        results = (self.result, self.path / RESULT, self.path / TABLE)
        if self.last_checkpoint is not None or any(path.exists() for path in results):
            return True
        return any(name.endswith(_WEIGHTS) for _, _, names in os.walk(self.path) for name in names)

    def at(self, path: Path) -> RunFolder:
        """The same run in another folder."""
        return RunFolder(path, *self._made)

    @property
    def known(self) -> bool:
        """Whether the folder says which run it holds."""
        return (self.path / IDENTITY).is_file()

    @property
    def difference(self) -> str | None:
        """In which settings the run that it holds is another one; None if it is this one."""
        stored = _without_beside(self._stored_identity() or {})
        return None if stored == self.identity else _difference(stored, self.identity)

    def take_over(self, other: RunFolder) -> None:
        """Make another folder of this very run this one, which is not there; its record says which run it is now.

        Raises:
            ExperimentError: it cannot be moved.
            InUseError: another process is at work in it.
        """
        try:
            with hold(other.path) as lock:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                other.path.rename(self.path)
                (self.path / lock.name).unlink()  # it has moved as well
                if self._run is not None and is_result(self.result, self.identity_hash):
                    replace(Record.load(self.result), run=self._run).save(self.path)
        except OSError as error:
            raise ExperimentError(f"{other.path} cannot be moved to {self.path} ({error.strerror})") from None

    def _stored_identity(self) -> dict[str, Any] | None:
        path = self.path / IDENTITY
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ExperimentError(f"{path} cannot be read ({error}); delete {self.path}") from None
        return content if isinstance(content, dict) else {}

    @contextlib.contextmanager
    def locked(self, config: str, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Make the folder, hold its lock, and write the config beside the identity.

        Args:
            config: the resolved config as YAML, from which the run can be started again.
            begun: whether there is something of the run to keep. What fails while there is not, in a folder that was
                not there, or empty but for a log, leaves nothing behind.

        Raises:
            ExperimentError: the folder cannot be written, or holds another run, see `status`.
            InUseError: another process is at work in it; says which.
        """
        made = [one for one in (self.path, *self.path.parents) if not one.exists()]
        with contextlib.ExitStack() as stack:
            with self._writing():
                self._last.parent.mkdir(parents=True, exist_ok=True)
                unmade = stack.enter_context(contextlib.ExitStack())  # what is left to do once the lock is gone
                stack.enter_context(hold(self.path))
            self.require_this_run()  # another process may have been at work in it until now
            remove_parts(self.path)
            fresh = not any(path.is_file() for path in self.path.rglob("*") if not _is_beside(path))
            try:
                self._say_which(config)
                yield
                (self.path / FAILURE).unlink(missing_ok=True)  # of an earlier try
            except BaseException:
                if fresh and not begun():
                    remove_all(path for path in self.path.iterdir() if not path.name.startswith(LOCK))
                    unmade.callback(remove_empty, made)
                raise

    def require_place(self) -> None:
        """Refuse a folder that cannot be made or written, as `locked` does, and leave it as it is.

        Raises:
            ExperimentError: see above.
        """
        with self._writing():
            try_place(self.path)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What is written in this block is written where the run is to be."""
        try:
            if self.result.is_dir():
                raise IsADirectoryError(0, f"{self.result.name} is a folder")
            yield
        except OSError as error:
            raise ExperimentError(
                f"the run folder {self.path} cannot be written ({error.strerror}); give another --runs-dir"
            ) from None

    def _say_which(self, config: str) -> None:
        write_whole(self.path / CONFIG, config)
        identity = self.identity | ({DATA: self.data_fingerprint} if self.data_fingerprint else {})
        identity |= {DATASET: self._run.dataset} if self._run is not None else {}
        save_sources(self.path, self.sources)
        write_whole(self.path / IDENTITY, json.dumps(identity, indent=1, sort_keys=True) + "\n")


def _is_beside(path: Path) -> bool:
    """Whether a file is nothing of a run: of a process that asks for the folder, or why an earlier try failed."""
    return path.name.startswith(LOCK) or path.name == FAILURE


def _without_beside(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stored.items() if key not in _BESIDE}


def _as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as JSON gives it back, with 2.0 as 2.

    A command line reads an option of type `int | float` as 2 in one process and as 2.0 in another, as typing's cache of
    unions has it; both are one run, and their hash has to be one.
    """
    text = json.dumps(identity, sort_keys=True, default=str)
    return json.loads(text, parse_float=_number)


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _difference(stored: Mapping[str, Any], asked: Mapping[str, Any], aside: Collection[str] = ()) -> str:
    there, here = _flat(stored), _flat(asked)
    every = sorted((there.keys() | here.keys()) - set(aside))
    keys = [key for key in every if there.get(key) != here.get(key)]
    named = {key: key if key.isprintable() else repr(key) for key in keys[:3]}
    shown = [f"{name} is {there.get(key)!r} there and {here.get(key)!r} here" for key, name in named.items()]
    return "; ".join(shown) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")
