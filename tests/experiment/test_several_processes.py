"""Two processes that meet: the first decides and writes, the others follow; and what each carries comes back to it."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cluster import free_ports
from experiment import process_group, processes
from experiment.errors import ExperimentError
from experiment.process_group import GROUP, run_all
from experiment.processes import OTHERS, Place, first_does, gather, is_first, join, leave, own_part, place, with_others

PATHS = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
@needs_gloo
def test_the_first_decides_writes_and_speaks(tmp_path, capfd):
    run_all("meeting", ["together", str(tmp_path)], 2)
    first, second = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in (0, 1))
    assert capfd.readouterr().out == "said by 0\n"
    for found in (first, second):
        assert (found["inside"], found["decided"], found["gathered"]) == ("entered", "by 0", [0, 10])
    assert (tmp_path / "lock0").read_text() == "left"
    assert not (tmp_path / "lock1").exists()
    assert first["kept"] == {"shared": 7, "own": 0, OTHERS: [{"own": 1, "more": 1}]}
    assert first["state"] == {"shared": 7, "own": 0}
    assert second["state"] == {"shared": 7, "own": 1, "more": 1}


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("late", ["0", "0.3"])  # s; the first may be gone before the second hears of it
def test_what_the_first_refuses_ends_all_with_its_code_and_one_line(tmp_path, monkeypatch, late):
    monkeypatch.setenv("LATE", late)
    monkeypatch.setattr(process_group, "SETTLE", 100.0)
    with pytest.raises(ExperimentError, match=r"^there is no more room$"):
        run_all("meeting", ["refused", str(tmp_path)], 2)
    assert [(tmp_path / name).read_text() for name in "01"] == ["ExperimentError 2", "FirstFailed 2"]


@pytest.mark.slow
@needs_gloo
def test_processes_of_another_launcher_say_who_they_are(tmp_path):
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(*free_ports(1))}
    command = [sys.executable, "-m", "meeting", "refused", str(tmp_path)]
    started = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=100)[1].splitlines()[-1:] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert said == [["error: there is no more room"], []]


@pytest.mark.slow
def test_one_that_waits_for_the_others_in_vain_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=0.5))
    monkeypatch.setenv(GROUP, str(tmp_path))
    with pytest.raises(ExperimentError, match=r"^process 0 of 2 has not met the others within .* \(Wait timeout"):
        join(Place(0, 2))
    assert place() == Place(0, 1)
    assert not torch.distributed.is_initialized()


def test_one_process_decides_for_itself():
    assert place() == Place(0, 1)
    assert is_first()
    assert first_does(lambda: "done") == "done"
    assert gather(3) == [3]
    assert leave(4) == 4
    with pytest.raises(KeyError):
        first_does(lambda: {}["missing"])


@given(st.dictionaries(st.text(), st.integers()))
def test_the_state_of_one_process_is_its_own(state):
    state.pop(OTHERS, None)
    assert with_others(state) == state
    assert own_part(with_others(state)) == state


def test_the_first_takes_its_part_of_what_several_have_saved():
    assert own_part({"basis": 0, "factor": 5, OTHERS: [{"basis": 1}]}) == {"basis": 0, "factor": 5}
