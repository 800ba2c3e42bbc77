"""A weight as two factors: its holder, its gradient on the way to the optimizer, and its node in autograd's graph."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank.errors import LowRankError
from lowrank.exact.recompute import Rebuild
from lowrank.methods.base import Tensors
from lowrank.tensors.factors import Factors, gradient_factors
from lowrank.tensors.geometry import LinearGeometry
from lowrank.tensors.gradients import weight_gradient
from lowrank.tensors.tucker import Tucker

Update = Literal["subspace", "svd"]


class FactoredMethod(Protocol):
    """What the holder reads of a method: whether the input is kept as it is, and how the weight moves."""

    keeps_input: ClassVar[bool]

    @property
    def update(self) -> Update:
        """One subspace iteration a step, or a truncated SVD."""


class FactoredWeight:
    """The two factors of one layer's weight, and its gradient on the way to the optimizer.

    Attributes:
        left, right: parameters (O, K) and (K, I).
        method: of the layer.
        name: the layer's name, for messages.
        gradient: the weight gradient of the backward passes since the last step, a sum of small products.
    """

    def __init__(self, left: nn.Parameter, right: nn.Parameter, method: FactoredMethod, name: str) -> None:
        self.left, self.right, self.method, self.name = left, right, method, name
        self.gradient: list[Factors] = []
        self._seen: tuple[int, int] | None = None
        self.register()

    def register(self) -> None:
        """Make the parameters known to optimizers as the factors of one weight."""
        for factor in (self.left, self.right):
            FACTORED[factor] = weakref.ref(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "gradient": [], "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.register()

    @property
    def rank(self) -> int:
        """K."""
        return self.left.shape[1]

    def factors(self) -> Factors:
        """The weight, without a graph."""
        return Factors(self.left.detach(), self.right.detach())

    def forget_gradient(self) -> None:
        """Drop the weight gradient."""
        self.gradient, self._seen = [], None

    def add_gradient(self, kept: Tensors, grad: Tensor) -> Factors:
        """Take in the gradient of one backward pass from what the layer kept and the output gradient (B, ..., O)."""
        fresh = self.left.grad is None or not bool(self.left.grad.any())
        if fresh:
            self.forget_gradient()
        found = self._gradient(kept, grad).to(self.left.dtype)
        projected = self.method.keeps_input and found.left.shape[1] < grad[..., 0].numel()
        if projected and self.gradient and self.method.update == "subspace":
            raise LowRankError(
                f"layer {self.name!r}: WSI keeps of a weight gradient only what one step needs, so it cannot add up "
                f"those of several backward passes; take one step per backward pass, or use lowrank.WASI"
            )
        self.gradient.append(found)
        self._seen = self._versions()
        return found

    def _gradient(self, kept: Tensors, grad: Tensor) -> Factors:
        outputs = grad.reshape(-1, grad.shape[-1])
        first, *factors = kept
        assert first is not None
        if not self.method.keeps_input and factors[-1] is not None:
            # Without the channels' factor the gradient is against the core's channels: (O, r).
            core = Tucker(first, (*factors[:-1], None)).to(grad.dtype)
            return Factors(weight_gradient(core, grad, LinearGeometry()), factors[-1].to(grad.dtype).mT)
        x = first if self.method.keeps_input else Tucker(first, tuple(factors)).to(grad.dtype).dense()
        x = x.reshape(len(outputs), -1)
        if self.method.update == "svd":
            return Factors(outputs.mT, x) if len(x) <= min(self._shape) else Factors(outputs.mT @ x, _identity(x))
        return gradient_factors(x, outputs, self.factors().to(x.dtype))

    @property
    def _shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def _versions(self) -> tuple[int, int]:
        return self.left._version, self.right._version

    def require_own_optimizer(self) -> None:
        """Raise if something else than `lowrank.SGD` has changed the factors since the last backward pass."""
        if self._seen is not None and self._seen != self._versions():
            raise LowRankError(
                f"layer {self.name!r}: an optimizer changed the factors of its weight one by one; train a model with "
                f"WSI or WASI with lowrank.SGD, which takes the arguments of torch.optim.SGD"
            )


FACTORED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> weak reference to its FactoredWeight


def factored_weights(parameters: Iterable[Tensor]) -> list[FactoredWeight]:
    """The weights that some parameters are factors of, each once."""
    found = {id(weight): weight for p in parameters if p in FACTORED and (weight := FACTORED[p]()) is not None}
    return list(found.values())


def _identity(x: Tensor) -> Tensor:
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device)


class FactoredFunction(torch.autograd.Function):
    """`y = (x R^T) L^T + bias`. Gradients: dX = (dY L) R, those of L and R, and the weight's own to its holder."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        weight: FactoredWeight,
        rebuild: Rebuild | None,
        *kept: Tensor | None,
    ) -> Tensor:
        ctx.weight, ctx.rebuild = weight, rebuild
        ctx.save_for_backward(left, right, *kept)
        return forward_factored(x, left.to(dtype), right.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        left, right, *kept = ctx.saved_tensors
        wants_x, wants_left, wants_right, wants_bias = ctx.needs_input_grad[:4]
        grad_x = grad_left = grad_right = grad_bias = None
        if wants_x:
            grad_x = grad @ left.to(grad.dtype) @ right.to(grad.dtype)
        if wants_left or wants_right:
            found = Factors(torch.zeros_like(left), torch.zeros_like(right))
            if kept:
                kept = kept if ctx.rebuild is None else [ctx.rebuild(*kept)]
                found = ctx.weight.add_gradient(tuple(kept), grad)
            grad_left = found.left @ (found.right @ right.mT)
            grad_right = (left.mT @ found.left) @ found.right
        if wants_bias:
            grad_bias = LinearGeometry().bias_gradient(grad)
        return grad_x, grad_left, grad_right, grad_bias, *[None] * (len(ctx.needs_input_grad) - 4)


def forward_factored(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(nn.functional.linear(x, right), left, bias)
