"""Self-attention whose projections are linear layers that are called, so that they can be converted like any other.

`nn.MultiheadAttention` and the shifted windows of Swin hand the weights of their projections to functions, so nothing
that is done to those layers would take effect. `open_attention` gives them another `forward`, with the same parameters,
outputs and gradients. Source of the shifted windows: Swin Transformer (ICCV 2021), sec. 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import ConversionError
from lowrank.exact.attention_math import joint_mask, multihead, shifted_windows
from lowrank.exact.recompute import attend
from lowrank.layers.layer import IN_PROJECTION, LowRankLayer

WINDOWS = ("torchvision.models.swin_transformer", "ShiftedWindowAttention")


class OpenAttention(nn.Module):
    """What opened attention modules have in common.

    Attributes:
        lean: whether queries, keys, values and probabilities are computed again in the backward pass.
    """

    stock_class: type[nn.Module]
    lean: bool

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.stock_class,), self.__dict__

    def _attend(self, function: Callable[..., Tensor], dropout: float, projected: Tensor, *others: Any) -> Tensor:
        dropout = dropout if self.training else 0.0
        function = partial(function, dropout)
        return attend(function, projected, *others) if self.lean and not dropout else function(projected, *others)


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
        """With the keys of the stock module."""
        state_dict = super().state_dict(*arguments, **options)
        _rename(state_dict, options.get("prefix", ""), f"{IN_PROJECTION}.", "in_proj_")
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
        if not (query is key is value and query.ndim == 3) or need_weights:
            return self._as_stock(
                (query, key, value), key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        tokens, batch = (1, 0) if self.batch_first else (0, 1)
        sizes = (query.shape[batch], self.num_heads, query.shape[tokens])
        mask = joint_mask(attn_mask, key_padding_mask, sizes, query.dtype)
        function = partial(multihead, self.num_heads, self.batch_first)
        mixed = self._attend(function, self.dropout, self._in_projection(query), mask)
        return self.out_proj(mixed), None

    def _as_stock(self, inputs: Any, key_padding_mask: Any, need_weights: bool, attn_mask: Any, *flags: bool) -> Any:
        """PyTorch's own forward pass, for the ways to call it that have no joint projection."""
        chosen = [
            name
            for name in (IN_PROJECTION, "out_proj")
            if isinstance(layer := self._modules[name], LowRankLayer) and layer.chosen
        ]
        if chosen:
            raise ConversionError(
                f"the converted {' and '.join(chosen)} of an nn.MultiheadAttention work for self-attention on batches "
                f"with need_weights=False alone; call it so, or leave this attention as it is"
            )
        average, is_causal = flags
        query, key, value = (x.transpose(0, 1) if self.batch_first and x.ndim == 3 else x for x in inputs)
        y, weights = F.multi_head_attention_forward(
            *(query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias),
            *(None, None, False, self.dropout, self.out_proj.weight, self.out_proj.bias),
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average,
            is_causal=is_causal,
        )
        return (y.transpose(0, 1) if self.batch_first and y.ndim == 3 else y), weights


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


def is_window_attention(module: nn.Module) -> bool:
    """Whether a module is torchvision's attention in shifted windows, not opened."""
    return (type(module).__module__, type(module).__qualname__) == WINDOWS


def _can_be_opened(module: nn.Module) -> bool:
    if is_window_attention(module):
        return True
    if type(module) is not nn.MultiheadAttention:
        return False
    return module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn


def closed_projections(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Linear layers whose attention module hands their weights to a function; the layer, and where it is."""
    for name, module in model.named_modules():
        for child in ("out_proj",) if type(module) is nn.MultiheadAttention else ("qkv", "proj"):
            if type(module) is nn.MultiheadAttention or is_window_attention(module):
                yield module.get_submodule(child), f"{name}.{child}" if name else child


def open_attention(model: nn.Module, lean: bool = False) -> list[str]:
    """Make the projections of self-attention layers that are called and can be converted, in place.

    An `nn.MultiheadAttention` gets a linear layer `lowrank_in_proj` that holds its parameters `in_proj_weight` and
    `in_proj_bias`, the same objects, under the same state dict keys; torchvision's `ShiftedWindowAttention` calls its
    `qkv` and `proj`. Outputs and gradients stay the same up to rounding. `revert` undoes it.

    Args:
        model: any module.
        lean: compute queries, keys, values and probabilities again in the backward pass; `convert` sets it where it
            fuses.

    Returns:
        Names of the opened modules; left out are those with inputs of several sizes, and cross-attention.
    """
    opened = []
    for name, module in model.named_modules():
        if isinstance(module, OpenAttention):
            module.lean |= lean
        elif _can_be_opened(module):
            _open(module).lean = lean
            opened.append(name)
    return opened


def _open(module: nn.Module) -> OpenAttention:
    if type(module) is nn.MultiheadAttention:
        weight, bias = (module._parameters.pop(f"in_proj_{kind}") for kind in ("weight", "bias"))
        assert weight is not None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight, layer.bias, layer.training = weight, bias, module.training  # type: ignore[assignment]
        module._modules = {IN_PROJECTION: layer, **module._modules}
        module._qkv_same_embed_dim = False  # else PyTorch's encoder reads the weights itself in evaluation mode
        # PyTorch gives the output projection a class of its own, which computes what nn.Linear does.
        _become(module.out_proj, nn.Linear)
        _become(module, OpenMultiheadAttention)
    else:
        _become(module, _window_class(type(module)))
    assert isinstance(module, OpenAttention)
    return module


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def close_attention(model: nn.Module) -> None:
    """Undo `open_attention`, in place."""
    for module in list(model.modules()):
        if isinstance(module, OpenMultiheadAttention):
            layer = module._modules.pop(IN_PROJECTION)
            assert layer is not None
            parameters = {f"in_proj_{kind}": layer._parameters[kind] for kind in ("weight", "bias")}
            _become(module, nn.MultiheadAttention)
            module._parameters = {**parameters, **module._parameters}
            module._qkv_same_embed_dim = True
            _become(module.out_proj, nn.modules.linear.NonDynamicallyQuantizableLinear)
        elif isinstance(module, OpenAttention):
            _become(module, module.stock_class)
        else:
            continue
        del module.lean


def _window_class(stock: type[nn.Module]) -> type[nn.Module]:
    return type("OpenShiftedWindowAttention", (OpenWindowAttention, stock), {"stock_class": stock})


def _rebuild(stock: type[nn.Module]) -> nn.Module:
    own = OpenMultiheadAttention if stock is nn.MultiheadAttention else _window_class(stock)
    return own.__new__(own)


def _rename(state_dict: dict[str, Any], prefix: str, before: str, after: str) -> None:
    """Rename weight and bias of the joint projection in a state dict, in place and in their order."""
    names = {f"{prefix}{before}{kind}": f"{prefix}{after}{kind}" for kind in ("weight", "bias")}
    items = [(names.get(key, key), value) for key, value in state_dict.items()]
    state_dict.clear()
    state_dict.update(items)
