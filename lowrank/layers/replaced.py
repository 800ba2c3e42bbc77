"""Functions of `torch.nn.functional` that somebody has put functions of theirs in the place of, as some packages do.

A stock layer calls what is there. So a converted layer is the stock one while a function that layers compute with is
not PyTorch's own, and says so.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F

_linear = torch._C._nn.linear
_OWN: dict[str, Any] = {
    **{name: getattr(torch, name) for name in ("conv1d", "conv2d", "conv3d")},
    **{name: getattr(torch, name) for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")},
    "linear": _linear,
}
_told: set[str] = set()


def is_replaced() -> bool:
    """Whether one of the functions is not PyTorch's own, which is asked at each call: without a loop."""
    if F.conv2d is not torch.conv2d or F.linear is not _linear or F.conv1d is not torch.conv1d:
        return True
    if F.conv3d is not torch.conv3d or F.conv_transpose1d is not torch.conv_transpose1d:
        return True
    return F.conv_transpose2d is not torch.conv_transpose2d or F.conv_transpose3d is not torch.conv_transpose3d


def tell_replaced(layer: str) -> None:
    """Warn of the functions that are not PyTorch's own, of each once; names the layer that found it."""
    for name, own in _OWN.items():
        found = getattr(F, name)
        if found is not own and name not in _told:
            _told.add(name)
            place = f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', type(found).__name__)}"
            warnings.warn(
                f"layer {layer!r}: torch.nn.functional.{name} is {place}, not PyTorch's own, so that converted layers "
                f"are stock ones, which keep their whole inputs; put the function back to have them keep less",
                stacklevel=2,
            )
