"""Several processes, one run: which of them this one is, what the first alone does, and what all of them have.

The first process writes and locks; what it decides, the others are told. In a run of one process nothing here does
anything.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from experiment.errors import ExperimentError, exit_code
from experiment.process_group import GROUP, STORE, is_started
from experiment.signals import pending

if TYPE_CHECKING:
    import torch

MEETING = timedelta(minutes=5)  # how long a process waits for the others to start
WORK = timedelta(hours=2)  # and how long for what another one does alone, such as the measurements of a record
_BY_LAUNCHERS = (  # environment variables
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE"),
)
OTHERS = "lowrank_processes"  # key of the parts of all processes but the first, in what a checkpoint holds

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Which process of a run this one is.

    Attributes:
        rank: from 0; the first is the one that writes.
        count: of the processes of the run.
    """

    rank: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"process {self.rank} of {self.count}"


class FirstFailed(SystemExit):
    """The first process has ended with an error, which it has said; this one ends with its exit code, in silence."""


_places = [Place()]


def place() -> Place:
    """Which process of its run this one is."""
    return _places[-1]


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return place().rank == 0


def join(own: Place, device: torch.device | None = None) -> None:
    """Meet the other processes of this run; where they are, the environment says, as their launcher has set it.

    Args:
        own: which of them this one is.
        device: what this process trains on, by default the CPU; decides how tensors are exchanged.

    Raises:
        ExperimentError: they did not come.
    """
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        kind = "cpu" if device is None else device.type
        if kind == "cuda":
            torch.cuda.set_device(device)
        try:
            store = _store(own)
            store.set(f"here/{own.rank}", "1")
            store.wait([f"here/{rank}" for rank in range(own.count)], MEETING)
            backend = distributed.get_default_backend_for_device(kind)
            distributed.init_process_group(backend, store=store, rank=own.rank, world_size=own.count, timeout=WORK)
        except RuntimeError as error:  # of torch's, some stores have errors of their own and some have not
            minutes = f"{MEETING.total_seconds() / 60:g} minutes"
            raise ExperimentError(
                f"{own} has not met the others within {minutes} ({_first_line(error)}); start them by one command"
            ) from None
    _places[:] = [own]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What a trainer sets up for a run of this process alone goes with that run.

    Left behind, the next command of the process would take it for the work of a launcher, and wait for others.
    """
    from torch import distributed

    before = {name: os.environ.get(name) for name in _BY_LAUNCHERS}
    joined = distributed.is_available() and distributed.is_initialized()
    try:
        yield
    finally:
        if place().count == 1:
            if distributed.is_available() and distributed.is_initialized() and not joined:
                distributed.destroy_process_group()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _store(own: Place) -> Any:
    from torch import distributed

    if GROUP in os.environ:
        return distributed.FileStore(str(Path(os.environ[GROUP]) / STORE), own.count)
    store, *_ = next(iter(distributed.rendezvous("env://", own.rank, own.count, timeout=MEETING)))
    return store


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def first_does(work: Callable[[], T]) -> T:
    """What `work` returns, done by the first process alone; the others wait for it.

    Args:
        work: returns something that can be sent.

    Raises:
        FirstFailed: in the others, where `work` has raised something in the first.
    """
    if place().count == 1:
        return work()
    if not is_first():
        result, code = _broadcast(None)
        if code:
            raise FirstFailed(code)
        return result
    try:
        result = work()
    except BaseException as error:
        with contextlib.suppress(RuntimeError):  # the others are gone
            _broadcast((None, exit_code(error)))
        raise
    _broadcast((result, 0))
    return result


@contextlib.contextmanager
def first_holds(block: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """A block that the first process alone enters and leaves; the others begin once it is in."""
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(block)

        first_does(enter)
        yield


def _broadcast(outcome: Any) -> Any:
    from torch import distributed

    content = [outcome]
    distributed.broadcast_object_list(content, src=0)
    return content[0]


def gather(value: T) -> list[T]:
    """What each process gives, in their order; all have to call it."""
    if place().count == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * place().count
    distributed.all_gather_object(found, value)
    return found


def asked_to_stop() -> int:
    """The signal by which one of the processes is to end, the same in all, which all have to call it; 0 if none is."""
    return max(gather(pending()))


def with_others(own: Mapping[str, Any], differs: Callable[[str], bool] = lambda key: True) -> dict[str, Any]:
    """A state for the one checkpoint: the first process's, and beside it what differs in that of each other.

    Args:
        own: this process's; tensors on the CPU.
        differs: whether what is under a key is of each process.
    """
    others = gather({key: value for key, value in own.items() if differs(key)})[1:]
    return {**own, OTHERS: others} if others else dict(own)


def own_part(saved: Mapping[str, Any], differs: Callable[[str], bool] = lambda key: True) -> dict[str, Any]:
    """What `with_others` was given in this process.

    A state that one process has saved is everyone's. That a run goes on with as many processes as before, its identity
    sees to.
    """
    first = {key: value for key, value in saved.items() if key != OTHERS}
    others = saved.get(OTHERS, [])
    if is_first() or len(others) < place().rank:
        return first
    return {key: value for key, value in first.items() if not differs(key)} | others[place().rank - 1]


def noted() -> dict[str, Any]:
    """What a record says of the processes, where they were several."""
    bases = "what a method carries from step to step, such as the bases of ASI, each has of its own images"
    return {"processes": f"{place().count}; {bases}"} if place().count > 1 else {}


def say(text: Any) -> None:
    """Print a line, once for all processes."""
    if is_first():
        print(text, flush=True)


def say_ahead(text: Any) -> None:
    """Print a line about settings, once: what a process finds that the command has started, that one has said."""
    if not is_started():
        say(text)


def leave(code: int) -> int:
    """End a process of several at once, as taking their group down may wait for ever; return the code of a single one.

    Args:
        code: exit code.
    """
    if place().count == 1:
        return code
    if code == 0:
        from torch import distributed

        with contextlib.suppress(RuntimeError):
            distributed.barrier()  # nothing is on its way any more
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
