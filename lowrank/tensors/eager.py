"""Whether a layer is in plain eager training, where it may keep less; everywhere else it is the stock layer.

Also what a backward pass does where it is itself differentiated, and where what it needs was changed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lowrank.errors import ChangedError, DoubleBackwardError

# Tensor classes that hold their own numbers and do nothing of their own when they are used.
ORDINARY: set[type[Tensor]] = {Tensor, nn.Parameter, nn.Buffer}
_TRACERS = [torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY]
_TRACERS.append(torch._C._TorchDispatchModeKey.FUNCTIONAL)


def trains_plainly(*tensors: Tensor | None) -> bool:
    """Whether operations on these tensors are recorded by autograd as ever, and by nothing else.

    Not so without gradients, while compiling, tracing or exporting, under a transform of `torch.func`, in forward mode,
    with fake tensors, and for tensors that are complex, sparse, nested, quantised, on the meta device or of a class of
    their own.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack() and any(torch._C._get_dispatch_mode(key) for key in _TRACERS):
        return False
    for tensor in tensors:  # noqa: SIM110 - run for every layer, so no generator
        if tensor is not None and not _is_ordinary(tensor):
            return False
    return True


def in_compiled_graph() -> bool:
    """Whether `torch.compile` records a graph for training, not an export, nor another tracer that says it compiles."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def wants_gradient(x: Tensor) -> bool:
    """Whether autograd keeps something for this tensor, in plain eager training."""
    return torch.is_grad_enabled() and x.requires_grad and trains_plainly(x)


def _is_ordinary(tensor: Tensor) -> bool:
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_meta
    if kind not in ORDINARY:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context in which autocast is off for a kind of device."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def saved(ctx: Any, name: str) -> tuple[Any, ...]:
    """The saved tensors of an autograd function.

    Args:
        ctx: of the function.
        name: what the function belongs to, for the message.

    Raises:
        ChangedError: one of them was changed in place since the forward pass.
    """
    try:
        tensors: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ChangedError(
            f"{name}: a tensor or parameter that its gradient is computed from was changed in place between "
            f"forward and backward pass ({' '.join(str(error).split())[:200]}); change it after the backward pass, or "
            f"convert with fuse=False"
        ) from None
    if torch.compiler.is_compiling():
        return tensors
    if any(tensor is not None and tensor.numel() and not tensor.untyped_storage().nbytes() for tensor in tensors):
        raise ChangedError(
            f"{name}: a parameter that its gradient is computed from was sharded again after the forward pass; convert "
            f"with fuse=False, or keep parameters whole until the backward pass (reshard_after_forward=False)"
        )
    return tensors


class _Refused(torch.autograd.Function):
    """A gradient that may be used, and not be differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *anchors: Tensor | None) -> Tensor:
        ctx.name = name
        return gradient.detach()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise DoubleBackwardError(
            f"{ctx.name}: its gradient cannot be differentiated again (create_graph=True), since it is formed from "
            f"what the layer kept, not from its input; call lowrank.revert for this, or leave the layer as it is"
        )


def refuse_double_backward(name: str, gradient: Tensor | None, *anchors: Tensor | None) -> Tensor | None:
    """`gradient`, such that its own derivative is an error and never silently missing.

    Args:
        name: of the layer.
        gradient: found in a backward pass that is recorded itself.
        anchors: tensors whose graphs a derivative of it would lead to, such as what the backward pass was given.
    """
    return None if gradient is None else _Refused.apply(name, gradient, *anchors)
