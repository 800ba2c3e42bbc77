"""What a report no longer has is not left beside what it has."""

import contextlib
import shutil
from pathlib import Path

import pytest

from report.__main__ import main


def made(runs):
    assert main([str(runs), "--published", str(runs)]) == 0
    return {path.relative_to(runs / "report").as_posix() for path in (runs / "report").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_tables_of_runs_that_are_gone_go_as_well(write, runs):
    write("vanilla", 2)
    alone = made(runs)
    write("vanilla", 2, dataset="flowers102")
    write("vanilla", 2, setup="B")
    assert made(runs) > alone
    for gone in ("A/mcunet/flowers102", "B"):
        shutil.rmtree(runs / "classification" / gone)
    assert made(runs) == alone
    assert not (runs / "report" / "classification" / "B").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 4, 13])  # files put in place ahead of it
def test_tables_of_runs_that_are_gone_go_also_where_a_report_was_killed_before(write, runs, monkeypatch, moment):
    write("vanilla", 2)
    alone = made(runs)
    for method in ("vanilla", "asi"):
        write(method, 2, dataset="flowers102")
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(Path, "replace", dying(Path.replace, moment))
            patch.setattr(Path, "unlink", dying(Path.unlink, moment))
            made(runs)
    shutil.rmtree(runs / "classification" / "A" / "mcunet" / "flowers102")
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Path, "replace", dying(Path.replace, moment))
        made(runs)
    assert {name for name in made(runs) if not name.endswith(".part")} == alone


class Killed(BaseException):
    """Stands for SIGKILL."""


def dying(act, count):
    """A function that does so often what it has to."""
    left = iter(range(count))

    def some(*arguments, **options):
        if next(left, None) is None:
            raise Killed
        return act(*arguments, **options)

    return some


@pytest.mark.slow
def test_what_a_user_has_changed_or_put_there_stays(write, runs):
    write("vanilla", 2)
    write("vanilla", 2, dataset="flowers102")
    made(runs)
    folder = runs / "report" / "classification" / "A" / "mcunet" / "flowers102"
    (folder / "table.md").write_text("mine")
    (folder / "predictions.png").write_bytes(b"mine")
    shutil.rmtree(runs / "classification" / "A" / "mcunet" / "flowers102")
    made(runs)
    assert {path.name for path in folder.iterdir()} == {"table.md", "predictions.png"}


@pytest.mark.slow
def test_a_list_of_anything_removes_nothing_outside(write, runs, tmp_path):
    write("vanilla", 2)
    made(runs)
    outside = tmp_path / "kept"
    outside.write_bytes(b"a")
    listed = runs / "report" / ".files.json"
    for content in ('{"../../kept": "x"}', f'{{"{outside}": 1}}', "[1]", "{", '{"a\\u0000": "x", "": 1}'):
        listed.write_text(content)
        made(runs)
        assert outside.read_bytes() == b"a"
