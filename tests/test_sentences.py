"""Sentences of README, results and limits that sum a table up, compared with the table."""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def rows(name: str, **chosen: str) -> list[dict[str, str]]:
    """Rows of a table of `figures/` that have these values."""
    with (ROOT / "figures" / name).open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in chosen.items())]


def text_of(page: str) -> str:
    return " ".join((ROOT / page).read_text().split())


def span(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def steps(depth: str) -> list[float]:
    """Times of ASI's steps over vanilla's, of the convolutional networks in batches of 64."""
    return timed("asi", depth) + [float(row["step_over_vanilla"]) for row in convolutional("asi", depth)]


def timed(way: str, depth: str) -> list[float]:
    found = rows("speed.csv", section="model step", first=way, second="vanilla")
    return [float(row["ratio"]) for row in found if row["case"].endswith(f"last {depth}")]


def convolutional(peer: str, *depths: str) -> list[dict[str, str]]:
    """Rows of the table of memory."""
    found = rows("memory.csv", peer=peer, batch="64")
    return [row for row in found if row["layers"] in depths and row["network"] != "vit_small"]


def channels_last(depth: str) -> list[float]:
    kind = {"section": "channels last", "first": "asi, channels last", "second": "vanilla, channels last"}
    return [float(row["ratio"]) for row in rows("channels_last/speed.csv", **kind) if row["case"].endswith(depth)]


def test_times_of_steps_are_those_of_the_tables() -> None:
    said = f"with ASI {span(steps('all'))} of vanilla's time with all layers, {span(steps('4'))} with the last 4."
    assert said in text_of("README.md")
    whole = span(channels_last("all"))
    assert f"{whole} of that with all layers" in text_of("README.md")
    assert f"it takes {whole} of that with all layers, not {span(steps('all'))} (" in text_of("docs/limits.md")


def less(peer: str, *depths: str) -> str:
    """How many times less than vanilla a way keeps at these depths, of the convolutional networks."""
    pairs = zip(convolutional("vanilla", *depths), convolutional(peer, *depths), strict=True)
    times = [float(vanilla["kept_bytes"]) / float(own["kept_bytes"]) for vanilla, own in pairs]
    return " to ".join(f"{value:.1f}" if value < 10 else f"{value:.0f}" for value in (min(times), max(times)))


def test_times_less_memory_are_those_of_the_table() -> None:
    page = text_of("README.md")
    all_layers, exact = f"{less('asi', 'all')} times less", f"{less('vanilla_fused', 'all')} times less"
    assert page.count(all_layers) == page.count(exact) == 2
    assert f"and {less('asi', '2', '4')} times less with the last 2 or 4" in page
    assert f"checkpointing {less('checkpointing', 'all')} times" in page


def test_what_the_limits_say_of_rivals_is_in_the_tables() -> None:
    page = text_of("docs/limits.md")
    checkpointed = span([float(row["step_over_vanilla"]) for row in convolutional("checkpointing", "all")])
    assert f"Checkpointing keeps {less('checkpointing', 'all')} times less for {checkpointed} of the time" in page
    hosvd = span(timed("hosvd_0.8", "all"))
    assert f"{hosvd} of vanilla's time with all layers trained, where ASI takes {span(steps('all'))}." in page


def test_what_is_said_of_the_digits_is_in_their_table() -> None:
    def of(method: str, column: str) -> list[float]:
        found = rows("digits_table.csv", method=method)
        return [float(row[column]) for row in sorted(found, key=lambda row: row["layers"])]

    def over_vanilla(method: str) -> str:
        pairs = zip(of(method, "step_median_s"), of("vanilla", "step_median_s"), strict=True)
        return " and ".join(f"{own / vanilla:.1f}" for own, vanilla in pairs)

    behind = {
        method: " and ".join(f"{-value:.1f}" for value in of(method, "test_difference_points"))
        for method in ("asi_int8_1of20", "asi_1of20")
    }
    page = text_of("RESULTS.md")
    assert f"On digits `asi_int8` at a twentieth is {behind['asi_int8_1of20']} points behind vanilla" in page
    assert f"ASI in float32 {behind['asi_1of20']}; [figures/digits_table.csv]" in page
    ms = " and ".join(f"{1000 * value:.0f}" for value in of("vanilla", "step_median_s"))
    assert f"a step of the trained tail is so small, {ms} ms," in page
    assert (
        f"it takes {over_vanilla('asi_int8_1of20')} of vanilla's time with int8, {over_vanilla('asi_1of20')} with"
        in page
    )
