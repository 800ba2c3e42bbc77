"""Everything on one HTML page that needs no other file and no network: data, styles, scripts, the plotting library."""

from __future__ import annotations

import base64
import functools
import gzip
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

WEB = Path(__file__).parent / "web"
SCRIPTS = ("data.js", "format.js", "table.js", "plots.js", "run.js", "overview.js", "main.js")


def page(content: Mapping[str, Any]) -> str:
    """The page that shows this content, see `report.payload.compose`.

    Nothing of a run is markup: its texts are in the page as JSON alone, in which no "<" is left, and the page's own
    scripts make text of them.
    """
    environment = Environment(loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html.jinja").render(
        compared=content["compared"] is not None,
        style=Markup((WEB / "page.css").read_text(encoding="utf-8")),
        script=Markup("\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)),
        data=Markup(_harmless(content)),
        plotly=_plotly(),
    )


def _harmless(content: Any) -> str:
    """JSON for a script element, which ends at nothing that is in it."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def _plotly() -> str:
    """The plotting library, compressed, in base64: 2 MB in place of 4.8, and read only where a plot is looked at."""
    source = importlib.resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(source, 9, mtime=0)).decode()
