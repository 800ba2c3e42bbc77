"""Perplexity of all that follows from an input, and ranks chosen so that what follows takes nothing."""

import copy
import json

import pytest
import torch
from derived_cases import DEPTHWISE, EXPAND, NAMES, PROJECT, by_hand, loss_of, network
from references import left_vectors, multiply, random_tensor
from torch import nn

import lowrank
from lowrank import ASI, BudgetError, PerplexityTable, TableError, Vanilla, select_ranks
from lowrank.tensors.storage import restore, store
from lowrank.tensors.tucker import Tucker

ENERGIES, MODE_ENERGIES = (0.4, 0.8), (0.3, 0.9)


def measured(model, x, **options):
    settings = {"energies": ENERGIES, "mode_energies": MODE_ENERGIES, "storages": ("int8",), "derive": True, **options}
    return lowrank.measure_perplexity(model, NAMES, loss_of, x, **settings)


def near(x, ranks, storage):
    """The HOSVD at these ranks, as it comes back from a storage."""
    bases = [left_vectors(x, mode, rank) for mode, rank in enumerate(ranks)]
    core, factors = x, []
    for mode, basis in enumerate(bases):
        whole = basis.shape[0] == basis.shape[1]
        core = core if whole else multiply(core, basis.mT, mode)
        factors.append(None if whole else basis)
    return restore(store(x, Tucker(core, tuple(factors)), storage), x.dtype).dense()


def rows(table):
    return {row.name: row for row in table.layers}


def test_it_is_the_sum_over_the_layer_and_what_follows_from_it():
    model, x = network(), random_tensor(4, 3, 9, 8)
    table = measured(model, x)
    found = rows(table)
    assert found[EXPAND].derived.shapes == {DEPTHWISE: (4, 24, 9, 8), PROJECT: (4, 24, 9, 8)}
    assert found[DEPTHWISE].derived is found[PROJECT].derived is None
    candidates = table.candidates(found[EXPAND])
    assert len(candidates.ranks) == len(found[EXPAND].derived.perplexity) > 5
    with torch.no_grad():
        narrow = model[0](x)
    exact = by_hand(copy.deepcopy(model), x, narrow)
    for at in (0, 1, len(ENERGIES), len(candidates.ranks) // 2, len(candidates.ranks) - 1):
        low = by_hand(copy.deepcopy(model), x, near(narrow, candidates.ranks[at], candidates.storages[at]))
        lacks = {name: float((low[name] - exact[name]).norm()) for name in exact}
        # Randomly signed vectors and a table in single precision steps of eight bits: to a part in a thousand.
        assert found[EXPAND].derived.perplexity[at] == pytest.approx(sum(lacks.values()), rel=1e-3)
        assert candidates.perplexity[at] == pytest.approx(lacks[f"{EXPAND}.weight"], rel=1e-3)


def test_all_else_is_as_it_is_without():
    model, x = network(), random_tensor(4, 3, 9, 8)
    for row, plain in zip(measured(model, x).layers, measured(model, x, derive=False).layers, strict=True):
        assert (row.ranks, row.perplexity, row.nbytes, row.mixed) == (
            plain.ranks,
            plain.perplexity,
            plain.nbytes,
            plain.mixed,
        )


def test_a_model_of_little_precision_is_measured_as_well():
    model, x = network(), random_tensor(4, 3, 9, 8)
    wide = rows(measured(model, x, mode_energies=()))[EXPAND]
    little = rows(measured(model.to(torch.bfloat16), x.to(torch.bfloat16), mode_energies=()))[EXPAND]
    assert little.ranks == wide.ranks
    assert little.derived.perplexity == pytest.approx(wide.derived.perplexity, rel=0.05)


def test_a_mean_over_batches():
    model, batches = network(), [random_tensor(4, 3, 9, 8, seed=seed) for seed in (0, 1)]
    table = measured(model, batches[0], further=batches[1:])
    alone = [rows(measured(model, batches[0]))[EXPAND], rows(table)[EXPAND]]
    assert alone[0].derived.shapes == alone[1].derived.shapes
    assert alone[0].derived.perplexity != alone[1].derived.perplexity
    assert table.batches == 2


@pytest.mark.parametrize("how", ["stock", "vanilla", "fused", "trained in eight bits"])
def test_the_model_is_left_as_it_was(how):
    model, x = network(), random_tensor(4, 3, 9, 8)
    model.append(nn.Flatten(1, 2)).append(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).double().eval())
    lowrank.open_attention(model)
    if how == "trained in eight bits":
        lowrank.convert(model, NAMES, ASI((2, 2, 3, 3), storage="int8"))
        loss_of(model, x).backward()
    elif how != "stock":
        lowrank.convert(model, NAMES, Vanilla(), fuse=how == "fused")

    def seen():
        classes = {name: type(module) for name, module in model.named_modules()}
        return classes, list(model.state_dict()), [id(p) for p in model.parameters()], lowrank.training_state(model)

    def step():
        model.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]

    before, twin = seen(), copy.deepcopy(model)
    measured(model, x)
    after = seen()
    assert before[:3] == after[:3]
    for name, tensor in before[3].items():
        assert torch.equal(tensor, after[3][name])
    found = step()
    model = twin
    for one, other in zip(found, step(), strict=True):
        assert torch.equal(one, other)


def test_ranks_chosen_so_take_no_more_than_the_budget_as_kept():
    model, x = network(), random_tensor(4, 3, 9, 8)
    table = measured(model, x)
    for budget in (1250, 1400, 2000):
        plan = select_ranks(table, budget, storages=("int8",), derive=True)
        assert plan.derived == {DEPTHWISE: EXPAND, PROJECT: EXPAND}
        assert list(plan.ranks) == NAMES
        trained = lowrank.convert(copy.deepcopy(model), NAMES, ASI(plan, storage="int8"), everywhere=True)
        loss_of(trained, x).backward()
        kept = {layer._lowrank.name: layer._lowrank.kept_bytes for layer in lowrank.converted_layers(trained)}
        assert kept == {EXPAND: plan.nbytes, DEPTHWISE: 0, PROJECT: 0}
        assert plan.nbytes <= budget
    assert not (plain := select_ranks(table, 2000, storages=("int8",))).derived
    assert plan.perplexity < plain.perplexity


def test_it_is_chosen_where_it_is_better_and_never_worse():
    """Where so little is kept that the narrow input is cut hard, each layer is better off with a form of its own."""
    model, x = network(), random_tensor(4, 3, 9, 8)
    table = measured(model, x)
    chosen = {}
    for budget in range(200, 2000, 100):
        plan, plain = (select_ranks(table, budget, storages=("int8",), derive=derive) for derive in (True, False))
        derived = [ways for ways in _all_derived(table) if ways[0] <= budget]
        best = min([plain.perplexity, *[cost for _, cost in derived]])
        assert plan.perplexity == pytest.approx(best)
        chosen[budget] = bool(plan.derived)
        method = ASI(plan, derive=True)
        assert [method.for_layer(name).derive for name in NAMES] == [chosen[budget]] * 3
    assert set(chosen.values()) == {True, False}


def _all_derived(table):
    row = rows(table)[EXPAND]
    candidates = table.candidates(row)
    pairs = zip(candidates.nbytes, row.derived.perplexity, candidates.storages, strict=True)
    return [(nbytes, cost) for nbytes, cost, storage in pairs if storage == "int8"]


def test_a_plan_brings_it_to_the_method():
    plan = select_ranks(measured(network(), random_tensor(4, 3, 9, 8)), 1400, storages=("int8",), derive=True)
    method = ASI(plan)
    assert all(method.for_layer(name).derive for name in NAMES)
    assert method.for_layer(EXPAND).storage == "int8"
    assert method.tag == "asi_int8_derived"


@pytest.mark.parametrize("options", [{}, {"recompute": False}, {"smallest": 2**18}], ids=repr)
def test_a_layer_that_a_plan_counts_on_and_that_keeps_its_input_says_so(options, recwarn):
    """Its ranks are the input's whole shape: many times the plan's bytes."""
    model, x = network(), random_tensor(4, 3, 9, 8)
    plan = select_ranks(measured(model, x), 1250, storages=("int8",), derive=True)
    lowrank.convert(model, NAMES, ASI(plan, storage="int8"), everywhere=True, **options)
    loss_of(model, x).backward()
    said = [str(warning.message) for warning in recwarn if "keeps its whole input" in str(warning.message)]
    kept = {layer._lowrank.name for layer in lowrank.converted_layers(model) if layer._lowrank.kept_bytes > plan.nbytes}
    planned = [name for name in plan.derived if name in kept and "smallest" not in options]
    assert len(said) == len(planned) == (2 if "recompute" in options else 0)
    assert all(any(repr(name) in text for text in said) for name in planned)


def test_of_the_layers_that_are_trained_alone():
    """The depthwise layer ahead of which nothing is trained keeps a form; what follows from it was not measured."""
    table = measured(network(), random_tensor(4, 3, 9, 8)).only([DEPTHWISE, PROJECT])
    plan = select_ranks(table, 10**5, storages=("int8",), derive=True)
    assert plan.derived == {}
    assert set(plan.ranks) == {DEPTHWISE, PROJECT}


def test_of_some_layers_what_follows_is_told_where_all_of_it_is_among_them(tmp_path):
    """The perplexity of what follows is a sum, which that of a layer that is not trained has no part in."""
    table = measured(network(), random_tensor(4, 3, 9, 8))
    part = table.only([EXPAND, DEPTHWISE])
    part.save(tmp_path / "table.json")
    assert PerplexityTable.load(tmp_path / "table.json") == part
    plan, plain = (select_ranks(part, 2000, storages=("int8",), derive=derive) for derive in (True, False))
    assert plan == plain
    assert table.only(NAMES[::-1]).layers == table.layers[::-1]


def test_a_table_keeps_it(tmp_path):
    table = measured(network(), random_tensor(4, 3, 9, 8))
    table.save(tmp_path / "table.json")
    assert PerplexityTable.load(tmp_path / "table.json") == table
    uniform = table.without_mixed()
    plan = select_ranks(uniform, 10**5, derive=True)
    assert len(rows(uniform)[EXPAND].derived.perplexity) == len(ENERGIES)
    assert plan.perplexity <= rows(table)[EXPAND].derived.perplexity[len(ENERGIES) - 1]


def test_a_table_that_does_not_say_is_refused():
    table = measured(network(), random_tensor(4, 3, 9, 8), derive=False)
    with pytest.raises(TableError, match="derive=True"):
        select_ranks(table, 10**5, derive=True)
    with pytest.raises(BudgetError, match="below the minimum for these 3 layers"):
        select_ranks(measured(network(), random_tensor(4, 3, 9, 8)), 10, storages=("int8",), derive=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["derived"].update(perplexity=[1.0]), "entries"),
        (lambda row: row["derived"]["perplexity"].__setitem__(0, -1.0), "negative"),
        (lambda row: row["derived"].update(shapes={}), "'shapes'"),
        (lambda row: row["derived"].update(shapes={"other": [4, 24, 9, 8]}), "no layer 'other'"),
        (lambda row: row["derived"]["shapes"].update({DEPTHWISE: [4, 24, 9]}), "of shape"),
        (lambda row: row.update(derived=[]), "'shapes'"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, change, message):
    path = tmp_path / "table.json"
    measured(network(), random_tensor(4, 3, 9, 8)).save(path)
    content = json.loads(path.read_text())
    change(content["layers"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(TableError, match=message):
        PerplexityTable.load(path)
