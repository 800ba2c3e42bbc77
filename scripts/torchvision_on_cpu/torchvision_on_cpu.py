"""Make torchvision importable beside a torch that was built without CUDA.

The published torchvision wheel's compiled part links CUDA libraries. Where they are missing it cannot be loaded,
and `import torchvision` stops at the first operator that it expects there. torchvision's models, transforms and
data sets need none of those operators, so declaring the two that are looked up at import is enough; calling them
still raises.

torch runs `declare_missing_operators` itself while it is imported (entry point group `torch.backends`), so the
order of imports never matters.
"""

import importlib.util
from pathlib import Path

import torch

_keep_alive: list[torch.library.Library] = []  # a Library's declarations end when it is collected

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare_missing_operators() -> None:
    """Declare `torchvision::nms` and `::qnms` where torchvision's compiled part cannot be loaded."""
    if torch.version.cuda or torch.version.hip or _keep_alive:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    for compiled in Path(spec.submodule_search_locations[0]).glob("_C*"):
        try:
            torch.ops.load_library(compiled)
            return
        except (OSError, RuntimeError):
            continue
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _keep_alive.append(library)
