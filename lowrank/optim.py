"""SGD for models some of whose weights are held as two factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import LowRankError, SettingError
from lowrank.layers.factored_weight import FactoredWeight, factored_weights
from lowrank.tensors.factors import Factors, joined, subspace_update, truncated


class SGD(torch.optim.SGD):
    """`torch.optim.SGD`, with its arguments; a weight held as factors moves by one subspace iteration.

    With weight W = L R, gradient dW and the settings of its parameter group, torch's SGD would go to

        g = dW + weight_decay W;  M = momentum M + (1 - dampening) g;  W - lr M   (nesterov: W - lr (g + momentum M))

    and this one goes to the projection of that matrix on the columns that one subspace iteration from L gives. With
    momentum 0 and no weight decay that is the algorithm of WASI (ICLR 2026). Nothing of the size of W is formed. M is
    kept as two factors too, its best approximation at the rank of W; a step uses it before it is cut. At energy 1
    every step is torch's.

    What was done to the gradients since the backward pass by one common factor, such as clipping their norm or taking
    back a loss scale, is read off the gradients of the factors and applies to dW as well. (The norm that is clipped is
    that of the factors' gradients.) All other parameters are stepped by torch.

    Example:
        lowrank.convert(model, names, lowrank.WASI(energy=0.9, ranks=[16, 8, 24]))
        optimizer = lowrank.SGD(model.parameters(), lr=0.05)
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Raises:
            LowRankError: only one of a weight's factors is here, or several processes train the model.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        weights = factored_weights(groups)
        self._check(weights, groups)
        gradients = [(p, p.grad) for weight in weights for p in (weight.left, weight.right)]
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            super().step()
        finally:
            for parameter, grad in gradients:
                parameter.grad = grad
        with torch.no_grad():
            for weight in weights:
                self._move(weight, groups[weight.left])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; the weights' own gradients go as well."""
        super().zero_grad(set_to_none)
        for weight in factored_weights(p for group in self.param_groups for p in group["params"]):
            weight.forget_gradient()

    def _check(self, weights: list[FactoredWeight], groups: dict[Tensor, Any]) -> None:
        for weight in weights:
            if weight.left not in groups or weight.right not in groups:
                raise SettingError(f"layer {weight.name!r}: give the optimizer both factors of its weight, or neither")
        if weights and torch.distributed.is_available() and torch.distributed.is_initialized():
            count = torch.distributed.get_world_size()
            if count > 1:
                raise LowRankError(
                    f"{count} processes train weights that are held as factors, which would drift apart; use one"
                )

    def _move(self, weight: FactoredWeight, group: dict[str, Any]) -> None:
        if weight.left.grad is None or not weight.gradient:
            return
        weight.require_own_optimizer()
        held = weight.factors().to(torch.promote_types(weight.left.dtype, torch.float32))
        gradient = [term.to(held.left.dtype) for term in weight.gradient]
        factor = self._common_factor(weight.left.grad, held, gradient)
        terms = [term.scaled(factor) for term in gradient]
        if group["maximize"]:
            terms = [term.scaled(-1.0) for term in terms]
        decay = group["weight_decay"]
        if group["momentum"]:
            terms = self._with_momentum(weight, [*terms, held.scaled(decay)] if decay else terms, group)
        elif decay:
            held = held.scaled(1 - group["lr"] * decay)  # and not one more term, so that the change has a small rank
        change = joined([term.scaled(-group["lr"]) for term in terms])
        svd = weight.method.update == "svd"
        after = truncated(joined([held, change]), weight.rank) if svd else subspace_update(held, change)
        weight.left.copy_(after.left)
        weight.right.copy_(after.right)
        weight.forget_gradient()

    @staticmethod
    def _common_factor(grad: Tensor, held: Factors, gradient: list[Factors]) -> Tensor:
        """By what the gradients were multiplied since the backward pass: a number, as a tensor."""
        total = sum((term.left @ (term.right @ held.right.mT) for term in gradient), torch.zeros_like(held.left))
        norm = torch.linalg.vector_norm(total)
        return torch.where(norm > 0, torch.linalg.vector_norm(grad.to(norm.dtype)) / norm, torch.ones_like(norm))

    def _with_momentum(self, weight: FactoredWeight, terms: list[Factors], group: dict[str, Any]) -> list[Factors]:
        """What the step subtracts from the weight, as a sum; keeps the momentum for the next step."""
        state = self.state[weight.left]
        if state.get("momentum_left") is None:
            buffer = terms
        else:
            before = Factors(state["momentum_left"], state["momentum_right"]).to(terms[0].left.dtype)
            buffer = [before.scaled(group["momentum"]), *(term.scaled(1 - group["dampening"]) for term in terms)]
        kept = truncated(joined(buffer), weight.rank).to(weight.left.dtype)
        state["momentum_left"], state["momentum_right"] = kept
        if group["nesterov"]:
            return [*terms, *(term.scaled(group["momentum"]) for term in buffer)]
        return buffer
