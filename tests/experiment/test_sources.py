"""The code of a run's method and model: noted, and a run of other code is not taken for this one."""

import importlib
import itertools
import sys

import pytest

from experiment import ExperimentError, RunFolder, Status
from experiment.receipt import has_receipt, write_receipt
from experiment.sources import load_sources, method_sources, source_of

NUMBERS = itertools.count()  # a class that was defined stays known by its name
METHOD = """from dataclasses import dataclass
import lowrank


@dataclass(frozen=True)
class Mine(lowrank.Vanilla):
    tag = "mine"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module with a method of one's own, outside of the suite; its file."""
    path = tmp_path / f"own_code_{next(NUMBERS)}.py"
    path.write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield path
    sys.modules.pop(path.stem, None)


def of_classification(own):
    return {"model": {"method": {"class_path": f"{own.stem}.Mine", "init_args": {}}}}


def of_segmentation(own):
    return {"custom_hooks": [{"type": "Other"}, {"type": "LowRankHook", "method": {"type": f"{own.stem}.Mine"}}]}


def made(path, identity, result="perplexity.json", **options):
    return RunFolder(path / "run", identity, result, **options)


def finished(path, identity, **options):
    run = made(path, identity, **options)
    with run.locked("a: 1\n"):
        run.result.write_text("{}")
    return run


@pytest.mark.parametrize("identity_of", [of_classification, of_segmentation])
def test_a_run_of_another_version_of_its_method_is_not_this_run(tmp_path, own, identity_of):
    identity = identity_of(own)
    finished(tmp_path, identity)
    assert made(tmp_path, identity).status() is Status.DONE
    own.write_text(METHOD.replace('"mine"', '"mine" + ""'))
    with pytest.raises(ExperimentError, match=r"of other code: the file of the method own_code_\d+\.Mine has .*\.py"):
        made(tmp_path, identity).status()
    own.write_text(METHOD)
    assert made(tmp_path, identity).status() is Status.DONE


def test_a_run_of_another_version_of_its_model_is_not_this_run(tmp_path):
    one, other = ({"model tiny": {"file": "tiny.py", "hash": word}} for word in ("ab", "cd"))
    finished(tmp_path, {}, sources=one)
    assert made(tmp_path, {}, sources=one).status() is Status.DONE
    assert made(tmp_path, {}, sources={"model tiny": {"file": "moved.py", "hash": "ab"}}).status() is Status.DONE
    with pytest.raises(
        ExperimentError, match=r"the file of the model tiny has changed since .tiny\.py, fingerprint ab "
    ):
        made(tmp_path, {}, sources=other).status()


def test_an_interrupted_run_of_other_code_does_not_go_on_but_one_that_came_to_nothing_begins_anew(tmp_path, own):
    run = made(tmp_path, of_classification(own))
    with run.locked(""):
        pass
    own.write_text(METHOD + "\n")
    assert made(tmp_path, of_classification(own)).status() is Status.NEW
    (run.checkpoints / "last.ckpt").touch()
    with pytest.raises(ExperimentError, match="of other code"):
        made(tmp_path, of_classification(own)).status()


@pytest.mark.parametrize("content", [None, "", "[]", '{"method NAME.Mine": 1}', '{"method NAME.Mine": {}}'])
def test_a_run_of_before_code_was_noted_is_accepted(tmp_path, own, content):
    run = finished(tmp_path, of_classification(own))
    (run.path / "sources.json").unlink()
    if content is not None:
        (run.path / "sources.json").write_text(content.replace("NAME", own.stem))
    own.write_text(METHOD + "\n")
    assert made(tmp_path, of_classification(own)).status() is Status.DONE


def test_a_sweep_looks_again_where_the_code_has_changed(tmp_path, own):
    run = finished(tmp_path, of_classification(own))
    write_receipt(run.result, ["fit", "a"])
    assert has_receipt(run.result, ["fit", "a"])
    own.write_text(METHOD + "\n")
    assert not has_receipt(run.result, ["fit", "a"])


def test_only_files_of_their_own_count():
    """The library's methods change with the suite, whose version records name."""
    for name in ("lowrank.HOSVD", "lowrank.ASI", "lowrank.GradientFilter"):
        assert method_sources({"model": {"method": {"class_path": name}}}) == {}
    assert source_of(print) == {}
    namespace = {"__name__": "nowhere"}
    exec("class Mine: pass", namespace)
    assert source_of(namespace["Mine"]) == {}
    assert method_sources({"model": {"method": None}}) == {}


def test_what_was_noted_is_read_back(tmp_path, own):
    run = finished(tmp_path, of_classification(own))
    assert load_sources(run.path) == run.sources == {f"method {own.stem}.Mine": source_of(sys.modules[own.stem].Mine)}
