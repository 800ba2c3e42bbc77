"""Run a model for a measurement and leave it, and the random state, as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from lowrank.errors import SettingError
from lowrank.layers.layer import LowRankLayer

LossFunction = Callable[[nn.Module, Any], Tensor]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore buffers, gradients, `requires_grad` flags, what methods carry, and the random state, whatever happens.

    Inside, every gradient is None, as after `optimizer.zero_grad()`.
    """
    buffers = {module: dict(module._buffers) for module in model.modules()}
    values = [(tensor, tensor.clone()) for tensor in model.buffers()]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    states = [(layer, replace(layer._lowrank)) for layer in model.modules() if isinstance(layer, LowRankLayer)]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        with torch.random.fork_rng(devices):
            yield
    finally:
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


def loss_of(loss_fn: LossFunction, model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch.

    Raises:
        SettingError: it is no tensor of one number.
    """
    loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise SettingError(f"loss_fn gave {found}; allowed is a tensor of one number, such as .mean() gives")
    return loss


def tensors_in(batch: object) -> list[Tensor]:
    """Every tensor of a batch of any nesting."""
    return [leaf for leaf in _pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
