"""What `derive` of a method says, see `lowrank.ASI`."""

from __future__ import annotations

from typing import Literal

from lowrank.errors import SettingError
from lowrank.tensors.again import BUDGET, LAYER

Derive = bool | int | Literal["slopes"]


def reach(derive: Derive) -> int:
    """The products per number that `derive` allows, if it says so; otherwise 0."""
    return derive if isinstance(derive, int) and not isinstance(derive, bool) else 0


def measured_with(derive: Derive) -> bool | int:
    """The `derive` of `measure_perplexity` and `select_ranks` that a method with this one needs."""
    return reach(derive) or bool(derive)


def check_derive(derive: object) -> None:
    """Refuse what `derive` cannot be.

    Raises:
        SettingError: it is neither true, false, "slopes" nor a number of products above the usual.
    """
    number = isinstance(derive, int) and not isinstance(derive, bool) and BUDGET < derive < LAYER
    if not (isinstance(derive, bool) or number or derive == "slopes"):
        raise SettingError(
            f"derive is {derive!r}; allowed: True, False, 'slopes' or a number of products between {BUDGET} and {LAYER}"
        )
