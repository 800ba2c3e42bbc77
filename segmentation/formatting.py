"""The text of a config, which MMEngine formats anew for its log, its copy of the config and every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
