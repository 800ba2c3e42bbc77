"""Runs of different recipes: never averaged, never compared, and never side by side without a word."""

from __future__ import annotations

import math

import pytest

from report.__main__ import main
from report.summary import summarise

RECIPE = {"epochs": 4, "steps": 40, "learning_rate": 0.05, "batch_size": 8, "image_size": 32, "precision": "32-true"}
OTHERS = [
    {"epochs": 3, "steps": 30},
    {"learning_rate": 0.1},
    {"batch_size": 16},
    {"image_size": 64},
    {"precision": "bf16-mixed"},
]


def rows(table):
    return {(row["method"], row["recipe"]): row for row in table.to_dict("records")}


def test_runs_of_one_recipe_have_no_word_of_it(write, runs, capsys):
    table = summarise([write(method, 2, recipe=RECIPE) for method in ("vanilla", "asi")])
    assert set(table["recipe"]) == {""}
    assert main([str(runs), "--published", str(runs)]) == 0
    assert "Recipe" not in capsys.readouterr().out


@pytest.mark.parametrize("other", OTHERS, ids=[",".join(other) for other in OTHERS])
def test_a_row_is_not_compared_with_a_baseline_of_another_recipe(write, other):
    records = [write("vanilla", 2, memory=8000, test=0.9, recipe=RECIPE)]
    records.append(write("asi", 2, memory=1000, test=0.8, recipe=RECIPE | other))
    table = summarise(records)
    name = next(iter(other)).replace("_", " ")
    vanilla, asi = table.to_dict("records")
    assert f"{name} {RECIPE[next(iter(other))]}" in vanilla["recipe"]
    assert f"{name} {other[next(iter(other))]}" in asi["recipe"]
    for column in ("activation_formula_times_less", "test_difference_points", "equal_accuracy_times_less"):
        assert math.isnan(asi[column]), column
        assert not math.isnan(vanilla[column]), column
    same = write("vanilla", 2, seed=1, memory=3000, test=0.7, recipe=RECIPE | other)
    asi = rows(summarise([*records, same]))["asi", asi["recipe"]]
    assert asi["activation_formula_times_less"] == 3
    assert asi["test_difference_points"] == pytest.approx(10)
    assert math.isnan(asi["equal_accuracy_times_less"])  # the only baseline as accurate is of another recipe


def test_seeds_of_different_recipes_are_not_averaged(write):
    records = [write("asi", 2, seed=seed, test=test, recipe=RECIPE) for seed, test in ((1, 0.5), (2, 0.7))]
    table = summarise([*records, write("asi", 2, seed=3, test=0.1, recipe=RECIPE | {"epochs": 1})])
    means = {row["recipe"]: (row["n"], row["test_mean_percent"]) for row in table.to_dict("records")}
    assert means == {"epochs 4": (2, 60.0), "epochs 1": (1, 10.0)}


def test_a_record_of_before_recipes_were_noted_is_not_taken_for_one_that_is_known(write):
    table = summarise([write("vanilla", 2), write("asi", 2, recipe=RECIPE)])
    assert list(table["recipe"]) == ["not recorded", "recorded"]
    assert math.isnan(table["activation_formula_times_less"][1])


def test_every_output_says_that_recipes_differ(write, runs, capsys):
    write("vanilla", 2, recipe=RECIPE)
    write("asi", 2, recipe=RECIPE | {"epochs": 3})
    assert main([str(runs), "--published", str(runs)]) == 0
    assert "epochs 3" in capsys.readouterr().out
    folder = runs / "report"
    for name in ("index.html", "classification/A/table.md", "classification/A/mcunet/pets/table.md"):
        text = (folder / name).read_text()
        assert "epochs 3" in text, name
        assert "different recipes" in text, name
    for name in ("table.csv", "table.tex"):
        assert "epochs 3" in (folder / "classification/A/mcunet/pets" / name).read_text()


def came_from(data="ab12", **settings):
    return {"data_fingerprint": data, "further_settings": {"model.momentum": 0.9, "model.weights": "w1"} | settings}


FURTHER = {
    "momentum 0": came_from(**{"model.momentum": 0.0}),
    "augment True": came_from(**{"data.augment": True}),
    "weights w2": came_from(**{"model.weights": "w2"}),
    "data cd34": came_from(data="cd34"),
}


@pytest.mark.parametrize("name", FURTHER)
def test_what_a_recipe_does_not_say_tells_runs_apart_as_well(write, name):
    write_one = {"recipe": RECIPE, "provenance": came_from()}
    records = [write("vanilla", 2, memory=8000, **write_one), write("asi", 2, memory=1000, **write_one)]
    assert set(summarise(records)["recipe"]) == {""}
    other = write("hosvd", 2, memory=2000, recipe=RECIPE, provenance=FURTHER[name])
    row = summarise([*records, other]).set_index("method").loc["hosvd"]
    assert row["recipe"] == name
    assert math.isnan(row["activation_formula_times_less"])
    assert math.isnan(row["test_difference_points"])


def test_a_network_of_its_own_for_each_seed_is_one_recipe(write):
    given = {seed: {"recipe": RECIPE, "provenance": came_from(**{"model.weights": f"w{seed}"})} for seed in (1, 2)}
    records = [write(method, 2, seed=seed, **given[seed]) for seed in (1, 2) for method in ("vanilla", "asi")]
    table = summarise(records)
    assert list(table["recipe"]) == ["", ""]
    assert list(table["n"]) == [2, 2]


def test_a_record_of_before_further_settings_were_noted_is_compared_as_it_was(write):
    table = summarise([write("vanilla", 2, recipe=RECIPE), write("asi", 2, recipe=RECIPE, provenance=came_from())])
    assert set(table["recipe"]) == {""}
