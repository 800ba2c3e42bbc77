"""Files of weights from anywhere: what they hold is read, and nothing in them is ever run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct, scalar

from experiment.errors import ExperimentError
from experiment.moved import if_moved

# What published checkpoints hold beside tensors and plain values: numbers and arrays of numpy, also of older versions.
_KINDS = ("bool", "uint8", "int8", "int16", "int32", "int64", "uint32", "uint64", "float16", "float32", "float64")
PLAIN: tuple[Any, ...] = (
    *((scalar, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")),
    *((_reconstruct, f"{module}.multiarray._reconstruct") for module in ("numpy.core", "numpy._core")),
    *(np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in _KINDS)),
)


def read_weights(path: str | Path, further: Sequence[Any] = (), map_location: Any = "cpu") -> Any:
    """What a checkpoint or a file of weights holds.

    Args:
        path: of the file.
        further: what may stand in it beside tensors, plain values, and numbers and arrays of numpy, as
            `torch.serialization.safe_globals` takes it.
        map_location: where tensors go, as `torch.load` takes it.

    Raises:
        ExperimentError: the file is missing or damaged, or holds other things.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ExperimentError(f"there is no weights file {path}{if_moved(path)}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([*PLAIN, *further]):
            warnings.simplefilter("ignore")  # of old formats
            return torch.load(path, map_location=map_location, weights_only=True)
    except OSError as error:
        raise ExperimentError(f"weights file {path} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise ExperimentError(f"weights file {path} cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without PyTorch's advice to run it nevertheless."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]*\w)", text)
    if found:
        return f"it holds {found[1]}, which is code and is not run; allowed are tensors and plain values"
    said = "" if "weights_only" in text or not text else f": {text.splitlines()[0][:160]}"
    return f"it is damaged, or holds other things than tensors and plain values ({type(error).__name__}{said})"
