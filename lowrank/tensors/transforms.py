"""What a compiler is asked of transforms of `torch.func`.

Imported when something is compiled, as it imports PyTorch's compiler, which takes as long as all else.
"""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result
def in_transform() -> bool:
    """Whether what is recorded is within a transform, which a compiler enters while it records."""
    return torch._C._functorch.peek_interpreter_stack() is not None
