"""A config is formatted once for a run, to the same text."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from mmengine.config import Config
from yapf.yapflib import yapf_api

from segmentation.formatting import formatted_once


@pytest.fixture
def formatted(monkeypatch):
    """The texts that were formatted."""
    plain, texts = yapf_api.FormatCode, []

    def note(text, **options):
        texts.append(text)
        return plain(text, **options)

    monkeypatch.setattr(yapf_api, "FormatCode", note)
    return texts


def test_a_text_is_formatted_once_and_another_one_anew(formatted):
    config = Config({"model": {"type": "A", "sizes": [1, 2]}, "seed": 3})
    wanted = config.pretty_text
    formatted.clear()
    with formatted_once():
        assert [config.pretty_text for _ in range(3)] == [wanted] * 3
        config.seed = 4
        assert config.pretty_text == wanted.replace("seed = 3", "seed = 4")
    assert len(formatted) == 2


def test_a_format_of_another_style_is_another_one_and_nothing_stays_changed(formatted):
    before = yapf_api.FormatCode
    with formatted_once():
        for width in (2, 4, 2):
            assert yapf_api.FormatCode("f(a)\n", style_config={"indent_width": width})[0] == "f(a)\n"
    assert len(formatted) == 2
    with pytest.raises(ZeroDivisionError), formatted_once():
        raise ZeroDivisionError
    assert yapf_api.FormatCode is before


@pytest.mark.slow
def test_a_grammar_that_another_process_has_half_written_is_not_read(tmp_path):
    """As a process leaves it that begins at the same time, or one whose disk was full."""

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, check=True)

    run("import yapf")
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) == 2
    for file in written:
        file.write_bytes(b"")
    run("import segmentation.formatting")
    assert all(file.read_bytes() == b"" for file in written)
