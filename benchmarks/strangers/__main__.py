"""Every stranger: how exact its converted form is, and how much less it keeps.

    python -m benchmarks.strangers [--help]

The table is written anew after each row, and what it has already is not measured again. Errors: largest relative error
of an output or a gradient in double precision, see `exactness`. Reductions: bytes kept by the stock model over those
kept by the converted one, see `saving`.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.strangers.exactness import largest_error, problems_as_a_model
from benchmarks.strangers.saving import BATCH, savings
from benchmarks.strangers.stranger import Stranger
from benchmarks.strangers.table import all_strangers
from experiment.files import write_whole

START, END = "<!-- the table, written by benchmarks.strangers -->", "<!-- its end -->"
LIKE = {
    "BERT and ViT": ("transformers/bert", "transformers/vit"),
    "Llama, Qwen, Gemma, Mistral": tuple(f"transformers/{name}" for name in ("llama", "qwen2", "gemma", "mistral")),
    "T5 and CLIP": ("transformers/t5", "transformers/clip vision"),
}
RATIOS = ["exact, stored", "asi, stored", "exact, batch", "asi, batch"]


def row_of(key: str, stranger: Stranger) -> dict[str, Any]:
    """One row of the table.

    Raises:
        RuntimeError: the converted model cannot do what the stock one can.
    """
    problems = problems_as_a_model(stranger)
    if problems:
        raise RuntimeError(f"{key}: {'; '.join(problems)}")
    row: dict[str, Any] = {"model": key, "largest error": largest_error(stranger)}
    for saving in savings(stranger):
        row[f"exact, {saving.statistics}"] = saving.stock / saving.exact
        row[f"asi, {saving.statistics}"] = saving.stock / saving.asi
    return row


def medians(table: pd.DataFrame) -> pd.DataFrame:
    """Of each family, and of the groups in `LIKE`."""
    families = table["model"].str.partition("/")[0]
    groups = {family: table[families == family] for family in families.unique()}
    groups |= {name: table[table["model"].isin(members)] for name, members in LIKE.items()}
    rows = [
        {"group": name, "models": len(rows), "largest error": rows["largest error"].max(), **rows[RATIOS].median()}
        for name, rows in groups.items()
        if len(rows)
    ]
    return pd.DataFrame(rows)


def as_text(table: pd.DataFrame) -> str:
    """Markdown, with as many digits as mean something."""
    shown = table.copy()
    shown["largest error"] = shown["largest error"].map(lambda error: "-" if error != error else f"{error:.0e}")
    for name in RATIOS:
        shown[name] = shown[name].map("{:.2f}".format)
    return str(shown.to_markdown(index=False))


def write_page(path: Path, table: pd.DataFrame) -> None:
    """Put the tables into their place on the page; the text around it stays."""
    before, _, rest = path.read_text().partition(START)
    _, _, after = rest.partition(END)
    tables = f"Medians:\n\n{as_text(medians(table))}\n\nEvery model:\n\n{as_text(table)}"
    write_whole(path, f"{before}{START}\n\n{tables}\n\n{END}{after}".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=f"What strangers' models keep for a batch of {BATCH}.")
    parser.add_argument("--only", default="", help="measure models with this text in their name alone")
    parser.add_argument("--table", type=Path, default=Path("figures/strangers.csv"))
    parser.add_argument("--page", type=Path, default=Path("docs/strangers.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    strangers = {key: stranger for key, stranger in all_strangers().items() if arguments.only in key}
    if not strangers:
        parser.error(f"no model has {arguments.only!r} in its name; tests and tables name them as in 'timm/resnet10t'")
    known = pd.read_csv(arguments.table) if arguments.table.exists() else pd.DataFrame({"model": []})
    order = [*all_strangers(), *known["model"]]  # also of a package that is not installed here
    for key, stranger in strangers.items():
        if key in set(known.dropna()["model"]):
            continue
        known = pd.concat([known[known["model"] != key], pd.DataFrame([row_of(key, stranger)])], ignore_index=True)
        known = known.sort_values("model", key=lambda names: names.map(order.index), ignore_index=True)
        write_whole(arguments.table, known.to_csv(index=False, float_format="%.6g").encode())
        print(known[known["model"] == key].to_string(index=False, header=False), flush=True)
    write_page(arguments.page, known)


if __name__ == "__main__":
    main()
