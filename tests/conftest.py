"""What all tests share: one thread, the same draws in every run, and scripts that install nothing."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from lowrank.kernels.build import cache_folder

ROOT = Path(__file__).parent.parent
settings.register_profile(
    "suite",  # no judgement of speed either
    deadline=None,
    derandomize=True,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("suite")
# It draws also from the numbers and texts in the source of all modules that are imported, which are others in each
# process and after each commit.
providers._get_local_constants = providers.Constants


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about a third of a second; leave out with -m 'not slow'")


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays, so that the collector need not go through it now, nor whenever a test asks for it."""
    gc.disable()
    yield
    gc.enable()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _left_behind() -> Iterator[None]:
    """What a file leaves for good, such as compiled code and registries, is gone through once and not ever again.

    MMEngine collects garbage for each data set that it builds, and what was compiled are millions of objects.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tensors here are tiny; handing them to a pool of threads takes longer than the work itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """What a test draws by PyTorch is the same in every run and in every order."""
    torch.manual_seed(0)


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """And so is what a fixture of several tests draws, which is made ahead of that."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture
def script_environment(tmp_path: Path) -> dict[str, str]:
    """Environment of a script: this interpreter as a virtual environment that is up to date, runs below `tmp_path`."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    shim = "scripts/torchvision_on_cpu"
    content = f"cat requirements.txt pyproject.toml {shim}/*.toml {shim}/*.py | cksum"
    wanted = subprocess.run(content, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    (venv / ".installed").write_text(wanted.stdout)
    runs = tmp_path / "runs"
    return {
        **{"PATH": "/usr/bin:/bin", "VENV": str(venv), "RUNS_DIR": str(runs), "HOME": str(tmp_path)},
        **{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LOWRANK_CACHE": str(cache_folder())},
    }


@pytest.fixture
def heard_signals():
    """SIGINT and SIGHUP act as on what a terminal starts, also where `&` or `nohup` has started the tests."""
    acting = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in acting.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_launcher():
    """What a test says of processes that train together is not there for the next one."""
    before = {name: os.environ.get(name) for name in LAUNCHED}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
