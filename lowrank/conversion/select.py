"""Choose layers by kind and place, freeze what is ahead of them, find modules by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from lowrank.conversion.attention import closed_projections
from lowrank.conversion.parts import PARTS, Part, is_of_attention, is_of_mlp, layers_of_mlps
from lowrank.errors import ConversionError, SettingError
from lowrank.layers.arguments import reason_against_model, require_model
from lowrank.layers.kinds import kind_of
from lowrank.layers.swap import plain_class

LayerKind = Literal["conv", "linear"]
INPUT_DIMENSIONS: dict[str, int] = {"conv": 4, "linear": 0}  # see `lowrank.layers.kinds.Kind`


def trailing_layers(
    model: nn.Module, count: int | Literal["all"], kind: LayerKind = "conv", part: Part = "all"
) -> list[str]:
    """Names of the model's last layers of a kind, in the order in which the model registers them.

    Args:
        model: any module.
        count: how many, from 1; or "all".
        kind: "conv" for convolutions of two dimensions, transposed ones too, "linear" for linear layers: all that
            `convert` takes, such as timm's padded convolutions, GPT-2's `Conv1D` and what `register_layer` was given;
            but no projections of attention that are not called (see `open_attention`).
        part: of a transformer, by the names of the modules that hold the layers: "mlp", and the linear layers outside
            of attention of a block that has none of that name, such as BERT's; "attention", named attention or attn;
            or "all".

    Raises:
        ConversionError: `model` is no module.
        SettingError: unknown kind or part, or a count that the model does not have.
    """
    require_model(model)
    for setting, value, known in (("kind", kind, INPUT_DIMENSIONS), ("part", part, PARTS)):
        if value not in list(known):
            raise SettingError(f"{setting} is {value!r}; allowed: {', '.join(known)}")
    closed = {name for _, name in closed_projections(model)}
    of_kind = [name for name in _of_dimensions(model, INPUT_DIMENSIONS[kind]) if name not in closed]
    names = of_kind
    if part == "attention":
        names = [name for name in names if is_of_attention(name)]
    elif part == "mlp":
        names = layers_of_mlps(model, names) if kind == "linear" else [name for name in names if is_of_mlp(name)]
    if count == "all" and names:
        count = len(names)
    if type(count) is bool or not isinstance(count, int) or not 1 <= count <= len(names):
        of_part = "" if part == "all" else f" of its {part}"
        hint = "; call lowrank.open_attention(model) first" if part == "attention" and closed else ""
        allowed = f"allowed: 1 to {len(names)}, or 'all'" if names else _others(model, of_kind)
        raise SettingError(
            f"{count!r} trailing {kind} layers{of_part} asked of {type(model).__name__}, which has {len(names)}; "
            f"{allowed}{hint}"
        )
    return names[-count:]


def _of_dimensions(model: nn.Module, dimensions: int) -> list[str]:
    """Names of the layers that can be converted and take inputs of so many dimensions."""
    kinds = ((name, kind_of(plain_class(layer))) for name, layer in model.named_modules())
    return [name for name, kind in kinds if kind is not None and kind.dimensions == dimensions]


def _others(model: nn.Module, of_kind: list[str]) -> str:
    """What a model has in the place of layers that were asked for: of their kind, or of others."""
    if of_kind:
        return f"of its {len(of_kind)} none is named so; give names of layers, such as {of_kind[-1]!r}"
    for kind, dimensions in INPUT_DIMENSIONS.items():
        if count := len(_of_dimensions(model, dimensions)):
            return f"it has {count} of kind {kind!r}"
    names = [name for dimensions in (3, 5) for name in _of_dimensions(model, dimensions)]
    return f"name the convolutions of other dimensions, such as {names[-1]!r}" if names else "it has none of any kind"


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


def weights_of(layer: nn.Module) -> list[Any]:
    """What a layer's weight is made of: itself, or where it is parametrised, the parameters; nothing is computed."""
    parametrizations = layer._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict) and "weight" in parametrizations:
        return list(parametrizations["weight"].parameters())
    return [layer.weight]


def is_frozen(layer: nn.Module) -> bool:
    """Whether a layer's weight wants no gradient."""
    return not any(getattr(weight, "requires_grad", True) for weight in weights_of(layer))


def named_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of these names.

    Raises:
        ConversionError: no name, or names that the model does not have.
    """
    problems, layers = find_layers(model, names)
    if problems:
        raise ConversionError("; ".join(problems))
    return layers


def find_layers(model: nn.Module, names: Iterable[str]) -> tuple[list[str], dict[str, nn.Module]]:
    """What is wrong with the names, and the modules of those that the model has."""
    reason = reason_against_model(model)
    if reason is not None:
        return [reason], {}
    if isinstance(names, str) or not isinstance(names, Iterable):
        return [f"layers are given as {names!r}; give a list of names"], {}
    names = list(names)
    if not names:
        return ["no layer is named; lowrank.trailing_layers(model, 2) gives the last two convolutions"], {}
    modules = dict(model.named_modules(remove_duplicate=False))
    problems = [_unknown(name, modules) for name in names if not isinstance(name, str) or name not in modules]
    return problems, {name: modules[name] for name in names if isinstance(name, str) and name in modules}


def _unknown(name: object, modules: dict[str, nn.Module]) -> str:
    if not isinstance(name, str):
        given = type(name).__name__ if isinstance(name, nn.Module) else repr(name)
        return f"a layer is given as {given}; give its name, a text, as in model.named_modules()"
    near = difflib.get_close_matches(name, modules, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see model.named_modules()"
    return f"the model has no layer {name!r}; {hint}"
