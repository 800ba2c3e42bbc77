"""Weights from local files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from experiment import ExperimentError, fingerprint
from experiment.checkpoints import refuse_earlier
from experiment.weights import read_weights

MODULE_PREFIX = "backbone."  # where the Lightning module of this suite holds the network


def tensors_of(content: Any, path: str) -> dict[str, Tensor]:
    """What a weights file holds as a state dict, its own or below `state_dict`.

    Raises:
        ExperimentError: it holds none.
    """
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    pairs = content.items() if isinstance(content, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in pairs):
        raise ExperimentError(f"weights file {path} holds no state dict")
    return dict(content)


def read_state_dict(path: str) -> dict[str, Tensor]:
    """The network's state dict in a file: a plain state dict, or a checkpoint of this suite.

    A folder is read as a model of `transformers` in safetensors; the head of a language model in it is left out.

    Raises:
        ExperimentError: the file is missing, damaged, of an earlier version of the suite, or holds something else.
    """
    if any(Path(path).glob("*.safetensors")):
        return _read_folder(Path(path))
    content = read_weights(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if isinstance(state, dict):
        own = {key: value for key, value in state.items() if str(key).startswith(MODULE_PREFIX)}
        content = {key.removeprefix(MODULE_PREFIX): value for key, value in own.items()} or state
    state = tensors_of(content, path)
    refuse_earlier(state, path)
    return state


def _read_folder(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ExperimentError(f"weights file {file} cannot be read ({error})") from None
    return {f"model.{key}": value for key, value in state.items() if not key.startswith("lm_head.")}


def load_weights(model: nn.Module, path: str) -> nn.Module:
    """Load a file into a network. A classifier of another size is left as it is; everything else must fit.

    Raises:
        ExperimentError: see `fitting`.
    """
    model.load_state_dict(fitting(model, path), strict=False)
    return model


def fitting(model: nn.Module, path: str) -> dict[str, Tensor]:
    """What a file has for a network, without a classifier of another size; everything else must fit.

    A network that is published under other names has `own_names`, which gives them its own.

    Raises:
        ExperimentError: see `read_state_dict`; or the weights are of another network.
    """
    state, own = read_state_dict(path), model.state_dict()
    own_names: Any = getattr(model, "own_names", dict)
    state = own_names(state)
    classifier = list(own)[-1].rpartition(".")[0]  # every backbone registers it last
    head = [key for key in own if key.rpartition(".")[0] == classifier]
    for key in head:
        if key in state and state[key].shape != own[key].shape:
            del state[key]
    wrong = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    absent = sorted(own.keys() - state.keys() - set(head))
    foreign = sorted(state.keys() - own.keys())
    if wrong or absent or foreign:
        example = (wrong or absent or foreign)[0]
        raise ExperimentError(
            f"weights file {path} is of another network: {len(absent)} tensors missing, {len(foreign)} unknown, "
            f"{len(wrong)} of another shape, such as {example!r}"
        )
    return state


def weights_fingerprint(path: str) -> str:
    """A short hash of the tensors in a weights file."""
    state = read_state_dict(path)
    return fingerprint(
        key.encode() + state[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for key in sorted(state)
    )
