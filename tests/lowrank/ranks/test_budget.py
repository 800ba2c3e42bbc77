from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

import lowrank
from lowrank import BudgetError, LayerPerplexity, PerplexityTable, TableError, select_ranks

ENERGIES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MIB = 2**20


def make_table(rows, energies=None):
    """A table from [(bytes per energy, perplexity per energy), ...]; each layer's ranks tell its choices apart."""
    layers = tuple(
        LayerPerplexity(f"layer{i}", (99,), tuple((j + 1,) for j in range(len(nbytes))), tuple(nbytes), tuple(cost))
        for i, (nbytes, cost) in enumerate(rows)
    )
    energies = tuple((j + 1) / 10 for j in range(len(rows[0][0]))) if energies is None else energies
    return PerplexityTable("Net", (99,), energies, layers)


def random_rows(layers, energies, seed, largest=10**6):
    """Bytes that ascend with energy and perplexities that descend, like measured ones, with some noise."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(layers):
        nbytes = np.sort(generator.integers(1, largest, energies))
        cost = np.sort(generator.random(energies) * 10 ** generator.uniform(-3, 1))[::-1]
        if generator.random() < 0.3:
            cost = generator.permutation(cost)
        rows.append(([int(n) for n in nbytes], [float(c) for c in cost]))
    return rows


def brute_force(table, budget):
    """Least total perplexity, and of these the least bytes, over every combination."""
    totals = []
    for combination in product(range(len(table.energies)), repeat=len(table.layers)):
        nbytes = sum(layer.nbytes[j] for layer, j in zip(table.layers, combination, strict=True))
        if nbytes <= budget:
            picks = zip(table.layers, combination, strict=True)
            totals.append((sum(layer.perplexity[j] for layer, j in picks), nbytes))
    return min(totals, default=None)


def assert_consistent(plan, table, budget):
    """The plan's numbers belong to its choices, and it keeps to the budget."""
    picks = {layer.name: (layer, table.energies.index(plan.energies[layer.name])) for layer in table.layers}
    assert plan.ranks == {name: layer.ranks[j] for name, (layer, j) in picks.items()}
    assert plan.nbytes == sum(layer.nbytes[j] for layer, j in picks.values())
    assert plan.perplexity == pytest.approx(sum(layer.perplexity[j] for layer, j in picks.values()), rel=1e-12)
    assert plan.nbytes <= budget


ROWS = st.integers(1, 4).flatmap(
    lambda energies: st.lists(
        st.tuples(
            st.lists(st.integers(1, 30), min_size=energies, max_size=energies),
            st.lists(st.integers(0, 20).map(float), min_size=energies, max_size=energies),
        ),
        min_size=1,
        max_size=5,
    )
)


@given(ROWS, st.integers(0, 160))
def test_the_plan_is_the_best_of_all_combinations(rows, budget):
    # Small whole numbers: many ties, dominated choices, and sums without rounding.
    table = make_table(rows)
    best = brute_force(table, budget)
    if best is None:
        with pytest.raises(BudgetError):
            select_ranks(table, budget)
        return
    plan = select_ranks(table, budget)
    assert_consistent(plan, table, budget)
    assert (plan.perplexity, plan.nbytes) == best


@pytest.mark.parametrize("seed", range(6))
def test_on_random_tables_the_plan_is_the_best_for_a_hundred_budgets(seed):
    table = make_table(random_rows(5, 4, seed))
    nbytes = np.array([layer.nbytes for layer in table.layers])
    for budget in np.linspace(nbytes.min(1).sum(), nbytes.max(1).sum(), 100):
        plan = select_ranks(table, budget)
        assert_consistent(plan, table, budget)
        assert plan.perplexity == pytest.approx(brute_force_sorted(table)(budget), rel=1e-9)


def brute_force_sorted(table):
    """Least perplexity as a function of the budget, from the sums of all combinations at once."""
    if table not in _sums:
        nbytes, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
        for layer in table.layers:
            nbytes = np.add.outer(nbytes, np.array(layer.nbytes)).ravel()
            cost = np.add.outer(cost, np.array(layer.perplexity)).ravel()
        order = np.argsort(nbytes)
        _sums[table] = nbytes[order], np.minimum.accumulate(cost[order])
    sizes, best = _sums[table]
    return lambda budget: best[np.searchsorted(sizes, budget, side="right") - 1]


_sums = {}

# The table released for DeepLabV3-MobileNetV2 on Cityscapes (papers, B2.4): batch 8, 64 x 128 positions.
# name, channels, then per energy MB, ranks and perplexity
SHALLOW = "1 1 1 1"
ASPP_RANKS = ["3 8 2 2", "3 12 3 3", "4 19 4 4", "5 27 6 7", "6 41 10 12", "7 67 22 34"]
ASPP_MB = [0.01169, 0.01817, 0.03088, 0.05962, 0.17114, 1.44221]
RELEASED = [
    (
        "backbone.layer6.2.conv.2",
        960,
        [0.00443, 0.00835, 0.0166, 0.05301, 0.18188, 1.21335],
        [SHALLOW, "1 2 2 1", "2 4 3 2", "3 13 4 4", "4 39 7 8", "6 122 15 18"],
        [0.840843, 0.55432, 0.528455, 0.368876, 0.308749, 0.1708],
    ),
    (
        "backbone.layer7.0.conv.0",
        160,
        [0.00505, 0.00926, 0.02065, 0.05545, 0.1762, 1.17714],
        ["2 5 3 2", "3 9 4 3", "4 17 5 5", "5 27 8 8", "6 43 11 13", "7 71 21 28"],
        [0.675122, 0.615166, 0.562405, 0.466783, 0.36041, 0.229191],
    ),
    (
        "backbone.layer7.0.conv.1",
        960,
        [0.01202, 0.02773, 0.05685, 0.12431, 0.367, 3.40883],
        ["1 3 2 1", "2 7 3 2", "3 14 4 4", "4 27 7 7", "5 56 11 13", "7 161 21 31"],
        [0.473454, 0.499686, 0.428201, 0.344327, 0.259969, 0.130396],
    ),
    (
        "backbone.layer7.0.conv.2",
        960,
        [0.00443, 0.00443, 0.00443, 0.00443, 0.02678, 0.25677],
        [SHALLOW, SHALLOW, SHALLOW, SHALLOW, "2 7 2 1", "5 58 6 6"],
        [0.723661, 0.613458, 0.613458, 0.613458, 0.567226, 0.266146],
    ),
    *(
        (f"decode_head.aspp_modules.{branch}", 320, ASPP_MB, ASPP_RANKS, perplexity)
        for branch, perplexity in enumerate(
            [
                [0.02096, 0.017978, 0.014517, 0.010969, 0.008177, 0.004568],
                [0.052883, 0.038751, 0.030957, 0.024232, 0.018704, 0.010778],
                [0.041326, 0.034234, 0.02788, 0.022515, 0.017657, 0.010499],
                [0.04598, 0.037304, 0.03096, 0.024674, 0.019272, 0.011039],
            ]
        )
    ),
    (
        "decode_head.bottleneck",
        640,
        [0.00321, 0.00565, 0.01794, 0.05379, 0.1926, 1.10364],
        [SHALLOW, "1 2 1 1", "2 7 1 1", "3 21 2 2", "5 69 4 4", "6 182 12 13"],
        [0.22516, 0.192218, 0.146742, 0.096804, 0.059674, 0.041732],
    ),
]


def released_table():
    layers = []
    for name, channels, _, ranks, perplexity in RELEASED:
        shape = (8, channels, 64, 128)
        entries = tuple(tuple(int(rank) for rank in entry.split()) for entry in ranks)
        nbytes = (4 * (prod(entry) + sum(n * r for n, r in zip(shape, entry, strict=True))) for entry in entries)
        layers.append(LayerPerplexity(name, shape, entries, tuple(nbytes), tuple(perplexity)))
    return PerplexityTable("EncoderDecoder", (8, 3, 512, 1024), ENERGIES, tuple(layers))


def test_the_released_memories_follow_from_ranks_and_shapes(tmp_path):
    table = released_table()
    for (name, _, megabytes, _, _), layer in zip(RELEASED, table.layers, strict=True):
        assert [round(n / MIB, 5) for n in layer.nbytes] == pytest.approx(megabytes, abs=1.1e-5), name
    table.save(tmp_path / "released.json")  # and the table is one that the package takes
    assert PerplexityTable.load(tmp_path / "released.json") == table


@pytest.mark.slow
def test_on_the_released_table_the_plan_is_the_best_for_a_hundred_budgets():
    table = released_table()
    nbytes = np.array([layer.nbytes for layer in table.layers])
    best = brute_force_sorted(table)
    low, high = nbytes.min(1).sum(), nbytes.max(1).sum()
    _sums.clear()  # ten million sums
    for budget in np.geomspace(low, high * 1.01, 100).astype(int):
        budget = max(int(budget), int(low))
        plan = select_ranks(table, budget)
        assert_consistent(plan, table, budget)
        assert plan.perplexity == pytest.approx(best(budget), rel=1e-9)


def milp_optimum(table, budget):
    nbytes = np.array([layer.nbytes for layer in table.layers], dtype=float)
    cost = np.array([layer.perplexity for layer in table.layers])
    layers, energies = cost.shape
    one_each = np.kron(np.eye(layers), np.ones(energies))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(nbytes.ravel()[None] / budget, -np.inf, 1)]
    options = {"mip_rel_gap": 0.0}
    solved = milp(cost.ravel(), constraints=constraints, integrality=1, bounds=Bounds(0, 1), options=options)
    return solved.fun


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("share", [0.002, 0.05, 0.3, 0.9])
def test_on_fifty_two_layers_the_plan_equals_an_integer_programme(seed, share):
    table = make_table(random_rows(52, 6, seed), ENERGIES)
    nbytes = np.array([layer.nbytes for layer in table.layers])
    low, high = int(nbytes.min(1).sum()), int(nbytes.max(1).sum())
    budget = low + int(share * (high - low))
    plan = select_ranks(table, budget)
    assert_consistent(plan, table, budget)
    assert plan.perplexity == pytest.approx(milp_optimum(table, budget), rel=1e-6)


def test_the_budget_of_just_the_minimum_is_enough():
    table = released_table()
    least = sum(min(layer.nbytes) for layer in table.layers)
    plan = select_ranks(table, least)
    assert plan.nbytes == least
    # Where the least bytes have several perplexities, the least of them is taken.
    assert plan.energies["backbone.layer7.0.conv.2"] == 0.5


@pytest.mark.parametrize("short", [1, 0.5, 10**4])
def test_a_budget_below_the_minimum_is_refused_and_the_minimum_stated(short):
    table = released_table()
    least = sum(min(layer.nbytes) for layer in table.layers)
    with pytest.raises(BudgetError, match=rf"\b{least} bytes"):
        select_ranks(table, least - short)


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("-inf"), None, "1e6", [10**6]])
def test_a_budget_that_is_no_size_is_refused(budget):
    with pytest.raises(BudgetError, match=r"allowed is a number of bytes, such as 200_000$"):
        select_ranks(released_table(), budget)


def test_a_budget_without_bound_takes_the_least_perplexity_of_every_layer():
    table = released_table()
    plan = select_ranks(table, float("inf"))
    assert plan.perplexity == pytest.approx(sum(min(layer.perplexity) for layer in table.layers))


def test_a_budget_that_the_table_cannot_use_up_is_told():
    table = make_table([([10, 20], [2.0, 1.0]), ([10, 30, 40], [2.0, 1.0, 1.0])])
    with pytest.warns(UserWarning, match=r"all 2 layers take 50 of the 56 bytes .* higher energies"):
        select_ranks(table, 56)


@pytest.mark.parametrize("budget", [49, 55, float("inf")])
def test_a_budget_that_is_used_or_has_no_bound_is_no_matter_for_a_warning(budget, recwarn):
    select_ranks(make_table([([10, 20], [2.0, 1.0]), ([10, 30], [2.0, 1.0])]), budget)
    assert not recwarn.list


def test_a_fraction_of_a_byte_is_dropped():
    table = make_table([([10, 20], [1.0, 0.0])])
    assert select_ranks(table, 19.999).nbytes == 10
    assert select_ranks(table, 20.0).nbytes == 20


def test_the_budget_is_kept_to_the_byte():
    # A thousandth of a MiB is 1048 bytes; rounding sizes to that grid would call this choice free.
    table = make_table([([1, 1048], [1.0, 0.0])] * 9)
    assert select_ranks(table, 9 * 1048 - 1).nbytes == 8 * 1048 + 1


def test_of_equally_good_choices_the_smallest_is_taken():
    table = make_table([([30, 10, 20], [1.0, 1.0, 1.0]), ([5, 7, 6], [2.0, 1.0, 1.0])])
    plan = select_ranks(table, 1000)
    assert plan.nbytes == 10 + 6
    assert plan.ranks == {"layer0": (2,), "layer1": (3,)}


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_layers_are_chosen_by_name(kind):
    table = released_table()
    names = table.names[-2:]
    plan = select_ranks(table, MIB, names=kind(names))
    assert list(plan.ranks) == names
    assert plan == select_ranks(table.only(names), MIB)


def test_a_layer_that_the_table_does_not_have_is_refused():
    with pytest.raises(TableError, match="'tail'"):
        select_ranks(released_table(), MIB, names=["tail"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_perplexity_that_is_not_finite_is_refused(bad):
    with pytest.raises(lowrank.LowRankError):
        select_ranks(make_table([([10, 20], [bad, 1.0]), ([10, 20], [2.0, 1.0])]), 40)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_choice_does_not_depend_on_the_scale_of_the_perplexities(scale):
    rows = random_rows(8, 6, seed=3)
    plain = select_ranks(make_table(rows), 2 * 10**6)
    scaled = select_ranks(make_table([(nbytes, [scale * c for c in cost]) for nbytes, cost in rows]), 2 * 10**6)
    assert scaled.ranks == plain.ranks


def test_asi_takes_the_plan_as_it_is():
    plan = select_ranks(make_table([([10, 20], [2.0, 1.0])]), 15)
    assert lowrank.ASI(plan).for_layer("layer0").ranks_for((99,)) == (1,)
