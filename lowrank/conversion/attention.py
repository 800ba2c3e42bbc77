"""Open self-attention, so that its projections are layers that are called, and close it again."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lowrank.layers.arguments import require_model
from lowrank.layers.attention import IN_PROJECTION, OpenAttention, OpenMultiheadAttention, window_class
from lowrank.layers.swap import become, has_own_forward, restore

WINDOWS = ("torchvision.models.swin_transformer", "ShiftedWindowAttention")
_OUT_PROJECTION = nn.modules.linear.NonDynamicallyQuantizableLinear


def is_window_attention(module: nn.Module) -> bool:
    """Whether a module is torchvision's attention in shifted windows, not opened."""
    return (type(module).__module__, type(module).__qualname__) == WINDOWS


def _can_be_opened(module: nn.Module) -> bool:
    if has_own_forward(module):
        return False
    if is_window_attention(module):
        return True
    if type(module) is not nn.MultiheadAttention or type(module.out_proj) is not _OUT_PROJECTION:
        return False
    if type(module._parameters.get("in_proj_weight")) is not nn.Parameter:  # nor one that FSDP2 has sharded, and finds
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

    Raises:
        ConversionError: `model` is no module.
    """
    require_model(model)
    opened = []
    for name, module in model.named_modules():
        if isinstance(module, OpenAttention):
            module._lowrank_lean |= lean
        elif _can_be_opened(module):
            _open(module)._lowrank_lean = lean
            opened.append(name)
    return opened


def _open(module: nn.Module) -> OpenAttention:
    if type(module) is nn.MultiheadAttention:
        weight, bias = (module._parameters.pop(f"in_proj_{kind}") for kind in ("weight", "bias"))
        assert weight is not None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight, layer.bias, layer.training = weight, bias, module.training  # type: ignore[assignment]
        module._modules = {IN_PROJECTION: layer, **module._modules}
        # PyTorch gives the output projection a class of its own, which computes what nn.Linear does.
        become(module.out_proj, nn.Linear)
        become(module, OpenMultiheadAttention)
    else:
        become(module, window_class(type(module)))
    assert isinstance(module, OpenAttention)
    return module


def close_attention(model: nn.Module) -> None:
    """Undo `open_attention`, in place."""
    for module in list(model.modules()):
        if not isinstance(module, OpenAttention):
            continue
        if isinstance(module, OpenMultiheadAttention):
            layer = module._modules.pop(IN_PROJECTION)
            assert layer is not None
            parameters = {f"in_proj_{kind}": layer._parameters[kind] for kind in ("weight", "bias")}
            module._parameters = {**parameters, **module._parameters}
            become(module.out_proj, _OUT_PROJECTION)
        del module._lowrank_lean
        restore(module)
