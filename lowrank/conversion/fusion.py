"""Find what can keep less than it does: runs of convolution and normalisation, activations, pooling, frozen layers.

A convolution may do the work of the batch normalisation behind it only if nothing else reads what passes between the
two. That is proven from the code of the module that calls both; where it cannot be proven, the two stay as they are,
and `Blocks.left` says why. Everything else is exact by itself and needs no proof.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from lowrank.conversion.attention import OpenAttention
from lowrank.conversion.trace import TraceError, trace
from lowrank.exact.lean import LEAN_FUNCTIONS, LEAN_MODULES
from lowrank.exact.recompute import RECOMPUTING_MODULES
from lowrank.layers.layer import FAMILIES, LeanBatchNorm2d

_CONVOLUTIONS = (nn.Conv2d, FAMILIES[nn.Conv2d])
_NORMS = (nn.BatchNorm2d, LeanBatchNorm2d)
_ACTIVATIONS = {nn.ReLU, nn.ReLU6, nn.Hardtanh}
_ACTIVATIONS |= {LEAN_MODULES[kind] for kind in _ACTIVATIONS}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Blocks:
    """What was found in a model.

    Attributes:
        runs: convolution name -> name of the normalisation that only it feeds.
        activations: name of such a convolution -> name of the activation that alone reads the normalisation's output.
        left: normalisation name -> why it is in no run.
        functional: whether the code calls activations and the like as functions, or cannot be traced.
    """

    runs: dict[str, str] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    functional: bool = False


def find_blocks(model: nn.Module) -> Blocks:
    """The runs of a model, proven one by one from the code of the modules that call them."""
    blocks = Blocks()
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    norms = {name: module for name, module in model.named_modules() if type(module) in _NORMS}
    for name, owner in model.named_modules():
        children = [child for child, module in norms.items() if child.rpartition(".")[0] == name]
        if isinstance(owner, OpenAttention) or not list(owner.children()):
            continue
        try:
            graph = trace(owner, is_leaf=lambda module: True)
        except TraceError as error:
            blocks.functional = True
            blocks.left.update(dict.fromkeys(children, f"of {name or 'the model'}, {error}"))
            continue
        blocks.functional |= any(node.target in LEAN_FUNCTIONS for node in graph.nodes if node.op == "call_function")
        blocks.functional |= any(node.op == "call_method" and node.target in ("relu", "relu_") for node in graph.nodes)
        prefix = name + "." if name else ""
        calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        for node in graph.nodes:
            if node.op == "call_module" and type(owner.get_submodule(str(node.target))) in _NORMS:
                reason = _reason_against(node, owner, calls, paths)
                if reason is None:
                    conv = prefix + str(node.args[0].target)
                    blocks.runs[conv] = prefix + str(node.target)
                    activation = _activation_behind(node, owner)
                    if activation is not None:
                        blocks.activations[conv] = prefix + activation
                else:
                    blocks.left[prefix + str(node.target)] = reason
    for norm in norms:
        if norm not in blocks.runs.values():
            blocks.left.setdefault(norm, "no module's code calls it")
    return blocks


def _reason_against(node: fx.Node, owner: nn.Module, calls: Counter[str], paths: Counter[int]) -> str | None:
    """Why the normalisation that `node` calls cannot be done by the layer ahead of it; None if it can."""
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return "what it reads is not the output of a layer"
    conv, norm = owner.get_submodule(str(source.target)), owner.get_submodule(str(node.target))
    if type(conv) not in _CONVOLUTIONS:
        return f"what it reads is the output of {type(conv).__name__}, not of a convolution"
    if len(source.users) > 1:
        return "the convolution's output is read by something else as well"
    if max(calls[str(source.target)], calls[str(node.target)]) > 1:
        return "it or the convolution is called more than once"
    if max(paths[id(conv)], paths[id(norm)]) > 1:
        return "it or the convolution has two places in the model"
    if any(getattr(module, kind) for module in (conv, norm) for kind in _HOOKS):
        return "it or the convolution has hooks"
    return None


def _activation_behind(node: fx.Node, owner: nn.Module) -> str | None:
    """The one module that reads what the normalisation of `node` gives, if it is an activation that can be included."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module" or users[0].args != (node,) or users[0].kwargs:
        return None
    activation = owner.get_submodule(str(users[0].target))
    if type(activation) not in _ACTIVATIONS or any(getattr(activation, kind) for kind in _HOOKS):
        return None
    return str(users[0].target)


def lean_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Activations, dropout and pooling that have a version that keeps less."""
    return (module for module in model.modules() if type(module) in LEAN_MODULES)


def frozen_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions and linear layers with a frozen weight; PyTorch keeps their input all the same."""
    for name, module in model.named_modules():
        if type(module) in FAMILIES and not module.weight.requires_grad:
            yield name, module


def recomputed_from(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers of a network that computes tensors again: inputs and outputs of theirs may be among these."""
    if any(type(module) in RECOMPUTING_MODULES or isinstance(module, OpenAttention) for module in model.modules()):
        yield from ((name, module) for name, module in model.named_modules() if type(module) is nn.Linear)


class _LeanFunctions(TorchFunctionMode):
    """Within it, plain functions that keep whole tensors give way to those of `lean`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lean: Callable[..., Any] | None = LEAN_FUNCTIONS.get(func)
        if lean is not None and torch.is_grad_enabled() and args and isinstance(args[0], Tensor):
            func = lean if args[0].requires_grad else func
        return func(*args, **(kwargs or {}))


class LeanCode(nn.Module):
    """Mixed into the class of a model whose own code calls activations and the like as functions."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with _LeanFunctions():
            return super().__call__(*arguments, **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        stock = type(self).__mro__[2]
        return _rebuild, (stock,), self.__dict__


def _rebuild(stock: type[nn.Module]) -> nn.Module:
    model = stock.__new__(stock)
    lean_code(model)
    return model


def lean_code(model: nn.Module) -> None:
    """Give a model's class `LeanCode`, in place."""
    if not isinstance(model, LeanCode):
        model.__class__ = type(type(model).__name__, (LeanCode, type(model)), {"__module__": type(model).__module__})


def stock_code(model: nn.Module) -> None:
    """Take `LeanCode` from a model's class, in place."""
    if isinstance(model, LeanCode):
        model.__class__ = type(model).__mro__[2]
