"""Run a model for a measurement and leave it, and the random state, as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from lowrank.layers.factored_weight import factored_weights

LossFunction = Callable[[nn.Module, Any], Tensor]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore buffers, gradients, `requires_grad` flags and the random state at the end, whatever happens.

    Inside, every gradient is None, as after `optimizer.zero_grad()`.
    """
    buffers = {module: dict(module._buffers) for module in model.modules()}
    values = [(tensor, tensor.clone()) for tensor in model.buffers()]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    factored = [(weight, list(weight.gradient)) for weight in factored_weights(model.parameters())]
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
        for weight, gradient in factored:
            weight.gradient = gradient
        for module, tensors in buffers.items():
            module._buffers.clear()
            module._buffers.update(tensors)
        with torch.no_grad():
            for tensor, value in values:
                # Buffers that did not change may belong to a graph whose backward pass is still to come.
                if not tensor.is_meta and not torch.equal(tensor, value):
                    tensor.copy_(value)


def tensors_in(batch: object) -> list[Tensor]:
    """Every tensor of a batch of any nesting."""
    return [leaf for leaf in _pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
