"""Slow and plain versions of what the package computes, written from the definitions and from nothing of its own.

But for the order in which sequential truncation takes the modes, which is free.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.tensors.tucker import iteration_order

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
DEVICE = torch.get_default_device().type  # where the tests make tensors, see `conftest`


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that do not depend on the global random state."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype, device="cpu")
    return numbers.to(DEVICE)


def low_rank_tensor(*shape: int, seed: int = 0, decay: float = 0.3) -> Tensor:
    """A tensor whose unfoldings have well separated, quickly falling singular values."""
    x = random_tensor(*shape, seed=seed)
    for mode, size in enumerate(shape):
        x = multiply(x, torch.diag(decay ** torch.arange(size, dtype=x.dtype)), mode)
    for mode, size in enumerate(shape):
        rotation, _ = torch.linalg.qr(random_tensor(size, size, seed=seed + 1 + mode))
        x = multiply(x, rotation, mode)
    return x


def unfold(x: Tensor, mode: int) -> Tensor:
    return x.movedim(mode, 0).reshape(x.shape[mode], -1)


def multiply(x: Tensor, matrix: Tensor, mode: int) -> Tensor:
    return torch.tensordot(matrix, x, ([1], [mode])).movedim(0, mode)


def svd_rank(x: Tensor, mode: int, energy: float) -> int:
    """Smallest k whose leading squared singular values hold the share `energy` (papers, A1)."""
    values = torch.linalg.svdvals(unfold(x, mode)) ** 2
    shares = values.cumsum(0) / values.sum()
    return next(k for k, share in enumerate(shares.tolist(), 1) if share >= energy)


def left_vectors(x: Tensor, mode: int, rank: int) -> Tensor:
    return torch.linalg.svd(unfold(x, mode), full_matrices=False)[0][:, :rank]


def projected(x: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """`x` projected on the span of the orthonormal columns of each basis, as a full tensor."""
    result = x
    for mode, basis in bases.items():
        result = multiply(result, basis @ basis.mT, mode)
    return result


def hosvd_input(x: Tensor, energy: float) -> Tensor:
    """The truncated HOSVD of a tensor, by a full SVD of every unfolding."""
    return projected(x, {mode: left_vectors(x, mode, svd_rank(x, mode, energy)) for mode in range(x.ndim)})


def svd_input(x: Tensor, energy: float) -> Tensor:
    """The truncated SVD of a tensor, by one full SVD of the batch unfolding."""
    u, s, v = torch.linalg.svd(unfold(x, 0), full_matrices=False)
    k = svd_rank(x, 0, energy)
    return (u[:, :k] * s[:k] @ v[:k]).reshape(x.shape)


def kept_input(x: Tensor, approximation: Tensor, ranks: Sequence[int]) -> Tensor:
    """What a method keeps of an input: its approximation at these ranks, or the input where that takes no more."""
    factors = sum(size * rank for size, rank in zip(x.shape, ranks, strict=True) if rank < size)
    return approximation if prod(ranks) + factors < x.numel() else x


def subspace_step(x: Tensor, starts: dict[int, Tensor], sequential: bool) -> dict[int, Tensor]:
    """One subspace iteration per mode: V = A^T U_prev, U = orth(A V) (papers, A3), A being an unfolding.

    Published: of the full tensor. Sequential: of the tensor truncated in the modes before, as `iteration_order` says.
    """
    bases: dict[int, Tensor] = {}
    current = x
    ranks = [starts[mode].shape[1] if mode in starts else size for mode, size in enumerate(x.shape)]
    for mode in (mode for mode in iteration_order(x.shape, ranks) if mode in starts):
        a = unfold(current if sequential else x, mode)
        bases[mode] = torch.linalg.qr(a @ (a.mT @ starts[mode]))[0]
        current = multiply(current, bases[mode].mT, mode)
    return bases


def fibres_by_definition(x: Tensor, mode: int, share: int, turn: int = 0, ahead: int = 0) -> Tensor:
    """Columns of the unfolding that are taken: those whose place in the modes between batch and `mode` is the number of
    the sample plus the turn, both modulo `share`; or a `-share`th of the places behind `mode` but those ahead, another
    for each sample and place and turn."""
    k = abs(share)
    behind = prod(x.shape[mode + 1 :])
    flat = x.reshape(x.shape[0], -1, x.shape[mode], behind)
    places, some = flat.shape[1], behind // k
    taken = []
    for sample, place in product(range(x.shape[0]), range(places)):
        if share > 0 and place % k == (sample + turn) % k:
            taken.append(flat[sample, place])
        elif share < 0:
            first = ahead + (sample + place + turn) % k * some
            taken.append(flat[sample, place, :, first : first + some])
    return torch.cat(taken, 1)


def same_span(first: Tensor, second: Tensor, tolerance: float = 1e-8) -> bool:
    return torch.allclose(first @ first.mT, second @ second.mT, rtol=0, atol=tolerance)


def autograd(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, input gradient and parameter gradients of a copy of `layer`."""
    layer = copy.deepcopy(layer)
    layer.zero_grad()
    x = x.detach().clone().requires_grad_(True)
    y = layer(x)
    y.backward(grad)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return y.detach(), x.grad, gradients


def filtered_gradients(conv: nn.Conv2d, x: Tensor, grad: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Weight and input gradient of the gradient filter, one patch at a time (papers, A6).

    On each patch of r x r outputs the output gradient is its mean. The matching input patch spans the positions that
    the kernel's centre passes over: output i is centred on input i s + d (k - 1) // 2 - padding, and with a stride it
    stands for s x s input positions, so sums over inputs are divided by s^2. The kernel is its spatial sum.
    """
    batch, outputs, rows, columns = grad.shape
    height, width = x.shape[2:]
    per_group = conv.in_channels // conv.groups
    left, _, top, _ = conv._reversed_padding_repeated_twice
    (sh, sw), (kh, kw), (dh, dw) = conv.stride, conv.kernel_size, conv.dilation
    down, right = dh * (kh - 1) // 2 - top, dw * (kw - 1) // 2 - left
    weight_gradient, input_gradient = torch.zeros_like(conv.weight), torch.zeros_like(x)
    for first_row in range(0, rows, patch):
        for first_column in range(0, columns, patch):
            last_row, last_column = min(first_row + patch, rows), min(first_column + patch, columns)
            mean = grad[:, :, first_row:last_row, first_column:last_column].mean((2, 3))
            h = slice(max(first_row * sh + down, 0), max(min(last_row * sh + down, height), 0))
            w = slice(max(first_column * sw + right, 0), max(min(last_column * sw + right, width), 0))
            total = x[:, :, h, w].sum((2, 3)) / (sh * sw)
            for o in range(outputs):
                group = o // (outputs // conv.groups)
                for c in range(per_group):
                    channel = group * per_group + c
                    for b in range(batch):
                        weight_gradient[o, c] += mean[b, o] * total[b, channel]
                        kernel_sum = conv.weight[o, c].sum() / (sh * sw)
                        input_gradient[b, channel, h, w] += mean[b, o] * kernel_sum
    return weight_gradient.detach(), input_gradient.detach()


class MultiplicationCounter(TorchDispatchMode):
    """Counts the multiplications of the matrix products and convolutions that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.total += args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "addbmm", "baddbmm"):
            self.total += args[1].numel() * args[2].shape[-1]
        elif name == "convolution_backward":
            grad, _, weight = args[:3]
            self.total += grad.numel() * prod(weight.shape[1:])
        return result


class LargeTensors(TorchDispatchMode):
    """Notes the operator and the shape of every tensor of at least a size that anything inside makes."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in _pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() >= self.numel:
                self.found.append((func, tuple(leaf.shape)))
        return result


class TwoConvolutions(nn.Module):
    """Conv, in-place ReLU, conv with stride, linear: small enough to count by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        x = F.relu(self.second(x), inplace=True)
        return self.head(x.mean((2, 3)))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def labelled_batch(size: int = 4, side: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return random_tensor(size, 3, side, side, seed=5, dtype=dtype), torch.arange(size) % 5
