"""The summary against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from experiment import ExperimentError
from report.methods import family, method_order
from report.summary import Group, Reported, find_runs, group_records, summarise
from report.tables import columns, to_markdown


def row(table, layers, method):
    """The one row of a summary."""
    (found,) = table[(table["layers"] == layers) & (table["method"] == method)].to_dict("records")
    return found


def test_means_and_sample_standard_deviations(write):
    records = [
        write("asi", 2, seed=seed, test=test, memory=memory, flops=flops, step=step)
        for seed, test, memory, flops, step in (
            (5, 0.90, 100, 4000, 0.1),
            (3, 0.92, 200, 6000, 0.2),
            (4, 0.97, 600, 8000, 0.6),
        )
    ]
    found = row(summarise(records), 2, "asi")
    assert (found["n"], found["seeds"]) == (3, (3, 4, 5))
    assert found["test_mean_percent"] == 93.0
    # Deviations -3, -1 and 4: the sum of squares is 26, over n - 1 = 2.
    assert found["test_std_percent"] == pytest.approx(math.sqrt(13), abs=1e-9)
    assert found["val_best_mean_percent"] == 94.0
    assert found["activation_formula_bytes"] == 300
    assert found["saved_measured_bytes"] == 600
    assert found["peak_measured_bytes"] == 900
    assert found["peak_inference_bytes"] == 2**19
    assert (found["flops_paper"], found["flops_corrected"]) == (3000, 6000)
    assert found["step_median_s"] == pytest.approx(0.3)


def test_training_losses_are_compared_at_equal_depth(write):
    found = summarise(
        [
            write("vanilla", 2, loss={"train_last": 0.125}),
            write("asi", 2, loss={"train_last": 0.25}),
            write("asi", 2, seed=1, loss={"train_last": 0.5}),
            (without := write("asi", 4)),
        ]
    )
    assert (row(found, 2, "asi")["train_loss"], row(found, 2, "asi")["train_loss_difference"]) == (0.375, 0.25)
    assert row(found, 2, "vanilla")["train_loss_difference"] == 0
    assert math.isnan(row(found, 4, "asi")["train_loss"])
    group = Group("classification", "A", "mcunet", "pets")
    assert "| 0.375 |" in " ".join(to_markdown(found, group).split())
    text = to_markdown(found, group, shown=columns(found))
    assert "Δ training loss" in text
    assert "+0.25" in text
    assert "loss" not in to_markdown(summarise([without]), group)


def test_one_seed_has_no_standard_deviation(write):
    found = row(summarise([write("asi", 2, test=0.9)]), 2, "asi")
    assert found["n"] == 1
    assert math.isnan(found["test_std_percent"])
    assert found["test_mean_percent"] == 90.0


def test_ratios_at_equal_depth(write):
    records = [
        write("vanilla", 2, test=0.80, memory=1000, kept=1500, flops=9000, step=0.3),
        write("vanilla", 4, test=0.90, memory=4000, kept=6000, flops=20000, step=0.6),
        write("asi", 2, test=0.78, memory=40, kept=500, flops=3000, step=0.6),
        write("asi", 4, test=0.91, memory=50, kept=600, flops=5000, step=0.2),
    ]
    shallow, deep = (row(summarise(records), layers, "asi") for layers in (2, 4))
    assert (shallow["activation_formula_times_less"], deep["activation_formula_times_less"]) == (25, 80)
    assert (shallow["saved_measured_times_less"], deep["saved_measured_times_less"]) == (3, 10)
    assert (shallow["flops_corrected_times_less"], deep["flops_corrected_times_less"]) == (3, 4)
    assert (shallow["flops_paper_times_less"], deep["flops_paper_times_less"]) == (3, 4)
    assert (shallow["step_median_times_less"], deep["step_median_times_less"]) == pytest.approx((0.5, 3))
    assert (shallow["test_difference_points"], deep["test_difference_points"]) == (-2, 1)


def test_ratios_at_all_layers(write):
    records = [write("vanilla", "all", memory=600), write("asi", "all", memory=6), write("vanilla", 2, memory=60)]
    assert row(summarise(records), "all", "asi")["activation_formula_times_less"] == 100


def test_another_baseline(write):
    records = [write("hosvd_0.8", 2, memory=600), write("asi", 2, memory=6), write("vanilla", 2, memory=6000)]
    table = summarise(records, baseline="hosvd_0.8")
    assert row(table, 2, "asi")["activation_formula_times_less"] == 100
    assert row(table, 2, "vanilla")["activation_formula_times_less"] == 0.1


def test_memory_ratio_at_equal_accuracy(write):
    records = [
        write("vanilla", 1, test=0.70, memory=1000),
        write("vanilla", 2, test=0.80, memory=3000),
        write("vanilla", 3, test=0.80, memory=2000),
        write("vanilla", 4, test=0.90, memory=8000),
        write("asi", 1, test=0.70, memory=10),  # exactly the shallowest baseline
        write("asi", 2, test=0.75, memory=20),  # the cheaper of two, at another depth
        write("asi", 3, test=0.85, memory=40),  # only the deepest
        write("asi", 4, test=0.91, memory=80),  # none
    ]
    table = summarise(records)
    found = [row(table, layers, "asi")["equal_accuracy_times_less"] for layers in (1, 2, 3, 4)]
    assert found[:3] == [100, 100, 200]
    assert math.isnan(found[3])
    assert row(table, 2, "vanilla")["equal_accuracy_times_less"] == pytest.approx(2 / 3)


def test_flops_ratio_at_equal_accuracy(write):
    records = [
        write("vanilla", 1, test=0.70, memory=1000, flops=9000),
        write("vanilla", 2, test=0.80, memory=3000, flops=8000),
        write("vanilla", 3, test=0.90, memory=100, flops=40_000),
        write("asi", 3, test=0.75, memory=10, flops=2000),
    ]
    assert row(summarise(records), 3, "asi")["equal_accuracy_flops_times_less"] == 4


def test_runs_that_are_planned_and_not_there_are_missing(write):
    records = [write("vanilla", 2, seed=1), write("vanilla", 2, seed=2)]
    planned = [replace(records[0].run, seed=seed) for seed in (1, 2, 3)]
    planned += [replace(records[0].run, method="asi", seed=seed) for seed in (1, 2)]
    table = summarise(records, planned=planned)
    assert [(found["method"], found["n"], found["missing"]) for found in table.to_dict("records")] == [
        ("vanilla", 2, 1),
        ("asi", 0, 2),
    ]
    absent = row(table, 2, "asi")
    numbers = [value for value in absent.values() if isinstance(value, float)]
    assert len(numbers) > 10
    assert all(map(math.isnan, numbers))
    assert math.isnan(row(summarise([], planned=planned), 2, "vanilla")["test_mean_percent"])


def test_equal_means_of_different_seeds_are_equal(write):
    """100 * 0.801 is a little above 80.1 in binary; the means of equal accuracies must meet all the same."""
    records = [write("vanilla", 2, seed=seed, test=test, memory=500) for seed, test in enumerate((0.800, 0.802))]
    records += [write("asi", 2, seed=seed, test=0.801, memory=5) for seed in (0, 1)]
    found = row(summarise(records), 2, "asi")
    assert found["test_difference_points"] == 0
    assert found["equal_accuracy_times_less"] == 100


def test_a_missing_baseline_leaves_the_ratios_missing(write):
    records = [write("vanilla", 2, memory=100), write("asi", 2, memory=10), write("asi", 4, memory=10)]
    table = summarise(records)
    assert len(table) == 3
    assert row(table, 2, "asi")["activation_formula_times_less"] == 10
    alone = row(table, 4, "asi")
    ratios = [name for name in alone if name.endswith("times_less") and not name.startswith("equal_accuracy")]
    assert len(ratios) == 5
    assert all(math.isnan(alone[name]) for name in [*ratios, "test_difference_points"])


def test_no_baseline_at_all(write):
    found = row(summarise([write("asi", 4)]), 4, "asi")
    assert math.isnan(found["activation_formula_times_less"])
    assert math.isnan(found["equal_accuracy_times_less"])
    assert found["activation_formula_bytes"] == 2**20


def test_a_number_that_one_seed_lacks_is_missing(write):
    records = [write("asi", 2, seed=0, test=0.9), write("asi", 2, seed=1, accuracy={"val_best": 0.9})]
    found = row(summarise(records), 2, "asi")
    assert math.isnan(found["test_mean_percent"])
    assert math.isnan(found["test_std_percent"])
    assert found["val_best_mean_percent"] == pytest.approx(90.5)


def test_no_ratio_over_zero_bytes(write):
    records = [write("vanilla", 2, memory=100), write("asi", 2, memory=0)]
    assert math.isnan(row(summarise(records), 2, "asi")["activation_formula_times_less"])


def test_rows_with_different_seeds(write):
    records = [write("vanilla", 2, seed=seed, test=test) for seed, test in ((1, 0.8), (2, 0.9))]
    records.append(write("asi", 2, seed=7, test=0.86))
    table = summarise(records)
    assert row(table, 2, "vanilla")["seeds"] == (1, 2)
    assert row(table, 2, "asi")["seeds"] == (7,)
    assert row(table, 2, "asi")["test_difference_points"] == 1


def test_order_of_rows(write):
    methods = [
        "wasi_0.8",
        "asi",
        "lance",
        "hosvd_0.9",
        "hosvd_0.8",
        "svd_0.8",
        "gradient_filter_10",
        "gradient_filter_7",
    ]
    methods += ["vanilla"]
    records = [write(method, 2) for method in methods]
    records += [write("vanilla", layers) for layers in ("all", 10, 1)]
    table = summarise(records)
    assert list(zip(table["layers"], table["method"], strict=True)) == [
        (1, "vanilla"),
        (2, "vanilla"),
        (2, "gradient_filter_7"),
        (2, "gradient_filter_10"),
        (2, "svd_0.8"),
        (2, "hosvd_0.8"),
        (2, "hosvd_0.9"),
        (2, "asi"),
        (2, "lance"),
        (2, "wasi_0.8"),
        (10, "vanilla"),
        ("all", "vanilla"),
    ]


def test_order_of_settings_of_one_method():
    tags = ["asi_hosvd0.9", "asi_10mb", "asi_2mb", "asi_hosvd0.85", "asi"]
    assert sorted(tags, key=method_order) == ["asi", "asi_2mb", "asi_10mb", "asi_hosvd0.85", "asi_hosvd0.9"]
    forms = ["asi_int8_derived_1of20", "asi_int8_1of20", "asi_1of20"]
    assert sorted(forms, key=method_order) == forms[::-1]
    assert {family(name) for name in forms} == {"asi"}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("vanilla", "vanilla"),
        ("gradient_filter_2", "gradient_filter"),
        ("svd_0.8", "svd"),
        ("hosvd_0.8", "hosvd"),
        ("asi_0.8", "asi"),
        ("wasi_0.8", "wasi"),
        ("asimov", "asimov"),
        ("my_own_method", "my_own_method"),
    ],
)
def test_family(method, name):
    assert family(method) == name


def test_reported_accuracies_reach_their_rows(write):
    records = [write("asi", 2), write("asi", "all"), write("vanilla", 2)]
    reported = {(2, "asi"): Reported(39.2, 500, 700), ("all", "asi"): Reported(75.0), (7, "asi"): Reported(1.0)}
    table = summarise(records, reported=reported)
    assert len(table) == 3
    two = row(table, 2, "asi")
    assert (two["reported_memory_bytes"], two["reported_flops"]) == (500, 700)
    assert two["reported_difference_points"] == pytest.approx(51 - 39.2)  # of the validation accuracy
    assert math.isnan(row(table, "all", "asi")["reported_memory_bytes"])
    assert row(table, 2, "asi")["reported_accuracy_percent"] == 39.2
    assert row(table, "all", "asi")["reported_accuracy_percent"] == 75.0
    assert math.isnan(row(table, 2, "vanilla")["reported_accuracy_percent"])


def test_groups(write, runs):
    write("asi", 2, dataset="pets")
    write("asi", 2, dataset="cub")
    write("asi", 4, dataset="cub", seed=3)
    write("asi", 2, dataset="cub", setup="B")
    groups = group_records(record for _, record in find_runs(runs))
    assert {group: len(records) for group, records in groups.items()} == {
        Group("classification", "A", "mcunet", "cub"): 2,
        Group("classification", "A", "mcunet", "pets"): 1,
        Group("classification", "B", "mcunet", "cub"): 1,
    }
    assert list(groups) == sorted(groups)


@pytest.mark.parametrize("edited", [False, True])
def test_of_two_records_of_one_run_one_is_shown_and_the_other_named(write, runs, capsys, edited):
    one, other = write("asi", 2, test=0.5), write("vanilla", 2)
    path = one.run.folder(runs) / "result.json"
    copy = runs / "copy" / "result.json"
    copy.parent.mkdir()
    copy.write_text(path.read_text().replace("0.5", "0.25") if edited else path.read_text())
    assert [record for _, record in find_runs(runs)] == [one, other]
    what = "another record of the run in" if edited else "a copy of"
    assert capsys.readouterr().err == (
        f"report: warning: left out: {copy} is {what} {path}, which is shown; keep one of them\n"
    )


@pytest.mark.parametrize("layers", ["2", -1, 2.5, True, "every"])
def test_unknown_layers_are_refused(write, runs, layers):
    path = write("asi", 2).run.folder(runs) / "result.json"
    content = json.loads(path.read_text())
    content["run"]["layers"] = layers
    path.write_text(json.dumps(content))
    with pytest.raises(ExperimentError, match="layers is"):
        find_runs(runs)


@pytest.mark.parametrize(
    ("key", "value"),
    [("method", None), ("method", ""), ("model", 3), ("dataset", "../x"), ("setup", "/x"), ("seed", "1")],
)
def test_a_run_that_cannot_be_sorted_or_placed_is_refused(write, runs, key, value):
    path = write("asi", 2).run.folder(runs) / "result.json"
    content = json.loads(path.read_text())
    content["run"][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ExperimentError, match=f"{key} is"):
        find_runs(runs)


def test_two_budgets_are_two_rows_beside_a_record_of_before_they_were_named(write):
    methods = ["asi_1of20", "asi", "asi_hosvd_0.8", "asi_1of5", "vanilla", "asi_papers"]
    table = summarise([write(method, 2, memory=memory) for memory, method in enumerate(methods, start=1)])
    assert list(table["method"]) == ["vanilla", "asi", "asi_1of5", "asi_1of20", "asi_hosvd_0.8", "asi_papers"]
    assert row(table, 2, "asi_1of20")["activation_formula_times_less"] == 5
    assert row(table, 2, "asi_1of5")["activation_formula_times_less"] == 5 / 4


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        *((f"asi{rest}", "asi") for rest in ("", "_1of20", "_papers", "_hosvd_0.8", "_every10_0.5mib", "_random_1of2")),
        *(("wasi_0.9_hosvd_0.8", "wasi"), ("mine_1of20", "mine"), ("mine_papers", "mine"), ("mine_vanilla", "mine")),
        *(("mine_hosvd_0.8_1of2", "mine"), ("hosvd_0.8", "hosvd"), ("first_channels", "first_channels")),
    ],
)
def test_a_budget_is_no_part_of_a_methods_family(method, expected):
    assert family(method) == expected


def test_at_equal_memory_a_row_is_held_against_the_baselines_best_of_as_little(write):
    own = {2: (0.80, 100), 4: (0.85, 300), 8: (0.83, 900)}
    records = [write("vanilla", layers, test=test, memory=memory) for layers, (test, memory) in own.items()]
    records += [write("asi", layers, test=0.84, memory=memory) for layers, memory in ((2, 90), (4, 300), (8, 1000))]
    table = summarise(records)
    for row in table[table["method"] == "asi"].to_dict("records"):
        below = [100 * test for test, memory in own.values() if memory <= row["activation_formula_bytes"]]
        best = max(below, default=math.nan)
        for name in ("equal_memory_difference_points", "equal_saved_difference_points"):  # kept is twice the formula
            assert row[name] == pytest.approx(84 - best, nan_ok=True)
    least = {row["layers"]: row["equal_accuracy_saved_times_less"] for row in table.to_dict("records")[1::2]}
    assert least == pytest.approx({2: 600 / 180, 4: 600 / 600, 8: 600 / 2000})
