"""What a compiler leaves to eager training.

Imported when something is compiled: `torch.compiler.disable` imports PyTorch's compiler, which takes as long as that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank.tensors.geometry import Shape


@torch.compiler.disable
def out_of_graph(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """What a function gives in eager training: one break in the graph, and nothing in it that is compiled."""
    return function(*arguments)


@torch.compiler.assume_constant_result
def can_be_proven(layer: Any, shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a layer of a registered class computes what was told of it: found while it is compiled."""
    proven: bool = layer.prove_ahead(shape, dtype, device)
    return proven
