"""SGD for models some of whose weights are held as two factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import LowRankError, NonFiniteError
from lowrank.layers.factor_pair import MARK, FactorPair, factor_pairs
from lowrank.tensors.factors import (
    Factors,
    joined,
    orthonormalised,
    steady,
    subspace_step,
    subspace_update,
    tangent,
    truncated,
)


class SGD(torch.optim.SGD):
    """`torch.optim.SGD`, with its arguments; a weight held as factors moves by one subspace iteration.

    With weight W = L R, gradient dW and the settings of its parameter group, torch's SGD would go to

        g = dW + weight_decay W;  M = momentum M + (1 - dampening) g;  W - lr M   (nesterov: W - lr (g + momentum M))

    and this one goes to the projection of that matrix on the columns that one subspace iteration from L gives. With
    momentum 0 and no weight decay that is the algorithm of WASI (ICLR 2026). Of dW it reads what the two `.grad`s say,
    dW R^T and L^T dW, as they stand: clipped, scaled, accumulated or averaged over processes like any gradient. What
    they leave open of dW is normal to both factors, and changes the step by a term with lr squared; at energy 1 nothing
    is left open, and every step is torch's. Nothing of the size of W is formed. M is kept as two factors too, its best
    approximation at the rank of W; a step uses it before it is cut.

    The settings are those of the group that `left` is in. All other parameters are stepped by torch.

    Example:
        lowrank.convert(model, names, lowrank.WASI(energy=0.9, ranks=[16, 8, 24]))
        optimizer = lowrank.SGD(model.parameters(), lr=0.05)
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._step_supports_amp_scaling = False  # a gradient scaler takes its scale back itself, from all gradients

    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Raises:
            SettingError: one factor of a weight is here without the other.
            LowRankError: parameters are sharded.
            NonFiniteError: a gradient has NaN or infinite values, where momentum or an SVD needs finite ones.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        _require_whole(groups)
        pairs = factor_pairs(groups)
        with torch.no_grad():
            for pair in pairs:
                if pair.left.grad is not None or pair.right.grad is not None:
                    self._move(pair, groups[pair.left])
        gradients = [(factor, factor.grad) for pair in pairs for factor in (pair.left, pair.right)]
        try:
            for factor, _ in gradients:
                factor.grad = None
            _step_of_torch()(self)
        finally:
            for factor, grad in gradients:
                factor.grad = grad
        return loss

    def _move(self, pair: FactorPair, group: dict[str, Any]) -> None:
        dtype = torch.promote_types(pair.left.dtype, torch.float32)
        held = Factors(pair.left.detach(), pair.right.detach()).to(dtype)
        sign = -1.0 if group["maximize"] else 1.0
        d_left, d_right = (
            torch.zeros_like(factor) if parameter.grad is None else sign * parameter.grad.to(dtype)
            for factor, parameter in zip(held, pair[:2], strict=True)
        )
        held, d_left, d_right = orthonormalised(held, d_left, d_right)
        if group["weight_decay"]:  # of the weight itself L^T W = R is all there is to add: W R^T is in the span of L
            d_right = d_right + group["weight_decay"] * held.right
        try:
            after = self._moved(pair, group, held, d_left, d_right)
        except torch.linalg.LinAlgError as error:
            raise NonFiniteError(f"layer {pair.name!r}: its gradient or momentum is not finite ({error})") from None
        pair.left.copy_(after.left)
        pair.right.copy_(after.right)

    def _moved(
        self, pair: FactorPair, group: dict[str, Any], held: Factors, d_left: Tensor, d_right: Tensor
    ) -> Factors:
        """The weight after the step."""
        rate, rank = group["lr"], held.left.shape[1]
        if not group["momentum"] and pair.update == "subspace":
            return subspace_update(held, d_left, d_right, rate)
        change = tangent(held, d_left, d_right)
        if group["momentum"]:
            change = self._with_momentum(pair, group, change, rank)
        moved = joined([held, change.scaled(-rate)])
        found = truncated(moved, rank) if pair.update == "svd" else subspace_step(held.left, moved)
        return steady(found, held.left)

    def _with_momentum(self, pair: FactorPair, group: dict[str, Any], gradient: Factors, rank: int) -> Factors:
        """What the step subtracts from the weight, but for the rate; keeps the momentum for the next step."""
        state, momentum = self.state[pair.left], group["momentum"]
        terms = [gradient]
        if state.get("momentum_left") is not None:
            before = Factors(state["momentum_left"], state["momentum_right"]).to(gradient.left.dtype)
            terms = [before.scaled(momentum), gradient.scaled(1 - group["dampening"])]
        buffer = joined(terms)
        state["momentum_left"], state["momentum_right"] = truncated(buffer, rank).to(pair.left.dtype)
        return joined([gradient, buffer.scaled(momentum)]) if group["nesterov"] else buffer


def _step_of_torch() -> Callable[[torch.optim.SGD], Any]:
    """torch's step without the calls of step hooks around it, which stand around the step here already."""
    step: Any = torch.optim.SGD.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _require_whole(parameters: Iterable[Tensor]) -> None:
    """Raise if any parameter is a part of one, since nobody can tell then whether it is of a factor."""
    for parameter in parameters:
        sharded = hasattr(parameter, "device_mesh") or getattr(parameter, "_is_flat_param", False)
        if sharded or (hasattr(parameter, MARK) and parameter.ndim != 2):
            raise LowRankError(
                "lowrank.SGD was given sharded parameters (FSDP), and the step of a factored weight needs whole ones; "
                "use torch.optim.AdamW, which steps sharded factors too, or DistributedDataParallel; without factored "
                "weights torch.optim.SGD takes the same steps"
            )
