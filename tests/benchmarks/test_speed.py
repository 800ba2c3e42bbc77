"""The speed benchmark: what it compares computes the same thing, and its table and fits are right."""

import math

import pandas as pd
import pytest
import torch

import lowrank
from benchmarks import published, speed
from benchmarks.comparisons import (
    Comparison,
    NoWeightGradient,
    Setting,
    probe,
    random_basis,
    training_step,
)
from benchmarks.networks import batch_of, build, loss_of, trained_layers
from benchmarks.pairs import ratio
from lowrank.tensors import decompose

TINY = Setting(batch=2, size=32, networks=("mcunet",))


def test_the_published_iteration_is_that_of_the_library():
    x = torch.randn(6, 8, 5, 4, dtype=torch.float64)
    starts = [random_basis(n, r).double() for n, r in zip(x.shape, (2, 3, 2, 3), strict=True)]
    own, _ = decompose.subspace_iteration(x, starts, "published")
    torch.testing.assert_close(published.subspace_iteration(x, starts).dense(), own.dense(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("energy", [0.4, 0.8, 0.95])
def test_the_published_hosvd_is_that_of_the_library(energy):
    x = torch.randn(6, 8, 5, 4, dtype=torch.float64)
    own, plain = decompose.hosvd(x, energy), published.hosvd(x, energy)
    assert own.ranks == plain.ranks
    torch.testing.assert_close(plain.dense(), own.dense(), rtol=1e-10, atol=1e-10)


def test_the_limit_has_the_exact_input_gradients_and_no_weight_gradient():
    batch, results = batch_of(2, 32), {}
    for method in (None, NoWeightGradient()):
        model = build("mcunet", 32)
        names = trained_layers("mcunet", model, 4)
        if method is not None:
            lowrank.convert(model, names, method)
        loss_of(model, batch).backward()
        results[method] = {name: parameter.grad for name, parameter in model.named_parameters()}
    stock, limit = results.values()
    torch.testing.assert_close(limit["classifier.bias"], stock["classifier.bias"], rtol=1e-4, atol=1e-6)
    assert all(limit[f"{name}.weight"].count_nonzero() == 0 for name in names)
    assert all(stock[f"{name}.weight"].count_nonzero() > 0 for name in names)


def test_the_limit_keeps_no_input_and_activations_read_their_bits_there():
    kept = []
    for method in (NoWeightGradient(), lowrank.ASI((1, 1, 1, 1))):
        model = build("mcunet", 32)
        lowrank.convert(model, trained_layers("mcunet", model, "all"), method)
        kept.append(lowrank.saved_bytes(model, lambda model, batch: loss_of(model, batch), batch_of(2, 32)))
    assert 0 < kept[0] < kept[1]


def test_a_ratio_is_the_median_of_pairs():
    first, second = iter([9.0, 1.0, 6.0, 8.0]), iter([9.0, 1.0, 2.0, 2.0])
    found = ratio(lambda: next(first), lambda: next(second), 3)
    assert (found.median, found.low, found.high) == (3.0, 1.0, 4.0)


@pytest.mark.slow
def test_every_comparison_can_be_made(monkeypatch):
    """Both ways of each section's first comparisons and of its last run."""
    monkeypatch.setattr("benchmarks.comparisons._Probe.__call__", lambda probe: 1.0)
    for name, section in speed.SECTIONS.items():
        comparisons = list(section(TINY))
        assert len({(c.section, c.case, c.first, c.second) for c in comparisons}) == len(comparisons), name
        for comparison in {*comparisons[:4], comparisons[-1]}:
            if comparison.section == "perplexity":
                continue  # full SVDs of 52 layers at six energies
            first, second = comparison.build()
            first(), second()


def test_a_probe_times_steps_in_its_process():
    assert probe("asi", 2, 32, steps=1) > 0


def test_the_table_grows_and_nothing_is_compared_twice(tmp_path, capsys):
    made = []

    def comparison(case, size, times):
        def build():
            made.append(case)
            return lambda: times, lambda: 1.0

        return Comparison("growth", case, f"batch {size}", "batch 16", build)

    comparisons = [comparison("a", 32, 4.0), comparison("b", 64, 16.0)]
    speed.run(comparisons[:1], TINY, 3, tmp_path / "speed.csv")
    frame = speed.run(comparisons, TINY, 3, tmp_path / "speed.csv")
    assert made == ["a", "b"]
    assert list(frame.ratio) == [4.0, 16.0]
    assert len(pd.read_csv(tmp_path / "speed.csv")) == 2
    assert speed.exponents(frame)["batch"] == pytest.approx(2), "four times the time for twice the size"
    assert "| batch  |          2 |" in speed.markdown(frame)
    assert "exponent" not in speed.markdown(frame.assign(section="reads")), "nothing has grown"
    means = speed.summary(frame)
    assert list(means["geometric mean"]) == [pytest.approx(4.0), pytest.approx(16.0)]
    assert math.isclose(means.greatest.max(), 16.0)


def test_the_plot_shows_every_networks_steps(tmp_path):
    rows = [
        {"section": "model step", "case": case, "first": first, "second": "vanilla", "ratio": 1.2, "low": 1, "high": 2}
        for case in ("mcunet, last 2", "mcunet, last 4")
        for first in ("asi", "hosvd_0.8")
    ]
    paths = speed.draw_speed(pd.DataFrame(rows), tmp_path)
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_steps_of_models_come_first_in_the_order_of_networks_depths_and_ways(tmp_path):
    def comparison(section, case, way):
        return Comparison(section, case, way, "vanilla", lambda: (lambda: 1.0, lambda: 1.0))

    measured = [("growth", "step", "depth 8"), ("model step", "mcunet, last all", "asi")]
    measured += [("model step", "mcunet, last 4", way) for way in ("asi", "vanilla_fused")]
    measured += [("model step", "mobilenet_v2, last 2", "asi")]
    frame = speed.run([comparison(*names) for names in measured], TINY, 1, tmp_path / "speed.csv")
    assert list(zip(frame.section, frame.case, frame["first"], strict=True)) == [measured[i] for i in (4, 3, 2, 1, 0)]
    assert list(pd.read_csv(tmp_path / "speed.csv").case) == list(frame.case)


def test_a_line_of_batches_for_each_way(tmp_path):
    rows = [
        {"section": "batch step", "case": "mcunet, last 4", "first": way, "second": "vanilla", "batch": batch}
        | {"size": 32, "threads": 1, "ratio": 1 + 1 / batch, "low": 0.9, "high": 2}
        for way in ("vanilla", "lean", "lean in 2 parts")
        for batch in (1, 2, 4)
    ]
    frame = pd.DataFrame(rows)
    paths = speed.draw_batches(frame, tmp_path)
    assert [path.name for path in paths] == ["speed_by_batch.png", "speed_by_batch.svg"]
    assert all(path.stat().st_size > 1000 for path in paths)
    assert speed.draw_batches(frame.assign(section="model step"), tmp_path) == []


def test_parts_of_a_batch_have_its_gradient_between_them(monkeypatch):
    """Of two equal parts the mean losses add up to twice that of the whole."""
    made = []
    monkeypatch.setattr("benchmarks.comparisons.build", lambda *sizes: made.append(build(*sizes)) or made[-1])
    for parts in (1, 2):
        training_step("mcunet", "4", None, TINY, parts=parts)()
    whole, halves = ({n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in made)
    assert whole.keys() == halves.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(halves[name], 2 * grad, rtol=1e-3, atol=1e-5)
