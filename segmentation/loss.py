"""The loss on logits of full size, computed again in the backward pass from the small logits; exact.

A head upsamples its logits to the labels' size before the loss, and autograd then keeps the logits, their logarithms
and the labels at full size: about as much as all trained layers of the networks here keep. Kept instead are the small
logits and the labels as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from mmengine.structures import PixelData
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank.layers.swap import Changed, become, restore

Losses = dict[str, Tensor]
LossFunction = Callable[[Tensor, Tensor], Losses]


class _Recomputed(torch.autograd.Function):
    """Values of a function of logits and labels that keeps these two alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, function: LossFunction) -> tuple[Tensor, ...]:
        device = logits.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.function = function
        ctx.save_for_backward(logits, labels)
        losses = function(logits, labels)
        ctx.names = list(losses)
        ctx.mark_non_differentiable(*(value for name, value in losses.items() if not _is_trained(name)))
        return tuple(losses.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            logits = logits.detach().requires_grad_()
            losses = ctx.function(logits, labels)
        trained = [(losses[name], grad) for name, grad in zip(ctx.names, grads, strict=True) if _is_trained(name)]
        (grad,) = torch.autograd.grad([loss for loss, _ in trained], [logits], [grad for _, grad in trained])
        return grad, None, None


def _is_trained(name: str) -> bool:
    return "loss" in name  # as MMEngine tells losses from values that are only shown


class RecomputedLoss(Changed, BaseDecodeHead):
    """Mixed into the class of a head whose loss is computed again in the backward pass; see `recomputing_class`."""

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: Any) -> Losses:
        """The stock head's losses; keeps the small logits and the labels."""
        if not (torch.is_grad_enabled() and seg_logits.requires_grad):
            return super().loss_by_feat(seg_logits, batch_data_samples)
        names: list[str] = []

        def function(logits: Tensor, labels: Tensor) -> Losses:
            samples = [SegDataSample(gt_sem_seg=PixelData(data=label.long())) for label in labels]
            losses = super(RecomputedLoss, self).loss_by_feat(logits, samples)
            names[:] = losses
            return losses

        head: Any = self
        labels = head._stack_batch_gt(batch_data_samples)
        if head.num_classes <= 255 and head.ignore_index in range(256):
            labels = labels.to(torch.uint8)  # what an indexed image holds
        values = _Recomputed.apply(seg_logits, labels, function)
        return dict(zip(names, values, strict=True))


@lru_cache
def recomputing_class(stock: type[nn.Module]) -> type[RecomputedLoss]:
    """A head's class with `RecomputedLoss` mixed in."""
    own = {"stock_class": stock, "_place": (__name__, "recomputing_class"), "__module__": stock.__module__}
    return type(stock.__name__, (RecomputedLoss, stock), own)


def _supported_heads(model: nn.Module) -> Iterator[BaseDecodeHead]:
    for module in model.modules():
        if isinstance(module, BaseDecodeHead) and not isinstance(module, RecomputedLoss):
            stock = type(module)
            plain = all(getattr(stock, m) is getattr(BaseDecodeHead, m) for m in ("loss_by_feat", "_stack_batch_gt"))
            # A sampler draws random pixels, and would draw others the second time.
            if plain and module.sampler is None and not any(p.requires_grad for p in module.loss_decode.parameters()):
                yield module


def recompute_loss(model: nn.Module) -> None:
    """Make every head whose loss is the plain one of MMSegmentation compute it again in the backward pass, in place.

    Heads with a loss of their own, a pixel sampler, or a loss that has trained parameters stay as they are.
    `lowrank.revert` takes it back, as `keep_loss` does alone.
    """
    for head in list(_supported_heads(model)):
        stock: Any = type(head)
        become(head, recomputing_class(stock))


def keep_loss(model: nn.Module) -> None:
    """Take back what `recompute_loss` did, in place."""
    for head in model.modules():
        if isinstance(head, RecomputedLoss):
            restore(head)
