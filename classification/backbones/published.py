"""Published checkpoints in the names of this suite's networks: MCUNet's release, and networks pretrained on a half.

A checkpoint is taken only if every tensor in it has a place in the network, every tensor of the network is in it, and
all shapes agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classification.backbones.mcunet import BLOCKS, MCUNet
from classification.backbones.registry import build_model
from experiment import ExperimentError

MCUNET_PARAMETERS = 636_232  # as published, with 1,000 classes
MCUNET_EPSILON = 1e-5  # of batch normalisation here
HEADS = ("classifier.linear.weight", "classifier.weight")  # of the published networks; first dimension: classes

Names = dict[str, str]  # from a published module's name to ours


def convert(name: str, state: Mapping[str, Tensor], config: Path | None = None) -> dict[str, Tensor]:
    """The state dict of a network of this suite from that of a published checkpoint.

    Args:
        name: of the network.
        state: tensors of the checkpoint. Known are MCUNet's release (`first_conv.conv.weight`, ...) and the gradient
            filter's networks pretrained on a half (`backbone.` before each name, `classifier.weight` for the head).
        config: JSON file of MCUNet's release.

    Raises:
        ExperimentError: the checkpoint is of another network.
    """
    heads = [state[key] for key in HEADS if key in state]
    if len(heads) != 1 or heads[0].ndim != 2:
        raise ExperimentError(f"the checkpoint has no classifier; known are {' and '.join(HEADS)}")
    with torch.device("meta"):
        model = build_model(name, num_classes=len(heads[0]))
    own = model.state_dict()
    released = name == "mcunet" and HEADS[0] in state
    renamed = _renamed(state, _released_names() if released else _half_names(name, model))
    odd = sorted(renamed.keys() ^ own.keys()) or [key for key in own if renamed[key].shape != own[key].shape]
    if odd:
        there = tuple(renamed[odd[0]].shape) if odd[0] in renamed else "not there"
        here = tuple(own[odd[0]].shape) if odd[0] in own else "not known"
        raise ExperimentError(
            f"the checkpoint is of another network than {name}: {len(odd)} tensors do not fit, such as {odd[0]!r}, "
            f"which is {there} in the checkpoint and {here} here"
        )
    if released:
        _check_released(renamed, dict(model.named_parameters()).keys(), config)
    converted = {key: renamed[key].detach().clone() for key in own}
    if name == "mcunet" and config is not None:
        _move_epsilon(converted, check_config(config))
    return converted


def _renamed(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        renamed[f"{names[module]}.{leaf}" if module in names else key] = value
    return renamed


def _half_names(name: str, model: nn.Module) -> Names:
    """Names in a checkpoint of a network that was pretrained on a half."""
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in model.state_dict()))
    body, head = modules[:-1], modules[-1]  # every backbone registers its classifier last
    pairs = _mcunet_names("model.0", "model", 1) if name == "mcunet" else zip(body, body, strict=True)
    return {f"backbone.{theirs}": ours for theirs, ours in pairs} | {"classifier": head}


def _released_names() -> Names:
    return dict(_mcunet_names("first_conv", "blocks", 0)) | {"classifier.linear": "classifier"}


def _mcunet_names(first: str, blocks: str, start: int) -> Iterator[tuple[str, str]]:
    """Pairs of a published name and ours, for the release's first convolution and its blocks, counted from `start`."""
    yield f"{first}.conv", "stem.0"
    yield f"{first}.bn", "stem.1"
    for number, (inputs, expanded, *_) in enumerate(BLOCKS):
        parts = ["inverted_bottleneck"] if expanded != inputs else []
        for place, part in enumerate([*parts, "depth_conv", "point_linear"]):
            theirs = f"{blocks}.{number + start}.mobile_inverted_conv.{part}"
            yield f"{theirs}.conv", f"blocks.{number}.layers.{3 * place}"
            yield f"{theirs}.bn", f"blocks.{number}.layers.{3 * place + 1}"


def _check_released(state: Mapping[str, Tensor], parameters: Any, config: Path | None) -> None:
    count = sum(state[key].numel() for key in parameters)
    if count != MCUNET_PARAMETERS:
        raise ExperimentError(f"the checkpoint has {count} parameters; MCUNet's release has {MCUNET_PARAMETERS}")
    if config is None:
        raise ExperimentError("MCUNet's release comes with a JSON file of its layers; give that as --config")


def check_config(path: Path) -> float:
    """Compare the JSON file of MCUNet's release with the network here. Returns its epsilon of batch normalisation.

    Raises:
        ExperimentError: it is damaged, or describes another network; names the first layer that differs.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        described, epsilon = list(_described(config)), float(config["bn"]["eps"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExperimentError(
            f"{path} is no description of a network as MCUNet's release has it ({type(error).__name__}: {error})"
        ) from None
    if len(described) != len(BLOCKS) + 3:
        raise ExperimentError(f"{path} describes {len(described) - 3} blocks, mcunet has {len(BLOCKS)}")
    for (place, there), here in zip(described, _expected(), strict=True):
        for key, value in here.items():
            if there[key] != value:
                raise ExperimentError(f"{path} is not of mcunet: {key} of {place} is {there[key]!r}, here {value!r}")
    return epsilon


def _described(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    first = config["first_conv"]
    yield "first_conv", {key: first[key] for key in (*_FIRST, "out_channels")}
    for number, block in enumerate(config["blocks"]):
        layer = block["mobile_inverted_conv"]
        inputs, expanded = layer["in_channels"], layer["mid_channels"]
        yield (
            f"block {number}",
            {key: layer[key] for key in ("in_channels", "kernel_size", "stride", "out_channels", *_BLOCK)}
            | {
                "mid_channels": round(inputs * layer["expand_ratio"]) if expanded is None else expanded,
                "shortcut": (block["shortcut"] or {}).get("name"),
            },
        )
    yield "the network", {"feature_mix_layer": config["feature_mix_layer"]}
    yield "classifier", {key: config["classifier"][key] for key in ("in_features", "bias", "act_func", "use_bn")}


_FIRST = {"in_channels": 3, "kernel_size": 3, "stride": 2, "act_func": "relu6", "use_bn": True, "bias": False}
_BLOCK = {"act_func": "relu6", "use_se": False}


def _expected() -> Iterator[dict[str, Any]]:
    with torch.device("meta"):
        shortcuts = [block.shortcut for block in MCUNet(num_classes=1).blocks]
    yield _FIRST | {"out_channels": BLOCKS[0][0]}
    for (inputs, expanded, kernel, stride, outputs), shortcut in zip(BLOCKS, shortcuts, strict=True):
        yield _BLOCK | {
            "in_channels": inputs,
            "mid_channels": expanded,
            "kernel_size": kernel,
            "stride": stride,
            "out_channels": outputs,
            "shortcut": "IdentityLayer" if shortcut else None,
        }
    yield {"feature_mix_layer": None}
    yield {"in_features": BLOCKS[-1][4], "bias": True, "act_func": None, "use_bn": False}


def _move_epsilon(state: dict[str, Tensor], epsilon: float) -> None:
    """Put a difference of epsilons into the stored variances; with them, the network computes the same."""
    for key, value in state.items():
        if key.endswith("running_var"):
            state[key] = value + (epsilon - MCUNET_EPSILON)
