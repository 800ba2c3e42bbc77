"""Self-attention whose projections are linear layers that are called, so that they can be converted like any other.

`nn.MultiheadAttention` and the shifted windows of Swin hand the weights of their projections to functions, so nothing
that is done to those layers would take effect. An opened one has another `forward`, with the same parameters, outputs
and gradients. Source of the shifted windows: Swin Transformer (ICCV 2021), sec. 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import ConversionError
from lowrank.exact.attention_math import joint_mask, multihead, shifted_windows
from lowrank.exact.recompute import attend
from lowrank.layers.layer import LowRankLayer
from lowrank.layers.swap import Changed

IN_PROJECTION = "lowrank_in_proj"  # child of an opened nn.MultiheadAttention: queries, keys and values in one layer


class OpenAttention(Changed):
    """What opened attention modules have in common.

    Attributes:
        _lowrank_lean: whether queries, keys, values and probabilities are computed again in the backward pass.
    """

    _lowrank_lean: bool

    def _attend(self, function: Callable[..., Tensor], dropout: float, projected: Tensor, *others: Any) -> Tensor:
        dropout = dropout if self.training else 0.0
        function = partial(function, dropout)
        lean = self._lowrank_lean and not dropout
        return attend(function, (projected,), *others) if lean else function(projected, *others)


class OpenMultiheadAttention(OpenAttention, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with a linear layer `lowrank_in_proj` (E inputs, 3 E outputs) and `out_proj`, called."""

    stock_class = nn.MultiheadAttention

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """Where PyTorch's code looks for it."""
        return self._in_projection.weight

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """Where PyTorch's code looks for it."""
        return self._in_projection.bias

    @property
    def _in_projection(self) -> nn.Linear:
        layer = self._modules[IN_PROJECTION]
        assert isinstance(layer, nn.Linear)
        return layer

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """The stock module's."""
        state_dict, prefix = super().state_dict(*arguments, **options), options.get("prefix", "")
        _rename(state_dict, prefix, f"{IN_PROJECTION}.", "in_proj_")
        getattr(state_dict, "_metadata", {}).pop(f"{prefix}{IN_PROJECTION}", None)
        return state_dict

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any, **options: Any) -> None:
        _rename(state_dict, prefix, "in_proj_", f"{IN_PROJECTION}.")
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`, for one batched input that is query, key and value."""
        unmasked = is_causal and attn_mask is None  # which the stock module refuses
        if not (query is key is value and query.ndim == 3) or need_weights or unmasked or not torch.is_grad_enabled():
            return self._as_stock(
                *(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            )
        tokens, batch = (1, 0) if self.batch_first else (0, 1)
        sizes = (query.shape[batch], self.num_heads, query.shape[tokens])
        mask = joint_mask(attn_mask, key_padding_mask, sizes, query.dtype)
        function = partial(multihead, self.num_heads, self.batch_first)
        mixed = self._attend(function, self.dropout, self._in_projection(query), mask)
        y = self.out_proj(mixed)
        if self.batch_first:  # laid out in memory as the stock module's output, so that a seed drops the same of it
            y = y.transpose(0, 1).contiguous().transpose(0, 1)
        return y, None

    def _as_stock(self, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        """PyTorch's own forward pass, for the ways to call it that have no joint projection."""
        chosen = [
            name
            for name in (IN_PROJECTION, "out_proj")
            if isinstance(layer := self._modules[name], LowRankLayer) and layer._lowrank.chosen
        ]
        if chosen and torch.is_grad_enabled():
            raise ConversionError(
                f"the converted {' and '.join(chosen)} of an nn.MultiheadAttention work for self-attention on batches "
                f"with need_weights=False alone; call it so, or leave this attention as it is"
            )
        return super().forward(*inputs)


class OpenWindowAttention(OpenAttention):
    """Attention in shifted windows, mixed into torchvision's class: its layers `qkv` and `proj` are called.

    Both layers work per token, so they are applied to the feature map (B, H, W, C) as it is: neither to windows, nor to
    what pads the map to whole windows. A padded token is zero, so its projection is the bias.
    """

    qkv: nn.Linear
    proj: nn.Linear
    get_relative_position_bias: Callable[[], Tensor]
    window_size: Any  # two whole numbers, as is the shift
    shift_size: Any
    num_heads: int
    attention_dropout: float
    dropout: float

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        function = partial(shifted_windows, (*self.window_size,), (*self.shift_size,), self.num_heads)
        bias = self.get_relative_position_bias()  # (1, heads, w, w) for w tokens in a window
        mixed = self._attend(function, self.attention_dropout, self.qkv(x), self.qkv.bias, bias)
        return F.dropout(self.proj(mixed), self.dropout, self.training)


def window_class(stock: type[nn.Module]) -> type[OpenAttention]:
    """The opened class of torchvision's attention in shifted windows."""
    own = {"stock_class": stock, "_place": (__name__, "window_class"), "__module__": nn.MultiheadAttention.__module__}
    return type("OpenShiftedWindowAttention", (OpenWindowAttention, stock), own)


def _rename(state_dict: dict[str, Any], prefix: str, before: str, after: str) -> None:
    """Rename weight and bias of the joint projection in a state dict, in place and in their order."""
    names = {f"{prefix}{before}{kind}": f"{prefix}{after}{kind}" for kind in ("weight", "bias")}
    items = [(names.get(key, key), value) for key, value in state_dict.items()]
    state_dict.clear()
    state_dict.update(items)
