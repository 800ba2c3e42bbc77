"""Ranks within a budget, chosen without perplexity."""

import itertools
import json
from dataclasses import replace

import pytest

from experiment import ExperimentError, Record, Run
from experiment.ranks import Budget, one_energy, random_energies
from lowrank import BudgetError, Candidates, PerplexityTable, select_ranks
from lowrank.ranks.perplexity import LayerPerplexity
from lowrank.ranks.table import Derived
from lowrank.tensors.costs import tucker_numel

ENERGIES = (0.4, 0.6, 0.8)
SHAPES = {"first": (8, 16, 6, 6), "second": (8, 24, 4, 4), "third": (8, 10, 4, 4)}
RANKS = ((1, 1, 1, 1), (2, 4, 2, 2), (5, 9, 3, 3))


def layer(name, shape):
    sizes = tuple(4 * tucker_numel(shape, ranks) for ranks in RANKS)
    return LayerPerplexity(name, shape, RANKS, sizes, (3.0, 2.0, 1.0))


TABLE = PerplexityTable("net", (8, 3, 32, 32), ENERGIES, tuple(layer(*item) for item in SHAPES.items()))
TOTALS = [sum(row.nbytes[place] for row in TABLE.layers) for place in range(3)]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_energy_is_the_highest_that_fits(place):
    assert set(one_energy(TABLE, TOTALS[place]).energies.values()) == {ENERGIES[place]}
    if place:
        assert set(one_energy(TABLE, TOTALS[place] - 1).energies.values()) == {ENERGIES[place - 1]}
    plan = one_energy(TABLE, TOTALS[place])
    assert plan.ranks == dict.fromkeys(SHAPES, RANKS[place])
    assert (plan.nbytes, plan.perplexity) == (TOTALS[place], 3 * (3 - place))


@pytest.mark.parametrize("budget", [TOTALS[0], (TOTALS[0] + TOTALS[1]) // 2, TOTALS[1], (TOTALS[1] + TOTALS[2]) // 2])
def test_random_energies_use_the_budget_up(budget):
    for seed in range(20):
        plan = random_energies(TABLE, budget, seed)
        assert plan.nbytes <= budget
        for row in TABLE.layers:
            place = ENERGIES.index(plan.energies[row.name])
            if place < 2:
                assert plan.nbytes + row.nbytes[place + 1] - row.nbytes[place] > budget
        assert plan == random_energies(TABLE, budget, seed)


def test_random_energies_differ_between_seeds():
    budget = (TOTALS[1] + TOTALS[2]) // 2
    plans = {tuple(random_energies(TABLE, budget, seed).energies.values()) for seed in range(50)}
    assert len(plans) > 2
    best = select_ranks(TABLE, budget).perplexity
    assert all(random_energies(TABLE, budget, seed).perplexity >= best for seed in range(50))


@pytest.mark.parametrize("choose", [one_energy, lambda table, budget: random_energies(table, budget, 1)])
def test_a_budget_below_the_least_is_refused(choose):
    with pytest.raises(BudgetError, match=f"3 layers: {TOTALS[0]} bytes"):
        choose(TABLE, TOTALS[0] - 1)


def test_a_budget_chooses_for_the_layers_it_is_asked_for(tmp_path):
    TABLE.save(tmp_path / "table.json")
    budget = Budget(str(tmp_path / "table.json"), mib=TOTALS[1] / 2**20)
    choices = ("perplexity", "per_layer", "one_energy", "random")
    chosen = {choice: budget.plan(["second", "third"], choice, 3) for choice in choices}
    assert {tuple(plan.ranks) for plan in chosen.values()} == {("second", "third")}
    for plan, other in itertools.combinations(chosen.values(), 2):
        assert plan.energies.keys() == other.energies.keys()
    assert chosen["perplexity"].perplexity == min(plan.perplexity for plan in chosen.values())


def test_one_energy_a_layer_leaves_the_mixed_candidates_out(tmp_path):
    first, *others = TABLE.layers
    size = 4 * tucker_numel(SHAPES["first"], (3, 4, 2, 2))
    better = Candidates(((0.6, 0.4, 0.4, 0.4),), ((3, 4, 2, 2),), (size,), (0.5,))
    table = replace(TABLE, layers=(replace(first, mixed=better), *others))
    table.save(tmp_path / "table.json")
    budget = Budget(str(tmp_path / "table.json"), mib=(TOTALS[1] + size) / 2**20)
    assert budget.plan(table.names).ranks["first"] == (3, 4, 2, 2)
    assert budget.plan(table.names, "per_layer") == select_ranks(TABLE, TOTALS[1] + size)


def test_with_derive_a_budget_is_for_the_layers_that_others_follow_from(tmp_path):
    first, second, third = TABLE.layers
    ahead = replace(first, derived=Derived({"second": second.input_shape}, (9.0, 5.0, 1.0)))
    replace(TABLE, layers=(ahead, second, third), derives=True).save(tmp_path / "derived.json")
    TABLE.save(tmp_path / "table.json")
    budget, before = (
        Budget(str(tmp_path / name), mib=(first.nbytes[2] + third.nbytes[0]) / 2**20)
        for name in ("derived.json", "table.json")
    )
    plan = budget.plan(TABLE.names, derive=True)
    assert plan.derived == {"second": "first"}
    assert plan.ranks == {"first": RANKS[2], "second": second.input_shape, "third": RANKS[0]}
    assert plan.perplexity == 1.0 + 3.0
    assert budget.plan(TABLE.names) == before.plan(TABLE.names), "without it nothing is another"
    assert budget.plan(["second", "third"], derive=True).derived == {}
    with pytest.raises(
        ExperimentError, match=r"table\.json does not say .*--model\.derive true \(segmentation: --derive"
    ):
        before.plan(TABLE.names, derive=True)
    with pytest.raises(
        ExperimentError, match=r"derived\.json does not say .* with derive=5000 .*--model\.derive 5000 "
    ):
        budget.plan(TABLE.names, derive=5000)
    for choice in ("per_layer", "one_energy", "random"):
        with pytest.raises(ExperimentError, match=f"rank_choice is '{choice}' with derive; allowed: 'perplexity'"):
            budget.plan(TABLE.names, choice, derive=True)


def test_the_settings_of_a_budget_say_its_size_and_how_its_table_was_measured(tmp_path):
    def settings(table=TABLE, identity=None, **budget):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        table.save(folder / "perplexity.json")
        if identity is not None:
            (folder / "identity.json").write_text(json.dumps(identity))
        return Budget(str(folder / "perplexity.json"), **budget).settings

    usual = settings(mib=0.2)
    assert usual == {
        **{"budget.mib": 0.2, "budget.energies": list(ENERGIES), "budget.batches": 1, "budget.derive": False}
    }
    assert settings(mib=0.3, name="papers") != settings(mib=0.2, name="papers")
    others = [replace(TABLE, batches=8), replace(TABLE, derives=True)]
    measured = [{"model": {"mode_energies": [0.5]}}, {"model": {"storages": ["input"]}}, {"perplexity": {"x": 1}}]
    every = [usual, *(settings(other, mib=0.2) for other in others)]
    every += [settings(identity=identity, mib=0.2) for identity in measured]
    assert len({json.dumps(one) for one in every}) == len(every)
    assert settings(identity=["damaged"], mib=0.2) == usual


@pytest.mark.parametrize("of_before", [True, False])
@pytest.mark.parametrize("other", ["table", "run"])
def test_a_table_or_a_run_of_another_data_set_gives_no_budget(tmp_path, other, of_before):
    TABLE.save(tmp_path / "perplexity.json")
    data = {"table": "digits", "run": "digits"} | {other: "pets"}
    told = {"dataset": data["table"]}
    (tmp_path / "identity.json").write_text(json.dumps({"data": told} if of_before else told))
    run = Run("classification", "A", "net", data["run"], "vanilla", 2, 1)
    Record(run, {}, {"activation_formula": 4000}, {}, {}).save(tmp_path)
    budget = Budget(str(tmp_path / "perplexity.json"), run=str(tmp_path))
    told = (TABLE.model, TABLE.batch_shape)
    with pytest.raises(ExperimentError, match=r"data set pets.* this run (is on|of) digits; "):
        budget.identity(*told, dataset="digits")
    (tmp_path / "identity.json").unlink()  # a table from elsewhere does not say
    assert budget.identity(*told, dataset=data["run"]) == budget.identity(*told)


@pytest.mark.parametrize("other", ["table", "run"])
def test_a_table_or_a_run_of_other_data_of_the_same_name_gives_no_budget(tmp_path, other):
    TABLE.save(tmp_path / "perplexity.json")
    data = {"table": "1a", "run": "1a"} | {other: "2b"}
    identity = tmp_path / "identity.json"
    identity.write_text(json.dumps({"data_fingerprint": data["table"]}))
    run = Run("classification", "A", "net", "digits", "vanilla", 2, 1)
    Record(run, {}, {"activation_formula": 4000}, {}, {}, {"data_fingerprint": data["run"]}).save(tmp_path)
    budget = Budget(str(tmp_path / "perplexity.json"), run=str(tmp_path))
    with pytest.raises(ExperimentError, match=rf"^the .*{other} .*\(fingerprint 2b there, 1a here\)"):
        budget.require_data("1a")
    budget.require_data(None)  # the run's data are not there yet
    if other == "table":  # which is of what a run trains on, where that is told
        budget.require_data("1a", "2b")
        with pytest.raises(ExperimentError, match=r"\(fingerprint 2b there, 1a here\)"):
            budget.require_data("1a", "3c")
    identity.unlink()  # a table from elsewhere does not say
    Record(run, {}, {"activation_formula": 4000}, {}, {}).save(tmp_path)
    budget.require_data("1a")


def test_a_table_on_other_weights_gives_no_budget(tmp_path):
    TABLE.save(tmp_path / "perplexity.json")
    identity = tmp_path / "identity.json"
    identity.write_text(json.dumps({"load_from": "1a", "seed": 1}))
    budget = Budget(str(tmp_path / "perplexity.json"), mib=1)

    def weights_of(identity):
        return str(identity.get("load_from"))

    budget.require_weights({"load_from": "1a", "seed": 2}, weights_of)
    for other in ({"load_from": "2b", "seed": 1}, {"seed": 1}):
        told = rf"^the perplexity table .*perplexity.json was .* \(1a there, {weights_of(other)} here\); measure it"
        with pytest.raises(ExperimentError, match=told):
            budget.require_weights(other, weights_of)
    identity.unlink()  # a table from elsewhere does not say
    budget.require_weights({"load_from": "2b"}, weights_of)
