"""What Python and its packages warn of, as lines of the suite's own."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from typing import Any

from experiment.process_group import cores
from experiment.processes import is_first, say_ahead

_FOR_PROGRAMMERS = (DeprecationWarning, PendingDeprecationWarning, ResourceWarning, ImportWarning)
_SAID_OTHERWISE = ("This DataLoader will create .* worker processes",)  # see `tell_crowded`


def say_warnings() -> None:
    """From now on a warning is one line on standard error, said once, by the first of several processes.

    What is for programmers, where they ask Python for it, stays as it is.
    """
    before, said = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *where: Any, **further: Any) -> None:
        if issubclass(category, _FOR_PROGRAMMERS):
            before(message, category, *where, **further)
            return
        text = " ".join(str(message).split())
        if text not in said and is_first():
            said.add(text)
            with contextlib.suppress(OSError):  # nobody reads it any more, or the disk is full: no reason to end
                print(f"warning: {text}", file=sys.stderr, flush=True)

    warnings.showwarning = show
    for text in _SAID_OTHERWISE:
        warnings.filterwarnings("ignore", message=text)


@functools.cache
def tell_crowded(option: str, count: int) -> None:
    """Say, once, that more processes load data than there are cores for them.

    Args:
        option: that asks for them, and its value.
        count: of the processes.
    """
    if count > cores():
        say_ahead(f"note: {option} is more processes than the {cores()} cores here; fewer may load faster")
