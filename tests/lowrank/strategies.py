"""Hypothesis strategies over the settings of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from references import random_tensor
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerSetting:
    """A float64 layer with its input and a random gradient of its output; plain fields, so that a failure can be read.

    `options` are the arguments of `nn.Conv2d` or `nn.Linear`.
    """

    shape: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    seed: int

    def layer(self) -> nn.Module:
        options = dict(self.options)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            family = nn.Conv2d if "kernel_size" in options else nn.Linear
            return family(**options, dtype=torch.float64)

    def x(self) -> Tensor:
        return random_tensor(*self.shape, seed=self.seed)

    def grad(self) -> Tensor:
        with torch.no_grad():
            shape = self.layer()(self.x()).shape
        return random_tensor(*shape, seed=self.seed + 1)


SEEDS = st.integers(0, 10**6)
KERNELS = st.sampled_from([(1, 1), (2, 2), (3, 3), (1, 3), (3, 2), (4, 1)])
STRIDES = st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 1)])
DILATIONS = st.sampled_from([(1, 1), (2, 2), (2, 1), (1, 3)])
PADDINGS = st.sampled_from([0, 1, (1, 0), (0, 2), (2, 1), "same", "valid"])
PADDING_MODES = st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
# (groups, input channels, output channels): dense, depthwise, depth multiplier, between, between with more outputs
CHANNELS = st.sampled_from([(1, 3, 4), (1, 1, 2), (4, 4, 4), (3, 3, 6), (2, 4, 6), (3, 6, 3), (2, 6, 2)])


@st.composite
def convolutions(draw: st.DrawFn, padding_modes: st.SearchStrategy[str] = PADDING_MODES) -> LayerSetting:
    """Any `nn.Conv2d` that PyTorch accepts, on a small input of any size."""
    groups, channels, outputs = draw(CHANNELS)
    kernel, dilation, padding = draw(KERNELS), draw(DILATIONS), draw(PADDINGS)
    stride = (1, 1) if padding == "same" else draw(STRIDES)
    mode = draw(padding_modes)
    smallest = []
    for axis in (0, 1):
        reach = dilation[axis] * (kernel[axis] - 1)
        if padding == "same":
            pad, needed = reach - reach // 2, 1
        else:
            pad = 0 if padding == "valid" else padding if isinstance(padding, int) else padding[axis]
            needed = max(1, reach + 1 - 2 * pad)  # for one output
        smallest.append(max(needed, {"reflect": pad + 1, "circular": pad}.get(mode, 1)))
    height, width = (size + draw(st.integers(0, 5)) for size in smallest)
    options = {
        "in_channels": channels,
        "out_channels": outputs,
        "kernel_size": kernel,
        "stride": stride,
        "dilation": dilation,
        "padding": padding,
        "groups": groups,
        "padding_mode": mode,
        "bias": draw(st.booleans()),
    }
    return LayerSetting((draw(st.integers(1, 4)), channels, height, width), tuple(options.items()), draw(SEEDS))


@st.composite
def linears(draw: st.DrawFn) -> LayerSetting:
    """Any `nn.Linear` on a 2-D, 3-D or 4-D input."""
    inputs, outputs = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    leading = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    options = {"in_features": inputs, "out_features": outputs, "bias": draw(st.booleans())}
    return LayerSetting((*leading, inputs), tuple(options.items()), draw(SEEDS))


LAYERS = convolutions() | linears()
SHAPES = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)
ENERGIES = st.sampled_from([0.3, 0.5, 0.8, 0.95])
