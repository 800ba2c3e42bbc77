"""Which kernel takes given tensors: they are plain memory, filled in order, and nobody watches the operators."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.kernels.library import gpu, library

_KINDS = {torch.float32: "float", torch.float64: "double", torch.int8: "int8", torch.bfloat16: "half"}


@lru_cache(maxsize=2)
def _plain_keys(device: str) -> frozenset[int]:
    """What PyTorch dispatches a tensor by that is nothing but memory of a device, ordinary or of inference mode."""
    with torch.inference_mode(False):
        ordinary = torch.empty(0, device=device)
    with torch.inference_mode():
        inferred = torch.empty(0, device=device)
    return frozenset(torch._C._dispatch_keys(tensor).raw_repr() for tensor in (ordinary, inferred))


_KEYS = _plain_keys("cpu")
_OWN = (Tensor, nn.Parameter)


def kernel_for(name: str, *tensors: Tensor, stored: tuple[Tensor, torch.dtype] | None = None) -> object | None:
    """A kernel for these tensors, all of one dtype; None if it cannot take them: not memory of a kind it knows, filled
    in order. Nor where somebody watches the operators, a compiler or a dispatch mode, who would not see a kernel.

    `stored`: what another kernel writes, and of which dtype.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    found = library()
    if found is None:
        return None
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype is not dtype or not _is_plain(tensor):
            return None
    if stored is not None and (stored[0].dtype is not stored[1] or not _is_plain(stored[0])):
        return None
    return getattr(found, f"{name}_{_KINDS.get(dtype)}", None)


def kernel_and_room(
    name: str, *tensors: Tensor, stored: tuple[Tensor, torch.dtype] | None = None
) -> tuple[Any, Any] | None:
    """A kernel for these tensors, and its function that tells the numbers of scratch memory that it takes."""
    kernel = kernel_for(name, *tensors, stored=stored)
    return None if kernel is None else (kernel, getattr(library(), f"{name}_room_{_KINDS[tensors[0].dtype]}"))


def _is_plain(tensor: Tensor) -> bool:
    own = type(tensor) in _OWN and torch._C._dispatch_keys(tensor).raw_repr() in _KEYS
    return own and tensor.is_contiguous()


def on_gpu(*tensors: Tensor) -> Any | None:
    """The GPU's kernels, if these tensors are nothing but its memory, filled in order, and nobody watches."""
    if not tensors[0].is_cuda or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    found = gpu()
    keys = frozenset() if found is None else _plain_keys("cuda")
    for tensor in tensors:
        own = type(tensor) in _OWN and torch._C._dispatch_keys(tensor).raw_repr() in keys
        if not own or not tensor.is_contiguous() or tensor.device != tensors[0].device:
            return None
    return found
