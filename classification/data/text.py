"""Texts: BoolQ and AG News, from local JSON lines or by `datasets`; and sentences that come with packages."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from classification.data.registry import Splits, TextSet, dataset
from experiment import ExperimentError, fingerprint

Row = dict[str, Any]
VAL_SHARE, SPLIT_SEED = 0.1, 233
PARTS = {"boolq": ("train", "validation"), "ag_news": ("train", "test")}  # to train on and to test on, as published
NEWS = ("World", "Sports", "Business", "Sci/Tech")


def _rows(path: Path, fields: dict[str, type | tuple[type, ...]]) -> list[Row]:
    """The rows of a file of JSON lines, checked."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ExperimentError(f"{path}, line {number} is not JSON ({error}); download the file again") from None
        wrong = [
            name for name, kind in fields.items() if not isinstance(row, dict) or not isinstance(row.get(name), kind)
        ]
        if wrong:
            raise ExperimentError(f"{path}, line {number} has no proper {wrong[0]!r}; needed are {', '.join(fields)}")
        rows.append(row)
    if not rows:
        raise ExperimentError(f"{path} is empty; download the file again")
    return rows


def is_there(name: str, root: Path) -> bool:
    """Whether texts can be read without a download."""
    return all(file.is_file() for file in _files(root, name, PARTS.get(name, ())))


def _files(root: Path, folder: str, parts: Sequence[str]) -> list[Path]:
    return [root / folder / f"{part}.jsonl" for part in parts]


def _read(root: Path, folder: str, fields: dict[str, Any], hub: str) -> list[list[Row]]:
    """Rows of two parts from `root/folder/<part>.jsonl`, else by `datasets`, which downloads to `root`."""
    parts = PARTS[folder]
    files = _files(root, folder, parts)
    if is_there(folder, root):
        return [_rows(file, fields) for file in files]
    try:
        import datasets

        found = datasets.load_dataset(hub, cache_dir=str(root / "huggingface"))
    except Exception as error:  # whatever a download can raise
        raise ExperimentError(
            f"{folder} is not at {files[0]} and {files[1]}, and cannot be downloaded as {hub} "
            f"({' '.join(str(error).split())[:160]}); put the two files there"
        ) from None
    return [list(found[part]) for part in parts]


def _splits(
    parts: list[list[Row]], text: Callable[[Row], str], label: Callable[[Row], int], classes: tuple[str, ...]
) -> Splits:
    """A part of the first rows validates; the second rows are the test."""
    first, test = ([(text(row), label(row)) for row in rows] for rows in parts)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(first))
    count = max(1, round(VAL_SHARE * len(first)))
    val, train = ([first[index] for index in np.sort(chosen)] for chosen in (order[:count], order[count:]))
    sets = [TextSet([t for t, _ in rows], np.array([y for _, y in rows], np.int64)) for rows in (train, val, test)]
    for part in sets:
        if len(part.labels) and not 0 <= part.labels.min() <= part.labels.max() < len(classes):
            raise ExperimentError(f"a label is not among the {len(classes)} classes 0 to {len(classes) - 1}")
    content = [piece for part in sets for piece in ("\n".join(part.texts).encode(), part.labels.tobytes())]
    return Splits(sets[0], sets[1], sets[2], classes, fingerprint(content))


@dataset("boolq")
def boolq(root: Path) -> Splits:
    """BoolQ: is the answer to a question on a passage yes or no. Tested on the published validation part."""
    fields = {"question": str, "passage": str, "answer": bool}
    parts = _read(root, "boolq", fields, "google/boolq")
    return _splits(
        parts, lambda row: f"{row['question']} [SEP] {row['passage']}", lambda row: int(row["answer"]), ("no", "yes")
    )


@dataset("ag_news")
def ag_news(root: Path) -> Splits:
    """AG News: which of four sections a report is from."""
    parts = _read(root, "ag_news", {"text": str, "label": int}, "fancyzhx/ag_news")
    return _splits(parts, lambda row: row["text"], lambda row: row["label"], NEWS)


def _summaries(module: Any) -> Iterator[str]:
    """First sentences of the documentation of everything public in a module or class."""
    for name in sorted(vars(module)):
        found = getattr(module, name, None)
        if name.startswith("_") or isinstance(found, ModuleType):
            continue
        lines = (inspect.getdoc(found) or "").strip().split("\n\n")
        sentence = next((" ".join(part.split()) for part in lines if part and "(" not in part[:40]), "")
        if 20 <= len(sentence) <= 200:
            yield sentence


@dataset("sentences")
def sentences(root: Path) -> Splits:
    """A few hundred sentences from the documentation of three packages: which one is it from. No download."""
    import pandas
    import torch.nn

    sources = {"numpy": np, "pandas": pandas.DataFrame, "torch": torch.nn}
    rows: list[Row] = []
    for number, module in enumerate(sources.values()):
        rows += [{"text": sentence, "label": number} for sentence in dict.fromkeys(_summaries(module))]
    test = [index % 4 == 3 for index in range(len(rows))]
    parts = [[row for row, out in zip(rows, test, strict=True) if out == wanted] for wanted in (False, True)]
    return _splits(parts, lambda row: row["text"], lambda row: row["label"], tuple(sources))


TEXTS = ("ag_news", "boolq", "review_sentences", "sentences")
