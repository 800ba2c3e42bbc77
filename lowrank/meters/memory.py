"""Memory as measured: what autograd keeps between forward and backward, and the peak of a training step."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.layers.arguments import require_model
from lowrank.layers.lazy import Lazy
from lowrank.layers.preserve import LossFunction, graph_of, loss_of, preserved, result_of, tensors_in, without_graphs


class _Kept:
    """Stands in for one tensor that autograd saved; lives exactly as long as autograd holds it."""

    def __init__(self, tensor: Tensor) -> None:
        # Without its graph: a saved output's own would hold this entry, a circle that is never freed.
        self.tensor = tensor.detach()


def saved_bytes(model: nn.Module, loss_fn: LossFunction, batch: Any) -> int:
    """Bytes that autograd keeps from the forward pass for the backward pass.

    Every storage counts once and in full, however many tensors share it; parameters and buffers do not count. Seen is
    what goes through `save_for_backward`, as all of PyTorch and this package do. The model is left as it was.

    Args:
        model: any module, converted or not, in the mode in which it trains.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`.
        batch: whatever `loss_fn` takes.

    Raises:
        ConversionError: `model` is no module.
        SettingError: `loss_fn` is no function of a model and a batch, or gives no tensor with a graph.
    """
    return sum(saved_storages(model, loss_fn, batch).values())


def saved_storages(
    model: nn.Module, loss_fn: LossFunction, batch: Any, note: Callable[[int, bool], None] | None = None
) -> dict[int, int]:
    """Every storage that `saved_bytes` counts, with its bytes; `note` is called with each as it is saved, and whether
    nobody has saved it yet: one that is gone may have had its address."""
    kept: defaultdict[int, weakref.WeakSet[_Kept]] = defaultdict(weakref.WeakSet)

    def pack(tensor: Tensor) -> _Kept:
        entry, storage = _Kept(tensor), _storage_id(tensor)
        if note is not None:
            note(storage, not kept[storage])
        kept[storage].add(entry)
        return entry

    with preserved(model):
        own = {_storage_id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.tensor):
            loss = graph_of(loss_fn, model, batch)
        entries = [entry for some in kept.values() for entry in some]
        sizes = {_storage_id(entry.tensor): entry.tensor.untyped_storage().nbytes() for entry in entries}
        del loss
    return {storage: size for storage, size in sizes.items() if storage not in own}


def held_bytes(model: nn.Module, loss_fn: LossFunction, batch: Any) -> int:
    """Bytes of tensors that live after the forward pass and did not before: `saved_bytes` seen from the other side.

    Counts whatever holds them, so also what a checkpoint or a hook of the user's own keeps, and the loss itself; the
    batch does not count, since it lived before. Other than on CUDA, what is compiled runs as the code that it was made
    of. The model is left as it was.

    Args:
        model: any module, converted or not, in the mode in which it trains.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`.
        batch: whatever `loss_fn` takes.
    """
    require_model(model)
    present = [*model.parameters(), *model.buffers(), *tensors_in(batch)]
    device = _gpu_of(present)
    if device is not None:
        _take_work_space(model, loss_fn, batch, backward=False)
    with preserved(model), torch.enable_grad():
        if device is not None:
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            loss = graph_of(loss_fn, model, batch)
            torch.cuda.synchronize(device)
            held = torch.cuda.memory_allocated(device) - before
        else:
            known = {_storage_id(tensor): tensor.untyped_storage().nbytes() for tensor in present}
            with without_graphs(), _Tracker(known) as tracker:
                loss = graph_of(loss_fn, model, batch)
            held = tracker.current - sum(known.values())
        del loss
    return held


def peak_bytes(model: nn.Module, loss_fn: LossFunction, batch: Any, backward: bool = True) -> int:
    """Most tensor bytes alive at once during a forward and backward pass.

    Parameters, buffers, gradients and the batch count with everything that the pass makes. On CUDA the allocator's own
    statistics are read, of a second pass, since libraries take their work space in the first. Elsewhere every tensor
    that an operator returns is followed until it is freed, so work space inside an operator is not seen, and what
    is compiled runs as the code that it was made of. The model is left as it was.

    Args:
        model: any module, converted or not, in the mode in which it trains.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`.
        batch: whatever `loss_fn` takes.
        backward: False measures inference: the forward pass alone, without gradients.
    """
    require_model(model)
    present = [*model.parameters(), *model.buffers(), *tensors_in(batch)]
    device = _gpu_of(present)
    if device is not None:
        _take_work_space(model, loss_fn, batch, backward)
    with preserved(model):
        known = {
            _storage_id(tensor): tensor.untyped_storage().nbytes()
            for tensor in present
            if device is None or tensor.device == device
        }
        if device is not None:
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            _step(model, loss_fn, batch, backward)
            torch.cuda.synchronize(device)
            return sum(known.values()) + torch.cuda.max_memory_allocated(device) - before
        with without_graphs(), _Tracker(known) as tracker:
            _step(model, loss_fn, batch, backward)
        return tracker.peak


def _gpu_of(tensors: list[Tensor]) -> torch.device | None:
    return next((tensor.device for tensor in tensors if tensor.is_cuda), None)


def _take_work_space(model: nn.Module, loss_fn: LossFunction, batch: Any, backward: bool) -> None:
    """Have cuBLAS and its like allocate what they keep for the whole process."""
    with preserved(model):
        _step(model, loss_fn, batch, backward)


def _step(model: nn.Module, loss_fn: LossFunction, batch: Any, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        if backward:
            loss_of(loss_fn, model, batch).backward()
        else:
            result_of(loss_fn, model, batch)


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Tracker(TorchDispatchMode):
    """Follows every storage that an operator returns until it is freed."""

    def __init__(self, known: dict[int, int]) -> None:
        super().__init__()
        self.alive = dict(known)
        self.current = self.peak = sum(known.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lazy = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Lazy)]
        result = func(*args, **(kwargs or {}))
        for leaf in [*(leaf.value() for leaf in lazy), *_pytree.tree_leaves(result)]:
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.current -= self.alive.pop(key, 0)
