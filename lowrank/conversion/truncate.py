"""Weights of a lower rank that WSI and WASI can start from, cut where that changes a layer's outputs least.

With a layer's inputs X (T, I) and a Cholesky factor S of their Gram matrix, X^T X = S S^T, the change of the outputs is
||X (W - W')^T|| = ||(W - W') S||. So the best W' of rank K is the truncated SVD of W S, times S^-1. With U the first K
left singular vectors of W S that is U U^T W, so nothing is divided by S. Source: SVD-LLM (ICLR 2025), sec. 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.conversion.select import named_layers
from lowrank.errors import ConversionError, NonFiniteError
from lowrank.layers.preserve import LossFunction, preserved
from lowrank.layers.swap import stock_class
from lowrank.layers.token_mask import without_padding
from lowrank.tensors.factors import Factors, factorise

UNCERTAIN = 1e-10  # share of the mean diagonal that is added to a Gram matrix, which few inputs leave singular


@torch.no_grad()
def truncate_weights(
    model: nn.Module, names: Iterable[str], loss_fn: LossFunction, batch: Any, energy: float = 0.9
) -> dict[str, int]:
    """Give linear layers weights of a lower rank, in place, whose outputs on a batch are nearest to what they were.

    The rank is that which `WSI` and `WASI` give a weight at this energy. They cut its smallest singular values,
    whatever the layer's inputs are; this cuts what these inputs hardly read. Convert with `energy=1` afterwards, which
    keeps the rank. One forward pass, in which all layers still have the weights that they had. A module that shares a
    weight has the truncated one as well.

    Args:
        model: any module.
        names: of `nn.Linear` layers that are not converted.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`; its value is not used.
        batch: whatever `loss_fn` takes; with some thousands of tokens, of the kind that the model is trained on. Within
            `token_mask`, padding is left out.
        energy: share of the squared singular values of each weight, above 0 and at most 1.

    Returns:
        The rank of each layer's weight.

    Raises:
        ConversionError: a layer that is unknown, no plain `nn.Linear`, or not called.
        NonFiniteError: a weight or an input with NaN or infinite values.
        SettingError: energy out of range.
    """
    layers: dict[str, nn.Linear] = {}
    for name, layer in named_layers(model, names).items():
        if type(layer) is not nn.Linear:
            raise ConversionError(
                f"layer {name!r} is a {stock_class(layer).__name__} that is converted or no nn.Linear; only weights of "
                "plain linear layers are truncated, ahead of convert"
            )
        layers[name] = layer
    grams = input_grams(model, list(layers), loss_fn, batch)
    found = {}
    for name, layer in layers.items():
        if name not in grams:
            raise ConversionError(f"layer {name!r} is not called by the loss, so its inputs are not known")
        if not grams[name].isfinite().all():
            raise NonFiniteError(f"the input of layer {name!r} has NaN or infinite values (or too large ones)")
        weight = layer.weight
        found[name] = whitened_truncation(weight, grams[name], factorise(weight, energy).left.shape[1])
    for name, layer in layers.items():
        layer.weight.copy_(found[name].dense())
    return {name: factors.left.shape[1] for name, factors in found.items()}


@torch.no_grad()
def input_grams(model: nn.Module, names: list[str], loss_fn: LossFunction, batch: Any) -> dict[str, Tensor]:
    """Per linear layer the Gram matrix (I, I), float64, of all inputs that it gets in one forward pass."""
    grams: dict[str, Tensor] = {}

    def hook(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = without_padding(inputs[0]).reshape(-1, inputs[0].shape[-1]).double()
        grams[name] = grams.get(name, 0) + x.mT @ x

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in names]
    try:
        with preserved(model):
            loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return grams


def whitened_truncation(weight: Tensor, gram: Tensor, rank: int) -> Factors:
    """The matrix of a rank whose outputs are nearest to those of a weight, on inputs with a given Gram matrix.

    Args:
        weight: (O, I).
        gram: (I, I), positive semidefinite, float64.
        rank: K.

    Returns:
        Factors (O, K) and (K, I) in `weight.dtype`; `left` has orthonormal columns.
    """
    ridge = UNCERTAIN * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    whitening = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    wide = weight.to(gram.dtype)
    left = torch.linalg.svd(wide @ whitening, full_matrices=False)[0][:, :rank]
    return Factors(left, left.mT @ wide).to(weight.dtype)
