"""SVD-LLM's start: linear layers whose weights are truncated where it changes the outputs on given inputs least.

With the layer's inputs X (T, I) and a Cholesky factor S of their Gram matrix, X^T X = S S^T, the change of the outputs
is ||X (W - W')^T|| = ||(W - W') S||. So the best W' of rank K is the truncated SVD of W S, times S^-1. With U the first
K left singular vectors of W S that is U U^T W, so nothing is divided by S. Source: SVD-LLM (ICLR 2025), sec. 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lowrank.tensors.factors import Factors

UNCERTAIN = 1e-10  # share of the mean diagonal that is added to a Gram matrix, which few inputs leave singular


@torch.no_grad()
def input_grams(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """Per linear layer the Gram matrix (I, I), float64, of the inputs that it gets from a calibration batch.

    Args:
        model: any module; runs once, in the mode that it is in.
        names: of `nn.Linear` layers.
        images: what the model takes.
    """
    grams: dict[str, Tensor] = {}

    def hook(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).double()
        grams[name] = grams.get(name, 0) + x.mT @ x

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in names]
    try:
        model(images)
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


def start_truncated(model: nn.Module, names: list[str], images: Tensor, rank_of: Callable[[Tensor], int]) -> list[str]:
    """Replace linear layers by two of a lower rank, whitened on a calibration batch, in place; the names of the two.

    Args:
        model, names, images: as of `input_grams`; the activations are those of the model before any truncation.
        rank_of: of a weight.
    """
    parts = []
    for name, gram in input_grams(model, names, images).items():
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
