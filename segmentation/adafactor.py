"""Adafactor, which MMEngine takes from Transformers as it is imported: here once a config asks for it.

To import Transformers takes a fifth of the time that a command needs to start.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


def adafactor(params: Any, **settings: Any) -> Any:
    """Transformers' optimizer of this name."""
    from transformers import Adafactor

    return Adafactor(params, **settings)


@contextmanager
def adafactor_later() -> Iterator[None]:
    """Where MMEngine is imported in this block, it finds no Transformers, and afterwards `adafactor` by its name."""
    if "mmengine.optim" in sys.modules or "transformers" in sys.modules or find_spec("transformers") is None:
        yield
        return
    sys.modules["transformers"] = None  # type: ignore[assignment] # as Python has it: there is no such module
    try:
        yield
    finally:
        del sys.modules["transformers"]
    from mmengine.registry import OPTIMIZERS

    OPTIMIZERS.register_module(name="Adafactor", module=adafactor)
