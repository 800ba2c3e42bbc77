"""A method is a frozen dataclass. It says what is kept of a layer's input and how gradients come from that.

To add a method, subclass `Method`: `tag`, `compress`, `weight_gradient` and `cost` are all it needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank.kernels.iterations import Iteration
from lowrank.methods.deriving import Derive, check_derive, reach
from lowrank.tensors import costs
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.geometry import Geometry, Shape
from lowrank.tensors.gradients import gradients, projects_batch, weight_gradient
from lowrank.tensors.plans import fewest_macs, plan_gradient
from lowrank.tensors.storage import Storage, check_storage, columns, kept_ranks, restore, stored_bytes

Tensors = tuple[Tensor | None, ...]
_MADE_OF_INPUT = {"compress", "weight_gradient", "gradients", "input_gradient"}  # of which `keeps_input` speaks


class Method(ABC):
    """How a layer keeps its input for the backward pass.

    The defaults keep the forward pass and the gradient with respect to the input exact.

    Attributes:
        factors_weight: whether the layer's weight is held as two factors as well; linear layers alone.
        keeps_input: whether what is kept is the input as it is, and gradients are the stock layer's, so that the input
            may be kept in another form and the stock operator used; found by itself, and never so of a class that has
            any of these of its own.
        restores: whether `restored` gives the input again, as near as what was kept is.
        chooses_by_data: whether the sizes of what is kept depend on the input's numbers, so that a compiler leaves it
            to eager training.
        own_input_gradient: whether `input_gradient` gives another than the layer's own; found by itself.
        carries: whether anything may be carried from step to step, as `compress` returns it.
        follows: name of the layer from which the input is to be derived, as a plan has it; None: there is no such plan.
        leads: whether a plan derives other layers' inputs from what is kept here, so that it is kept in any case.
        derive: whether an input that can be computed again from what a layer ahead keeps of its own, in whatever form,
            is not kept; see `lowrank.ASI`.
    """

    factors_weight: ClassVar[bool] = False
    keeps_input: ClassVar[bool] = False
    restores: ClassVar[bool] = False
    chooses_by_data: ClassVar[bool] = False
    carries: ClassVar[bool] = True
    own_input_gradient: ClassVar[bool] = False
    derive: Derive = False
    follows: str | None = None
    leads: bool = False

    def __init_subclass__(cls, **settings: object) -> None:
        super().__init_subclass__(**settings)
        cls.own_input_gradient = cls.input_gradient is not Method.input_gradient
        if not _MADE_OF_INPUT.isdisjoint(vars(cls)):
            cls.keeps_input = False

    @property
    @abstractmethod
    def tag(self) -> str:
        """Short name with the setting that matters, fit for a folder and a table row."""

    def for_layer(self, name: str) -> Method:
        """The method as the layer `name` uses it."""
        return self

    def reason_against(self, layer: nn.Module) -> str | None:
        """Why `layer` cannot be converted with this method, or None."""
        return None

    def reason_against_state(self, state: Tensors) -> str | None:
        """Why what a run carried from step to step cannot be this method's, or None if it may be."""
        if not self.carries and any(tensor is not None for tensor in state):
            return f"{self.tag} carries nothing from step to step"
        return None

    @abstractmethod
    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        """What to keep of an input.

        Args:
            x: the input, (B, C, H, W) or (B, ..., I), without a graph.
            geometry: the layer.
            state: what the method returned as state at the step before; empty at first.
            name: the layer's name.

        Returns:
            The tensors to keep for the backward pass, and the state for the next step.
        """

    def price(self, x: Tensor, geometry: Geometry, out_channels: int) -> tuple[int, float] | None:
        """Against keeping the input `x` as it is: the bytes that the method saves, and the time that it takes more, in
        operator calls (see `lowrank.tensors.worth`); by the shape alone. None: the shape does not say."""
        return None

    def first_step(self, shape: Shape, state: Tensors) -> Iteration | None:
        """The subspace iteration that `compress` begins with on a contiguous tensor of this shape, as far as the state
        tells: it may then have been made ahead, see `lowrank.tensors.head_start`. None: none, or not known."""
        return None

    def can_use(self, other: Method, shape: Shape) -> bool:
        """Whether what `other` keeps of an input of shape `shape` serves this method at least as well as its own."""
        return False

    @abstractmethod
    def weight_gradient(self, kept: Tensors, grad: Tensor, geometry: Geometry, shape: Shape) -> Tensor:
        """Weight gradient from the kept tensors and the output gradient; `shape` is the input's.

        A new tensor, which the caller may change.
        """

    def gradients(self, kept: Tensors, grad: Tensor, geometry: Geometry, shape: Shape) -> tuple[Tensor, Tensor]:
        """Weight gradient and bias gradient, (O,), where both are wanted: one read of `grad` may give both.

        Where the bias has no gradient, `weight_gradient` is called in its place: who changes one changes both.
        """
        return self.weight_gradient(kept, grad, geometry, shape), geometry.bias_gradient(grad)

    def first_factor(self, kept: Tensors, grad: Tensor, geometry: Geometry, with_bias: bool) -> Tensor | None:
        """The batch's factor, (B, r), on which `gradients` (without a bias `weight_gradient`) projects the contiguous
        `grad` ahead of all else: that may then have been made already, see `lowrank.tensors.gradient_start`. None: it
        does not, or not as far as is known."""
        return None

    def restored(self, kept: Tensors, dtype: torch.dtype) -> Tensor:
        """The input (B, ...) again, in `dtype`, of methods that say so by `restores`."""
        raise NotImplementedError(f"{type(self).__name__} does not give an input again")

    def formula_bytes(self, kept: Tensors, shape: Shape) -> int:
        """Bytes of what was kept of an input of shape `shape`, by the method's formula."""
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def input_gradient(self, grad: Tensor, weight: Tensor, geometry: Geometry, shape: Shape) -> Tensor:
        """Gradient with respect to the input, shape `shape`."""
        return geometry.input_gradient(grad, weight, shape)

    @abstractmethod
    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        """Cost of one training step for the input `x`; only methods with data-dependent ranks read its values."""


def exact_flops(geometry: Geometry, shape: Shape, out_channels: int, input_gradient: bool) -> int:
    """Forward and, if needed, input gradient."""
    return 2 * geometry.macs(shape, out_channels) * (2 if input_gradient else 1)


def form_tag(storage: str, derive: Derive) -> str:
    """Ending of a tag where numbers are not kept in the input's dtype, or inputs that follow from others not at all."""
    behind = "_derived_slopes" if derive == "slopes" else "_derived" if derive else ""
    behind += f"_{reach(derive)}" if reach(derive) else ""
    return f"{'' if storage == 'input' else f'_{storage}'}{behind}"


@dataclass(frozen=True)
class Vanilla(Method):
    """Keep the input as it is: ordinary training."""

    carries: ClassVar[bool] = False

    @property
    def tag(self) -> str:
        return "vanilla"

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        return (x,), ()

    def weight_gradient(self, kept: Tensors, grad: Tensor, geometry: Geometry, shape: Shape) -> Tensor:
        (x,) = kept
        assert x is not None
        return geometry.weight_gradient(x, grad)

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        shape = tuple(x.shape)
        return LayerCost(
            activation_bytes=x.numel() * x.element_size(),
            flops_paper=costs.paper_forward(geometry, shape, out_channels)
            + costs.paper_weight_gradient(geometry, shape, out_channels),
            flops=exact_flops(geometry, shape, out_channels, input_gradient) + 2 * geometry.macs(shape, out_channels),
        )


Vanilla.keeps_input = True  # which its subclasses have too, unless they have gradients of their own


@dataclass(frozen=True)
class TuckerMethod(Method):
    """Shared by the methods that keep a Tucker form.

    Args:
        storage: the form in which its numbers are kept, see `lowrank.ASI` and `lowrank.tensors.storage`.
        derive: whether inputs that follow from another layer's are not kept, see `lowrank.ASI`.
    """

    restores: ClassVar[bool] = True
    storage: Storage = field(default="input", kw_only=True)
    derive: Derive = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_storage(self.storage)
        check_derive(self.derive)

    def __repr__(self) -> str:
        shown = [field.name for field in fields(self) if field.repr and field.name not in ("storage", "derive")]
        shown += [] if self.storage == "input" else ["storage"]
        shown += ["derive"] if self.derive else []
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def to_eight_bits(self) -> bool:
        """Whether no more than eight bits of a number are kept, so that more than these need not be multiplied."""
        return self.storage in ("bfloat16", "int8")

    def can_use(self, other: Method, shape: Shape) -> bool:
        return self == other

    def restored(self, kept: Tensors, dtype: torch.dtype) -> Tensor:
        return restore(kept, dtype).to(dtype).dense().to(dtype)  # which is float32 of factors in float16

    def weight_gradient(self, kept: Tensors, grad: Tensor, geometry: Geometry, shape: Shape) -> Tensor:
        return weight_gradient(restore(kept, grad.dtype), grad, geometry, self.to_eight_bits)

    def gradients(self, kept: Tensors, grad: Tensor, geometry: Geometry, shape: Shape) -> tuple[Tensor, Tensor]:
        if type(self).weight_gradient is not TuckerMethod.weight_gradient:  # a subclass has its own
            return super().gradients(kept, grad, geometry, shape)
        return gradients(restore(kept, grad.dtype), grad, geometry, self.to_eight_bits)

    def first_factor(self, kept: Tensors, grad: Tensor, geometry: Geometry, with_bias: bool) -> Tensor | None:
        own = type(self)
        if own.weight_gradient is not TuckerMethod.weight_gradient or own.gradients is not TuckerMethod.gradients:
            return None
        core = kept[0]
        assert core is not None
        values, scales = kept[1 : core.ndim + 1], kept[core.ndim + 1 :]
        pairs = zip(values, core.shape, strict=True)
        shape = tuple(rank if factor is None else factor.shape[0] for factor, rank in pairs)
        factored = tuple(factor is not None for factor in values)
        if not projects_batch(shape, tuple(core.shape), factored, grad, geometry, with_bias):
            return None
        return columns(values[0], scales[1] if scales else None, grad.dtype)

    def kept_ranks(self, shape: Shape, ranks: Shape) -> Shape:
        """The ranks at which an input is kept; its shape, where it is kept as it is."""
        return kept_ranks(shape, ranks, self.storage)

    def form_bytes(self, x: Tensor, ranks: Shape) -> int:
        """Bytes that are kept of an input at these ranks."""
        shape = tuple(x.shape)
        return stored_bytes(shape, self.kept_ranks(shape, ranks), x.dtype, self.storage)

    def gradient_flops(self, geometry: Geometry, shape: Shape, ranks: Shape, out_channels: int) -> int:
        """Of the weight gradient, as it is formed together with a bias gradient, which is not counted."""
        return 2 * plan_gradient(*self._form(geometry, shape, ranks), out_channels).macs

    def fewest_gradient_macs(self, geometry: Geometry, shape: Shape, ranks: Shape, out_channels: int) -> int:
        """Multiplications that the weight gradient takes at least, by which `lowrank.tensors.worth` tells its time."""
        return fewest_macs(*self._form(geometry, shape, ranks), out_channels)

    def _form(self, geometry: Geometry, shape: Shape, ranks: Shape) -> tuple[Geometry, Shape, Shape, tuple[bool, ...]]:
        ranks = self.kept_ranks(shape, ranks)
        return geometry, shape, ranks, tuple(rank < size for rank, size in zip(ranks, shape, strict=True))
