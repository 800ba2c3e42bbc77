"""What is said where a part of a model that is compiled on its own is handed a tensor of eager training's.

Imported when something is compiled, as it imports PyTorch's compiler, which takes as long as all else.
"""

from __future__ import annotations

import warnings

from torch._dynamo.comptime import ComptimeContext, comptime


def tell() -> None:
    """Say while it is compiled what to do."""
    comptime(_tell)


def _tell(ctx: ComptimeContext) -> None:
    warnings.warn(
        "a part of a converted model is compiled on its own, and what eager training hands it is no ordinary tensor, "
        "which breaks its graph. Compile the part ahead of lowrank.convert, which sees to that, or the whole model; "
        "where PyTorch compiles by itself (torch.cond, flex_attention), convert with fuse=False",
        stacklevel=2,
    )
