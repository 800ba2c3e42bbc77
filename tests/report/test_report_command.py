# ruff: noqa: RUF001 - the signs that the tables use
"""The command, in process and as users start it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiment import ExperimentError, add_planned
from report.__main__ import main
from report.drawn import NOTES
from report.output import write_all

ROOT = Path(__file__).parents[2]
TABLES = {"table.md", "table.csv", "table.tex"}
FILES = TABLES | {"pareto.png", "pareto.svg"}
PUBLISHED = {"published.png", "published.svg"}  # of the synthetic records' model and data set there are


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def command(*arguments, folder):
    return subprocess.run(
        [sys.executable, "-m", "report", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


def refused(capsys, *arguments):
    """The one line that the command says when it refuses."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.slow
def test_every_file_is_written_and_named(write, runs, capsys):
    write("vanilla", 2)
    write("asi", 2, dataset="cub")
    assert main([str(runs), "--published", str(runs)]) == 0
    said = capsys.readouterr().out
    for dataset in ("pets", "cub"):
        folder = runs / "report" / "classification" / "A" / "mcunet" / dataset
        assert {path.name for path in folder.iterdir()} == FILES
        assert all(f"{folder / name}\n" in said for name in FILES)
        assert f"mcunet on {dataset}, setup A (classification)\n" in said
    setup = runs / "report" / "classification" / "A"
    assert {path.name for path in setup.iterdir() if path.is_file()} == TABLES
    assert said.endswith(f"all on one page: {runs / 'report' / 'index.html'}\n")
    assert '"mcunet","cub",2' in (runs / "report" / "index.html").read_text()


@pytest.mark.slow
def test_what_is_planned_is_shown_as_missing(write, runs):
    finished = write("vanilla", 2, seed=1).run
    add_planned(runs, [finished, replace(finished, seed=2), replace(finished, method="asi")])
    add_planned(runs, [replace(finished, dataset="cub")])
    assert main([str(runs), "--published", str(runs)]) == 0
    text = (runs / "report" / "classification" / "A" / "mcunet" / "pets" / "table.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    column = {title: place for place, title in enumerate(cells[0])}
    assert [(row[column["Method"]], row[column["n"]]) for row in cells[2:]] == [
        ("vanilla", "1 of 2"),
        ("asi", "0 of 1"),
    ]
    assert [row[column["Test (%)"]] for row in cells[2:]] == ["50.0", "missing"]
    cub = runs / "report" / "classification" / "A" / "mcunet" / "cub"
    assert {path.name for path in cub.iterdir()} == TABLES
    assert "No run is finished" in (cub / "table.md").read_text()
    assert "missing" in (runs / "report" / "classification" / "A" / "table.md").read_text()
    assert (runs / "report" / "index.html").read_text().count('"planned",null,') == 3  # runs that are not there


@pytest.mark.slow
def test_published_points_have_a_figure(write, runs, tmp_path):
    write("asi", 2)
    entry = "- {setup: A, model: mcunet, dataset: pets, method: asi, layers: 2, accuracy: 38.75, memory_mib: 2}\n"
    (tmp_path / "classification_curves.yaml").write_text(entry)
    assert main([str(runs), "--published", str(tmp_path)]) == 0
    folder = runs / "report" / "classification" / "A" / "mcunet" / "pets"
    assert {path.name for path in folder.iterdir()} == FILES | PUBLISHED


@pytest.mark.slow
def test_as_a_subprocess_twice_with_identical_files(write, runs, tmp_path):
    """In the default folders, seen from where the runs are; a second process must write the same bytes."""
    for seed in (1, 2):
        write("vanilla", 2, seed=seed, test=0.8 + 0.01 * seed)
        write("asi", "all", seed=seed, memory=5000)
    first = command(folder=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    before = contents(runs / "report")
    assert {path.name for path in before} == FILES | PUBLISHED | {"index.html"}
    (runs / "report" / NOTES).unlink()  # so that the figures are drawn again
    second = command(folder=tmp_path)
    assert second.stdout == first.stdout
    assert contents(runs / "report") == before


@pytest.mark.slow
def test_output_and_baseline(write, runs, tmp_path, capsys):
    write("hosvd_0.8", 2, memory=4 * 2**20)
    write("asi", 2, memory=2**20)
    assert main([str(runs), "--output", str(tmp_path / "new" / "out"), "--baseline", "hosvd_0.8"]) == 0
    assert "4.00×" in capsys.readouterr().out
    assert not (runs / "report").exists()
    assert len(contents(tmp_path / "new" / "out")) == len(FILES | PUBLISHED) + len(TABLES) + 1


@pytest.mark.slow
def test_published_accuracies_are_shown(write, runs, tmp_path, capsys):
    write("asi", 2)
    entry = "- {setup: A, model: mcunet, dataset: pets, method: asi, layers: 2, accuracy: 38.75}\n"
    (tmp_path / "classification.yaml").write_text(entry)
    assert main([str(runs), "--published", str(tmp_path)]) == 0
    table = runs / "report" / "classification" / "A" / "mcunet" / "pets" / "table.md"
    assert "| 38.8 |" in " ".join(table.read_text().split())


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("RUNS_DIR", "--output", "--baseline", "--published"))


def test_no_records(tmp_path, capsys):
    assert "no finished run" in refused(capsys, tmp_path)
    assert not (tmp_path / "report").exists()


def test_no_folder(tmp_path, capsys):
    assert "is not a folder" in refused(capsys, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def nested(depth):
    return '{"schema": 1, "x": ' + "[" * depth + "]" * depth + "}"


DAMAGED = {
    "half": lambda path, whole: path.write_text(whole[: len(whole) // 2]),
    "empty": lambda path, whole: path.write_text(""),
    "null": lambda path, whole: path.write_text("null"),
    "a list": lambda path, whole: path.write_text("[]"),
    "no UTF-8": lambda path, whole: path.write_bytes(b"\xff\xfe"),
    "lacking": lambda path, whole: path.write_text('{"schema": 1}'),
    "another schema": lambda path, whole: path.write_text(whole.replace('"schema": 1', '"schema": 2')),
    "another task": lambda path, whole: path.write_text(whole.replace('"classification"', '"detection"')),
    "nested": lambda path, whole: path.write_text(nested(100_000)),
    "many digits": lambda path, whole: path.write_text(whole.replace("1000000000", "9" * 5000)),
    "a huge number": lambda path, whole: path.write_text(whole.replace("1000000000", "1" + "0" * 400)),
    "a large number": lambda path, whole: path.write_text(whole.replace("1000000000", "1e300")),
    "a negative number": lambda path, whole: path.write_text(whole.replace("1000000000", "-5")),
    "a folder": lambda path, whole: (path.unlink(), path.mkdir()),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_record_is_left_out_with_one_line_and_hides_no_other(write, runs, capsys, damage):
    write("vanilla", 2)
    path = write("asi", 2).run.folder(runs) / "result.json"
    DAMAGED[damage](path, path.read_text())
    assert main([str(runs), "--published", str(runs)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"report: warning: left out: {path}")
    assert said.err.count("\n") == 1
    assert "vanilla" in said.out
    assert "asi" not in (runs / "report/classification/A/mcunet/pets/table.md").read_text()


def test_damaged_records_alone_are_an_error_that_names_one(write, runs, capsys):
    for method in ("vanilla", "asi"):
        path = write(method, 2).run.folder(runs) / "result.json"
        path.write_text("{")
    assert "asi/layers2/seed0/result.json" in refused(capsys, runs)
    assert not (runs / "report").exists()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "[[[[", "null", "[" * 100_000])
def test_a_damaged_plan_is_left_out_with_one_line(write, runs, capsys, text):
    finished = write("vanilla", 2).run
    add_planned(runs, [replace(finished, dataset="cub")])
    (path,) = runs.rglob("planned.json")
    path.write_text(text)
    assert main([str(runs), "--published", str(runs)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"report: warning: left out: {path}")
    assert said.err.count("\n") == 1


def test_unknown_baseline(write, runs, capsys):
    write("vanilla", 2)
    write("asi", 2)
    assert "no run of the baseline vanila; there are asi, vanilla" in refused(capsys, runs, "--baseline", "vanila")


def test_output_that_is_a_file(write, runs, tmp_path, capsys):
    write("vanilla", 2)
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(output) in refused(capsys, runs, "--output", output)
    assert (tmp_path / "file").read_text() == "mine"


def test_damaged_published_accuracies(write, runs, tmp_path, capsys):
    write("vanilla", 2)
    (tmp_path / "classification.yaml").write_text("- {setup: A}")
    assert "classification.yaml, entry 1" in refused(capsys, runs, "--published", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["nothing", "damaged", "output"])
def test_errors_of_the_subprocess(write, runs, tmp_path, mistake):
    arguments = [runs]
    runs.mkdir()
    if mistake != "nothing":
        path = write("vanilla", 2).run.folder(runs) / "result.json"
    if mistake == "damaged":
        path.write_text("{")
    if mistake == "output":
        (tmp_path / "file").write_text("")
        arguments += ["--output", tmp_path / "file"]
    done = command(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_unknown_option_of_the_subprocess(tmp_path):
    done = command("--colour", folder=tmp_path)
    assert done.returncode == 2
    assert "--colour" in done.stderr


def test_files_are_written_all_or_none(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "b").mkdir()
    with pytest.raises(ExperimentError, match="is a folder"):
        write_all({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert contents(tmp_path) == {Path("a"): b"old"}
    write_all({tmp_path / "a": b"new", tmp_path / "c" / "d": b"\x00\xff"})
    assert contents(tmp_path) == {Path("a"): b"new", Path("c/d"): b"\x00\xff"}


@pytest.mark.slow
def test_an_output_that_cannot_be_written_replaces_nothing(write, runs, capsys):
    """A folder stands where one of the files belongs."""
    write("vanilla", 2)
    assert main([str(runs)]) == 0
    folder = runs / "report" / "classification" / "A" / "mcunet" / "pets"
    (folder / "table.tex").unlink()
    (folder / "table.tex").mkdir()
    before = contents(runs)
    capsys.readouterr()
    write("asi", 2)
    after_run = contents(runs)
    assert "table.tex" in refused(capsys, runs)
    assert contents(runs) == after_run
    assert before.items() <= after_run.items()
