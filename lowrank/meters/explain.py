"""What a training step still keeps: every kept tensor, the module that kept it, and why."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from lowrank.layers.arguments import require_model
from lowrank.layers.attention import OpenAttention
from lowrank.layers.layer import LowRankLayer
from lowrank.layers.lean import CURVES, RECOMPUTED, LeanModule
from lowrank.layers.preserve import LossFunction, result_of
from lowrank.layers.swap import stock_class
from lowrank.meters.memory import saved_storages
from lowrank.methods.base import Method

OUTSIDE = "(outside the model)"


@dataclass(frozen=True)
class Kept:
    """Bytes that one module keeps from the forward pass for the backward pass.

    Attributes:
        module: name in the model; of tensors that several modules keep, the first of them.
        kind: class of the stock module.
        nbytes: bytes.
        reason: why they are kept, and what would change that.
    """

    module: str
    kind: str
    nbytes: int
    reason: str


class Explanation(Sequence[Kept]):
    """What is kept, largest first; printed as a table. `nbytes` is the sum, the number that `saved_bytes` gives."""

    def __init__(self, rows: Sequence[Kept]) -> None:
        self.rows = sorted(rows, key=lambda row: -row.nbytes)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Kept]:
        return iter(self.rows)

    @property
    def nbytes(self) -> int:
        """All that is kept."""
        return sum(row.nbytes for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing is kept"
        width = max(len(row.module) for row in self.rows)
        lines = [f"{row.nbytes / 2**20:9.3f}  {row.module:<{width}}  {row.kind}: {row.reason}" for row in self.rows]
        return "\n".join([f"{'MiB':>9}  {'module':<{width}}", *lines, f"{self.nbytes / 2**20:9.3f}  in all"])


def explain(model: nn.Module, loss_fn: LossFunction, batch: Any) -> Explanation:
    """What autograd keeps from the forward pass for the backward pass, by module, largest first.

    Counts what `saved_bytes` counts. The model is left as it was.

    Args:
        model: any module, converted or not, in the mode in which it trains.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`.
        batch: whatever `loss_fn` takes.

    Example:
        print(lowrank.explain(model, loss_fn, batch))
    """
    require_model(model)
    names = {module: name for name, module in model.named_modules()}
    chosen = [module for module in names if isinstance(module, LowRankLayer) and module._lowrank.chosen]
    called: set[nn.Module] = set()
    owners: dict[int, nn.Module | None] = {}
    exact: set[nn.Module | None] = set()  # layers whose method is not used, since their exact input takes no more
    whole: set[nn.Module | None] = set()  # layers that keep their input as it is by the rule of `smallest`
    derived: dict[LowRankLayer, str] = {}  # layers that keep nothing, as their input follows from another's

    def note(storage: int, first: bool) -> None:
        if first:
            owners[storage] = _running(names)
        owner = owners[storage]
        if isinstance(owner, LowRankLayer) and owner._lowrank.whole:
            whole.add(owner)

    def watched(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = result_of(loss_fn, model, batch)
        exact.update(layer for layer in chosen if layer in called and layer._lowrank.exact)
        derived.update({one: one._lowrank.derived for one in chosen if one in called and one._lowrank.derived})
        return loss

    handles = [layer.register_forward_pre_hook(lambda layer, _: called.add(layer)) for layer in chosen]
    try:
        sizes = saved_storages(model, watched, batch, note)
    finally:
        for handle in handles:
            handle.remove()
    kept: dict[nn.Module | None, int] = defaultdict(int)
    for storage, size in sizes.items():
        kept[owners[storage]] += size
    special = {**dict.fromkeys(exact, _EXACT), **dict.fromkeys(whole, _WHOLE)}
    rows = [_row(module, size, names, special.get(module)) for module, size in kept.items() if size]
    rows += [_idle(layer, names, _UNCALLED) for layer in chosen if layer not in called]
    rows += [_idle(layer, names, _EXACT) for layer in chosen if layer in exact and not kept.get(layer)]
    rows += [_idle(layer, names, _DERIVED.format(ahead)) for layer, ahead in derived.items() if not kept.get(layer)]
    return Explanation(rows)


def _running(names: dict[nn.Module, str]) -> nn.Module | None:
    """The innermost module of these whose code runs. Read off the stack, since a layer with hooks may keep more."""
    frame = sys._getframe(1)  # not its own, which would hold itself
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names:
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _row(module: nn.Module | None, nbytes: int, names: dict[nn.Module, str], special: str | None) -> Kept:
    if module is None:
        return Kept(OUTSIDE, "loss", nbytes, "what the loss function keeps, such as probabilities")
    name, kind = names[module] or "(the model itself)", stock_class(module).__name__
    return Kept(name, kind, nbytes, special or _reason(module))


def _idle(layer: nn.Module, names: dict[nn.Module, str], reason: str) -> Kept:
    return Kept(names[layer], stock_class(layer).__name__, 0, reason)


def _asked_for(method: Method) -> str:
    """A method as it was called: without what is as by default."""
    if not is_dataclass(method):
        return str(method)
    given = {field: getattr(method, field.name) for field in fields(method) if field.init}
    told = [f"{field.name}={value!r}" for field, value in given.items() if value != field.default]
    return f"{type(method).__name__}({', '.join(told)})"


def _reason(module: nn.Module) -> str:
    if isinstance(module, LowRankLayer):
        if module._lowrank.chosen:
            asked = _asked_for(module._lowrank.method)
            return f"its input, as {asked} keeps it, or what it is computed from, where that takes less"
        return "its input, for the gradient of its weight or of its normalisation; name it in convert to keep less"
    if isinstance(module, nn.BatchNorm2d):
        if module.training or module.running_mean is None:
            return "its input, which batch statistics need; in evaluation mode its convolution is computed with it"
        if isinstance(module, LeanModule) and module._lowrank_smallest:
            return f"its input: at its size computing it with its convolution is not worth its time; {_RULE}"
        if isinstance(module, LeanModule):
            return "its input, for the gradient of its scale; what reached it is no convolution's unread output"
        return "its input, for the gradient of its scale; convert computes it with its convolution"
    if isinstance(module, LeanModule) and stock_class(module) in RECOMPUTED:
        return _AHEAD if stock_class(module) in CURVES else _NORMALISED
    if isinstance(module, OpenAttention):
        return "position biases and masks; what is in it is computed again"
    for kind, reason in _REASONS.items():
        if issubclass(stock_class(module), kind):
            if isinstance(module, LeanModule) and module._lowrank_smallest:
                return f"bits, places or shapes, and whole tensors where these are too small for it; {_RULE}"
            return reason if type(module) is stock_class(module) else "bits, places or shapes: the least that is exact"
    return "what its own code keeps"


_RULE = "see smallest of convert"
_UNCALLED = "named in convert to no effect: the forward pass never calls it; its weight may be handed to a function"
_WHOLE = f"its input as it is: keeping less of one so small is not worth its time; {_RULE}"
_EXACT = "exact: its input is computed again from this, or what is kept in any case; see everywhere of convert"
_DERIVED = "near: its input is computed again from what layer {!r} keeps of its own; see derive of its method"
_AHEAD = "what its input is computed again from"
_NORMALISED = "its input, which its statistics need; what follows is computed again from it"
_CAN_BE_CONVERTED = "its input, for the gradient of its weight; name it in convert to keep less"
_SMOOTH = "its input: its derivative takes many values, so bits are not enough"
_COMPUTED = "its input; convert makes it compute that again from what is kept ahead of it"
_LEAN = "whole tensors; convert makes it keep bits or shapes"
_REASONS: dict[type[nn.Module] | tuple[type[nn.Module], ...], str] = {
    (nn.Conv2d, nn.ConvTranspose2d, nn.Linear): _CAN_BE_CONVERTED,
    (nn.SiLU, nn.GELU): _COMPUTED,
    (nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.Softmax, nn.Mish, nn.ELU): _SMOOTH,
    (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.LeakyReLU, nn.Dropout): _LEAN,
    (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d): _LEAN,
    nn.MultiheadAttention: "queries, keys, values and more; convert makes it compute them again",
    (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d): "its input, which its statistics need",
}
