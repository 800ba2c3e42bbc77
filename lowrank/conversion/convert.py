"""Convert layers in place, all or none, and bring the original ones back."""

from __future__ import annotations

from collections.abc import Container
from typing import TypeVar

from torch import nn

from lowrank.conversion.attention import close_attention, open_attention
from lowrank.conversion.check import Choice, Conversion, plan_conversion
from lowrank.conversion.code import FunctionCalls
from lowrank.conversion.compiled import close_doors, open_doors
from lowrank.conversion.select import is_frozen
from lowrank.errors import ConversionError
from lowrank.layers import factored
from lowrank.layers.arguments import require_model, require_switches
from lowrank.layers.attention import OpenAttention
from lowrank.layers.classes import layer_class
from lowrank.layers.factored import FactoredLinear
from lowrank.layers.keeping import LayerState
from lowrank.layers.layer import LowRankLayer, can_be_converted
from lowrank.layers.lean import LEAN_MODULES, RECOMPUTED, LeanModule
from lowrank.layers.swap import become, has_own_forward, restore, stock_class
from lowrank.methods.base import Method, Vanilla
from lowrank.tensors.worth import check_smallest

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    names: Choice,
    method: Method | None = None,
    fuse: bool = True,
    recompute: bool = True,
    smallest: float = 0,
    everywhere: bool = False,
) -> Model:
    """Make layers keep their inputs as `method` does, in place.

    Everything is checked first, and nothing is changed if any layer cannot be converted; the model's own code is not
    run, and no random number is drawn. Parameters stay the same objects, and the state dict stays the stock one. Only
    `WSI` and `WASI` put two parameters, `left` and `right`, in the place of a weight: make the optimizer after the
    conversion. A layer that is converted already changes to the new method and loses the state of the old one.

    With `fuse`, the rest of the model keeps less as well, with the same outputs and gradients up to rounding:

    - A batch normalisation that uses its running statistics (in evaluation mode) is computed together with the
      convolution whose output reaches it, and nothing is kept for it. Its scale then gets its gradient from the
      layer's weight gradient, so it is approximated as that one is.
    - ReLU and its like, dropout and pooling keep bits or shapes, as modules or called as functions.
    - Convolutions and linear layers with a frozen weight keep nothing, nor does a batch normalisation with a frozen
      scale and running statistics. Freeze first, then convert.
    - In transformers the output of a layer normalisation, the input of GELU or SiLU and everything inside
      self-attention are computed again in the backward pass, from what is kept in any case; see `recompute`. That runs
      the linear layer in front of an activation or of attention once more. So are the outputs of convolutions of few
      products, such as depthwise ones, with the normalisation and the activation behind them.
    - Where the input of a layer can be computed again from what is kept in any case, such as behind a normalisation,
      and the method would keep more than a 32nd of it, the layer keeps nothing and the gradient of its weight is exact;
      see `everywhere`. Not so with methods whose bytes depend on the data.

    What is fused is decided while the model runs, by what reaches a layer: hooks, other readers of a tensor, and
    changes to the model afterwards see what they see in the stock model. A part that is compiled on its own is given
    ordinary tensors, if that was done before.

    Args:
        model: any module.
        names: names of `nn.Conv2d` and `nn.Linear` layers, as in `model.named_modules()`; or a method for each name.
        method: such as `lowrank.HOSVD(energy=0.8)`, where `names` are names alone.
        fuse: False changes the named layers and nothing else.
        recompute: False keeps the outputs of layers and attention, and computes none of these again: a step takes
            hardly longer than stock's then, and more is kept.
        smallest: against slow steps on small inputs: less of a tensor is kept only where that saves at least so many
            bytes for each additional operator call; elsewhere the layer is the stock layer, and takes hardly longer.
            Decided by shapes alone, see `lowrank.tensors.worth`; `lowrank.account` and `lowrank.explain` say where. 0:
            wherever anything is saved, as in published numbers and tables. 2**18: at no batch does a step take much
            longer than stock's, and small batches keep more, at one image all. 2**15: some longer, and less is kept.
        everywhere: True uses the method also where the exact input takes no more than what it keeps, as the papers do.
            An input that is derived from others (`derive`) is then the exact one, where that takes nothing either.

    Returns:
        `model`.

    Raises:
        ConversionError: lists every layer that cannot be converted, with the reason; with `fuse` off also those whose
            method has `derive`.
        SettingError: `smallest` is below zero or no number, or a switch is neither True nor False.

    Example:
        lowrank.convert(model, lowrank.trailing_layers(model, 4), lowrank.ASI(ranks=[8, 16, 3, 3]))
        lowrank.convert(model, {"conv1": lowrank.Vanilla(), "conv2": lowrank.HOSVD(0.8)})
    """
    check_smallest(smallest)
    require_switches(fuse=fuse, recompute=recompute, everywhere=everywhere)
    problems, conversions = plan_conversion(model, names, method)
    if not fuse:
        problems += [f"layer {one.name!r}: derive needs fuse, which is off" for one in conversions if one.method.derive]
    if problems:
        raise ConversionError("; ".join(problems))
    for conversion in conversions:
        _take(conversion)
    if fuse:
        _keep_less(model, recompute)
    _set_choices(model, smallest, everywhere)
    return model


def adopt(layer: nn.Module, method: Method, name: str) -> None:
    """Turn one stock layer into a converted one that nobody named, in place."""
    become(layer, layer_class(type(layer)))
    assert isinstance(layer, LowRankLayer)
    layer._lowrank = LayerState(method, name, chosen=False)


def _take(conversion: Conversion) -> None:
    layer = conversion.layer
    if isinstance(layer, LowRankLayer):
        _release(layer)
    kind = layer_class(type(layer))
    layer._lowrank = LayerState(conversion.method, conversion.name)  # type: ignore[assignment]
    if conversion.factors is None:
        become(layer, kind)
    else:
        factored.attach(layer, *conversion.factors)


def _release(layer: LowRankLayer) -> None:
    if isinstance(layer, FactoredLinear):
        factored.detach(layer)
    restore(layer)
    del layer._lowrank


def _keep_less(model: nn.Module, recompute: bool) -> None:
    """Everything but the named layers: what `fuse` says in `convert`."""
    open_attention(model, lean=True)
    modules = {name: module for name, module in model.named_modules() if not has_own_forward(module)}
    calls = {name: FunctionCalls(module) for name, module in model.named_modules()}
    calls = {name: found for name, found in calls.items() if found}
    kinds = {stock_class(module) for module in modules.values()}
    recomputes = bool(kinds & set(RECOMPUTED)) or any(isinstance(m, OpenAttention) for m in modules.values())
    read_behind = _may_be_read_behind(modules)
    ahead = _ahead_of_functions(model, calls)
    for name, module in modules.items():
        watched = any(found.reach(_child(owner, name)) for owner, found in calls.items() if _is_in(owner, name))
        watched = watched or any(_is_in(owner, name) or owner == name for owner in ahead)
        lazy = name in read_behind
        stock = not isinstance(module, LowRankLayer) and can_be_converted(module)
        if stock and (lazy or watched or (recomputes and type(module) is nn.Linear) or is_frozen(module)):
            adopt(module, Vanilla(), name)
        if isinstance(module, LowRankLayer):
            module._lowrank.lazy, module._lowrank.watched, module._lowrank.recompute = lazy, watched, recompute
        elif type(module) in LEAN_MODULES:
            become(module, LEAN_MODULES[type(module)])
        if isinstance(module, LeanModule):
            module._lowrank_watched = watched
    open_doors(model)


def _set_choices(model: nn.Module, smallest: float, everywhere: bool) -> None:
    told: list[str] = []
    for layer in model.modules():
        if isinstance(layer, LowRankLayer):
            layer._lowrank.smallest, layer._lowrank.everywhere, layer._lowrank.settled = smallest, everywhere, {}
            layer._lowrank.told = told
        elif isinstance(layer, LeanModule):
            layer._lowrank_smallest = smallest


def _ahead_of_functions(model: nn.Module, calls: Container[str]) -> set[str]:
    """The children ahead of one beside them whose own code calls functions, such as a normalisation over channels."""
    found = set()
    for owner, module in model.named_modules():
        behind = False
        for child, one in reversed(list(module.named_children())):
            name = f"{owner}.{child}" if owner else child
            if behind:
                found.add(name)
            behind = behind or (name in calls and next(one.children(), None) is None)
    return found


def _is_in(owner: str, name: str) -> bool:
    return name != owner and (not owner or name.startswith(owner + "."))


def _child(owner: str, name: str) -> str:
    """The owner's child that a module lies in."""
    return name[len(owner) and len(owner) + 1 :].partition(".")[0]


def _may_be_read_behind(modules: dict[str, nn.Module]) -> set[str]:
    """The convolutions whose output pays as a lazy one: where a normalisation of their width is behind or beside them,
    or, of frozen ones, a Hardtanh (ReLU6 is one) beside them. What it is in the end decides itself when the model runs.
    """
    owners = {name: name.rpartition(".")[0] for name in modules}
    beside = {(owners[name], m.num_features) for name, m in modules.items() if isinstance(m, nn.BatchNorm2d)}
    activated = {owners[name] for name, module in modules.items() if isinstance(module, nn.Hardtanh)}
    behind: set[int] = set()
    found = set()
    for name, module in reversed(modules.items()):
        if isinstance(module, nn.BatchNorm2d):
            behind.add(module.num_features)
        elif isinstance(module, nn.Conv2d):
            normalised = module.out_channels in behind or (owners[name], module.out_channels) in beside
            if normalised or (owners[name] in activated and is_frozen(module)):
                found.add(name)
    return found


def revert(model: Model) -> Model:
    """Give every layer that `convert` changed its original class back, in place. Parameters keep their values.

    Raises:
        ConversionError: `model` is no module.
    """
    require_model(model)
    close_doors(model)
    for layer in list(model.modules()):
        if isinstance(layer, LowRankLayer):
            _release(layer)
    close_attention(model)
    for layer in model.modules():
        for own in ("_lowrank_watched", "_lowrank_smallest"):
            vars(layer).pop(own, None)
        restore(layer)
    return model
