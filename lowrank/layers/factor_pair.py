"""How an optimizer knows that two parameters are the factors of one weight: the left one says so."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor, nn

from lowrank.errors import SettingError
from lowrank.methods.wasi import Update

MARK = "_lowrank_factor"  # an attribute of the parameters


class FactorPair(NamedTuple):
    """The two factors of one layer's weight.

    Attributes:
        left: (O, K).
        right: (K, I).
        update: how `lowrank.SGD` moves the weight.
        name: of the layer, for messages.
    """

    left: Tensor
    right: Tensor
    update: Update
    name: str


def link(left: Tensor | None, right: Tensor | None, update: Update, name: str) -> None:
    """Mark two parameters as the factors of one weight; done again, it does nothing more.

    The mark is made of plain objects alone, so that a parameter that has it can be loaded with `weights_only`. It goes
    with a pickled parameter, and is lost with a copied one: whoever holds the factors marks them at every use.
    """
    if isinstance(left, nn.Parameter) and isinstance(right, nn.Parameter):
        setattr(left, MARK, (right, update, name))
        setattr(right, MARK, name)


def factor_pairs(parameters: Collection[Tensor]) -> list[FactorPair]:
    """The weights that some parameters are the factors of.

    Raises:
        SettingError: one factor of a weight is among them, and the other is not.
    """
    known = {id(parameter) for parameter in parameters}
    marks = [(parameter, getattr(parameter, MARK, None)) for parameter in parameters]
    pairs = [FactorPair(left, *mark) for left, mark in marks if isinstance(mark, tuple)]
    rights = {id(pair.right) for pair in pairs}
    alone = [pair.name for pair in pairs if id(pair.right) not in known]
    alone += [mark for right, mark in marks if isinstance(mark, str) and id(right) not in rights]
    if alone:
        raise SettingError(
            f"layer {alone[0]!r}: the optimizer has one of the factors `left` and `right` of its weight; give it both "
            f"or neither"
        )
    return pairs
