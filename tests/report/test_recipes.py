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


@pytest.mark.slow
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


@pytest.mark.slow
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


def noted(**settings):
    """What a record notes of its settings beside those that are compared between all rows."""
    beside = {name.replace("__", "."): value for name, value in settings.items()}
    return {"recipe": RECIPE, "provenance": came_from() | {"settings": beside}}


OWN_SETTINGS = {
    "ranks 4 x 3 x 4 x 4": {"model__method__init_args__ranks": [4, 3, 4, 4]},
    "energies 0.5 x 0.99": {"budget__energies": [0.5, 0.99]},
    "mode energies None": {"budget__mode_energies": None},
    "mib 0.3": {"budget__mib": 0.3},
    "channels last True": {"model__channels_last": True},
}
USUAL = {
    **{"model__method__init_args__ranks": [1, 1, 1, 1], "budget__energies": [0.8, 0.9], "budget__mib": 0.2},
    **{"budget__mode_energies": [0.4], "model__channels_last": False},
}


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_runs_of_one_method_by_other_settings_are_rows_of_their_own(write, name):
    records = [write("vanilla", 2, memory=8000, **noted(**USUAL, seed=1))]
    records += [write("asi", 2, seed=seed, memory=1000, **noted(**USUAL, seed=seed)) for seed in (1, 2)]
    records.append(write("asi", 2, seed=3, memory=2000, **noted(**(USUAL | OWN_SETTINGS[name]), seed=3)))
    vanilla, *asi = summarise(records).to_dict("records")
    assert vanilla["recipe"] == ""
    assert {row["n"]: row["activation_formula_times_less"] for row in asi} == {2: 8, 1: 4}  # compared all the same
    assert name in [row["recipe"] for row in asi]


def test_what_may_differ_between_seeds_does_not_tell_them_apart(write):
    for_seed = lambda seed: noted(seed=seed, model__budget__table=f"t{seed}", model__budget__bytes=1000 + seed)  # noqa: E731
    table = summarise([write("asi", 2, seed=seed, **for_seed(seed)) for seed in (1, 2)])
    assert list(table["n"]) == [2]
    assert list(table["recipe"]) == [""]


def test_what_the_recipe_says_is_told_once(write):
    for_epochs = lambda epochs: noted(trainer__max_epochs=epochs) | {"recipe": RECIPE | {"epochs": epochs}}  # noqa: E731
    table = summarise([write("asi", 2, seed=epochs, **for_epochs(epochs)) for epochs in (3, 4)])
    assert sorted(table["recipe"]) == ["epochs 3", "epochs 4"]


def test_runs_of_one_depth_that_trained_other_layers_do_not_compare(write):
    hook = {"custom_hooks__0__freeze": []}
    records = [write("vanilla", "all", memory=8000, **noted(**hook, custom_hooks__0__layers=["a", "b"]))]
    records.append(write("asi", "all", memory=1000, **noted(**hook, custom_hooks__0__layers=["a", "b"])))
    records.append(write("asi", "all", seed=1, memory=500, **noted(**hook, custom_hooks__0__layers=["b"])))
    table = summarise(records)
    assert [(row["method"], row["recipe"], row["n"]) for row in table.to_dict("records")] == [
        ("vanilla", "layers a x b", 1),
        ("asi", "layers a x b", 1),
        ("asi", "layers b", 1),
    ]
    assert list(table["activation_formula_times_less"][:2]) == [1, 8]
    assert math.isnan(table["activation_formula_times_less"][2])
    shallow = write("asi", 2, **noted(custom_hooks__0__layers=["b"]))  # another depth has other layers
    assert summarise([*records[:2], shallow])["recipe"].tolist() == ["", "", ""]


def test_a_baseline_of_several_settings_is_not_compared_with(write):
    given = [noted(model__method__init_args__ranks=[rank]) for rank in (1, 2)]
    records = [write("hosvd", 2, seed=seed, memory=1000 * seed, **given[seed - 1]) for seed in (1, 2)]
    table = summarise([*records, write("asi", 2, memory=500, **noted())], baseline="hosvd")
    assert table["activation_formula_times_less"].tolist()[:2] == [1, 1]
    assert math.isnan(table["activation_formula_times_less"][2])


@pytest.mark.parametrize(
    ("one", "other"),
    [(0.05, 0.05000001), ("a" * 60, "a" * 60 + "b"), ([1] * 50, [1] * 51), ({"a": "b" * 50}, {"a": "b" * 49 + "c"})],
)
def test_values_that_begin_alike_are_not_taken_for_one(write, one, other):
    given = [{"recipe": RECIPE, "provenance": came_from(**{"model.weight": value})} for value in (one, other)]
    table = summarise([write("asi", 2, seed=seed, **given[seed]) for seed in (0, 1)])
    assert list(table["n"]) == [1, 1]
    assert table["recipe"].nunique() == 2


def test_a_record_of_before_settings_were_noted_is_in_the_row_of_its_name(write):
    table = summarise([write("asi", 2, seed=1, **noted(seed=1)), write("asi", 2, seed=2, recipe=RECIPE)])
    assert list(table["n"]) == [2]


def of_code(**code):
    return {"recipe": RECIPE, "provenance": came_from() | {"code": {n.replace("__", " "): h for n, h in code.items()}}}


def test_runs_of_one_method_by_other_code_are_rows_of_their_own(write):
    records = [write("vanilla", 2, memory=8000, **of_code(model__tiny="m1"))]
    for seed, code in ((1, "a1"), (2, "a1"), (3, "b2")):
        records.append(write("mine", 2, seed=seed, memory=1000, **of_code(model__tiny="m1", method__Mine=code)))
    records.append(write("mine", 2, seed=4, memory=1000, recipe=RECIPE, provenance=came_from()))  # of before
    found = {row["recipe"]: row for row in summarise(records).to_dict("records") if row["method"] == "mine"}
    assert {recipe: row["n"] for recipe, row in found.items()} == {"": 1, "code of Mine a1": 2, "code of Mine b2": 1}
    assert {row["activation_formula_times_less"] for row in found.values()} == {8}


def test_a_row_is_not_compared_with_a_baseline_of_other_code_of_the_model(write):
    records = [write("vanilla", 2, memory=8000, **of_code(model__tiny="m1"))]
    records.append(write("asi", 2, memory=1000, **of_code(model__tiny="m2")))
    table = summarise(records)
    assert list(table["recipe"]) == ["code of tiny m1", "code of tiny m2"]
    assert math.isnan(table["activation_formula_times_less"][1])
