"""Whether keeping less is worth its time, by shapes alone: so a run repeats bit for bit, whatever else a machine does.

What is kept less of a small tensor is few bytes, and the operators that do it take as long as for a larger one. The
rule counts both: what is saved, in bytes, and the time that it takes more, in operator calls. An *operator call* is
what starting an operator from Python takes in a step, about 10 microseconds; in that time one core moves
`MOVED_A_CALL` bytes or does `MACS_A_CALL` multiplications. What saves less than `smallest` bytes a call stays as it is
in PyTorch. So a step takes at most 10 microseconds longer for every `smallest` bytes that it saves, and with infinity
nothing is done that takes longer.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from lowrank.errors import SettingError
from lowrank.tensors.geometry import ConvGeometry, Shape
from lowrank.tensors.memory_layout import bytes_of

# Fitted to the layers of MobileNetV2 and ResNet-18 at batch 1, 4 and 16 of 160 pixels, each against its stock step on
# one core of an x86-64 server; MCUNet was not used for it. `python -m benchmarks.worth` compares and fits anew.
MOVED_A_CALL = 2**17
MACS_A_CALL = 2**18
CONVOLVED_A_CALL = 3 * 2**18  # multiplications of a convolution, which do more at once
_CACHE = 2**20  # bytes of a tensor to which a further pass takes next to nothing
_COLDEST = 2**21  # bytes of input and output that drive all of Python's own code out of cache
# What each of `merging_terms` takes. Beyond the cache it takes passes less, of 1 x 1 layers most, which PyTorch does in
# more passes than their products take. Of two sets that fit single layers about as well (errors of 9 to 11 % of the
# step), the one with which steps of whole networks take less.
_MERGING = (46, 2, 4, -4, -2, -4)
_AHEAD = 2**23  # bytes of an output from which merging takes less ahead of everything trained, by steps of networks
_BITS = 11  # calls of an activation that keeps bits
_AGAIN, _AGAIN_PASSES = 40, 6  # calls of computing a layer's output again, and passes over it, beside its products


def check_smallest(smallest: object) -> None:
    """Raise `SettingError` unless it is a number from 0, infinity included."""
    if isinstance(smallest, bool) or not isinstance(smallest, int | float) or not smallest >= 0:
        raise SettingError(f"smallest is {smallest!r}; allowed: bytes an operator call, from 0, such as 2**18")


def is_worth(saved: int, calls: float, smallest: float) -> bool:
    """The rule: whether something saves at least `smallest` bytes for each operator call that it takes more.

    Args:
        saved: bytes.
        calls: time, in operator calls; below zero, it takes less.
        smallest: bytes a call; 0: whatever saves anything.
    """
    return saved > 0 and (calls <= 0 or saved >= smallest * calls)


@lru_cache(maxsize=4096)
def merging_is_worth(geometry: ConvGeometry, shape: Shape, out_channels: int, itemsize: int, smallest: float) -> bool:
    """The rule, of computing a convolution together with the normalisation behind it, which then keeps nothing.

    Args:
        geometry: of the convolution.
        shape: of its input, (B, C, H, W).
        out_channels: O.
        itemsize: bytes of a number.
        smallest: bytes a call.
    """
    output = itemsize * prod(geometry.output_shape(shape, out_channels))
    return is_worth(output, merging_calls(geometry, shape, out_channels, itemsize), smallest)


def merging_calls(geometry: ConvGeometry, shape: Shape, out_channels: int, itemsize: int) -> float:
    """What that takes more than one after the other, in operator calls; arguments as of `merging_is_worth`."""
    terms = merging_terms(geometry, shape, out_channels, itemsize)
    return sum(constant * term for constant, term in zip(_MERGING, terms, strict=True))


def merging_terms(geometry: ConvGeometry, shape: Shape, out_channels: int, itemsize: int) -> tuple[float, ...]:
    """What those calls are a sum over: one; the input and output that make Python's code cold, the weight, what of the
    output is beyond the cache, and of a product's output and input, each in bytes, by what is moved in a call."""
    input, output = itemsize * prod(shape), itemsize * prod(geometry.output_shape(shape, out_channels))
    weight = itemsize * out_channels * (shape[1] // geometry.groups) * prod(geometry.kernel)
    far_input, far_output = max(input - _CACHE, 0), max(output - _CACHE, 0)
    product = geometry.is_product
    moved = min(input + output, _COLDEST), weight, far_output, product * far_output, product * far_input
    return (1, *(nbytes / MOVED_A_CALL for nbytes in moved))


def merging_ahead_is_worth(output: int) -> bool:
    """The same ahead of everything trained, where nothing is kept in any case: whether it takes no longer.

    Args:
        output: bytes of the output.
    """
    return output >= _AHEAD


def again_is_worth(output: int, products: int, itemsize: int, smallest: float) -> bool:
    """The rule, of computing a layer's output again in the backward pass in the place of keeping it.

    Args:
        output: numbers in it.
        products: for each of them.
        itemsize: bytes of a number.
        smallest: bytes a call.
    """
    saved = output * itemsize
    calls = _AGAIN + output * products / MACS_A_CALL + _AGAIN_PASSES * saved / MOVED_A_CALL
    return is_worth(saved, calls, smallest)


def bits_are_worth(x: Tensor, smallest: float) -> bool:
    """The rule, of keeping a bit for each number of an activation's input, or anything as small."""
    # A number that a compiler may not know; otherwise the shorter way, which comes with every activation.
    return is_worth(bytes_of(x) if torch.compiler.is_compiling() else x.nbytes, _BITS, smallest)
