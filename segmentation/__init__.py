"""Low-rank activations in MMSegmentation: importing this package registers the hook `LowRankHook`,
and for exact resuming the samplers `PlacedSampler` and `PlacedEpochs` and the data set wrapper `PlacedDataset`, which
`python -m segmentation train` puts in the place of MMEngine's own.

In a config of your own:

    custom_imports = dict(imports=["segmentation"])
    custom_hooks = [
        dict(type="LowRankHook", method=dict(type="HOSVD", energy=0.8), layers=["decode_head.bottleneck.conv"]),
    ]
"""

import contextlib
import io
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segmentation.data.draws import PlacedDataset, PlacedEpochs, PlacedSampler
    from segmentation.hook import LowRankHook

__all__ = ["LowRankHook", "PlacedDataset", "PlacedEpochs", "PlacedSampler"]


def register() -> dict[str, Any]:
    """Import what registers itself with MMEngine, which takes seconds; gives it by name."""
    from segmentation.adafactor import adafactor_later

    # MMSegmentation prints that it does without a package that is not used here.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), adafactor_later():
        warnings.simplefilter("ignore")  # of parts that are not used here, and for programmers of theirs
        from segmentation.data.draws import PlacedDataset, PlacedEpochs, PlacedSampler
        from segmentation.data.reading import NamedImage, NamedLabels
        from segmentation.hook import LowRankHook
    return {
        one.__name__: one for one in (LowRankHook, PlacedDataset, PlacedEpochs, PlacedSampler, NamedImage, NamedLabels)
    }


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return register()[name]


# As `python -m segmentation` it is imported to find the command, which registers when there is something to run.
_is_command = sys.argv[:1] == ["-m"] and f"-m {__name__} " in f"{' '.join(sys.orig_argv)} "
if not _is_command:
    register()
