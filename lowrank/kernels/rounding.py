"""Numbers to int8 and back by compiled kernels; where one cannot, it says so, and the caller does without."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.kernels.choice import kernel_for, on_gpu


def round_columns(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """A matrix (n, r), float32, in int8, and the scales (r,), see `lowrank.tensors.storage`; None: not for this one."""
    if x.is_cuda:
        found = on_gpu(x)
        return None if found is None else found.round_columns(x)
    kernel = kernel_for("round_columns", x)
    if kernel is None:
        return None
    values, scales = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[1], dtype=torch.bfloat16)
    kernel(x.data_ptr(), values.data_ptr(), scales.data_ptr(), *x.shape)  # type: ignore[operator]
    return values, scales


def round_blocks(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """A tensor, float32, in int8, and the scales (ceil(numel / 32),); None: not for this one."""
    if x.is_cuda:
        found = on_gpu(x)
        return None if found is None else found.round_blocks(x)
    kernel, count = kernel_for("round_blocks", x), x.numel()
    if kernel is None:
        return None
    values, scales = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(-(-count // 32), dtype=torch.bfloat16)
    pointers = x.data_ptr(), values.data_ptr(), scales.data_ptr()
    kernel(*pointers, count, torch.get_num_threads())  # type: ignore[operator]
    return values, scales


def restore_columns(values: Tensor, scales: Tensor) -> Tensor | None:
    """What `round_columns` rounded, in float32; None: not for these."""
    if values.is_cuda:
        found = on_gpu(values, scales)
        return None if found is None else found.restore_columns(values, scales)
    kernel = kernel_for("restore_columns", values, stored=(scales, torch.bfloat16))
    if kernel is None:
        return None
    out = values.new_empty(values.shape, dtype=torch.float32)
    kernel(out.data_ptr(), values.data_ptr(), scales.data_ptr(), *values.shape)  # type: ignore[operator]
    return out


def restore_blocks(values: Tensor, scales: Tensor) -> Tensor | None:
    """What `round_blocks` rounded, in float32; None: not for these."""
    if values.is_cuda:
        found = on_gpu(values, scales)
        return None if found is None else found.restore_blocks(values, scales)
    kernel = kernel_for("restore_blocks", values, stored=(scales, torch.bfloat16))
    if kernel is None:
        return None
    out = values.new_empty(values.shape, dtype=torch.float32)
    pointers = out.data_ptr(), values.data_ptr(), scales.data_ptr()
    kernel(*pointers, values.numel(), torch.get_num_threads())  # type: ignore[operator]
    return out
