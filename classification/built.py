"""What a network shows once it is built, found without its numbers, so that a dry run can say it at once."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import lowrank
from classification.backbones import build_model
from classification.backbones.weights import fitting
from classification.data.text import TEXTS
from classification.image_size import require_image_size
from experiment import ExperimentError
from experiment.download import downloads_told
from experiment.method import build_method, with_ranks
from experiment.ranks import Budget

_CLASSES = 10  # a classifier of another size is left out where weights are compared


def require_network(settings: Mapping[str, Any]) -> None:
    """Refuse layers, weights, a method and a size of images that are not for the network.

    Args:
        settings: the resolved config of a command.

    Raises:
        ExperimentError, LowRankError: one of them is not.
    """
    model, data = settings["model"], settings["data"]
    method = build_method(model["method"])
    network = _network(model["backbone"], with_numbers=method.factors_weight)  # of which factors are found
    if model["weights"] is not None:
        fitting(network, model["weights"])
    elif model["pretrained"]:
        with downloads_told(), contextlib.redirect_stdout(io.StringIO()):  # where PyTorch says that it downloads
            build_model(model["backbone"], _CLASSES, pretrained=True)
    names = _layers(network, model)
    budget = None if model["budget"] is None else Budget(**model["budget"])
    told = (names, model["rank_choice"], settings["seed_everything"])
    method = with_ranks(method, budget, *told)
    if problems := lowrank.check(network, names, method):
        raise ExperimentError("; ".join(problems))
    if data["dataset"] not in TEXTS:
        require_image_size(network, data["image_size"], model["backbone"], _CLASSES)


def require_layers(settings: Mapping[str, Any]) -> None:
    """Refuse more layers than the network has; arguments and errors as of `require_network`."""
    _layers(_network(settings["model"]["backbone"], with_numbers=False), settings["model"])


def _layers(network: nn.Module, model: Mapping[str, Any]) -> list[str]:
    if model["kind"] == "linear" and model["part"] != "mlp":
        lowrank.open_attention(network)
    return lowrank.trailing_layers(network, model["layers"], model["kind"], model["part"])


def _network(name: str, with_numbers: bool) -> nn.Module:
    """A network on the meta device; with numbers, or one of somebody's own that asks for them, as for training."""
    if with_numbers:
        return build_model(name, _CLASSES)
    try:
        with torch.device("meta"):
            return build_model(name, _CLASSES)
    except ExperimentError:
        raise
    except Exception:  # whatever is asked of numbers that are not there
        return build_model(name, _CLASSES)
