"""Whether a network takes images of a size, tried before data are read and not found out by training."""

from __future__ import annotations

import torch
from torch import nn

from experiment import ExperimentError
from lowrank.layers.preserve import preserved

_USUAL = (32, 64, 96, 128, 160, 224, 384)


def require_image_size(network: nn.Module, size: int, name: str) -> None:
    """Try one empty image; the network is left as it was, but for its mode, which is evaluation then.

    Args:
        network: takes images (B, 3, H, W).
        size: height and width.
        name: of the network, for the error.

    Raises:
        ExperimentError: the network fails with that size, and not with every other one.
    """
    network.eval()
    problem = _problem(network, size)
    if problem is None:
        return
    # What fails with every size is no matter of the size: training says where.
    other = next((one for one in _USUAL if one != size and _problem(network, one) is None), None)
    if other is not None:
        raise ExperimentError(
            f"--data.image_size is {size}, which {name} does not take ({problem}); give another one, such as {other}"
        )


@torch.no_grad()
def _problem(network: nn.Module, size: int) -> str | None:
    device = next(network.parameters()).device
    try:
        with preserved(network):
            network(torch.zeros(1, 3, size, size, device=device))
    except Exception as error:  # whatever a network of one's own raises
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None
