"""The MMEngine hook that brings low-rank activations into any MMSegmentation config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

import lowrank
from experiment import ExperimentError
from lowrank import ASI, HOSVD, SVD, GradientFilter, Method, NonFiniteError, Vanilla
from lowrank.layers.layer import STATE_PREFIX
from segmentation.classifier import keep_nonzero
from segmentation.freezing import apply_freeze_list, freeze_statistics, switch_off_dropout
from segmentation.loss import recompute_loss
from segmentation.planning import Budget

METHODS: dict[str, type[Method]] = {method.__name__: method for method in (Vanilla, GradientFilter, SVD, HOSVD, ASI)}
STATE = "lowrank_state"


def build_method(config: Mapping[str, Any]) -> Method:
    """A method from its config, such as dict(type="HOSVD", energy=0.8).

    Raises:
        ExperimentError: unknown type or settings.
    """
    settings = dict(config)
    name = settings.pop("type", None)
    if name not in METHODS:
        raise ExperimentError(f"method type is {name!r}; allowed: {', '.join(METHODS)}")
    try:
        return METHODS[name](**settings)
    except TypeError as error:
        raise ExperimentError(f"method {name}: {error}") from None


@HOOKS.register_module()
class LowRankHook(Hook):
    """Converts the model once its weights are there, and keeps it trained as the papers train it.

    Checkpoints hold the weights under their stock names, so that MMSegmentation loads them without this package; a
    method's state lies beside them, so that a resumed run goes on exactly.

    Args:
        method: such as dict(type="HOSVD", energy=0.8); the types are the methods of `lowrank`.
        layers: names of the convolutions and linear layers that the method is for, or "all" for every convolution.
        freeze: module paths whose parameters are frozen, in order; `~` ahead of a path trains it again.
        budget: for ASI, where its ranks come from: dict(table="perplexity.json", mib=1.0), or in place of mib a
            finished run's memory or a part of it; see `segmentation.planning.Budget`.
        fuse: the rest of the network keeps less as well, with the same gradients; see `lowrank.convert` and
            `segmentation.classifier`. By default yes, except that vanilla is ordinary training.
        recompute_loss: the loss on full-size logits is computed again in the backward pass; exact. By default as
            `fuse`.
        freeze_statistics: batch normalisation uses its stored statistics and does not update them.
        dropout: False switches off every dropout layer.
    """

    def __init__(
        self,
        method: Mapping[str, Any],
        layers: Sequence[str] | Literal["all"],
        freeze: Sequence[str] = (),
        budget: Mapping[str, Any] | None = None,
        fuse: bool | None = None,
        recompute_loss: bool | None = None,
        freeze_statistics: bool = True,
        dropout: bool = False,
    ) -> None:
        self.method, self.layers, self.freeze = build_method(method), layers, list(freeze)
        self.budget = None if budget is None else Budget(**budget)
        self.fuse = not isinstance(self.method, Vanilla) if fuse is None else fuse
        self.recompute_loss = self.fuse if recompute_loss is None else recompute_loss
        self.freeze_statistics, self.dropout = freeze_statistics, dropout
        self._state: dict[str, Any] = {}

    def before_train(self, runner: Any) -> None:
        """Freeze and convert; after a resume, set the method's state."""
        model = unwrapped(runner.model)
        self.prepare(model)
        if self._state and runner.iter > 0:
            model.load_state_dict({**model.state_dict(), **self._state})
        self._state = {}

    def prepare(self, model: nn.Module) -> list[str]:
        """Freeze and convert a model, in place.

        Returns:
            Names of the converted layers.

        Raises:
            ExperimentError: a path that the model does not have, or no ranks.
            ConversionError: a layer that the model does not have or that cannot be converted.
        """
        apply_freeze_list(model, self.freeze)
        if not self.dropout:
            switch_off_dropout(model)
        names = lowrank.trailing_layers(model, "all") if self.layers == "all" else list(self.layers)
        if names:
            lowrank.convert(model, names, self.method_for(names), self.fuse)
        if self.fuse:
            keep_nonzero(model)
        if self.recompute_loss:
            recompute_loss(model)
        return names

    def method_for(self, names: Sequence[str]) -> Method:
        """The method, with ranks from the budget where it needs some."""
        if not isinstance(self.method, ASI) or self.method.ranks is not None:
            return self.method
        if self.budget is None:
            raise ExperimentError("ASI needs ranks: give its own, or a budget with a perplexity table")
        return self.budget.ranks_for(self.method, names)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Frozen statistics stay frozen, though the training loop puts the model in training mode at every step."""
        if self.freeze_statistics:
            freeze_statistics(runner.model)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Stop the run at a loss that is not finite."""
        loss = (outputs or {}).get("loss")
        if loss is not None and not torch.isfinite(loss):
            raise NonFiniteError(
                f"the training loss is {loss.item()} at iteration {runner.iter}; look for NaN in the images, or lower "
                f"the learning rate"
            )

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Put the method's state apart from the weights."""
        stock = lowrank.stock_state_dict(checkpoint["state_dict"])
        state = {key: value for key, value in checkpoint["state_dict"].items() if key not in stock}
        checkpoint["state_dict"] = stock
        if state:
            checkpoint[STATE] = state

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the method's state until the model is converted."""
        weights = checkpoint.get("state_dict", {})
        inside = {key: weights.pop(key) for key in list(weights) if key.rpartition(".")[2].startswith(STATE_PREFIX)}
        self._state = {**inside, **checkpoint.pop(STATE, {})}


def unwrapped(model: Any) -> nn.Module:
    """The model itself, without what distributes it."""
    return model.module if is_model_wrapper(model) else model
