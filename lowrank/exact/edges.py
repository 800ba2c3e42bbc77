"""Where second derivatives go on, of a tensor that is computed again.

A backward pass that is itself differentiated (`create_graph=True`) needs of such a tensor its numbers and its place in
the graph: hooks that were put on it, `retain_grad` and gradients with respect to it, or to anything on its way, count
there. So its numbers are computed without a graph, and stand at the place that it had in the forward pass.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def edge_of(x: Tensor) -> Tensor | None:
    """A tensor without numbers of its own that stands where `x` stands in the graph; None: no gradient goes there.

    For where gradients are on; made in each forward pass for each tensor that is computed again, so it takes little."""
    if not x.requires_grad:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        found: Tensor = _unsafe_view(x, x.shape)  # no view, which would keep what it is a view of
        found.data = _without_numbers(x.shape, x.dtype, x.device)
    return found


_unsafe_view = torch.ops.aten._unsafe_view.default


@lru_cache(maxsize=1024)
def _without_numbers(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty((), dtype=dtype, device=device).expand(shape)


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, edge: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def placed(edge: Tensor | None, value: Tensor) -> Tensor:
    """These numbers where the edge stands."""
    found: Tensor = value.detach() if edge is None else _Placed.apply(edge, value)
    return found
