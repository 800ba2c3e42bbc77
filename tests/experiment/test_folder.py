import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiment import ExperimentError, Record, Run, RunFolder, Status
from experiment.errors import InUseError
from experiment.execute import at_work_on, nothing_to_do

IDENTITY = {"model": {"name": "mcunet", "layers": 2}, "seed": 1, "mean": (0.5, 0.5)}
HOLDER = """
import sys
from pathlib import Path
from experiment import RunFolder
with RunFolder(Path(sys.argv[1]), {}, "result.json").locked(""):
    print("locked", flush=True)
    sys.stdin.read()
"""


def folder(path, result="result.json", **changes):
    return RunFolder(path / "run", IDENTITY | changes, result)


def write_result(run):
    """What the run leaves when it is done."""
    if run.result.name == "result.json":
        of = Run("classification", "A", "mcunet", "pets", "vanilla", 2, 1)
        Record(of, {}, {}, {}, {}, {"config_hash": run.identity_hash}).save(run.path)
    else:
        run.result.write_text("{}")


def started(path):
    run = folder(path)
    with run.locked("a: 1\n"):
        pass
    return run


@pytest.mark.parametrize("error", [ExperimentError("x"), KeyboardInterrupt()])
def test_what_fails_before_there_is_something_to_keep_leaves_nothing_behind(error, tmp_path):
    run = RunFolder(tmp_path / "runs" / "a" / "run", IDENTITY, "result.json")

    def fail(begun):
        with run.locked("a: 1\n", begun):
            (run.path / "logs").mkdir(exist_ok=True)
            (run.path / "logs" / "log").touch()
            raise error

    def failed(begun):
        with pytest.raises(type(error)):
            fail(begun)

    failed(lambda: False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    failed(lambda: False)
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]
    run.path.mkdir(parents=True)
    (run.path / "failure.log").write_text("of an earlier try, as a sweep leaves it")
    failed(lambda: False)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    failed(lambda: True)
    there = sorted(run.path.rglob("*"))
    assert (run.path / "logs" / "log") in there
    failed(lambda: False)  # of what was there before, nothing is taken away
    assert sorted(run.path.rglob("*")) == there


def test_the_data_set_is_told_beside_the_identity_and_is_no_part_of_it(tmp_path):
    named, nameless = (
        RunFolder(tmp_path / "run", IDENTITY, "perplexity.json", "ab", run=run)
        for run in (Run("segmentation", "finetune", "net", "pets", "perplexity", 2, 1), None)
    )
    with named.locked(""):
        named.result.write_text("{}")
    told = json.loads((named.path / "identity.json").read_text())
    assert (told["dataset"], told["data_fingerprint"]) == ("pets", "ab")
    assert nameless.status() is Status.DONE
    assert (nameless.difference, nameless.identity_hash) == (None, named.identity_hash)


def test_a_folder_that_does_not_exist_is_new(tmp_path):
    run = folder(tmp_path)
    assert (run.status(), run.last_checkpoint) == (Status.NEW, None)
    assert not run.path.exists()


def test_a_folder_with_a_checkpoint_is_interrupted(tmp_path):
    run = started(tmp_path)
    assert run.status() is Status.NEW
    (run.path / "checkpoints" / "last.ckpt").touch()
    assert run.status() is Status.INTERRUPTED
    assert run.last_checkpoint == run.path / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("result", ["result.json", "perplexity.json"])
def test_a_folder_with_its_result_is_done(tmp_path, result):
    started(tmp_path)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    run = folder(tmp_path, result)
    write_result(run)
    assert run.status() is Status.DONE
    assert folder(tmp_path, "other.json").status() is Status.INTERRUPTED


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 2}, "seed is 1 there and 2 here"),
        ({"model": {"name": "mcunet", "layers": 4}}, r"model\.layers is 2 there and 4 here"),
        ({"colour": "red"}, "colour is None there and 'red' here"),
        ({"mean": (0.5, 0.4)}, r"mean is \[0.5, 0.5\] there and \[0.5, 0.4\] here"),
        ({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, "and 2 more"),
    ],
)
@pytest.mark.parametrize("saved", ["result.json", "perplexity.json", "checkpoints/last.ckpt", "own/weights.pth"])
def test_a_run_of_another_identity_is_refused_with_the_difference(tmp_path, changes, difference, saved):
    run = started(tmp_path)
    (run.path / saved).parent.mkdir(exist_ok=True)
    (run.path / saved).touch()
    with pytest.raises(ExperimentError, match=difference) as raised:
        folder(tmp_path, **changes).status()
    assert str(run.path) in str(raised.value)


def test_a_run_with_other_settings_that_saved_nothing_gives_way_once_nobody_is_at_work_in_it(tmp_path, capsys):
    killed, now = (named(tmp_path, RUN.method, data_fingerprint=data, seed=data) for data in ("first", "second"))
    with killed.locked("a: 1\n"):
        (killed.checkpoints / ".last.ckpt.0a1b2c3d.part").touch()
        assert nothing_to_do(RUN, now, dry_run=True).startswith("would run")
        with pytest.raises(InUseError), at_work_on(RUN, now, "a: 2\n"):
            pass
    assert capsys.readouterr().out == ""
    with at_work_on(RUN, now, "a: 2\n"):
        assert (now.path / "config.yaml").read_text() == "a: 2\n"
    said = capsys.readouterr().out
    assert said.startswith(f"note: the run with other settings in {now.path} had saved nothing")
    assert "seed is 'first' there and 'second' here" in said
    with at_work_on(RUN, named(tmp_path, RUN.method, data_fingerprint="second", seed="second"), ""):
        assert capsys.readouterr().out == ""


def test_a_run_that_was_done_while_it_was_asked_for_stays(tmp_path):
    asked, run = folder(tmp_path, seed=2), started(tmp_path)
    assert asked.status() is Status.NEW
    write_result(run)
    with pytest.raises(ExperimentError, match="seed is 1 there and 2 here"), asked.locked("a: 2\n"):
        pass
    assert run.status() is Status.DONE


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[]", b"3", b"{}"])
def test_a_damaged_identity_is_refused(tmp_path, content):
    run = started(tmp_path)
    write_result(run)
    (run.path / "identity.json").write_bytes(content)
    with pytest.raises(ExperimentError, match="delete") as raised:
        run.status()
    assert str(run.path) in str(raised.value)


def test_the_identity_survives_its_file(tmp_path):
    # Tuples, None, numbers and nested mappings come back from JSON as something that is still the same run.
    identity = {"none": None, "tuple": (1, 2.5), "nested": {"path": Path("a/b"), "true": True}}
    run = RunFolder(tmp_path / "run", identity, "result.json")
    with run.locked(""):
        pass
    assert RunFolder(tmp_path / "run", identity, "result.json").status() is Status.NEW


def test_the_identity_hash_depends_on_values_and_not_on_the_order_of_keys(tmp_path):
    reordered = {key: IDENTITY[key] for key in reversed(IDENTITY)}
    reordered["model"] = {"layers": 2, "name": "mcunet"}
    same = RunFolder(tmp_path, reordered, "result.json").identity_hash
    assert same == folder(tmp_path).identity_hash
    assert same != folder(tmp_path, seed=2).identity_hash
    assert same != folder(tmp_path, model={"name": "mcunet", "layers": "2"}).identity_hash


def test_a_number_that_another_process_read_as_a_float_is_of_the_same_run(tmp_path):
    first = folder(tmp_path, batches=2, clip=1.0)
    with first.locked(""):
        write_result(first)
    second = folder(tmp_path, batches=2.0, clip=1)
    assert (second.status(), second.identity_hash) == (Status.DONE, first.identity_hash)
    with second.locked(""):
        assert folder(tmp_path, batches=2).identity_hash != first.identity_hash  # without the clip another run
    assert folder(tmp_path, batches=2, clip=1).identity_hash == first.identity_hash


def test_the_lock_writes_the_config_beside_the_identity(tmp_path):
    run = folder(tmp_path)
    with run.locked("a: 1\n"):
        assert (run.path / "config.yaml").read_text() == "a: 1\n"
        assert run.checkpoints.is_dir()


def on_data(path, fingerprint):
    return RunFolder(path / "run", IDENTITY, "result.json", fingerprint)


@pytest.mark.parametrize("done", [False, True])
def test_a_run_on_other_data_is_refused(tmp_path, done):
    with on_data(tmp_path, "first").locked(""):
        pass
    if done:
        write_result(on_data(tmp_path, "first"))
    else:
        (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    expected = Status.DONE if done else Status.INTERRUPTED
    assert on_data(tmp_path, "first").status() is expected
    assert on_data(tmp_path, None).status() is expected  # the data is not there to be compared
    with pytest.raises(ExperimentError, match=r"other data \(fingerprint first there, second here\); restore"):
        on_data(tmp_path, "second").status()


def test_the_data_is_no_part_of_the_identity_hash(tmp_path):
    assert on_data(tmp_path, "first").identity_hash == on_data(tmp_path, "second").identity_hash


def test_a_second_holder_in_this_process_is_refused_until_the_first_is_done(tmp_path):
    with folder(tmp_path).locked("first"):
        with pytest.raises(ExperimentError, match="another process is at work"), folder(tmp_path).locked("second"):
            pass
        assert (tmp_path / "run" / "config.yaml").read_text() == "first"
    with folder(tmp_path).locked("third"):
        assert (tmp_path / "run" / "config.yaml").read_text() == "third"


def test_the_lock_goes_with_an_error_inside(tmp_path):
    with pytest.raises(KeyError), folder(tmp_path).locked(""):
        raise KeyError
    with folder(tmp_path).locked(""):
        pass


def test_a_folder_in_use_by_another_process_is_refused_until_that_is_killed(tmp_path):
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(ExperimentError, match="another process is at work"), folder(tmp_path).locked(""):
            pass
        holder.kill()
        holder.wait()
    with folder(tmp_path).locked(""):
        pass


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    # A file where a folder must be: a folder without write permission would not stop root.
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(ExperimentError, match=r"cannot be written .*--runs-dir") as raised, folder(tmp_path).locked(""):
        pass
    assert "\n" not in str(raised.value)
    assert (tmp_path / "run").read_text() == "in the way"


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match=r"no UTF-8.*--runs-dir"):
        folder(tmp_path / "l\udcfcufe")


def test_a_process_that_asks_for_the_folder_of_a_run_that_fails_keeps_its_file(tmp_path):
    run = folder(tmp_path)
    asking = run.path / ".lock-another"

    def fail():
        asking.touch()
        raise KeyError

    with pytest.raises(KeyError), run.locked("", begun=lambda: False):
        fail()
    assert list(run.path.iterdir()) == [asking]


def test_why_an_earlier_try_failed_goes_once_a_later_one_has_not(tmp_path):
    run = started(tmp_path)
    (run.path / "failure.log").touch()
    with pytest.raises(KeyError), run.locked(""):
        raise KeyError
    assert (run.path / "failure.log").exists()
    with run.locked(""):
        pass
    assert not (run.path / "failure.log").exists()


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'{"schema": 1}', b"\xff", b"[" * 100_000, "cut", "foreign"])
def test_a_result_that_is_not_whole_or_of_another_run_is_none(tmp_path, content):
    run = started(tmp_path)
    write_result(run)
    whole = run.result.read_bytes()
    foreign = whole.replace(run.identity_hash.encode(), b"another")
    run.result.write_bytes({"cut": whole[:-20], "foreign": foreign}.get(content, content))
    assert run.status() is Status.NEW
    run.result.write_bytes(whole)
    assert run.status() is Status.DONE


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    run = started(tmp_path)
    left = [run.path / ".metrics.csv.x.part", run.checkpoints / ".last.ckpt.y.part"]
    for path in left:
        path.touch()
    with pytest.raises(InUseError), run.locked(""), folder(tmp_path).locked(""):
        pass
    assert not any(path.exists() for path in left)


def test_a_folder_in_place_of_the_result_is_refused(tmp_path):
    run = started(tmp_path)
    run.result.mkdir()
    with pytest.raises(ExperimentError, match=r"result\.json is a folder"), run.locked(""):
        pass


RUN = Run("classification", "A", "mcunet", "pets", "asi_hosvd_0.8", 2, 1)


def named(root, method, data_fingerprint=None, **changes):
    """A run's folder below a root by the name of its method."""
    run = replace(RUN, method=method)
    return RunFolder(run.folder(root), IDENTITY | changes, "result.json", data_fingerprint, run=run)


@pytest.fixture
def earlier(tmp_path):
    """A finished run whose method has the name of before budgets were in it."""
    run = named(tmp_path, "asi")
    with run.locked("a: 1\n"):
        (run.path / "checkpoints" / "last.ckpt").write_text("last")
        Record(replace(RUN, method="asi"), {"test": 0.5}, {}, {}, {}, {"config_hash": run.identity_hash}).save(run.path)
    return run


def test_a_run_under_its_earlier_name_is_taken_over(tmp_path, earlier, capsys):
    now = named(tmp_path, RUN.method)
    assert nothing_to_do(RUN, now, dry_run=True).startswith(f"would take over: {RUN}\n")
    assert earlier.result.exists()
    assert nothing_to_do(RUN, now, dry_run=False).startswith("done already: ")
    assert capsys.readouterr().out.startswith(f"taken over: {earlier.path} holds this run under its earlier name")
    assert (Record.load(now.result).run, Record.load(now.result).accuracy) == (RUN, {"test": 0.5})
    assert (now.checkpoints / "last.ckpt").read_text() == "last"
    assert not earlier.path.exists()
    assert nothing_to_do(RUN, named(tmp_path, RUN.method), dry_run=False).startswith("done already: ")
    assert capsys.readouterr().out == ""


def test_one_that_is_not_done_goes_on_under_its_name_of_now(tmp_path, earlier):
    earlier.result.unlink()
    now = named(tmp_path, RUN.method)
    assert nothing_to_do(RUN, now, dry_run=False) is None
    assert now.status() is Status.INTERRUPTED


def test_another_run_under_the_earlier_name_is_left_and_told(tmp_path, earlier, capsys):
    assert nothing_to_do(RUN, named(tmp_path, RUN.method, seed=2), dry_run=False) is None
    said = capsys.readouterr().out
    assert said == (
        f"note: {earlier.path} holds no part of this run, as it is of other settings (seed is 1 there and 2 here)\n"
    )
    assert earlier.result.exists()
    assert nothing_to_do(RUN, named(tmp_path / "other", RUN.method), dry_run=False) is None
    assert nothing_to_do(replace(RUN, method="wasi_1mib"), named(tmp_path, "wasi_1mib"), dry_run=False) is None
    assert capsys.readouterr().out == ""


def test_a_run_in_work_is_not_taken_over(tmp_path, earlier):
    with earlier.locked(""), pytest.raises(InUseError):
        nothing_to_do(RUN, named(tmp_path, RUN.method), dry_run=False)
    assert earlier.result.exists()
