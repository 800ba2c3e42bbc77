"""A callback that trains the last layers of your own LightningModule in less memory. Lightning is needed here alone.

Example:
    trainer = Trainer(callbacks=[LowRankCallback(lowrank.ASI(), layers=4, budget=200_000)])
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lowrank.conversion.check import check
from lowrank.conversion.convert import convert
from lowrank.conversion.select import LayerKind, freeze_before, trailing_layers
from lowrank.errors import ConversionError, SettingError, StateError
from lowrank.layers.layer import converted_layers
from lowrank.layers.preserve import LossFunction
from lowrank.layers.training_state import load_training_state, training_state
from lowrank.methods.base import Method
from lowrank.methods.deriving import measured_with, reach
from lowrank.ranks.perplexity import MODE_ENERGIES, measure_perplexity
from lowrank.ranks.select import RankPlan, select_ranks
from lowrank.tensors.storage import Storage

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    try:
        try:
            from lightning.pytorch import Callback, LightningModule, Trainer
        except ModuleNotFoundError:
            from pytorch_lightning import Callback, LightningModule, Trainer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "lowrank.lightning needs Lightning, which is not here; pip install lightning"
        ) from error

KEY = "lowrank"  # in Lightning's checkpoints
Ranks = dict[str, tuple[int, ...]]


class LowRankCallback(Callback):
    """Converts the last layers of a LightningModule when its training begins, and carries their state through resumes.

    What is ahead of the first of the layers is frozen before the optimizers are made. With a budget, perplexity is
    measured on the first training batch, and the layers get the ranks with the least total perplexity within it.
    A checkpoint holds the stock model's weights, and under "lowrank" what was chosen and what the method carries from
    step to step; of several processes, which each measure and carry their own, the first one's.

    Args:
        method: such as `lowrank.ASI(ranks=[8, 16, 3, 3])`; with a budget one without ranks yet: `lowrank.ASI()`.
        layers: how many of the last ones, or "all"; or their names, as in `module.named_modules()`.
        budget: bytes that the inputs of these layers may take in a step; None for a method that needs none.
        kind: of layers that are counted: "conv" or "linear".
        loss_fn: `loss_fn(module, batch) -> scalar tensor`, for perplexity; by default what `training_step` gives, whose
            logging is left out. Metrics that it updates see the first batch twice.
        fuse: see `lowrank.convert`.

    Attributes:
        names: the layers, once training has been set up.
        ranks: per layer, once they are chosen; empty without a budget.
        derived: per layer that keeps nothing, the one from whose form its input follows; see `RankPlan`.

    Raises:
        SettingError: a budget and a method, or `fuse` and a method, that cannot go together.
    """

    def __init__(
        self,
        method: Method,
        layers: int | Literal["all"] | Sequence[str] = 4,
        budget: float | None = None,
        *,
        kind: LayerKind = "conv",
        loss_fn: LossFunction | None = None,
        fuse: bool = True,
    ) -> None:
        if budget is not None and getattr(method, "ranks", "none") is not None:
            raise SettingError(
                f"a budget is for a method whose ranks are not chosen yet, such as ASI(), not {method!r}"
            )
        if budget is not None and method.factors_weight:
            raise SettingError(
                f"{type(method).__name__} makes parameters before there is a batch; give it ranks in place of a budget"
            )
        if method.derive and not fuse:
            raise SettingError(
                f"fuse is off with {type(method).__name__}(derive={method.derive!r}): what lies between the layers is "
                f"not known then, and no input follows from another; leave fuse out"
            )
        self.method, self.layers, self.budget, self.kind = method, layers, budget, kind
        self.loss_fn, self.fuse = loss_fn or _training_loss, fuse
        self.names: list[str] = []
        self.ranks: Ranks = {}
        self.derived: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, freeze, and convert unless ranks are to be measured; ahead of the optimizers. A module that is
        converted so already stays as it is, with the ranks that it has.

        Raises:
            ConversionError, SettingError: layers that are not there, or cannot be converted, or a module that is
                converted in another way; nothing is changed.
        """
        if stage != "fit":
            return
        counted = isinstance(self.layers, int) or self.layers == "all"
        self.names = trailing_layers(pl_module, self.layers, self.kind) if counted else list(self.layers)  # type: ignore[arg-type]
        if _is_converted(pl_module):
            self._take_over(pl_module)
            return
        trial = self.method if self.budget is None else replace(self.method, ranks=1)  # type: ignore[type-var]
        problems = check(pl_module, self.names, trial)
        if problems:
            raise ConversionError("; ".join(map(str, problems)))
        freeze_before(pl_module, self.names)
        if self.budget is None:
            convert(pl_module, self.names, self.method, self.fuse)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """At the first batch, measure perplexity on it, choose the ranks and convert.

        Raises:
            BudgetError: the budget is below the least that the layers need.
            ConversionError: a layer that the loss does not depend on, or that is called more than once.
        """
        if self.budget is None or _is_converted(pl_module):
            return
        storage: Storage = getattr(self.method, "storage", "input")
        options: dict[str, Any] = {"storages": (storage,), "derive": measured_with(self.method.derive)}
        with trainer.strategy.precision_plugin.forward_context():
            table = measure_perplexity(
                pl_module, self.names, self.loss_fn, batch, mode_energies=MODE_ENERGIES, **options
            )
        plan = select_ranks(table, self.budget, **options)
        self._convert(pl_module, plan.ranks, plan.derived)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the ranks, and what the method carries, beside the weights."""
        state = {name: tensor.cpu() for name, tensor in training_state(pl_module).items()}
        chosen = {"ranks": {name: list(ranks) for name, ranks in self.ranks.items()}, "derived": self.derived}
        checkpoint[KEY] = {**chosen, "training_state": state}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up both, so that training goes on as if it had not been interrupted.

        Raises:
            StateError: the checkpoint was saved without this callback, or with other layers.
        """
        if trainer.state.fn != "fit":
            return
        saved = checkpoint.get(KEY)
        if saved is None:
            raise StateError(
                "the checkpoint was saved without LowRankCallback, so its training cannot go on as it was; "
                "load its weights (checkpoint['state_dict']) and start anew"
            )
        ranks = {name: tuple(each) for name, each in saved["ranks"].items()}
        if ranks and set(ranks) != set(self.names):
            raise StateError(f"the checkpoint has ranks of {', '.join(ranks)}, not of {', '.join(self.names)}")
        if ranks:
            self._convert(pl_module, ranks, saved.get("derived", {}))
        load_training_state(pl_module, saved["training_state"])

    def _take_over(self, module: nn.Module) -> None:
        """Take what a converted module has for what this callback would have made."""
        methods = {layer._lowrank.name: layer._lowrank.method for layer in converted_layers(module)}
        if set(methods) != set(self.names) or not all(self._has_made(*each) for each in methods.items()):
            raise ConversionError(
                f"the module is converted already, and otherwise than LowRankCallback is told: {len(methods)} layers, "
                f"the last by {list(methods.values())[-1]!r}; lowrank.revert(module) first, or tell it the same"
            )
        if self.budget is not None:
            self.ranks = {name: tuple(method.ranks) for name, method in methods.items()}  # type: ignore[attr-defined]
            follows = {name: method.follows for name, method in methods.items()}
            self.derived = {name: ahead for name, ahead in follows.items() if ahead is not None}

    def _has_made(self, name: str, method: Method) -> bool:
        if self.budget is None:
            return method == self.method.for_layer(name)
        if type(method) is not type(self.method):
            return False
        own: Any = method
        return own == replace(self.method, ranks=own.ranks, derive=own.derive)  # type: ignore[type-var]

    def _convert(self, module: nn.Module, ranks: Ranks, derived: dict[str, str]) -> None:
        self.ranks, self.derived = ranks, derived
        plan = RankPlan(ranks, {}, nbytes=0, perplexity=0, derived=derived, reach=reach(self.method.derive))
        convert(module, self.names, replace(self.method, ranks=plan), fuse=self.fuse)  # type: ignore[type-var]


def _is_converted(module: nn.Module) -> bool:
    return any(layer._lowrank.chosen for layer in converted_layers(module))


def _training_loss(module: Any, batch: Any) -> Tensor:
    """What `training_step` gives for a batch; it logs nothing."""
    if not module.automatic_optimization:
        raise SettingError(f"{type(module).__name__} steps its optimizers itself; give LowRankCallback a loss_fn")
    module.log = lambda *_, **__: None
    try:
        takes_index = len(inspect.signature(module.training_step).parameters) > 1
        output = module.training_step(batch, 0) if takes_index else module.training_step(batch)
    finally:
        del module.log
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise SettingError(f"{type(module).__name__}.training_step gives no loss; give LowRankCallback a loss_fn")
    return loss
