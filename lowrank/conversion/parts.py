"""Which layers of a transformer are those of its MLPs, and which are attention's: by names, and by where they stand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

Part = Literal["all", "mlp", "attention"]
PARTS: tuple[Part, ...] = ("all", "mlp", "attention")


def is_of_mlp(name: str) -> bool:
    """Whether a module's name says that it is, or lies in, an MLP."""
    return "mlp" in name.lower()


def is_of_attention(name: str) -> bool:
    """Whether a module's name says that it is, or lies in, attention; T5's is `SelfAttention`."""
    return any(word in name.lower() for word in ("attn", "attention"))


def layers_of_mlps(model: nn.Module, linear: Iterable[str]) -> list[str]:
    """Those of these linear layers that are named mlp, and what stands for an MLP in blocks that name none so.

    BERT's MLP is `intermediate.dense` and `output.dense`, OPT's `fc1` and `fc2`, and T5's `DenseReluDense`: in such
    blocks it is all linear layers outside of attention. What is outside of the blocks is never of an MLP, so no
    classifier is, nor layers ahead of a block or between two stages.
    """
    linear = list(linear)
    found = {name for name in linear if is_of_mlp(name)}
    for block in _blocks(model, linear):
        if not any(is_of_mlp(name) for name, _ in model.get_submodule(block).named_modules()):
            found.update(_outside_attention(block, linear))
    return [name for name in linear if name in found]


def _blocks(model: nn.Module, linear: list[str]) -> list[str]:
    """Names of the smallest members of a list or a sequence with attention, and with linear layers outside of it."""
    blocks: list[str] = []
    for name in reversed([name for name, _ in model.named_modules()]):  # what a module holds comes ahead of it
        owner, _, _ = name.rpartition(".")
        if not name or not isinstance(model.get_submodule(owner), (nn.ModuleList, nn.Sequential)):
            continue
        within = [inner for inner, _ in model.get_submodule(name).named_modules()]
        holds_block = any(block.startswith(f"{name}.") for block in blocks)
        if not holds_block and any(map(is_of_attention, within)) and _outside_attention(name, linear):
            blocks.append(name)
    return blocks


def _outside_attention(block: str, linear: list[str]) -> list[str]:
    """The linear layers in a block that do not lie in its attention; the block may lie in a module of that name."""
    return [name for name in linear if name.startswith(f"{block}.") and not is_of_attention(name[len(block) :])]
