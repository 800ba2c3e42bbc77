"""Hooks of MkDocs: README, results, changes and pictures are pages of the site, where they lie in the repository.

Links are written so that they work in the repository; here they are turned to where the pages are in the site.
"""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md"} | {name: name for name in ("RESULTS.md", "CHANGELOG.md", "CONTRIBUTING.md")}
BESIDE = ("figures/**/*", "examples/*.py", "CITATION.cff")


def on_files(files: Files, config: Any) -> Files:
    """Add what lies beside `docs/`."""
    found = dict(PAGES)
    for pattern in BESIDE:
        found |= {
            str(path.relative_to(ROOT)): str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if path.is_file()
        }
    for name, place in found.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links of the repository to links of the site."""
    outside = page.file.src_uri in PAGES.values()
    return re.sub(r"\]\(docs/" if outside else r"\]\(\.\./", "](", markdown).replace("](README.md", "](index.md")


class ExamplesAreCode(griffe.Extension):
    """What a docstring has under "Example:" is set as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fence it."""
        if obj.docstring is not None:
            fenced = r"Example:\n    ```python\n\1    ```\n"
            obj.docstring.value = re.sub(r"^Example:\n((?:    .*\n)+)", fenced, f"{obj.docstring.value}\n", flags=re.M)
