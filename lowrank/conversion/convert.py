"""Choose layers, check them, convert them in place, and bring the original ones back."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, TypeVar

from torch import nn

from lowrank.conversion.attention import OpenAttention, close_attention, closed_projections, open_attention
from lowrank.conversion.fusion import find_blocks, frozen_layers, lean_code, lean_modules, recomputed_from, stock_code
from lowrank.errors import ConversionError, SettingError
from lowrank.exact.lean import LEAN_MODULES
from lowrank.layers.factored import shared_weights
from lowrank.layers.layer import FAMILIES, LeanBatchNorm2d, LowRankLayer, adopt, include, lean_norm, release, stock_norm
from lowrank.methods.base import Method, Vanilla

Kind = Literal["conv", "linear"]
Part = Literal["all", "mlp", "attention"]
PARTS: dict[str, tuple[str, ...]] = {"all": ("",), "mlp": ("mlp",), "attention": ("attn", "attention")}
KINDS: dict[str, type[nn.Module]] = {"conv": nn.Conv2d, "linear": nn.Linear}
Model = TypeVar("Model", bound=nn.Module)


def stock_type(layer: nn.Module) -> type[nn.Module]:
    """The layer's class, of a converted layer the class that it had before."""
    if isinstance(layer, LowRankLayer):
        return layer.stock_class
    if isinstance(layer, OpenAttention):
        return layer.stock_class
    changed = isinstance(layer, LeanBatchNorm2d) or type(layer) in LEAN_MODULES.values()
    return type(layer).__mro__[1] if changed else type(layer)


def trailing_layers(
    model: nn.Module, count: int | Literal["all"], kind: Kind = "conv", part: Part = "all"
) -> list[str]:
    """Names of the model's last layers of a kind, in the order in which the model registers them.

    Args:
        model: any module.
        count: how many, from 1; or "all".
        kind: "conv" for `nn.Conv2d`, "linear" for `nn.Linear`; subclasses are not meant, nor are projections of
            attention that are not called (see `open_attention`).
        part: of a transformer, by the names of the modules that hold the layers: "mlp"; "attention", named attention
            or attn; or "all".

    Raises:
        SettingError: unknown kind or part, or a count that the model does not have.
    """
    for setting, value, allowed in (("kind", kind, KINDS), ("part", part, PARTS)):
        if value not in allowed:
            raise SettingError(f"{setting} is {value!r}; allowed: {', '.join(allowed)}")
    closed = {name for _, name in closed_projections(model)}
    names = [
        name
        for name, layer in model.named_modules()
        if stock_type(layer) is KINDS[kind] and name not in closed and any(word in name for word in PARTS[part])
    ]
    if count == "all" and names:
        count = len(names)
    if not isinstance(count, int) or not 1 <= count <= len(names):
        of_part = "" if part == "all" else f" of its {part}"
        hint = "; call lowrank.open_attention(model) first" if part == "attention" and closed else ""
        raise SettingError(
            f"{count!r} trailing {kind} layers{of_part} asked of {type(model).__name__}, which has {len(names)}; "
            f"allowed: 1 to {len(names)}, or 'all'{hint}"
        )
    return names[-count:]


def freeze_before(model: nn.Module, names: Iterable[str]) -> None:
    """Set `requires_grad` to False for every parameter registered ahead of the first of the named layers.

    What follows that layer, normalisation and classifier included, is left as it is.

    Raises:
        ConversionError: a name that the model does not have.
    """
    layers = list(named_layers(model, names).values())
    own = {id(parameter) for layer in layers for parameter in layer.parameters()}  # may be tied to an earlier module
    for module in model.modules():
        if any(module is layer for layer in layers):
            return
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in own:
                parameter.requires_grad_(False)


def named_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of these names.

    Raises:
        ConversionError: no name, or names that the model does not have.
    """
    if isinstance(names, str):
        raise ConversionError(f"layers are given as the text {names!r}; give a list of names")
    names = list(names)
    if not names:
        raise ConversionError("no layer is named; lowrank.trailing_layers(model, 2) gives the last two convolutions")
    modules = dict(model.named_modules(remove_duplicate=False))
    problems = [_unknown(name, modules) for name in names if name not in modules]
    _refuse(problems)
    return {name: modules[name] for name in names}


def convert(model: Model, names: Iterable[str], method: Method, fuse: bool = True) -> Model:
    """Make layers keep their inputs as `method` does, in place.

    Everything is checked first, and nothing is changed if any layer cannot be converted. Parameters stay the same
    objects, and state dict keys stay as they are, except with `WSI` and `WASI`, which put two factors in the place of
    a weight: make the optimizer, `lowrank.SGD`, after the conversion. A layer that is converted already changes to the
    new method and loses the state of the old one.

    With `fuse`, the rest of the model keeps less as well, with the same outputs and gradients up to rounding:

    - A convolution does the work of the batch normalisation behind it while that uses its stored statistics (in
      evaluation mode), and nothing is kept for it; where no gradient is needed, that of the ReLU or ReLU6 behind both
      as well. The normalisation's scale then gets its gradient from the layer's weight gradient,
      so it is approximated as that one is.
    - ReLU and its like, dropout and pooling keep bits or shapes, as modules or called as functions.
    - Convolutions and linear layers with a frozen weight keep nothing, nor does a batch normalisation with a frozen
      scale and stored statistics. Freeze first, then convert.
    - In transformers the output of a layer normalisation, the input of GELU or SiLU and everything inside
      self-attention are computed again in the backward pass, from what is kept in any case; see `recompute`. That runs
      the linear layer in front of an activation or of attention once more.

    Take such a model apart, or replace layers in it, only after `revert`.

    Args:
        model: any module.
        names: names of `nn.Conv2d` and `nn.Linear` layers, as in `model.named_modules()`.
        method: such as `lowrank.HOSVD(energy=0.8)`.
        fuse: False changes the named layers and nothing else.

    Returns:
        `model`.

    Raises:
        ConversionError: lists every layer that cannot be converted, with the reason.
    """
    if not isinstance(method, Method):
        raise ConversionError(f"method is {method!r}; give an instance of a method, such as lowrank.HOSVD(energy=0.8)")
    layers = named_layers(model, names)
    problems: list[str] = []
    closed = {id(layer) for layer, _ in closed_projections(model)}
    methods: dict[str, Method] = {}
    for name, layer in layers.items():
        reason = _CLOSED if id(layer) in closed else _reason_against(layer) or method.reason_against(layer)
        if reason is None and method.layer_family is not None and shared_weights(model, layer):
            reason = "its weight is used by another module as well, so it cannot be held as two factors"
        if reason is None:
            try:
                methods[name] = method.for_layer(name)
            except SettingError as error:
                reason = str(error)
        if reason is not None:
            problems.append(f"layer {name!r} ({stock_type(layer).__name__}): {reason}")
    _refuse(problems)
    for name, layer in layers.items():
        if isinstance(layer, LowRankLayer):
            release(layer)
        adopt(layer, methods[name], name)
    if fuse:
        _keep_less(model)
    return model


def _keep_less(model: nn.Module) -> None:
    """Everything but the named layers: what `fuse` says in `convert`."""
    open_attention(model, lean=True)
    blocks = find_blocks(model)
    modules = dict(model.named_modules())
    for name, layer in list(recomputed_from(model)):
        adopt(layer, Vanilla(), name, chosen=False)
    for name, layer in list(frozen_layers(model)):
        adopt(layer, Vanilla(), name, chosen=False)
    for conv, norm in blocks.runs.items():
        layer, normalisation = modules[conv], modules[norm]
        assert isinstance(normalisation, nn.BatchNorm2d)
        if type(layer) in FAMILIES:
            adopt(layer, Vanilla(), conv, chosen=False)
        assert isinstance(layer, LowRankLayer)
        activation = modules[blocks.activations[conv]] if conv in blocks.activations else None
        if layer.norm is None:
            include(layer, normalisation, activation)
    for module in modules.values():
        if type(module) is nn.BatchNorm2d:
            lean_norm(module)
    for module in list(lean_modules(model)):
        module.__class__ = LEAN_MODULES[type(module)]
    if blocks.functional:
        lean_code(model)


def revert(model: Model) -> Model:
    """Give every layer that `convert` changed its original class back, in place. Parameters keep their values."""
    stock_code(model)
    for layer in list(model.modules()):
        if isinstance(layer, LowRankLayer):
            release(layer)
    close_attention(model)
    for layer in model.modules():
        if isinstance(layer, LeanBatchNorm2d):
            stock_norm(layer)
        layer.__class__ = stock_type(layer)
    return model


_CLOSED = (
    "its attention module hands its weight to a function and never calls it; lowrank.open_attention(model) changes "
    "that for plain self-attention"
)


def _reason_against(layer: nn.Module) -> str | None:
    kind = stock_type(layer)
    if kind in FAMILIES:
        return None
    supported = ", ".join(f"nn.{family.__name__}" for family in FAMILIES)
    base = next((family.__name__ for family in FAMILIES if isinstance(layer, family)), None)
    if base is not None:
        return f"is a subclass of nn.{base} that may compute something else; supported are {supported} themselves"
    return f"this kind of layer is not supported; supported are {supported}"


def _unknown(name: str, modules: dict[str, nn.Module]) -> str:
    near = difflib.get_close_matches(name, modules, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see model.named_modules()"
    return f"the model has no layer {name!r}; {hint}"


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConversionError("; ".join(problems))
