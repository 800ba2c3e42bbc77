"""Runs started by hand go on where the folder of all runs is moved to, with what they take from one another."""

import pytest
from commands import arguments, execute

OPTIONS = ("--model.layers", 2, "--seed_everything", 3)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """The folder of all runs of a pretraining, HOSVD, a table, and ASI that takes from all of these; moved away."""
    from classification.cli import main

    old = tmp_path_factory.mktemp("runs") / "old"
    assert main(arguments("fit", old, "--model.layers", 1)) == 0
    weights = ("--model.weights", next(old.rglob("best.ckpt")))
    assert main(arguments("fit", old, *OPTIONS, *weights, method="hosvd_0.8")) == 0
    assert main(arguments("measure", old, *OPTIONS, *weights)) == 0
    (table,), (hosvd,) = old.rglob("perplexity.json"), old.rglob("hosvd_0.8/*/seed3")
    budget = ("--model.budget.table", table, "--model.budget.run", hosvd)
    assert main(arguments("fit", old, *OPTIONS, *weights, *budget, method="asi")) == 0
    return old.rename(old.with_name("new"))


@pytest.mark.slow
def test_a_moved_run_finds_its_budget_its_table_and_its_weights(by_hand, capsys):
    (run,) = by_hand.rglob("asi_*/*/seed3")
    command = ["fit", "--config", str(run / "config.yaml"), "--runs_dir", str(by_hand)]
    printed = execute(command, capsys)
    assert printed.count("is not there; taken from") == 3
    assert f"done already: mcunet on digits, setup B, {run.parts[-3]}" in printed
    (run / "result.json").unlink()
    assert "resuming: " in execute(command, capsys)
    assert str(by_hand.with_name("old")) not in (run / "config.yaml").read_text()
    assert "taken from" not in execute(["fit", "--config", str(run / "config.yaml")], capsys)
