"""What calls are given: checked in one place, so that each says the same of what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lowrank.errors import ConversionError, SettingError


def reason_against_model(model: object) -> str | None:
    """Why something cannot be a model, or None if it is one."""
    if isinstance(model, nn.Module):
        return None
    given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    return f"the model is {given}; give a torch.nn.Module"


def require_model(model: object) -> None:
    """Raise `ConversionError` unless it is a module."""
    reason = reason_against_model(model)
    if reason is not None:
        raise ConversionError(reason)


def require_switches(**given: object) -> None:
    """Raise `SettingError` unless each is True or False: "no" would be as good as True."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise SettingError(f"{name} is {value!r}; allowed: True, False")


def input_among(given: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """A layer's input among the arguments that it is called with, as a hook gets them: the first, however it is given.

    Example:
        layer.register_forward_pre_hook(lambda layer, given, named: see(input_among(given, named)), with_kwargs=True)
    """
    return given[0] if given else named.get("input", next(iter(named.values()), None))
