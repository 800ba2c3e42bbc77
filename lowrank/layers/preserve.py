"""Run a model for a measurement and leave it, and the random state, as they were."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from lowrank.errors import SettingError
from lowrank.layers.arguments import require_model
from lowrank.layers.layer import LowRankLayer

LossFunction = Callable[[nn.Module, Any], Tensor]


Restore = Callable[[], None]


def without_graphs() -> AbstractContextManager[Any]:
    """A context in which what is compiled runs as the code that it was made of: a graph knows of no hook that was put
    on a layer since, and none may become a part of it."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore buffers, gradients, `requires_grad` flags, what methods carry, and the random state, whatever happens; of
    modules that are not PyTorch's, attributes as well, such as a count of calls, the state of a metric, or a note that
    hooks are there: so hooks that are registered inside, by anybody but PyTorch, are removed.

    Inside, every gradient is None, as after `optimizer.zero_grad()`.

    Raises:
        ConversionError: `model` is no module.
    """
    require_model(model)
    attributes = [_attributes_of(module) for module in model.modules() if not _is_of_torch(module)]
    attributes += [_hooks_of(module) for module in model.modules()]
    buffers = {module: dict(module._buffers) for module in model.modules()}
    values = [(tensor, tensor.clone()) for tensor in model.buffers()]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    states = [(layer, replace(layer._lowrank)) for layer in model.modules() if isinstance(layer, LowRankLayer)]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        for layer, _ in states:
            layer._lowrank.recorded = ()  # whose numbers would be others
        with torch.random.fork_rng(devices):
            yield
    finally:
        for restore in attributes:
            restore()
        for parameter, grad, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for layer, state in states:
            layer._lowrank = state
        for module, tensors in buffers.items():
            module._buffers.clear()
            module._buffers.update(tensors)
        with torch.no_grad():
            for tensor, value in values:
                # Buffers that did not change may belong to a graph whose backward pass is still to come.
                if not tensor.is_meta and not torch.equal(tensor, value):
                    tensor.copy_(value)


def _is_of_torch(module: nn.Module) -> bool:
    """Whether a module's class is one of PyTorch's, whose state is buffers, or which knows best itself."""
    return type(module).__module__.partition(".")[0] == "torch"


def _hooks_of(module: nn.Module) -> Restore:
    """Removes hooks that a module has not now. One that is gone then has done what it was there for."""
    own = vars(module).items()
    before = [(hooks, set(hooks)) for name, hooks in own if name.endswith("_hooks") and isinstance(hooks, dict)]

    def restore() -> None:
        for hooks, known in before:
            for key in [key for key in hooks if key not in known and not _is_torchs(hooks[key])]:
                del hooks[key]

    return restore


def _is_torchs(hook: Any) -> bool:
    function = hook.func if isinstance(hook, partial) else hook
    return str(getattr(function, "__module__", "")).partition(".")[0] == "torch"


def _attributes_of(module: nn.Module) -> Restore:
    """Gives a module the attributes back that it has now, with what they hold, but for what PyTorch registers."""
    registered = ("_parameters", "_buffers", "_modules", "_lowrank")
    own = {name: value for name, value in vars(module).items() if name not in registered}
    seen: set[int] = set()
    held = [_content_of(value, seen) for name, value in own.items() if not name.endswith("_hooks")]

    def restore() -> None:
        for name in vars(module).keys() - own.keys() - set(registered):
            del vars(module)[name]
        vars(module).update(own)
        for content in held:
            content()

    return restore


def _content_of(value: Any, seen: set[int]) -> Restore:
    """Gives a tensor, list or dictionary back what it holds now; anything else, and what was seen, is left alone."""
    if id(value) in seen:
        return lambda: None
    seen.add(id(value))
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return _numbers_of(value)
    if not isinstance(value, list | dict):
        return lambda: None
    before: Any = value.copy()
    inner = [_content_of(one, seen) for one in (value.values() if isinstance(value, dict) else value)]

    def restore() -> None:
        value.clear()
        value.update(before) if isinstance(value, dict) else value.extend(before)
        for content in inner:
            content()

    return restore


def _numbers_of(tensor: Tensor) -> Restore:
    if tensor.is_meta or tensor.is_inference():
        return lambda: None
    before, version = tensor.detach().clone(), tensor._version

    def restore() -> None:
        if tensor._version != version:
            with torch.no_grad():
                tensor.copy_(before)

    return restore


def loss_of(loss_fn: LossFunction, model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch.

    Raises:
        SettingError: it is no tensor of one number, or one without a graph.
    """
    loss = result_of(loss_fn, model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise SettingError(f"loss_fn gave {found}; allowed is a tensor of one number, such as .mean() gives")
    _require_graph([loss], model)
    return loss


def graph_of(loss_fn: LossFunction, model: nn.Module, batch: Any) -> Any:
    """What a loss function gives, which alone holds the graph that is measured.

    Raises:
        SettingError: there is no tensor in it, such as where a function ends without `return`, or none with a graph.
    """
    found = result_of(loss_fn, model, batch)
    if not tensors_in(found):
        raise SettingError(f"loss_fn gave a {type(found).__name__}, which holds no graph; let it return the loss")
    _require_graph(tensors_in(found), model)
    return found


def result_of(loss_fn: LossFunction, model: nn.Module, batch: Any) -> Any:
    """What a loss function gives, whatever that is.

    Raises:
        SettingError: it is no function, or one of other arguments.
    """
    if not callable(loss_fn):
        raise SettingError(f"loss_fn is {loss_fn!r}; allowed is a function loss_fn(model, batch) that returns the loss")
    try:
        signature(loss_fn).bind(model, batch)
    except TypeError as error:
        raise SettingError(f"loss_fn is called with (model, batch), which it does not take: {error}") from None
    except ValueError:  # of what is written in C nobody knows
        pass
    return loss_fn(model, batch)


def _require_graph(found: list[Tensor], model: nn.Module) -> None:
    """Raise `SettingError` where a model is trained and its loss has no graph, so that nothing would be measured."""
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())
    if trained and not any(tensor.requires_grad for tensor in found):
        raise SettingError(
            "loss_fn gave a tensor without a graph, though parameters want gradients; let it return the loss as it is, "
            "neither detached nor computed under torch.no_grad()"
        )


def tensors_in(batch: object) -> list[Tensor]:
    """Every tensor of a batch of any nesting."""
    return [leaf for leaf in _pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
