"""The Lightning module: a backbone whose trailing layers are trained with one method, by the papers' recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import lowrank
from classification.backbones import build_model
from classification.data.module import Activations
from classification.front import Split, split
from experiment import ExperimentError
from experiment.checkpoints import TRAINING_STATE, refuse_earlier
from experiment.method import derived_layers, fuses, require_derived, with_ranks
from experiment.processes import own_part, with_others
from experiment.ranks import Budget, RankChoice
from lowrank import MODE_ENERGIES, Method, NonFiniteError, Storage, Vanilla
from lowrank.layers.training_state import is_basis
from lowrank.ranks.perplexity import ENERGIES

Batch = tuple[Tensor | Activations, Tensor]


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch: images (B, 3, H, W) and class numbers (B,)."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def learning_rate_factor(epoch: int, epochs: int, warmup: int, warmup_start: float, floor: float) -> float:
    """Share of the learning rate in an epoch: linear warm-up, then a cosine from 1 to `floor`."""
    if epoch < warmup:
        return warmup_start + (1 - warmup_start) * epoch / warmup
    progress = (epoch - warmup) / max(1, epochs - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


class FineTune(pl.LightningModule):
    """Train the last layers of a backbone; everything ahead of them is frozen.

    Args:
        backbone: name of the network; see classification/backbones.
        num_classes: size of the classifier; taken from the data set.
        pretrained: start from published ImageNet weights.
        weights: local file with weights to start from.
        method: how the trained layers keep their inputs; a class of `lowrank`, such as lowrank.HOSVD.
        fuse: the rest of the network keeps less as well; see lowrank.convert. By default yes, except that vanilla is
            ordinary training.
        layers: how many trailing layers are trained, or "all".
        kind: of those layers: "conv" for convolutions, "linear" for linear layers.
        part: of a transformer, which of its linear layers: "mlp", "attention" (its projections) or "all".
        budget: where ranks come from, of a method that has none of its own, such as ASI.
        energies: at which perplexity is measured; by default the papers' six. More of them let the chosen ranks come
            closer to the budget, and cost time in measuring alone.
        mode_energies: for each mode apart, at which perplexity is measured as well; see lowrank.measure_perplexity. An
            empty list for the papers' way, one energy for all modes of a layer.
        storages: in which forms perplexity is measured, see `lowrank.tensors.storage`; those of the methods that are to
            take their ranks from the table, by default of every shipped one.
        derive: measure as well which layers' inputs follow from another's, and how well: what methods with `derive`
            take their ranks by; a number of products, of those whose `derive` is that. The table has a folder of its
            own.
        rank_choice: how ranks are chosen within the budget: by "perplexity", of all that was measured; by perplexity
            with one energy for all modes of a layer ("per_layer"); as the highest energy that fits when it is the same
            for all layers ("one_energy"); or without looking, at "random".
        rank_seed: of the random choice; the run's seed.
        channels_last: hold images and weights with the channels fastest in memory; on a CPU often faster, the same
            result up to rounding.
        cache_front: compute the frozen layers ahead of the trained ones once per image and keep the result in a file,
            which all runs with these layers, weights and images read; for data sets whose activations fit on the disk,
            and in memory while they are computed. The same training, up to rounding, in shorter steps.
        freeze_statistics: batch normalisation uses its stored statistics and does not update them.
        optimizer: "sgd", or "adamw", as pretrained transformers are fine-tuned.
        learning_rate: of the optimizer.
        momentum: of SGD; AdamW has its own.
        weight_decay: of the optimizer.
        warmup_epochs: epochs in which the learning rate rises linearly.
        warmup_start: share of the learning rate in the first of them.
        final_learning_rate: share of the learning rate at the end of the cosine.
        select_from: share of the epochs, below 1, that pass before the best one is looked for; above 0 where so few
            images validate that a lucky early epoch would win.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int = 1000,
        pretrained: bool = False,
        weights: str | None = None,
        method: Method | None = None,
        fuse: bool | None = None,
        layers: int | Literal["all"] = "all",
        kind: Literal["conv", "linear"] = "conv",
        part: Literal["all", "mlp", "attention"] = "all",
        budget: Budget | None = None,
        energies: tuple[float, ...] = ENERGIES,
        mode_energies: tuple[float, ...] = MODE_ENERGIES,
        storages: tuple[Storage, ...] = ("input", "int8"),
        derive: bool | int = False,
        rank_choice: RankChoice = "perplexity",
        rank_seed: int = 0,
        freeze_statistics: bool = True,
        channels_last: bool = False,
        cache_front: bool = False,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        learning_rate: float = 0.05,
        momentum: float = 0.0,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
        warmup_start: float = 0.25,
        final_learning_rate: float = 0.1,
        select_from: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = build_model(backbone, num_classes, pretrained, weights)
        if kind == "linear" and part != "mlp":
            lowrank.open_attention(self.backbone)
        self.names = lowrank.trailing_layers(self.backbone, layers, kind, part)
        lowrank.freeze_before(self.backbone, self.names)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone.to(memory_format=self.memory_format)
        self.method = with_ranks(method or Vanilla(), budget, self.names, rank_choice, rank_seed)
        lowrank.convert(self.backbone, self.names, self.method, fuses(self.method, fuse), everywhere=True)
        self.energies, self.mode_energies, self.storages = tuple(energies), tuple(mode_energies), tuple(storages)
        self.derive = derive
        self.freeze_statistics, self.cache_front = freeze_statistics, cache_front
        self._split: list[Split] = []  # not an attribute of its own, which would register its layers twice
        self.front_folder: Path | None = None  # of files that runs share; None keeps the front's output in memory
        self.optimizer = optimizer
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.warmup_epochs, self.warmup_start = warmup_epochs, warmup_start
        self.final_learning_rate = final_learning_rate
        # Of all processes together; what Lightning makes of a plain number is inexact where they have unequal counts.
        self.accuracy = nn.ModuleDict({f"{part}_accuracy": _accuracy(num_classes) for part in ("val", "test")})
        self.loss = nn.ModuleDict({f"{part}_loss": MeanMetric() for part in ("val", "test")})
        self.train()  # the trainer keeps the mode in which it gets each layer
        self._trained = self._trainable()

    def forward(self, images: Tensor | Activations) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W), or of what the frozen front made of them."""
        if isinstance(images, Tensor):
            return self.backbone(self.prepare(images))
        return self._split[0].tail(*(self.prepare(activation) for activation in images))

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) on the network's device and in its memory format."""
        images = images.to(self.device)
        return images.contiguous(memory_format=self.memory_format) if images.ndim == 4 else images

    def on_fit_start(self) -> None:
        """Compute the frozen front once per image, if asked to."""
        if not self.cache_front:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise ExperimentError("--model.cache_front needs the data module; give the trainer that, not loaders")
        images, _ = data.first_batch(seed=0)
        parts = split(self.backbone, self.prepare(images))
        self._split, folder = [parts], self.front_folder
        key = f"{parts.fingerprint()}-{str(self.memory_format).rpartition('.')[2]}"
        file = None if folder is None else lambda images: folder / f"{images}-{key}.pt"
        nbytes = data.precompute(lambda images: parts.front(self.prepare(images)), file)
        if self.trainer.is_global_zero:
            print(f"  frozen front: {parts}; {nbytes / 2**20:.1f} MiB of activations", flush=True)

    def on_train_epoch_start(self) -> None:
        """Stop where a callback has changed what is trained: the record would say other layers."""
        if changed := sorted(self._trained ^ self._trainable()):
            raise ExperimentError(
                f"a callback has changed whether {changed[0]} is trained; which layers are is said by --model.layers, "
                f"so leave the callback out"
            )

    def _trainable(self) -> frozenset[str]:
        return frozenset(name for name, parameter in self.named_parameters() if parameter.requires_grad)

    def train(self, mode: bool = True) -> FineTune:
        """As usual, but frozen statistics stay frozen."""
        super().train(mode)
        if self.freeze_statistics:
            for layer in self.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss; stops the run at a loss that is not finite."""
        place = f"in epoch {self.current_epoch}, batch {batch_idx}"
        advice = "look for NaN in the images, or lower --model.learning_rate"
        try:
            loss = classification_loss(self, batch)
        except NonFiniteError as error:
            raise NonFiniteError(f"{place}: {error}; {advice}") from None
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the training loss is {loss.item()} {place}; {advice}")
        if behind := derived_layers(self.method):
            require_derived(self.backbone, behind)
        return loss

    def _evaluate(self, batch: Batch, part: str) -> None:
        images, labels = batch
        logits = self(images)
        size = len(labels)
        loss, accuracy = self.loss[f"{part}_loss"], self.accuracy[f"{part}_accuracy"]
        loss.update(F.cross_entropy(logits, labels), size)
        accuracy.update(logits, labels)
        self.log(f"{part}_loss", loss, batch_size=size)
        self.log(f"{part}_accuracy", accuracy, prog_bar=True, batch_size=size)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of a validation batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of a test batch."""
        self._evaluate(batch, "test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put what the method carries from step to step beside the weights: in each process, of its own images."""
        state = lowrank.training_state(self.backbone)
        checkpoint[TRAINING_STATE] = with_others({key: tensor.cpu() for key, tensor in state.items()}, is_basis)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the method carries until the weights, which come next, are there.

        Raises:
            ExperimentError: an earlier version of the suite saved the checkpoint.
        """
        refuse_earlier(checkpoint["state_dict"])
        self._carried = own_part(checkpoint.get(TRAINING_STATE, {}), is_basis)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The weights, and then what `on_load_checkpoint` found beside them."""
        keys = super().load_state_dict(state_dict, strict, assign)
        carried = vars(self).pop("_carried", None)
        if carried is not None:
            lowrank.load_training_state(self.backbone, carried)
        return keys

    def configure_optimizers(self) -> Any:
        """The optimizer of what is not frozen; the learning rate changes once an epoch."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        options: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(trained, **options)
        else:
            optimizer = lowrank.SGD(trained, momentum=self.momentum, **options)
        epochs = self.trainer.max_epochs
        assert epochs is not None
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda epoch: learning_rate_factor(
                epoch, epochs, self.warmup_epochs, self.warmup_start, self.final_learning_rate
            ),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}


def _accuracy(num_classes: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes, average="micro")
