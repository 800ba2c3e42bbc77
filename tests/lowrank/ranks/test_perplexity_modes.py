"""Perplexity with an energy for each mode: the candidates, their choice, and the table on disk."""

import copy
import json
import math
from itertools import pairwise, product

import pytest
import torch
from references import (
    TOLERANCE,
    TwoConvolutions,
    autograd,
    cross_entropy,
    labelled_batch,
    left_vectors,
    low_rank_tensor,
    multiply,
    random_tensor,
)
from test_perplexity import inputs_and_output_gradients, measured_bytes
from torch import nn

import lowrank
from lowrank import Candidates, PerplexityTable, SettingError, TableError
from lowrank.tensors.decompose import allowed_ranks
from lowrank.tensors.storage import kept_ranks, restore, store
from lowrank.tensors.tucker import Tucker

NAMES = ["first", "second", "head"]
ENERGIES, MODE_ENERGIES = (0.4, 0.6, 0.8), (0.5, 0.7, 0.9)


@pytest.fixture(scope="module")
def measured():
    x, labels = labelled_batch(6, 8, torch.float64)
    model, batch = TwoConvolutions().double(), (low_rank_tensor(*x.shape, decay=0.7), labels)
    table = lowrank.measure_perplexity(model, NAMES, cross_entropy, batch, ENERGIES, MODE_ENERGIES)
    return model, batch, table


def truncated(x, energies):
    """`x` with each mode cut at its own energy, by full SVDs, and the ranks; what ASI leaves whole is not cut."""
    vectors, ranks = [], []
    for mode, energy in enumerate(energies):
        basis, values, _ = torch.linalg.svd(x.movedim(mode, 0).flatten(1), full_matrices=False)
        share = values.square().cumsum(0) / values.square().sum()
        ranks.append(len(values) if energy == 1 else int((share < energy).sum()) + 1)
        vectors.append(basis)
    result = x
    for mode, (basis, rank) in enumerate(zip(vectors, kept_ranks(x.shape, allowed_ranks(x.shape, ranks)), strict=True)):
        if rank < x.shape[mode]:
            result = torch.tensordot(basis[:, :rank] @ basis[:, :rank].mT, result, ([1], [mode])).movedim(0, mode)
    return result, tuple(ranks)


def test_every_candidate_equals_a_slow_one(measured):
    model, batch, table = measured
    found = inputs_and_output_gradients(model, NAMES, batch)
    for row in table.layers:
        x, grad = found[row.name]
        layer = model.get_submodule(row.name)
        exact = autograd(layer, x, grad)[2]["weight"]
        entries = zip(row.mixed.energies, row.mixed.ranks, row.mixed.nbytes, row.mixed.perplexity, strict=True)
        for energies, ranks, nbytes, perplexity in entries:
            low, expected = truncated(x, energies)
            assert ranks == expected
            assert nbytes == measured_bytes(layer, x, ranks)
            slow = float((autograd(layer, low, grad)[2]["weight"] - exact).norm())
            torch.testing.assert_close(perplexity, slow, **TOLERANCE)


def test_the_climb_takes_the_steepest_step_and_ends_where_nothing_is_saved(measured):
    *_, table = measured
    for row in table.layers:
        points = dict(zip(row.mixed.ranks, zip(row.mixed.nbytes, row.mixed.perplexity, strict=True), strict=True))
        assert len(points) == len(row.mixed.ranks)
        assert all(nbytes < 8 * math.prod(row.input_shape) for nbytes, _ in list(points.values())[1:])
        ladders = [sorted({ranks[mode] for ranks in points}) for mode in range(len(row.input_shape))]
        at, visited = row.mixed.ranks[0], {row.mixed.ranks[0]}
        while True:
            steps = []
            for mode, ladder in enumerate(ladders):
                above = dict(pairwise(ladder)).get(at[mode])
                step = (*at[:mode], above, *at[mode + 1 :])
                steps += [step] if step in points else []
            if not steps:
                break
            visited |= set(steps)
            here = points[at]
            at = max(steps, key=lambda step: (here[1] - points[step][1]) / max(points[step][0] - here[0], 1))
        assert visited == set(points)


def test_the_choice_is_never_worse_than_with_one_energy(measured):
    *_, table = measured
    sizes = [table.candidates(row).nbytes for row in table.layers]
    better = 0
    for budget in range(sum(map(min, sizes)), sum(map(max, sizes)), 97):
        plan = lowrank.select_ranks(table, budget)
        assert plan.nbytes <= budget
        if budget >= sum(min(row.nbytes) for row in table.layers):
            published = lowrank.select_ranks(table.without_mixed(), budget)
            assert plan.perplexity <= published.perplexity
            assert all(isinstance(energy, float) for energy in published.energies.values())
            better += plan.perplexity < published.perplexity
    assert better > 0


def test_a_plan_names_the_energies_of_its_ranks(measured):
    *_, table = measured
    plan = lowrank.select_ranks(table, sum(max(table.candidates(row).nbytes) for row in table.layers))
    for row in table.layers:
        candidates = table.candidates(row)
        place = candidates.ranks.index(plan.ranks[row.name])
        assert plan.perplexity <= sum(max(table.candidates(other).perplexity) for other in table.layers)
        assert plan.energies[row.name] in {
            energies
            for energies, ranks in zip(candidates.energies, candidates.ranks, strict=True)
            if ranks == candidates.ranks[place]
        }


def test_inputs_of_two_and_three_dimensions_climb_too():
    model = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 5)).double()

    def loss(net, x):
        return net(x).square().mean()

    for shape in ((9, 6), (4, 5, 6)):
        x = random_tensor(*shape, seed=1)
        table = lowrank.measure_perplexity(model, ["0", "2"], loss, x, (0.5,), (0.3, 0.6))
        assert all(len(ranks) == len(shape) for row in table.layers for ranks in row.mixed.ranks)


def test_without_energies_for_modes_nothing_is_mixed(measured):
    model, batch, table = measured
    plain = lowrank.measure_perplexity(model, NAMES, cross_entropy, batch, ENERGIES)
    assert all(row.mixed is None for row in plain.layers)
    assert [row.ranks for row in plain.layers] == [row.ranks for row in table.layers]
    for row, other in zip(plain.layers, table.layers, strict=True):
        torch.testing.assert_close(row.perplexity, other.perplexity, **TOLERANCE)


def test_an_energy_of_a_mode_out_of_range_is_refused():
    with pytest.raises(SettingError, match=r"energy is 1\.5"):
        lowrank.measure_perplexity(TwoConvolutions(), NAMES, cross_entropy, labelled_batch(6, 8), (0.5,), (0.5, 1.5))


def test_the_table_comes_back_from_disk(measured, tmp_path):
    *_, table = measured
    table.save(tmp_path / "table.json")
    assert PerplexityTable.load(tmp_path / "table.json") == table
    table.without_mixed().save(tmp_path / "plain.json")
    rows = json.loads((tmp_path / "plain.json").read_text())["layers"]
    keys = {"name", "input_shape", "ranks", "nbytes", "perplexity", "gradient_norm"}
    assert all(set(row) == keys for row in rows)
    assert PerplexityTable.load(tmp_path / "plain.json") == table.without_mixed()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda mixed: mixed["ranks"].pop(), "need one entry for each energy"),
        (lambda mixed: mixed["energies"][0].pop(), "must be one a mode"),
        (lambda mixed: mixed["energies"][0].__setitem__(0, 1.2), "must be one a mode"),
        (lambda mixed: mixed["ranks"][0].__setitem__(0, 99), "do not fit the input shape"),
        (lambda mixed: mixed["perplexity"].__setitem__(0, -1.0), "a perplexity is negative"),
        (lambda mixed: mixed.clear(), "'energies' must be a list of lists"),
    ],
)
def test_damaged_candidates_are_refused(measured, tmp_path, damage, message):
    *_, table = measured
    table.save(tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    damage(content["layers"][1]["mixed"])
    (tmp_path / "table.json").write_text(json.dumps(content))
    with pytest.raises(TableError, match=f"layer 'second': .*{message}"):
        PerplexityTable.load(tmp_path / "table.json")


def test_a_row_without_mixed_candidates_has_those_of_the_table(measured):
    *_, table = measured
    row = table.without_mixed().layers[0]
    assert table.candidates(row) == Candidates(ENERGIES, row.ranks, row.nbytes, row.perplexity)


# Other storages


@pytest.fixture(scope="module")
def stored():
    x, labels = labelled_batch(6, 8, torch.float64)
    model, batch = TwoConvolutions().double(), (low_rank_tensor(*x.shape, decay=0.7), labels)
    table = lowrank.measure_perplexity(
        model, NAMES, cross_entropy, batch, ENERGIES, MODE_ENERGIES, storages=("input", "bfloat16", "int8")
    )
    return model, batch, table


def rounded(x, ranks, storage):
    """HOSVD of these ranks as it comes back from a storage; a mode at full rank has no factor."""
    ranks = kept_ranks(x.shape, allowed_ranks(x.shape, ranks), storage)
    bases = [None if r == n else left_vectors(x, m, r) for m, (n, r) in enumerate(zip(x.shape, ranks, strict=True))]
    core = x
    for mode, basis in enumerate(bases):
        core = core if basis is None else multiply(core, basis.mT, mode)
    return restore(store(x, Tucker(core.contiguous(), tuple(bases)), storage), x.dtype).dense()


@pytest.mark.slow
def test_each_storage_is_measured_as_it_comes_back_with_the_bytes_that_it_takes(stored):
    model, batch, table = stored
    found = inputs_and_output_gradients(model, NAMES, batch)
    for row in table.layers:
        x, grad = found[row.name]
        layer = model.get_submodule(row.name)
        exact = autograd(layer, x, grad)[2]["weight"]
        candidates = table.candidates(row)
        assert set(candidates.storages) == {"input", "bfloat16", "int8"}
        entries = zip(candidates.ranks, candidates.storages, candidates.nbytes, candidates.perplexity, strict=True)
        for ranks, storage, nbytes, perplexity in entries:
            assert nbytes == measured_bytes(layer, x, ranks, storage)
            low = autograd(layer, rounded(x, ranks, storage), grad)[2]["weight"]
            # The sign of a singular vector is free, and a tie of rounding may go either way with it.
            apart = {"input": 1e-10, "bfloat16": 1e-3, "int8": 1e-2}[storage]
            assert perplexity == pytest.approx(float((low - exact).norm()), rel=0.1, abs=apart * float(exact.norm()))
        whole = [at for at, ranks in enumerate(candidates.ranks) if ranks == row.input_shape]
        assert {candidates.storages[at] for at in whole} == {"bfloat16", "int8"}


def test_the_storage_is_chosen_with_the_ranks_as_by_trying_all(stored):
    *_, table = stored
    table = table.only(NAMES[1:])
    layers = [table.candidates(row) for row in table.layers]
    chosen = set()
    for storages in (("input",), ("int8",), ("input", "int8"), ("input", "bfloat16", "int8")):
        entries = [
            [(n, p, s) for n, p, s in zip(c.nbytes, c.perplexity, c.storages, strict=True) if s in storages]
            for c in layers
        ]
        least = sum(min(n for n, *_ in entry) for entry in entries)
        for budget in (least, 400, 700, 1500):
            plan = lowrank.select_ranks(table, budget, storages=storages)
            pairs = product(*entries)
            best = min(
                (sum(p for _, p, _ in pair), sum(n for n, *_ in pair))
                for pair in pairs
                if sum(n for n, *_ in pair) <= budget
            )
            assert (plan.perplexity, plan.nbytes) == (pytest.approx(best[0]), best[1])
            assert set(plan.storages.values()) <= set(storages)
            chosen |= set(plan.storages.values())
    assert len(chosen) > 1


@pytest.mark.parametrize("budget", [400, 1500])
def test_a_plan_keeps_in_a_model_what_it_says(stored, budget):
    model, batch, table = stored
    names = NAMES[:2]
    plan = lowrank.select_ranks(table, budget, names)
    model = lowrank.convert(copy.deepcopy(model), names, lowrank.ASI(plan))
    cross_entropy(model, batch)
    layers = [model.get_submodule(name)._lowrank for name in names]
    assert [layer.method.storage for layer in layers] == [plan.storages[name] for name in names]
    assert sum(layer.kept_bytes for layer in layers) == plan.nbytes <= budget


def test_the_storages_come_back_from_disk_and_are_checked(stored, tmp_path):
    *_, table = stored
    path = tmp_path / "table.json"
    table.save(path)
    assert PerplexityTable.load(path) == table
    content = json.loads(path.read_text())
    for damage, message in (
        (lambda mixed: mixed["storages"].pop(), "need one entry"),
        (lambda mixed: mixed["storages"].__setitem__(0, "int4"), "allowed in it: input, float32, bfloat16, int8"),
        (lambda mixed: mixed["nbytes"].__setitem__(-1, mixed["nbytes"][-1] + 1), "bytes do not fit ranks"),
    ):
        other = copy.deepcopy(content)
        damage(other["layers"][1]["mixed"])
        path.write_text(json.dumps(other))
        with pytest.raises(TableError, match=f"layer 'second': .*{message}"):
            PerplexityTable.load(path)


def test_a_storage_that_was_not_measured_is_told(measured):
    *_, table = measured
    with pytest.raises(TableError, match=r"no candidate in storage int8 for layer 'first'.*storages=\['int8'\]"):
        lowrank.select_ranks(table, 10**6, storages=("int8",))
    with pytest.raises(SettingError, match="storage is 'int4'"):
        lowrank.select_ranks(table, 10**6, storages=("int4",))


def test_a_table_of_before_counts_every_factor_and_still_loads(measured, tmp_path):
    *_, table = measured
    table.save(tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    for row in content["layers"]:
        for part in (row, row["mixed"]):
            sizes = [
                (ranks, sum(n * r for n, r in zip(row["input_shape"], ranks, strict=True))) for ranks in part["ranks"]
            ]
            part["nbytes"] = [8 * (math.prod(ranks) + factors) for ranks, factors in sizes]
    (tmp_path / "table.json").write_text(json.dumps(content))
    loaded = PerplexityTable.load(tmp_path / "table.json")
    assert [row.nbytes for row in loaded.layers] == [tuple(row["nbytes"]) for row in content["layers"]]
    assert lowrank.select_ranks(loaded, 10**5).nbytes > 0
