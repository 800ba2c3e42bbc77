"""The MMEngine hook that brings low-rank activations into any MMSegmentation config."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lowrank
from experiment import ExperimentError
from experiment.checkpoints import TRAINING_STATE, refuse_earlier
from experiment.method import build_method, derived_layers, fuses, require_derived, with_ranks
from experiment.processes import own_part, with_others
from experiment.ranks import Budget
from lowrank import NonFiniteError
from lowrank.layers.training_state import is_basis
from segmentation.classifier import keep_nonzero
from segmentation.freezing import apply_freeze_list, freeze_statistics, switch_off_dropout
from segmentation.loss import recompute_loss


@HOOKS.register_module()
class LowRankHook(Hook):
    """Converts the model once its weights are there, and keeps it trained as the papers train it.

    Checkpoints hold the stock model's weights, so that MMSegmentation loads them without this package; what a method
    carries from step to step lies beside them, so that a resumed run goes on exactly. In a distributed run the model is
    wrapped anew, since what `DistributedDataParallel` waits for is fixed when it is made.

    Args:
        method: such as dict(type="HOSVD", energy=0.8): a method of `lowrank`, or a class of your own by its path; see
            `experiment.method.build_method`.
        layers: names of the convolutions and linear layers that the method is for, or "all" for every convolution.
        freeze: module paths whose parameters are frozen, in order; `~` ahead of a path trains it again.
        budget: where ranks come from, of a method that has none of its own, such as ASI: dict(table="perplexity.json",
            mib=1.0), or in place of mib a finished run's memory or a part of it; see `experiment.ranks.Budget`.
        fuse: the rest of the network keeps less as well, with the same gradients; see `lowrank.convert` and
            `segmentation.classifier`. By default yes, except that vanilla is ordinary training.
        recompute_loss: the loss on full-size logits is computed again in the backward pass; exact. By default as
            `fuse`.
        freeze_statistics: batch normalisation uses its stored statistics and does not update them.
        dropout: False switches off every dropout layer.
        channels_last: hold weights, and so what comes of images, with the channels fastest in memory; on a CPU often
            faster, the same result up to rounding.
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
        channels_last: bool = False,
    ) -> None:
        self.method, self.layers, self.freeze = build_method(method), layers, list(freeze)
        self.budget = None if budget is None else Budget(**budget)
        self.fuse = fuses(self.method, fuse)
        self.recompute_loss = self.fuse if recompute_loss is None else recompute_loss
        self.freeze_statistics, self.dropout = freeze_statistics, dropout
        self.channels_last = channels_last
        self._carried: dict[str, Tensor] = {}
        self._collected: dict[str, Any] | None = None

    def before_train(self, runner: Any) -> None:
        """Freeze and convert; after a resume, set what the method carries.

        Raises:
            ExperimentError: the model is distributed in a way that takes its parameters apart.
        """
        model = unwrapped(runner.model)
        if runner.model is not model and not isinstance(runner.model, DistributedDataParallel):
            raise ExperimentError(
                f"the model is wrapped in {type(runner.model).__name__}; low-rank training of segmentation works in "
                f"MMDistributedDataParallel, or in one process"
            )
        self.prepare(model)
        if runner.iter > 0:
            lowrank.load_training_state(model, self._carried)
        self._carried = {}
        if runner.model is not model:
            _wrap_again(runner, model)

    def prepare(self, model: nn.Module) -> list[str]:
        """Freeze, lay out in memory and convert a model, in place.

        Returns:
            Names of the converted layers.

        Raises:
            ExperimentError: a path that the model does not have, or no ranks.
            ConversionError: a layer that the model does not have or that cannot be converted.
        """
        apply_freeze_list(model, self.freeze)
        if not self.dropout:
            switch_off_dropout(model)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        names = lowrank.trailing_layers(model, "all") if self.layers == "all" else list(self.layers)
        if names:
            self.method = with_ranks(self.method, self.budget, names)
            lowrank.convert(model, names, self.method, self.fuse, everywhere=True)
        if self.fuse:
            keep_nonzero(model)
        if self.recompute_loss:
            recompute_loss(model)
        return names

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
        if behind := derived_layers(self.method):
            require_derived(unwrapped(runner.model), behind)

    def collect(self, runner: Any) -> None:
        """Take from all processes, before the first of them saves a checkpoint, what the method carries in each."""
        self._collected = with_others(_state(runner), is_basis)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Put what the method carries beside the weights; of weights that no run resumes, the first process's alone."""
        checkpoint[TRAINING_STATE] = _state(runner) if self._collected is None else self._collected
        self._collected = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Keep what the method carries until the model is converted.

        Raises:
            ExperimentError: an earlier version of the suite saved the checkpoint.
        """
        refuse_earlier([*checkpoint, *checkpoint.get("state_dict", {})], runner._load_from)
        self._carried = own_part(checkpoint.pop(TRAINING_STATE, {}), is_basis)


def _state(runner: Any) -> dict[str, Tensor]:
    return {key: tensor.cpu() for key, tensor in lowrank.training_state(unwrapped(runner.model)).items()}


def _wrap_again(runner: Any, model: nn.Module) -> None:
    """Wrap a model for the parameters that it trains now; what MMEngine does with a wrapped model is done again."""
    runner.model = model
    gc.collect()  # the old wrapper's hooks on the parameters end with it
    runner.model = runner.wrap_model(runner.cfg.get("model_wrapper_cfg"), model)
    runner._maybe_compile("train_step")


def unwrapped(model: Any) -> nn.Module:
    """The model itself, without what distributes it."""
    return model.module if is_model_wrapper(model) else model
