"""Weights of a lower rank that WSI and WASI can start from, cut where that changes a layer's outputs least.

With a layer's inputs X (T, I) and a Cholesky factor S of their Gram matrix, X^T X = S S^T, the change of the outputs is
||X (W - W')^T|| = ||(W - W') S||. So the best W' of rank K is the truncated SVD of W S, times S^-1. With U the first K
left singular vectors of W S that is U U^T W, so nothing is divided by S. Source: SVD-LLM (ICLR 2025), sec. 3.1.

Not every change of an output matters alike to what follows. With the loss's gradients G (T, O) at the outputs, and a
Cholesky factor P of their Gram matrix, G^T G = P P^T, ||P^T (W - W') S|| counts each by what it moves; squared, that is
the change of the loss to second order, in the approximation of K-FAC (Martens and Grosse, ICML 2015), where inputs and
gradients do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from lowrank.conversion.select import named_layers
from lowrank.errors import ConversionError, NonFiniteError
from lowrank.layers.arguments import input_among
from lowrank.layers.preserve import LossFunction, loss_of, preserved, result_of, without_graphs
from lowrank.layers.swap import stock_class
from lowrank.layers.token_mask import without_padding
from lowrank.tensors.decompose import check_energy
from lowrank.tensors.factors import Factors, factorise
from lowrank.tensors.geometry import LinearGeometry

Grams = dict[str, Tensor]
UNCERTAIN = 1e-10  # share of the mean diagonal that is added to a Gram matrix, which few inputs leave singular
# The same for gradients: those of a network that is cut already are others, so none is trusted to be without effect.
EVEN = 0.5


@torch.no_grad()
def truncate_weights(
    model: nn.Module,
    names: Iterable[str],
    loss_fn: LossFunction,
    batch: Any,
    energy: float = 0.9,
    *,
    weigh_outputs: bool = False,
    further: Iterable[Any] = (),
) -> dict[str, int]:
    """Give linear layers weights of a lower rank, in place, whose outputs on a batch are nearest to what they were.

    The rank is that which `WSI` and `WASI` give a weight at this energy. They cut its smallest singular values,
    whatever the layer's inputs are; this cuts what these inputs hardly read. Convert with `energy=1` afterwards, which
    keeps the rank. One forward pass a batch, in which all layers still have the weights that they had. A module that
    shares a weight has the truncated one as well.

    Args:
        model: any module.
        names: of `nn.Linear` layers that are not converted.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`; without `weigh_outputs` its value is not used.
        batch: whatever `loss_fn` takes; with some thousands of tokens, of the kind that the model is trained on. Within
            `token_mask`, padding is left out.
        energy: share of the squared singular values of each weight, above 0 and at most 1.
        weigh_outputs: True lets a change of an output count by the gradient of the loss there, and so by what it does
            to all that follows; that takes a backward pass a batch. The sum of a network's outputs, each times a normal
            random number, is a loss whose gradients tell what moves those outputs, without labels.
        further: other batches, such as a data loader, taken one after the other, so that none has to be large.

    Returns:
        The rank of each layer's weight.

    Raises:
        ConversionError: a layer that is unknown, no plain `nn.Linear`, of a computed weight or that of another one that
            is named, or not called; with `weigh_outputs`, one whose output gets no gradient; a model that is wrapped in
            `DistributedDataParallel`.
        NonFiniteError: a weight, an input or a gradient with NaN or infinite values.
        SettingError: energy out of range; with `weigh_outputs`, a loss that is no tensor of one number.

    Example:
        probe = lambda model, batch: (out := model(batch)).mul(torch.randn_like(out)).sum()
        lowrank.truncate_weights(model, names, probe, batches[0], weigh_outputs=True, further=batches[1:])
        lowrank.convert(model, names, lowrank.WSI(energy=1))
    """
    layers: dict[str, nn.Linear] = {}
    check_energy(energy)
    for name, layer in named_layers(model, names).items():
        reason = _reason_against(layer, [(other, one) for other, one in layers.items() if one is not layer])
        if reason is not None:
            raise ConversionError(f"layer {name!r} {reason}")
        layers[name] = layer  # type: ignore[assignment]
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ConversionError(
            "the model is wrapped in DistributedDataParallel, whose processes would get weights that differ; truncate "
            "the weights, then wrap it"
        )
    inputs, gradients = layer_grams(model, list(layers), loss_fn, chain([batch], further), weigh_outputs)
    found = {}
    for name, layer in layers.items():
        _check(name, inputs, gradients if weigh_outputs else None)
        rank = factorise(layer.weight, energy).left.shape[1]
        found[name] = whitened_truncation(layer.weight, inputs[name], rank, gradients.get(name))
    for name, layer in layers.items():
        layer.weight.copy_(found[name].dense())
    return {name: factors.left.shape[1] for name, factors in found.items()}


def _reason_against(layer: nn.Module, others: list[tuple[str, nn.Linear]]) -> str | None:
    """Why a layer's weight cannot be truncated beside those of others."""
    if type(layer) is not nn.Linear:
        return (
            f"is a {stock_class(layer).__name__} that is converted or no nn.Linear; only weights of plain linear "
            "layers are truncated, ahead of convert"
        )
    weight = layer._parameters.get("weight")
    if weight is None:
        return "has a weight that is computed, as by pruning or weight normalisation; remove that first"
    if not weight.numel():
        return "has an empty weight, of which there is nothing to truncate"
    shared = next((name for name, other in others if other.weight is weight), None)
    return None if shared is None else f"has the weight of layer {shared!r}, which is truncated once; name one of them"


def _check(name: str, inputs: Grams, gradients: Grams | None) -> None:
    """Raise for a layer that was not called, or whose Gram matrices do not tell what to keep."""
    if name not in inputs:
        raise ConversionError(f"layer {name!r} is not called by the loss, so its inputs are not known")
    if gradients is not None and not (name in gradients and gradients[name].any()):
        raise ConversionError(
            f"the output of layer {name!r} gets no gradient from the loss (or zeros alone), so its outputs cannot be "
            "weighed; give a loss that reads it, or leave out weigh_outputs"
        )
    for what, grams in (("input of", inputs), ("gradient at the output of", gradients or {})):
        if name in grams and not grams[name].isfinite().all():
            raise NonFiniteError(f"the {what} layer {name!r} has NaN or infinite values (or too large ones)")


def layer_grams(
    model: nn.Module, names: list[str], loss_fn: LossFunction, batches: Iterable[Any], weigh_outputs: bool = False
) -> tuple[Grams, Grams]:
    """Per linear layer the Gram matrices, float64, of all inputs that it gets, (I, I), and of the gradients, (O, O).

    The second is that of the loss's gradients at the layer's outputs; empty without `weigh_outputs`.
    """
    inputs: Grams = {}
    gradients: Grams = {}
    reached: list[tuple[str, GradientEdge]] = []

    def hook(name: str, layer: nn.Module, given: tuple[Tensor, ...], named: Any, output: Tensor) -> Tensor | None:
        _add(inputs, name, without_padding(input_among(given, named).detach(), LinearGeometry()))
        if not weigh_outputs or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return None
        # Of an output that is a view, a change in place would leave its node out of the graph; one behind frozen layers
        # alone wants no gradient. A copy has neither.
        handed_on = (output if output.requires_grad else output.detach().requires_grad_()).clone()
        reached.append((name, get_gradient_edge(handed_on)))
        return handed_on

    add = {name: model.get_submodule(name).register_forward_hook for name in names}
    handles = [register(partial(hook, name), with_kwargs=True) for name, register in add.items()]
    try:
        with preserved(model), without_graphs(), torch.set_grad_enabled(weigh_outputs):
            for batch in batches:
                reached.clear()
                loss = loss_of(loss_fn, model, batch) if weigh_outputs else result_of(loss_fn, model, batch)
                outputs = list(reached)  # checkpoints in the model call layers again in the backward pass
                if outputs and loss.requires_grad:
                    found = torch.autograd.grad(loss, [edge for _, edge in outputs], allow_unused=True)
                    for (name, _), grad in zip(outputs, found, strict=True):
                        if grad is not None:
                            _add(gradients, name, grad)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, gradients


def _add(grams: Grams, name: str, rows: Tensor) -> None:
    """Add the Gram matrix of the last dimension of a tensor to that of a name."""
    x = rows.reshape(-1, rows.shape[-1]).double()
    grams[name] = grams.get(name, 0) + x.mT @ x


def whitened_truncation(weight: Tensor, gram: Tensor, rank: int, gradients: Tensor | None = None) -> Factors:
    """The matrix of a rank whose outputs are nearest to those of a weight, on inputs with a given Gram matrix.

    Args:
        weight: (O, I).
        gram: (I, I), positive semidefinite, float64.
        rank: K.
        gradients: (O, O), likewise, not zero: by which changes of the outputs count; half their mean diagonal is added,
            see `EVEN`. None: all count alike.

    Returns:
        Factors (O, K) and (K, I) in `weight.dtype`; `left` has orthonormal columns, unless there are `gradients`.
    """
    wide = weight.to(gram.dtype)
    weighing = None if gradients is None else _root(gradients, EVEN)
    scaled = wide if weighing is None else weighing.mT @ wide
    left = torch.linalg.svd(scaled @ _root(gram, UNCERTAIN), full_matrices=False)[0][:, :rank]
    right = left.mT @ scaled
    if weighing is not None:
        left = torch.linalg.solve_triangular(weighing.mT, left, upper=True)
    return Factors(left, right).to(weight.dtype)


def _root(gram: Tensor, added: float) -> Tensor:
    """Cholesky factor of a Gram matrix, a share of whose mean diagonal is added to it."""
    ridge = added * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    return torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
