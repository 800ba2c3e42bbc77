"""Which functions of PyTorch have one that keeps less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.exact import curves
from lowrank.exact.activations import dropout, hardsigmoid
from lowrank.exact.curves import hardtanh, leaky_relu, relu, relu6
from lowrank.exact.expressions import EXPRESSIONS, noted
from lowrank.exact.pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from lowrank.exact.recompute import (
    group_norm,
    instance_norm,
    layer_norm,
    products_of,
    rms_norm,
    scaled_dot_product_attention,
    scaled_sum,
)

MATRIX_PRODUCTS = (
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm),
    torch.einsum,
)


def _softmax(input: Any, dim: Any, dtype: Any = None, **options: Any) -> Any:
    if options:  # such as a tensor for the result
        return torch.softmax(input, dim, dtype=dtype, **options)
    return curves.softmax(input, dim, dtype=dtype)


# What plain functional code calls, and what stands in for it.
LEAN_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.relu: relu,
    torch.relu: relu,
    Tensor.relu: relu,
    F.relu_: lambda input: relu(input, inplace=True),
    torch.relu_: lambda input: relu(input, inplace=True),
    Tensor.relu_: lambda input: relu(input, inplace=True),
    F.relu6: relu6,
    F.hardtanh: hardtanh,
    F.hardsigmoid: hardsigmoid,
    F.leaky_relu: leaky_relu,
    F.dropout: dropout,
    F.max_pool2d: max_pool2d,
    F.avg_pool2d: noted(F.avg_pool2d, avg_pool2d),
    F.adaptive_avg_pool2d: noted(F.adaptive_avg_pool2d, adaptive_avg_pool2d),
    F.gelu: curves.gelu,
    F.silu: curves.silu,
    F.hardswish: curves.hardswish,
    F.mish: curves.mish,
    F.softplus: curves.softplus,
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), curves.power),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), curves.sigmoid),
    **dict.fromkeys((torch.tanh, Tensor.tanh), curves.tanh),
    F.softmax: curves.softmax,
    **dict.fromkeys((torch.softmax, Tensor.softmax), _softmax),
    F.normalize: products_of(F.normalize, costs=False),
    **{function: products_of(function) for function in MATRIX_PRODUCTS},
    torch.addcmul: scaled_sum,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    **EXPRESSIONS,
}
