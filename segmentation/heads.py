"""Whether the heads of a network, their losses and what the network begins with are for one another and its classes.

MMSegmentation builds whatever it is told: the first step stops at a channel too many, and a loss with a class too many,
or one that is left out of the sum of losses, goes on without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from mmengine.model.weight_init import BaseInit
from mmengine.registry import WEIGHT_INITIALIZERS
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiment import ExperimentError
from segmentation.compose import HOOK
from segmentation.identity import WEIGHTS_OF_CLASSES
from segmentation.parts import at

_READ = (".npy", ".json")  # what MMSegmentation reads such files by; of others it would run what they say
_PER_CLASS = (WEIGHTS_OF_CLASSES, "alpha")
_EDGE = 64  # pixels; a channel too many shows in small images as well


def require_plain_files(value: Any, where: str = "model") -> None:
    """Refuse files of weights of classes that MMEngine would run, as it does pickles, before a network is built.

    Raises:
        ExperimentError: there is one; names its place in the config.
    """
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in parts:
        if key == WEIGHTS_OF_CLASSES and isinstance(inner, str) and not inner.endswith(_READ):
            raise ExperimentError(
                f"{where}.{key} is the file {inner}; allowed are such that end in {' or '.join(_READ)}"
            )
        require_plain_files(inner, f"{where}.{key}")


def require_heads(model: nn.Module) -> None:
    """Refuse heads of another number of classes than the one that predicts, and losses that are not for their classes.

    A head with labels of its own, such as those of edges, may have other classes.

    Raises:
        ExperimentError: see above.
    """
    heads = [(name, head) for name, head in model.named_modules() if isinstance(head, BaseDecodeHead)]
    last = getattr(model, "decode_head", None)
    last = last[-1] if isinstance(last, nn.ModuleList) else last
    for name, head in heads:
        plain = type(head).loss_by_feat is BaseDecodeHead.loss_by_feat
        if plain and isinstance(last, BaseDecodeHead) and head.num_classes != last.num_classes:
            raise ExperimentError(
                f"model.{name}.num_classes is {head.num_classes}, and the head that predicts has {last.num_classes}; "
                f"both are trained on the same labels, so set them alike"
            )
        for place, loss in head.named_modules(prefix=f"model.{name}") if plain else ():
            if place.startswith(f"model.{name}.loss_decode"):
                _require_loss(place, loss, (head.num_classes, head.out_channels))


def _require_loss(where: str, loss: nn.Module, classes: tuple[int, int]) -> None:
    name = getattr(loss, "loss_name", "loss")
    if "loss" not in name:  # by which MMEngine tells what is to be summed up
        raise ExperimentError(
            f"{where}.loss_name is {name!r}, which has no 'loss' in it, so that it would be shown and not trained; "
            f"allowed is such as {f'loss_{name}'!r}"
        )
    for key in _PER_CLASS:
        given = getattr(loss, key, None)
        values = None if given is None or isinstance(given, int | float) else list(given)
        if values is not None and len(values) not in classes:
            raise ExperimentError(
                f"{where}.{key} has {len(values)} numbers, and its head {classes[0]} classes; give one for each class"
            )
        if wrong := [one for one in values or () if not 0 <= float(one) < math.inf]:
            raise ExperimentError(f"{where}.{key} has {wrong[0]}; allowed are finite numbers from 0")


def require_beginning(model: Any, config: Mapping[str, Any]) -> None:
    """Give a network its first weights, and refuse an `init_cfg` that would give some to nothing.

    Args:
        model: built of `config`, without weights that are to be downloaded.
        config: its settings.

    Raises:
        ExperimentError: see above.
    """
    kinds = {kind.__name__ for module in model.modules() for kind in (type(module), *type(module).__bases__)}
    for where, settings in _beginnings(config, "model"):
        kind = WEIGHT_INITIALIZERS.get(settings.get("type")) if isinstance(settings.get("type"), str) else None
        if not (isinstance(kind, type) and issubclass(kind, BaseInit)):  # MMEngine says so, or it is one's own
            continue
        layer = settings.get("layer", [])
        names = [layer] if isinstance(layer, str) else layer
        if not names and not settings.get("override"):
            raise ExperimentError(
                f"{where} of type {settings['type']} has no layer, so that it would have no effect; give the classes "
                f"of the layers, such as layer=['Conv2d']"
            )
        if unknown := [one for one in names if one not in kinds]:
            raise ExperimentError(
                f"{where}.layer names {unknown[0]!r}, of which the network has none; allowed are the classes of its "
                f"layers, such as Conv2d"
            )
    try:
        model.init_weights()
    except RuntimeError as error:  # others of MMEngine's are told as those of other parts
        raise ExperimentError(f"the network cannot begin as its init_cfg says: {error}") from None


def _beginnings(value: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each `init_cfg` of a network's settings, with its place."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "init_cfg":
                yield from _beginnings(inner, f"{where}.{key}")
            elif isinstance(inner, Mapping):
                yield f"{where}.{key}", inner
            elif isinstance(inner, list | tuple):
                yield from ((f"{where}.{key}.{n}", one) for n, one in enumerate(inner) if isinstance(one, Mapping))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _beginnings(inner, f"{where}.{number}")


@torch.no_grad()
def require_spread(model: Any, config: Mapping[str, Any]) -> None:
    """Refuse batch normalisations that would take their statistics from one number of each channel, as of single images
    that are pooled to one pixel; PyTorch refuses that at the first step.

    Args:
        model: built, and its statistics are those of the batch; its mode is evaluation then.
        config: see `segmentation.compose`.

    Raises:
        ExperimentError: see above.
    """
    size, batch = _size(config), at(config, "train_dataloader.batch_size")
    if batch != 1 or size is None:
        return
    alone: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, given: alone.append(name) if math.prod(given[0].shape[2:]) == 1 else None

    together = nn.SyncBatchNorm if config.get("processes", 1) > 1 else ()  # whose statistics are of all processes
    trained = [(name, one) for name, one in model.train().named_modules() if isinstance(one, _BatchNorm)]
    hooks = [
        one.register_forward_pre_hook(note(name))
        for name, one in trained
        if one.training and not isinstance(one, together)
    ]
    model.eval()
    _problem(model, _empty(config, size))
    for hook in hooks:
        hook.remove()
    if alone:
        raise ExperimentError(
            f"model.{alone[0]} would take its statistics from one number a channel, as train_dataloader.batch_size is "
            f"1 and its input one pixel; allowed are batches from 2, or freeze_statistics=True in a {HOOK}"
        )


def _size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The images' height and width, of a network whose parts are known."""
    size = at(config, "crop_size") or at(config, "model.data_preprocessor.size")
    known = at(config, "model.type") == "EncoderDecoder" and isinstance(size, list | tuple)
    return (size[0], size[1]) if known else None


def _empty(config: Mapping[str, Any], size: tuple[int, int]) -> torch.Tensor:
    mean = at(config, "model.data_preprocessor.mean") or ()
    return torch.zeros(1, len(mean) if len(mean) > 1 else 3, *size)


@torch.no_grad()
def require_joined(model: Any, config: Mapping[str, Any]) -> None:
    """Refuse heads that do not take what comes of the backbone, as with a channel too many, by an empty image.

    Args:
        model: built; its mode is evaluation then.
        config: see `segmentation.compose`.

    Raises:
        ExperimentError: see above.
    """
    size = _size(config)
    if size is None:
        return
    model.eval()
    small = (min(size[0], _EDGE), min(size[1], _EDGE))
    said = ""
    for edges in dict.fromkeys((small, size)):  # the whole size where a small one is too small
        said = _problem(model, _empty(config, edges))
        if not said:
            return
    raise ExperimentError(
        f"{said}, of an image of {size[0]} x {size[1]} pixels; look at its in_channels and in_index, and at the size"
    )


def _problem(model: Any, images: torch.Tensor) -> str:
    """What part of the network fails, and what it says; nothing if none does."""
    given: Any = images
    for part, module in (("model.backbone", model.extract_feat), *_heads_of(model)):
        try:
            result = module(given)
            given = result if part == "model.backbone" else given  # which all heads are given
        except Exception as error:  # whatever a network of one's own raises
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            return f"{part} does not take what it is given ({reason})"
    return ""


def _heads_of(model: Any) -> Iterator[tuple[str, Any]]:
    yield "model.decode_head", model.decode_head
    further = getattr(model, "auxiliary_head", None)
    if isinstance(further, nn.ModuleList):
        yield from ((f"model.auxiliary_head.{number}", head) for number, head in enumerate(further))
    elif further is not None:
        yield "model.auxiliary_head", further
