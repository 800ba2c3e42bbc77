"""What a compiler leaves to eager training.

Imported when something is compiled: `torch.compiler.disable` imports PyTorch's compiler, which takes as long as that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.compiler.disable
def out_of_graph(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """What a function gives in eager training: one break in the graph, and nothing in it that is compiled."""
    return function(*arguments)
