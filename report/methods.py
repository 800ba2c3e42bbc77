"""The order of methods in tables and figures, and the family that a method's tag belongs to."""

from __future__ import annotations

import re

from experiment.budget import OF_PAPERS

BASELINE = "vanilla"  # what ratios refer to, unless asked otherwise
FAMILIES = ("vanilla", "gradient_filter", "svd", "hosvd", "asi")


def family(method: str) -> str:
    """The family of a method's tag: what stands before its settings and its budget.

    >>> family("hosvd_0.8"), family("asi_1of20"), family("wasi_0.9"), family("mine_hosvd_0.8"), family("mine_papers")
    ('hosvd', 'asi', 'wasi', 'mine', 'mine')
    """
    for name in FAMILIES:
        if re.match(rf"{name}(?![a-z])", method):
            return name
    return re.split(rf"_(?=\d|{OF_PAPERS}\b|hosvd_|vanilla\b)", method)[0]


def method_order(method: str) -> tuple[int, str, list[tuple[float, str]]]:
    """Sort key of a method: the known families in a fixed order, others by name; numbers in a tag count as numbers."""
    name = family(method)
    place = FAMILIES.index(name) if name in FAMILIES else len(FAMILIES)
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", method[len(name) :])
    return place, name, [(float(part), "") if part[0].isdecimal() else (-1.0, part) for part in parts]
