"""SVD-LLM's start: linear layers as two of a lower rank, truncated where it changes the outputs on given inputs least.

Source: SVD-LLM (ICLR 2025), sec. 3.1; `lowrank.conversion.truncate` has the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lowrank.conversion.truncate import layer_grams, whitened_truncation


def start_truncated(model: nn.Module, names: list[str], images: Tensor, rank_of: Callable[[Tensor], int]) -> list[str]:
    """Replace linear layers by two of a lower rank, whitened on a calibration batch, in place; the names of the two.

    Args:
        model, names: the layers; the activations are those of the model before any truncation.
        images: what the model takes.
        rank_of: of a weight.
    """
    parts = []
    for name, gram in layer_grams(model, names, lambda network, given: network(given), [images])[0].items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.detach()
        left, right = whitened_truncation(weight, gram, rank_of(weight))
        first = nn.Linear(right.shape[1], len(right), bias=False)
        second = nn.Linear(len(right), len(left), bias=layer.bias is not None)
        first.weight.data, second.weight.data = right.contiguous(), left.contiguous()
        if layer.bias is not None:
            second.bias = layer.bias
        model.set_submodule(name, nn.Sequential(first, second))
        parts += [f"{name}.0", f"{name}.1"]
    return parts
