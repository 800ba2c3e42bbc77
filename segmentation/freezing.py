"""Which parameters train: freeze lists of module paths, frozen normalisation statistics, no dropout."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiment import ExperimentError


def apply_freeze_list(model: nn.Module, paths: Iterable[str]) -> None:
    """Freeze the parameters of modules, in place and in order; a path that starts with `~` is trained again.

    Args:
        model: any module.
        paths: such as ["backbone", "~backbone.layer4"]: freeze the backbone, then take its layer4 out.

    Raises:
        ExperimentError: a path that the model does not have; nothing was changed.
    """
    paths = list(paths)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        name = path.removeprefix("~")
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see model.named_modules()"
            raise ExperimentError(f"the freeze list names {name!r}, which the model does not have; {hint}")
    for path in paths:
        for parameter in modules[path.removeprefix("~")].parameters():
            parameter.requires_grad_(path.startswith("~"))


def freeze_statistics(model: nn.Module) -> None:
    """Make every batch normalisation use its stored statistics, until the next `model.train()`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def switch_off_dropout(model: nn.Module) -> None:
    """Set the probability of every dropout layer to 0."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
