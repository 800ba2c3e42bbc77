"""What self-attention computes from queries, keys and values in one tensor: pure functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def multihead(heads: int, batch_first: bool, dropout: float, projected: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, N, 3 E), or (N, B, 3 E), to (B, N, E) or (N, B, E)."""
    projected = projected if batch_first else projected.transpose(0, 1)
    queries, keys, values = projected.unflatten(-1, (3, heads, -1)).permute(
        2, 0, 3, 1, 4
    )  # each (B, heads, N, E/heads)
    mixed = F.scaled_dot_product_attention(queries, keys, values, mask, dropout).transpose(1, 2).flatten(2)
    return mixed if batch_first else mixed.transpose(0, 1)


def joint_mask(attention: Tensor | None, padding: Tensor | None, sizes: Any, dtype: torch.dtype) -> Tensor | None:
    """One mask to add to the scores, from one per pair of tokens and one per token; None if there is neither."""
    batch, heads, tokens = sizes
    total = None
    if attention is not None:
        shape = (batch, heads, tokens, tokens) if attention.ndim == 3 else (1, 1, tokens, tokens)
        total = _to_add(attention, dtype).view(shape)
    if padding is not None:
        added = _to_add(padding, dtype).view(batch, 1, 1, tokens)
        total = added if total is None else total + added
    return total


def _to_add(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def shifted_windows(
    window: tuple[int, int],
    shift: tuple[int, int],
    heads: int,
    dropout: float,
    projected: Tensor,
    pad: Tensor | None,
    position: Tensor,
) -> Tensor:
    """Attention within windows of (B, H, W, 3 C), to (B, H, W, C)."""
    batch, rows, columns, channels = projected.shape
    height, width = (-(-size // side) * side for size, side in zip((rows, columns), window, strict=True))
    if (height, width) != (rows, columns):
        whole = projected.new_zeros(batch, height, width, channels)
        whole = whole if pad is None else whole + pad
        projected = torch.cat([projected, whole[:, :rows, columns:]], 2)
        projected = torch.cat([projected, whole[:, rows:]], 1)
    # A map of a single window in one direction needs no shift in it.
    moved = [s if side < size else 0 for s, side, size in zip(shift, window, (height, width), strict=True)]
    if any(moved):
        projected = projected.roll((-moved[0], -moved[1]), (1, 2))
    grid = (height // window[0], window[0], width // window[1], window[1])
    tokens = window[0] * window[1]
    tiles = (
        projected.view(batch, *grid, channels)
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(-1, tokens, 3, heads, channels // 3 // heads)
    )
    queries, keys, values = tiles.permute(2, 0, 3, 1, 4)  # each (B x windows, heads, tokens, C/heads)
    mask = position
    if any(moved):
        apart = _apart((height, width), window, moved, position)  # (windows, tokens, tokens)
        mask = (position + apart[:, None]).repeat(batch, 1, 1, 1)
    mixed = F.scaled_dot_product_attention(queries, keys, values, mask, dropout)
    mixed = mixed.transpose(1, 2).reshape(batch, grid[0], grid[2], window[0], window[1], channels // 3)
    mixed = mixed.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels // 3)
    if any(moved):
        mixed = mixed.roll((moved[0], moved[1]), (1, 2))
    return mixed[:, :rows, :columns].contiguous()


def _apart(size: tuple[int, int], window: tuple[int, int], moved: list[int], like: Tensor) -> Tensor:
    """-100 between tokens of a window that were not neighbours before the shift, 0 between others."""
    labels = []
    for length, side, shift in zip(size, window, moved, strict=True):
        place = torch.arange(length, device=like.device)
        far = (place >= length - side).long() + (place >= length - shift).long()
        labels.append(far if shift else torch.zeros_like(far))
    regions = (3 * labels[0][:, None] + labels[1]).view(
        size[0] // window[0], window[0], size[1] // window[1], window[1]
    )
    regions = regions.permute(0, 2, 1, 3).reshape(-1, window[0] * window[1])
    return (regions[:, :, None] != regions[:, None, :]).to(like.dtype) * -100.0
