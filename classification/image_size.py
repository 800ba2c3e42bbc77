"""Whether a network takes images of a size, tried before data are read and not found out by training."""

from __future__ import annotations

import torch
from torch import nn

from experiment import ExperimentError
from lowrank.layers.preserve import preserved

_USUAL = (32, 64, 96, 128, 160, 224, 384)


def require_image_size(network: nn.Module, size: int, name: str, classes: int) -> None:
    """Try one empty image; the network is left as it was, but for its mode, which is evaluation then.

    Args:
        network: takes images (B, 3, H, W).
        size: height and width.
        name: of the network, for the error.
        classes: how many it has to tell apart.

    Raises:
        ExperimentError: the network fails with that size, and not with every other one, or gives other than a number
            for each class.
    """
    network.eval()
    problem, given = _tried(network, size)
    if problem is None:
        if given != (1, classes):
            raise ExperimentError(
                f"{name} makes {given or 'no tensor'} of an image, and not (1, {classes}), a number for each class; "
                f"build it with num_classes outputs"
            )
        return
    # What fails with every size is no matter of the size: training says where.
    other = next((one for one in _USUAL if one != size and _tried(network, one)[0] is None), None)
    if other is not None:
        raise ExperimentError(
            f"--data.image_size is {size}, which {name} does not take ({problem}); give another one, such as {other}"
        )


@torch.no_grad()
def _tried(network: nn.Module, size: int) -> tuple[str | None, tuple[int, ...]]:
    """What fails with an empty image, and the shape of what comes of it."""
    device = next(network.parameters()).device
    try:
        with preserved(network):
            logits = network(torch.zeros(1, 3, size, size, device=device))
    except Exception as error:  # whatever a network of one's own raises
        return " ".join(str(error).split())[:200] or type(error).__name__, ()
    return None, tuple(logits.shape) if isinstance(logits, torch.Tensor) else ()
