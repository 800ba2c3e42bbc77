"""Whether a layer is in plain eager training, where it may keep less; everywhere else it is the stock layer.

Also what a backward pass does where it is itself differentiated, and where what it needs was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache, wraps
from threading import local
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._functorch.pyfunctorch import (
    pop_dynamic_layer_stack,
    push_dynamic_layer_stack,
    temporarily_clear_interpreter_stack,
)
from torch.autograd import forward_ad

from lowrank.errors import ChangedError, DoubleBackwardError

Function = TypeVar("Function", bound=Callable[..., Any])
# Tensor classes that hold their own numbers and do nothing of their own when they are used.
_STOCK = (Tensor, nn.Parameter, nn.Buffer)
ORDINARY: set[type[Tensor]] = {*_STOCK}
_TRACERS = [torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY]
_TRACERS.append(torch._C._TorchDispatchModeKey.FUNCTIONAL)
_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "privateuseone")
_WITH_AUTOCAST = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))
# Modes that go by the operators of PyTorch: of a checkpoint that keeps the results of chosen ones, and counts those of
# a pass that it runs again; and of a context that copies what is saved ahead of a change in place.
_BY_OPERATORS = tuple(
    getattr(owner, name)
    for owner, name in (
        (torch.utils.checkpoint, "_CachingTorchDispatchMode"),
        (torch.utils.checkpoint, "_CachedTorchDispatchMode"),
        (torch.autograd.graph, "_CloneArgBeforeMutateMode"),
    )
    if hasattr(owner, name)
)


def trains_plainly(*tensors: Tensor | None) -> bool:
    """Whether operations on these tensors are recorded by autograd as ever, and by nothing else.

    Not so without gradients, while compiling, tracing or exporting, under a transform of `torch.func`, in forward mode,
    in a checkpoint that keeps the results of chosen operators, where saved tensors may be changed
    (`allow_mutation_on_saved_tensors`), with fake tensors, and for tensors that are complex, sparse, nested, quantised,
    on the meta device or of a class of their own.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack() and _is_traced():
        return False
    for tensor in tensors:  # noqa: SIM110 - run for every layer, so no generator
        if tensor is not None and not _is_ordinary(tensor):
            return False
    return True


def _is_traced() -> bool:
    """Whether one of the dispatch modes that are on takes operators for more than what they give."""
    if any(torch._C._get_dispatch_mode(key) for key in _TRACERS):
        return True
    modes = map(torch._C._get_dispatch_stack_at, range(torch._C._len_torch_dispatch_stack()))
    return any(isinstance(mode, _BY_OPERATORS) for mode in modes)


def remembered(function: Function) -> Function:
    """A function of hashable arguments, one after the other, that remembers what it found. A compiler sees the function
    itself: it does not look into a cache, and warns of it."""
    cached = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def found(*args: Any) -> Any:
        return function(*args) if torch.compiler.is_compiling() else cached(*args)

    return found  # type: ignore[return-value]


def in_compiled_graph() -> bool:
    """Whether `torch.compile` records a graph for training, not an export, not under a transform of `torch.func`, nor
    another tracer that says it compiles."""
    # The flag itself: on PyTorch 2.11, is_exporting() answers True to any compiler that asks.
    if not torch.compiler.is_dynamo_compiling() or torch.compiler._is_exporting_flag:
        return False
    from lowrank.tensors.transforms import in_transform

    return not in_transform()


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
    return torch.autocast(device, enabled=False) if in_autocast(device) else nullcontext()


@contextmanager
def as_when_called(device: str) -> Iterator[None]:
    """A context for what a layer computes later than it was called, without a graph: whoever asks for it may be in
    autocast, in inference mode or under a transform of `torch.func`, of which numbers that serve others know none."""
    with ExitStack() as stack:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            stack.enter_context(temporarily_clear_interpreter_stack())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_autocast(device))
        yield


def in_autocast(device: str) -> bool:
    """Whether autocast is on for a kind of device."""
    if torch.compiler.is_compiling():  # the compiler of PyTorch 2.11 cannot look into `is_autocast_available`
        return device in _WITH_AUTOCAST and torch.is_autocast_enabled(device)
    if not torch._C._is_any_autocast_enabled():
        return False
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def saved(ctx: Any, name: str) -> tuple[Any, ...]:
    """The saved tensors of an autograd function, ordinary ones: in a backward pass no function keeps less.

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
            f"a copy of it, or, where PyTorch needs it no more, convert with fuse=False"
        ) from None
    if torch.compiler.is_compiling():
        return tensors
    for tensor in tensors:
        if tensor is not None and not tensor.untyped_storage().nbytes() and tensor.numel():
            raise ChangedError(
                f"{name}: a parameter that its gradient is computed from was sharded again after the forward pass; "
                f"convert with fuse=False, or keep parameters whole until the backward pass "
                f"(reshard_after_forward=False)"
            )
    return tuple(map(ordinary, tensors))


def ordinary(tensor: Tensor | None) -> Tensor | None:
    """The same numbers and graph in a tensor of PyTorch's own class."""
    return tensor if tensor is None or type(tensor) in _STOCK else tensor.as_subclass(Tensor)


def no_view(y: Tensor) -> Tensor:
    """The same for a function to return, which autograd does not take for a view: as stock's, it may be changed in
    place."""
    if torch.compiler.is_compiling():  # which cannot ask whether it is one
        return torch.ops.aten._unsafe_view.default(y, y.shape)
    return y.detach() if y._is_view() else y


class Node(torch.autograd.Function):
    """An autograd function of one output whose backward pass also takes a batch of gradients
    (`is_grads_batched=True`), one by one.

    PyTorch has rules for few operators on such a batch. Nor does autocast reach the backward pass: what is computed
    again there was computed without. Where no gradient arrives, none is given, as by PyTorch's own nodes: a parameter
    with zeros in its place would decay, and move on by its momentum.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        setattr(cls, "forward", staticmethod(_told_of_none(cls.forward)))  # noqa: B010 - not a method to mypy
        setattr(cls, "backward", staticmethod(_one_by_one(cls.backward)))  # noqa: B010


def _told_of_none(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def first(ctx: Any, *arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        return forward(ctx, *arguments)

    return first


def _one_by_one(backward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(backward)
    def each(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        if not torch._C._is_any_autocast_enabled():
            return run(ctx, *grads)
        with without_autocast(grads[0].device.type):
            return run(ctx, *grads)

    def run(ctx: Any, *grads: Any) -> Any:
        global _nodes_run
        _nodes_run += 1
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return in_transform(ctx, *grads)
        batched = next(filter(is_batched, grads), None)
        if batched is None:
            return backward(ctx, *grads)
        level = _innermost_level(batched)
        columns = [torch._remove_batch_dim(g, level, 0, 0) if is_batched(g) else None for g in grads]
        return tuple(
            None if found is None else torch._add_batch_dim(found, 0, level)
            for found in _stacked_rows(backward, ctx, grads, columns)
        )

    def in_transform(ctx: Any, *grads: Any) -> Any:
        """Of `torch.func.vmap`: a graph from outside of it knows of the gradients that it is given alone."""
        level = torch._C._functorch.peek_interpreter_stack().level()
        columns = [_unwrapped(g, level) for g in grads]
        top = pop_dynamic_layer_stack()
        try:
            if not any(column is not None for column in columns):
                return run(ctx, *grads)
            made = _stacked_rows(run, ctx, grads, columns)
        finally:
            push_dynamic_layer_stack(top)
        return tuple(None if found is None else torch._C._functorch._add_batch_dim(found, 0, level) for found in made)

    return each


def _stacked_rows(function: Callable[..., Any], ctx: Any, grads: Any, columns: list[Tensor | None]) -> list[Any]:
    """What a backward pass makes of each gradient of a batch, one below the other; `columns` are the batches among its
    gradients, (n, ...)."""
    size = next(len(column) for column in columns if column is not None)
    found, ctx = [], _AskedOnce(ctx)
    with _one_of_a_batch():
        for at in range(size):
            given = (g if column is None else column[at] for g, column in zip(grads, columns, strict=True))
            made = function(ctx, *given)
            found.append(made if isinstance(made, tuple) else (made,))
    return [torch.stack(column) if isinstance(column[0], Tensor) else None for column in zip(*found, strict=True)]


class _AskedOnce:
    """The context of a node, which is asked once for what it saved, see `known_in_batch`."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ctx, name)
        if name == "saved_tensors":
            self.saved_tensors = found
        return found


def _unwrapped(grad: Any, level: int) -> Tensor | None:
    """The gradients that one stands for at a level of `torch.func.vmap`, (n, ...); None: it is one."""
    functorch = torch._C._functorch
    if not isinstance(grad, Tensor) or not functorch.is_batchedtensor(grad) or functorch.maybe_get_level(grad) != level:
        return None
    return functorch.get_unwrapped(grad).movedim(functorch.maybe_get_bdim(grad), 0)


_nodes_run = 0


def nodes_run() -> int:
    """How many backward nodes have run: another number says that a graph of before may have let go of what it kept."""
    return _nodes_run


def _innermost_level(batched: Tensor) -> int:
    """Of the batches that a gradient is of, one within another; read off the gradient, since a GPU's backward pass runs
    in a thread of its own, which does not know how many there are."""
    level = 1
    while len(torch._remove_batch_dim(batched, level + 1, 0, 0)):  # without such a level: the batch of size 0 asked for
        level += 1
    return level


_THREAD = local()


@contextmanager
def _one_of_a_batch() -> Iterator[None]:
    before = known_in_batch()
    _THREAD.known = {} if before is None else before
    try:
        yield
    finally:
        _THREAD.known = before


def in_batch() -> bool:
    """Whether a backward node of this thread is at one of a batch of gradients, so that others may follow."""
    return known_in_batch() is not None


def known_in_batch() -> dict[Any, Any] | None:
    """What a backward node that is at one of a batch of gradients has been given, for those that follow: a checkpoint
    gives what was saved once. None: it is at none of a batch."""
    return getattr(_THREAD, "known", None)


def is_batched(grad: Any) -> bool:
    """Whether it is a batch of gradients in the place of one (`is_grads_batched=True`)."""
    return isinstance(grad, Tensor) and torch._C._functorch.is_legacy_batchedtensor(grad)


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
