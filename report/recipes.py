"""What tells runs apart that the names of their rows do not: their recipe, further settings, data and code.

Rows hold runs that differ in nothing but their seed, and in what `MAY_DIFFER` lists. Settings that recipes do not say,
and those that the method and the depth stand for, are compared where records have noted them: older ones have not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiment import Record
from experiment.provenance import fingerprint
from experiment.record import CODE, FURTHER, PER_SEED, SETTINGS

# Of what the records of a row have noted, all that may differ: the seed, the network that each seed starts from, what a
# budget comes to for it, and what has an influence on measuring perplexity alone, which the table tells of itself.
MAY_DIFFER = {
    *("seed", "randomness.seed", "model.weights", "load_from"),
    *("model.budget.table", "model.budget.bytes", "model.budget.seed", "model.energies"),
    *("custom_hooks.budget.table", "custom_hooks.budget.bytes", "custom_hooks.budget.seed"),
}
# What the recipe says as well, and is compared by it.
IN_RECIPE = {
    *("model.learning_rate", "data.batch_size", "data.image_size", "data.limit", "processes"),
    *("trainer.max_epochs", "trainer.precision"),
}
# What the depth stands for: where it differs within one depth, other layers were trained, which do not compare.
OF_DEPTH = ("custom_hooks.layers", "custom_hooks.freeze")
COMPARED_ELSEWHERE = {*MAY_DIFFER, *IN_RECIPE, *OF_DEPTH}
LONGEST = 40  # letters of a value in a label


@dataclass(frozen=True, order=True)
class Recipe:
    """What differs of a row's runs from others of the table, in words; "" where nothing does.

    Attributes:
        trained: of how and on what they were trained; rows that differ in it do not compare.
        method: of the settings of the method that the row is of.
    """

    trained: str = ""
    method: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.trained, self.method)))


def recipe_labels(records: Sequence[Record]) -> Callable[[Record], str]:
    """What to call a record's recipe among these, see `recipes`."""
    recipe_of = recipes(records)
    return lambda record: str(recipe_of(record))


def recipes(records: Sequence[Record]) -> Callable[[Record], Recipe]:
    """The recipe of a record among these: what differs of it, such as "epochs 2"; "" where nothing does."""
    every = [record.recipe for record in records]
    names = list(dict.fromkeys(name for recipe in every for name in recipe))
    odd = [name for name in names if len({str(recipe.get(name)) for recipe in every if recipe}) > 1]
    noted = all(every) or not any(every)
    further = _odd(records, _further, lambda name, record: record.run.seed if name in PER_SEED else None)
    everywhere = sorted({name for names in further.values() for name in names})
    models = _odd(records, _code("model"), lambda *_: None)[None]
    depths = _odd(records, _of_depth, lambda _, record: record.run.layers)
    rows, methods = _odd(records, _of_method, _row_of), _odd(records, _code("method"), _row_of)

    def recipe_of(record: Record) -> Recipe:
        beside = _words(_further(record), everywhere) + _words(_code("model")(record), models)
        beside += _words(_of_depth(record), depths[record.run.layers])
        if record.recipe:
            told = [*_words(record.recipe, odd), *beside] or ([] if noted else ["recorded"])
        else:
            told = [*([] if noted else ["not recorded"]), *beside]
        row = _row_of("", record)
        own = _words(_of_method(record), rows[row]) + _words(_code("method")(record), methods[row])
        return Recipe(", ".join(told), ", ".join(own))

    return recipe_of


def _row_of(_: str, record: Record) -> tuple[int | str, str]:
    """Layers and method, within which settings of a method are compared, whichever they are."""
    return record.run.layers, record.run.method


def _further(record: Record) -> dict[str, Any]:
    """Settings that the recipe does not say, and the data; empty in records of before the former were noted."""
    settings = record.provenance.get(FURTHER)
    if not isinstance(settings, dict):
        return {}
    return settings | {"data": record.provenance.get("data_fingerprint")}


def _of_depth(record: Record) -> dict[str, Any]:
    return {name: value for name, value in _noted(record).items() if _plain(name) in OF_DEPTH}


def _of_method(record: Record) -> dict[str, Any]:
    """All that a record has noted, but what `COMPARED_ELSEWHERE` lists."""
    return {name: value for name, value in _noted(record).items() if _plain(name) not in COMPARED_ELSEWHERE}


def _code(kind: str) -> Callable[[Record], dict[str, Any]]:
    """What records have noted of the code of their "model" or "method": a hash, by what it is of."""

    def code_of(record: Record) -> dict[str, Any]:
        code = record.provenance.get(CODE)
        every = code if isinstance(code, dict) else {}
        of_kind = ((what, value) for what, value in every.items() if what.startswith(f"{kind} "))
        return {f"code of {what.rpartition(' ')[2].rpartition('.')[2]}": value for what, value in of_kind}

    return code_of


def _noted(record: Record) -> dict[str, Any]:
    settings = record.provenance.get(SETTINGS)
    return settings if isinstance(settings, dict) else {}


def _plain(name: str) -> str:
    """The name of a setting without places in lists: "custom_hooks.layers" of "custom_hooks.0.layers"."""
    return re.sub(r"\.\d+(?=\.|$)", "", name)


def _odd(
    records: Sequence[Record],
    settings_of: Callable[[Record], Mapping[str, Any]],
    group_of: Callable[[str, Record], Hashable],
) -> Mapping[Hashable, list[str]]:
    """The names of settings that differ between records of one group, of those that have noted any; by group."""
    every = [(record, settings) for record in records if (settings := settings_of(record))]
    names = sorted({name for _, settings in every for name in settings})
    found: dict[tuple[str, Hashable], set[str]] = defaultdict(set)
    for record, settings in every:
        for name in names:
            found[name, group_of(name, record)].add(str(settings.get(name)))
    odd: dict[Hashable, list[str]] = defaultdict(list)
    for (name, group), values in found.items():
        if len(values) > 1:
            odd[group].append(name)
    return odd


def _words(settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """These settings in words: "weight decay 0.1" of "model.weight_decay"; none where none are noted."""
    return [f"{_named(name)} {_told(settings.get(name))}" for name in names if settings]


def _named(setting: str) -> str:
    return _one_line(_plain(setting).rpartition(".")[2].replace("_", " "))[:LONGEST]


def _told(value: Any) -> str:
    """A value in words, others for each: rows go by them. Of a long one its beginning and a fingerprint are told."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = " x ".join(map(_told, value)) if isinstance(value, list | tuple) else str(value)
    line = _one_line(text)
    short = line == text and len(text) <= LONGEST
    return text if short else f"{line[:LONGEST]}.. ({fingerprint([text.encode(errors='surrogatepass')])[:6]})"


def _one_line(text: str) -> str:
    """As a cell of a table has it; of names of files that are no UTF-8 the bytes are told."""
    return " ".join(text.split()).encode(errors="backslashreplace").decode()
