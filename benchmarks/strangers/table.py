"""The rows of all strangers."""

from __future__ import annotations

from benchmarks.strangers.smp_models import smp_models
from benchmarks.strangers.stranger import Stranger
from benchmarks.strangers.timm_models import timm_models
from benchmarks.strangers.torchvision_models import torchvision_models
from benchmarks.strangers.transformers_models import transformers_models

# One of each way of writing a network, and each in a second or two: what the ordinary run of the tests has.
FAST = (
    "torchvision/mobilenet_v3_small",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/squeezenet1_1",
    "torchvision/vit (4 layers, 128 wide)",
    "torchvision video/swin3d (2 stages)",
    "timm/lcnet_035",
    "timm/regnetx_002",
    "transformers/convnext",
    "transformers/t5",
    "transformers/llama",
    "transformers/gpt2",
    "transformers/bert",
)


def all_strangers() -> dict[str, Stranger]:
    """By family and name, as in "timm/resnet10t", in the order of the table."""
    rows = [*torchvision_models(), *timm_models(), *transformers_models(), *smp_models()]
    found = {f"{row.family}/{row.name}": row for row in rows}
    assert len(found) == len(rows), "two strangers of one name"
    return found
