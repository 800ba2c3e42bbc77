"""The text of a config, which MMEngine formats anew for its log, its copy of the config and every checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

# YAPF keeps its grammar in the user's cache, in a file that gets its name ahead of its last bytes: a process that is
# begun beside the first one, or after a disk was full, reads half of it and fails. Made anew, it takes 13 ms.
with patch("platformdirs.user_cache_dir", return_value=os.devnull):
    from yapf.yapflib import yapf_api


@contextmanager
def formatted_once() -> Iterator[None]:
    """Within it, the same text is formatted once: that takes longer than to save a checkpoint of a small network."""
    plain = yapf_api.FormatCode
    known: dict[tuple[str, str], Any] = {}

    def format_code(text: str, **options: Any) -> Any:
        key = (text, repr(sorted(options.items())))
        if key not in known:
            known[key] = plain(text, **options)
        return known[key]

    yapf_api.FormatCode = format_code  # MMEngine looks it up there each time
    try:
        yield
    finally:
        yapf_api.FormatCode = plain
