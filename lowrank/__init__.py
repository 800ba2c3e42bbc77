"""Train neural networks in little memory: keep low-rank activations, and form weight gradients from their factors.

Example:
    names = lowrank.trailing_layers(model, 4)
    lowrank.freeze_before(model, names)
    lowrank.convert(model, names, lowrank.ASI(ranks=[8, 16, 3, 3]))
"""

from lowrank.accounting import Account, account
from lowrank.asi import ASI
from lowrank.attention import open_attention
from lowrank.budget import RankPlan, select_ranks
from lowrank.convert import convert, freeze_before, revert, trailing_layers
from lowrank.costs import LayerCost
from lowrank.errors import (
    BudgetError,
    ConversionError,
    LowRankError,
    NonFiniteError,
    SettingError,
    TableError,
)
from lowrank.explain import Explanation, explain
from lowrank.factored import WASI, WSI
from lowrank.gradient_filter import GradientFilter
from lowrank.layers import converted_layers, stock_state_dict
from lowrank.meter import peak_bytes, saved_bytes
from lowrank.methods import HOSVD, SVD, Method, Vanilla
from lowrank.optimizer import SGD
from lowrank.padding import token_mask
from lowrank.perplexity import MODE_ENERGIES, measure_perplexity
from lowrank.perplexity_table import Candidates, LayerPerplexity, PerplexityTable
from lowrank.tucker import Tucker
from lowrank.weight_memory import WeightMemory, weight_memory

__version__ = "0.1.0"

__all__ = [
    "ASI",
    "HOSVD",
    "MODE_ENERGIES",
    "SGD",
    "SVD",
    "WASI",
    "WSI",
    "Account",
    "BudgetError",
    "Candidates",
    "ConversionError",
    "Explanation",
    "GradientFilter",
    "LayerCost",
    "LayerPerplexity",
    "LowRankError",
    "Method",
    "NonFiniteError",
    "PerplexityTable",
    "RankPlan",
    "SettingError",
    "TableError",
    "Tucker",
    "Vanilla",
    "WeightMemory",
    "account",
    "convert",
    "converted_layers",
    "explain",
    "freeze_before",
    "measure_perplexity",
    "open_attention",
    "peak_bytes",
    "revert",
    "saved_bytes",
    "select_ranks",
    "stock_state_dict",
    "token_mask",
    "trailing_layers",
    "weight_memory",
]
