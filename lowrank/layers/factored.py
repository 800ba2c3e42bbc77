"""Linear layers whose weight is two factors, in training as in inference.

Such a layer has the parameters `left` L (O, K) and `right` R (K, I) where the stock layer has `weight` (O, I). They are
parameters like any other, with ordinary gradients dW R^T and L^T dW. To all else the layer looks as the stock one: its
state dict has their product under `weight`, and so has the attribute. Source: WASI (ICLR 2026), sec. 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import ChangedError, LowRankError, NonFiniteError
from lowrank.exact.origins import origin_of
from lowrank.exact.recompute import note_layer
from lowrank.layers.classes import LowRankLinear
from lowrank.layers.factor_pair import link
from lowrank.layers.factored_function import FactoredFunction, FactoredSettings, forward_factored
from lowrank.layers.keeping import HandedOut, Rebuilt, kept_of
from lowrank.layers.layer import as_computed, is_single
from lowrank.layers.lazy import real
from lowrank.layers.swap import become
from lowrank.methods.base import Method, Tensors
from lowrank.methods.wasi import WASI, WSI
from lowrank.tensors import costs
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.eager import ORDINARY, in_compiled_graph, trains_plainly, without_autocast
from lowrank.tensors.factors import Factors, factorise, refactorise, truncated
from lowrank.tensors.geometry import LinearGeometry


class Product(Tensor):
    """The weight of a layer as other code reads it: an ordinary tensor, but that its data are nobody's to set."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The numbers without a graph; a change of them is noticed, as it is of a tensor that is detached."""
        return self.detach()

    @data.setter
    def data(self, numbers: Tensor) -> None:
        raise ChangedError(
            "a weight that is held as two factors cannot be given other data; set those of the parameters `left` and "
            "`right`, load a state dict, or call lowrank.revert first"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


ORDINARY.add(Product)


class FactoredLinear(LowRankLinear):
    """A linear layer (I inputs, O outputs) whose weight is held as two factors of rank K.

    Attributes:
        left: (O, K).
        right: (K, I).
    """

    stock_class = nn.Linear
    left: nn.Parameter
    right: nn.Parameter

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (O, I) as other code reads it: the product of the factors, with its graph.

        It is formed anew at every reading, so it is for reading alone: what is written into it reaches no factor, which
        the next forward pass says, and nothing can be set in its place.
        """
        found = self._handed_out()
        if not torch.compiler.is_compiling() and type(found) is Tensor:
            found.__class__ = Product
        return found

    def _handed_out(self) -> Tensor:
        found = _product(self.left, self.right)
        if not torch.compiler.is_compiling() and type(found) is Tensor:
            self._lowrank.handed_out = HandedOut(found, self._lowrank.handed_out)
        return found

    @property
    def rank(self) -> int:
        """K."""
        return self.left.shape[1]

    def reset_parameters(self) -> None:
        """Start from the nearest weight of this rank to what `nn.Linear` starts from."""
        options: Any = {"device": self.left.device, "dtype": self.left.dtype}
        stock = nn.Linear(self.in_features, self.out_features, self.bias is not None, **options)
        with torch.no_grad():
            wide = stock.weight.to(torch.promote_types(stock.weight.dtype, torch.float32))
            identity = torch.eye(self.in_features, dtype=wide.dtype, device=wide.device)
            self._hold(truncated(Factors(wide, identity), self.rank).to(stock.weight.dtype), fresh=False)
            if self.bias is not None:
                self.bias.copy_(stock.bias)

    def cost(self, x: Tensor, input_gradient: bool) -> LayerCost:
        """Cost of one training step for an input (B, ..., I); see `costs.LayerCost`."""
        outputs, rank = self.left.shape
        if _wants_gradient(self.left, self.right):
            cost = _factored(self._lowrank.method).factored_cost(x, outputs, rank, input_gradient)
        else:
            tokens, inputs = prod(x.shape[:-1]), x.shape[-1]
            cost = LayerCost(
                flops_paper=costs.paper_factored_pass(tokens, inputs, outputs, rank),
                flops=2 * tokens * rank * (inputs + outputs) * (2 if input_gradient else 1),
            )
        return replace(cost, weight_bytes=self.left.nbytes + self.right.nbytes)

    # Forward.

    def _compiled(self, input: Tensor) -> Tensor:
        """A compiler decides itself what to keep of a layer that keeps its input; other methods go into its graph."""
        tracked = torch.is_grad_enabled() and _wants_gradient(self.left, self.right) and in_compiled_graph()
        if not tracked or self._lowrank.method.keeps_input or not self.left.is_floating_point() or input.is_meta:
            return forward_factored(input, self.left, self.right, self.bias)
        return self._tracked(input)

    def _run(self, input: Tensor) -> Tensor:
        parameters = (self.left, self.right, self.bias)
        self._require_unwritten()
        plain = isinstance(input, Tensor) and trains_plainly(input, *parameters)
        if not plain or not _wants_gradient(input, *parameters):
            return forward_factored(input, *parameters)
        self._link()
        return self._watched(self._tracked(real(input)))

    def _tracked(self, input: Tensor) -> Tensor:
        state, parameters = self._lowrank, (self.left, self.right, self.bias)
        x, dtype, outside = as_computed(input, self.left)
        with outside:
            method: Method = state.method
            kept: Tensors = ()
            if _wants_gradient(self.left, self.right):
                method, kept = kept_of(self, LinearGeometry(), self.left, input, x)
            rebuild = method.rebuild if isinstance(method, Rebuilt) else None
            settings = FactoredSettings(state.name, dtype, method.keeps_input, rebuild)
            y = FactoredFunction.apply(x, *parameters, settings, *kept)
        if x is input and not is_single(self, x) and state.recompute and not torch.compiler.is_compiling():
            ahead = origin_of(input)
            keeps_x = bool(kept) and method.keeps_input
            note_layer(ahead.as_kept() if keeps_x else ahead, y, forward_factored, parameters)
        return y

    # State.

    def _require_unwritten(self) -> None:
        handed_out = self._lowrank.handed_out
        if handed_out is not None and handed_out.is_written():
            raise ChangedError(
                f"layer {self._lowrank.name!r}: its weight, or that of its state dict, was changed in place, which "
                f"reaches none of the two factors that it is held as; change or average the parameters `left` and "
                f"`right`, or load the changed state dict"
            )

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._link()

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        result = super()._apply(*arguments, **options)
        self._link()
        return result

    def _link(self) -> None:
        """Parameters come and go (copies, `to_empty`, assigned state dicts): mark those that are here now."""
        left, right = self._parameters.get("left"), self._parameters.get("right")
        link(left, right, _factored(self._lowrank.method).update, self._lowrank.name)

    def _hold(self, found: Factors, fresh: bool) -> None:
        """Take other factors, of any rank; in new parameters, if `fresh`, else in those that are there."""
        for name, value in zip(("left", "right"), found, strict=True):
            own = self._parameters[name]
            assert own is not None
            if fresh:
                self._parameters[name] = nn.Parameter(value.contiguous(), own.requires_grad)
            elif own.shape == value.shape:
                with torch.no_grad():
                    own.copy_(value)
            else:
                own.data, own.grad = value.to(own).contiguous(), None
        self._link()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, prefix, keep_vars)
        for key, value in own.items():
            if key == f"{prefix}left":
                weight = self._handed_out()
                destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()
            elif key != f"{prefix}right":
                destination[key] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a dense weight, or factors (O, k) and (k, I) under `left` and `right` as they are.

        The stock module loads it, into a placeholder, so hooks, assigning and all that can be wrong are as ever. A
        weight of no higher rank than K is taken apart at that rank, any other at the method's energy.
        """
        if type(self.left) not in ORDINARY:
            raise LowRankError(
                f"layer {self._lowrank.name!r}: the factors of its weight are a {type(self.left).__name__}; load the "
                f"weights before they are sharded"
            )
        key, reports = f"{prefix}weight", (missing_keys, unexpected_keys, error_msgs)
        exact = _take_factors(state_dict, prefix)
        if exact is not None:
            state_dict[key] = _product(*exact)
        left, right, before = self.left, self.right, len(error_msgs)
        unread = left.new_full((self.out_features, self.in_features), float("nan"))
        placeholder = nn.Parameter(unread, left.requires_grad)
        _swap_parameters(self, {"left": {"weight": placeholder}, "right": {}})
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)
        finally:
            loaded = self._parameters["weight"]
            _swap_parameters(self, {"weight": {"left": left, "right": right}})
        if key not in state_dict or any(key in message for message in error_msgs[before:]):
            return
        self._lowrank.handed_out = None
        assert loaded is not None
        try:
            found = exact or _taken_apart(loaded.detach(), self.rank, _factored(self._lowrank.method).energy)
        except NonFiniteError as error:
            error_msgs.append(f'While copying the parameter named "{key}": {error}.')
        else:
            self._hold(found, fresh=local_metadata.get("assign_to_params_buffers", False))


# What `convert` and `revert` call.


def factorise_layer(layer: nn.Module, method: Method) -> tuple[nn.Parameter, nn.Parameter]:
    """The two factors that a layer will hold in the place of its weight (O, I): (O, K) and (K, I).

    The layer is not touched, and may be one that holds factors already.

    Raises:
        NonFiniteError: the weight has NaN or infinite values.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    found = factorise(weight.detach(), _factored(method).energy)
    left, right = (nn.Parameter(part.contiguous(), weight.requires_grad) for part in found)
    return left, right


def attach(layer: nn.Module, left: nn.Parameter, right: nn.Parameter) -> None:
    """Turn a linear layer with a state `_lowrank` into one that holds these factors in the place of its weight."""
    _swap_parameters(layer, {"weight": {"left": left, "right": right}})
    become(layer, FactoredLinear)
    assert isinstance(layer, FactoredLinear)
    layer._link()


def detach(layer: FactoredLinear) -> None:
    """Put a dense weight in the place of the two factors; the class is left for the caller to restore."""
    left, right = layer.left, layer.right
    weight = nn.Parameter(_product(left, right).detach(), _wants_gradient(left, right))
    _swap_parameters(layer, {"left": {"weight": weight}, "right": {}})


def _swap_parameters(layer: nn.Module, changes: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
    """Put parameters by name in the place of others, the order kept."""
    parameters = dict(layer._parameters)
    layer._parameters.clear()
    for name, parameter in parameters.items():
        layer._parameters.update(changes.get(name, {name: parameter}))


def _factored(method: Method) -> WSI | WASI:
    assert isinstance(method, WSI | WASI)
    return method


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """L R in the factors' own dtype, whatever autocast says."""
    with without_autocast(left.device.type):
        return left @ right


def _take_factors(state_dict: dict[str, Any], prefix: str) -> Factors | None:
    """Factors that a state dict has in the place of a weight, taken out of it; None: it has none that fit together."""
    left, right = (state_dict.get(f"{prefix}{name}") for name in ("left", "right"))
    if f"{prefix}weight" in state_dict or not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return None
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        return None
    del state_dict[f"{prefix}left"], state_dict[f"{prefix}right"]
    return Factors(left.detach(), right.detach())


def _taken_apart(weight: Tensor, rank: int, energy: float) -> Factors:
    """Factors of a loaded weight; on the meta device they have their rank alone."""
    if weight.is_meta:
        return Factors(weight.new_empty(weight.shape[0], rank), weight.new_empty(rank, weight.shape[1]))
    return refactorise(weight, rank, energy)
