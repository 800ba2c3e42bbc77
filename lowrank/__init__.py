"""Train neural networks in little memory: keep low-rank activations, and form weight gradients from their factors.

Example:
    names = lowrank.trailing_layers(model, 4)
    lowrank.freeze_before(model, names)
    lowrank.convert(model, names, lowrank.ASI(ranks=[8, 16, 3, 3]))
"""

from typing import TYPE_CHECKING, Any

from lowrank.conversion.attention import open_attention
from lowrank.conversion.check import check
from lowrank.conversion.convert import convert, revert
from lowrank.conversion.select import freeze_before, trailing_layers
from lowrank.conversion.truncate import truncate_weights
from lowrank.errors import (
    BudgetError,
    ChangedError,
    ConversionError,
    DoubleBackwardError,
    LowRankError,
    NonFiniteError,
    SettingError,
    StateError,
    TableError,
)
from lowrank.layers.kinds import register_layer
from lowrank.layers.layer import converted_layers
from lowrank.layers.token_mask import token_mask
from lowrank.layers.training_state import load_training_state, training_state
from lowrank.meters.account import Account, account
from lowrank.meters.explain import Explanation, explain
from lowrank.meters.memory import peak_bytes, saved_bytes
from lowrank.meters.weight_memory import WeightMemory, weight_memory
from lowrank.methods.amc import HOSVD, SVD
from lowrank.methods.asi import ASI
from lowrank.methods.base import Method, Vanilla
from lowrank.methods.fixed_bases import FixedBases
from lowrank.methods.gradient_filter import GradientFilter
from lowrank.methods.rounded import Rounded
from lowrank.methods.wasi import WASI, WSI
from lowrank.ranks.perplexity import MODE_ENERGIES, measure_perplexity
from lowrank.ranks.select import RankPlan, select_ranks
from lowrank.ranks.table import Candidates, LayerPerplexity, PerplexityTable
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.geometry import ConvGeometry, LinearGeometry
from lowrank.tensors.storage import STORAGES, Storage
from lowrank.tensors.tucker import Tucker

if TYPE_CHECKING:
    from lowrank.optim import SGD

__version__ = "0.1.0"

__all__ = [
    "ASI",
    "HOSVD",
    "MODE_ENERGIES",
    "SGD",
    "STORAGES",
    "SVD",
    "WASI",
    "WSI",
    "Account",
    "BudgetError",
    "Candidates",
    "ChangedError",
    "ConvGeometry",
    "ConversionError",
    "DoubleBackwardError",
    "Explanation",
    "FixedBases",
    "GradientFilter",
    "LayerCost",
    "LayerPerplexity",
    "LinearGeometry",
    "LowRankError",
    "Method",
    "NonFiniteError",
    "PerplexityTable",
    "RankPlan",
    "Rounded",
    "SettingError",
    "StateError",
    "Storage",
    "TableError",
    "Tucker",
    "Vanilla",
    "WeightMemory",
    "account",
    "check",
    "convert",
    "converted_layers",
    "explain",
    "freeze_before",
    "load_training_state",
    "measure_perplexity",
    "open_attention",
    "peak_bytes",
    "register_layer",
    "revert",
    "saved_bytes",
    "select_ranks",
    "token_mask",
    "trailing_layers",
    "training_state",
    "truncate_weights",
    "weight_memory",
]


def __getattr__(name: str) -> Any:
    """`SGD`, which needs PyTorch's compiler: importing that takes as long as importing PyTorch."""
    if name != "SGD":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lowrank.optim import SGD

    return SGD


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
