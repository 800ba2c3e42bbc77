"""The shell scripts: documented, and their dry run lists the runs that they would do."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from classification.help import COMMANDS
from report.__main__ import parser

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").rglob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_the_head_of_the_script(script: str, tmp_path: Path) -> None:
    (tmp_path / script).parent.mkdir(parents=True)  # where `cd` looks first
    looks = os.environ | {"CDPATH": str(tmp_path)}
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True, cwd=ROOT, env=looks)
    assert f"Usage: bash {script}" in done.stdout
    assert "set -euo" not in done.stdout
    assert "set -euo pipefail" in (ROOT / script).read_text()


def dry_run(script: str, environment: dict[str, str], *arguments: str) -> list[str]:
    """Titles of the runs that a script would do."""
    done = subprocess.run(
        ["bash", ROOT / "scripts" / script, "--dry-run", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not Path(environment["RUNS_DIR"]).exists()
    return [line.partition("] ")[2] for line in done.stdout.splitlines() if line.startswith("[")]


def test_quickstart_dry_run_lists_every_run(script_environment: dict[str, str]) -> None:
    methods = ["vanilla", "gradient_filter_r2", "hosvd_0.8", "asi_1of20", "asi_int8_1of20"]
    rows = [(method, layers) for layers in (2, 4) for method in methods]
    rows = [("perplexity", 2), ("perplexity", 4), *rows]
    trained = [f"digits: {method}, last {layers}, seed 7" for method, layers in rows]
    assert dry_run("quickstart.sh", script_environment, "7") == ["digits: pretrain, seed 7", *trained]


def test_quickstart_takes_the_variables_of_all_scripts(script_environment: dict[str, str]) -> None:
    given = script_environment | {"METHODS": "vanilla", "LAYERS": "3", "EPOCHS": "1", "SEEDS": "8 9"}
    runs = ["digits: pretrain, seed", "digits: vanilla, last 3, seed"]
    assert dry_run("quickstart.sh", given, "7") == [f"{run} 7" for run in runs]
    assert dry_run("quickstart.sh", given) == [f"{run} {seed}" for seed in (8, 9) for run in runs]


def test_segmentation_quickstart_dry_run_lists_every_run(script_environment: dict[str, str]) -> None:
    runs = ["calibrate", "perplexity, last 10"]
    runs += [f"{method}, last 10" for method in ("vanilla", "gradient_filter", "hosvd_0.8", "asi_1of20")]
    expected = ["digit_scenes_pretrain: pretrain, seed 233", *(f"digit_scenes: {run}, seed 233" for run in runs)]
    assert dry_run("segmentation/quickstart.sh", script_environment) == expected


@pytest.mark.slow
def test_several_budgets_are_runs_of_their_own(script_environment: dict[str, str]) -> None:
    chosen = {**script_environment, "METHODS": "vanilla hosvd_0.8 asi", "BUDGET": "1/20 hosvd 0.5mib", "LAYERS": "5"}
    for script, words in (("segmentation/fcn.sh", ["voc12aug"]), ("classification/setup_a/mcunet.sh", ["digits"])):
        titles = dry_run(script, chosen, *words)
        methods = [title.partition(": ")[2].partition(",")[0] for title in titles]
        assert methods[-5:] == ["vanilla", "hosvd_0.8", "asi_1of20", "asi_hosvd_0.8", "asi_0.5mib"]


def test_a_segmentation_script_takes_its_settings_from_the_environment(
    script_environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "w.pth").touch()
    chosen = {"METHODS": "vanilla hosvd_0.8", "LAYERS": "5 all", "SEEDS": "1 2", "ITERATIONS": "7"}
    chosen["WEIGHTS"] = str(tmp_path / "w.pth")
    titles = dry_run("segmentation/fcn.sh", {**script_environment, **chosen}, "cityscapes")
    trained = [("vanilla", 5), ("hosvd_0.8", 5), ("vanilla", "all")]
    assert titles == [
        "cityscapes: calibrate, seed 233",
        *(f"cityscapes: {method}, last {depth}, seed {seed}" for seed in (1, 2) for method, depth in trained),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "layers"), [("classification/setup_b/mcunet.sh", "2 4"), ("segmentation/fcn.sh", "5 10")]
)
def test_a_list_may_have_a_word_a_line(script_environment: dict[str, str], script: str, layers: str) -> None:
    chosen = {"METHODS": "vanilla asi", "LAYERS": layers, "SEEDS": "1 2", "BUDGET": "1/20 0.5mib"}
    lines = {name: value.replace(" ", "\n") for name, value in chosen.items()}
    titles = [dry_run(script, script_environment | lists) for lists in (chosen, lines)]
    assert titles[0] == titles[1]


@pytest.mark.parametrize("model", ["swin_t", "vit_b_32"])
def test_scripts_of_vision_transformers_list_their_runs(script_environment: dict[str, str], model: str) -> None:
    titles = dry_run(f"classification/transformers/{model}.sh", script_environment | {"SEEDS": "5"}, "digits")
    methods = ["vanilla", "hosvd_0.8", "wsi_0.9", "asi_hosvd_0.8", "wasi_0.9_hosvd_0.8"]
    rows = [("perplexity", 2), ("perplexity", 4), *((method, layers) for layers in (2, 4) for method in methods)]
    assert titles == [f"digits: {method}, last {layers}, seed 5" for method, layers in rows]


def test_the_script_of_the_language_model_lists_its_runs(script_environment: dict[str, str]) -> None:
    titles = dry_run("classification/transformers/tinyllama.sh", script_environment)
    methods = ["vanilla", "asi_rank20", "wasi_0.1_rank20"]
    assert titles == [f"boolq: {method}, last {layers}, seed 233" for layers in range(1, 6) for method in methods]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("classification/run.sh", ["a", "mcunet", "digits"]),
        ("quickstart.sh", []),
        ("segmentation/fcn.sh", ["voc12aug"]),
    ],
)
def test_workers_and_launcher_go_to_the_sweep(
    script_environment: dict[str, str], script: str, words: list[str]
) -> None:
    command = ["bash", str(ROOT / "scripts" / script), *words[:2], "--dry-run", *words[2:]]
    if not script.startswith("classification"):
        command = ["bash", str(ROOT / "scripts" / script), "--dry-run", *words]
    for changed, message in (({"WORKERS": "0"}, "--workers is 0"), ({"LAUNCHER": "cloud"}, "invalid choice: 'cloud'")):
        done = subprocess.run(command, env=script_environment | changed, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the scripts and of what they read, beside `figures/` with results that were kept."""
    tree = tmp_path / "tree"
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    shutil.copytree(ROOT / "figures", tree / "figures", ignore=lambda folder, names: [n for n in names if "." not in n])
    return tree


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def call(tree: Path, script: str, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script of a copy of the tree."""
    command = ["bash", str(tree / script), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("left", [[], ["table.md"], ["table.md", "table.csv"], ["mcunet/digits/table.md"]])
@pytest.mark.parametrize("script", ["scripts/classification/results_page.sh", "scripts/figures.sh"])
def test_results_stay_as_they_are_where_the_runs_for_new_ones_are_not_there(
    script_environment: dict[str, str], tree: Path, script: str, left: list[str]
) -> None:
    Path(script_environment["VENV"], "bin", "python").write_text("#!/usr/bin/env bash\n")  # everything is done
    report = Path(script_environment["RUNS_DIR"], "report/classification/B")
    for name in left:
        (report / name).parent.mkdir(parents=True, exist_ok=True)
        (report / name).write_text("new")
    before = files_of(tree)
    done = call(tree, script, script_environment)
    assert done.returncode != 0
    assert "error: " in done.stderr.splitlines()[-1]
    assert files_of(tree) == before


def test_the_page_of_results_is_written_from_the_runs_there_are(script_environment: dict[str, str], tree: Path) -> None:
    Path(script_environment["VENV"], "bin", "python").write_text("#!/usr/bin/env bash\n")
    report = Path(script_environment["RUNS_DIR"], "report/classification/B")
    for name in ("table.md", "mcunet/digits/table.md", "table.csv"):
        (report / name).parent.mkdir(parents=True, exist_ok=True)
        (report / name).write_text(f"{name}\n")
    before = files_of(tree)
    assert call(tree, "scripts/classification/results_page.sh", script_environment).returncode == 0
    written = {tree / "figures/setup_b_digits.md": b"table.md\n\nmcunet/digits/table.md\n\n"}
    written |= {tree / "figures/setup_b_digits.csv": b"table.csv\n"}
    assert files_of(tree) == before | written


def test_no_script_empties_a_file_before_there_is_something_to_put_in_its_place() -> None:
    for script in SCRIPTS:
        for line in (ROOT / script).read_text().splitlines():
            replaced = re.search(r"(?<![<>&\d])> *(\"?[^ >&]+)", line.partition("#")[0])
            told = replaced and replaced[1].strip('"')
            assert not told or told == "/dev/null" or told.endswith(".part"), f"{script}: {line}"


NEEDED = {  # what scripts have to be given besides
    "scripts/classification/run.sh": ["b", "mcunet"],
    "scripts/classification/curve.sh": ["mcunet", "digits"],
    "scripts/segmentation/sweep.sh": ["fcn"],
}
# Notes what was started, and refuses the unknown argument as every command of the suite does.
NOTES = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$HOME/started"
[[ "$*" != *--nonsense* ]] || exit 2
"""


def started(script: str, environment: dict[str, str], tree: Path, *words: str) -> tuple[int, list[str], str]:
    """How a script ended with these words, which commands it has started, and what it printed; no file is written."""
    for name in ("python", "ruff", "mypy", "shellcheck"):
        command = Path(environment["VENV"], "bin", name)
        command.write_text(NOTES)
        command.chmod(0o755)
    before = files_of(tree)
    done = call(tree, script, environment, *NEEDED.get(script, []), *words)
    assert files_of(tree) == before
    assert not Path(environment["RUNS_DIR"]).exists()
    notes = Path(environment["HOME"], "started")
    return done.returncode, notes.read_text().splitlines() if notes.exists() else [], done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_starts_nothing(script_environment: dict[str, str], tree: Path, script: str) -> None:
    code, commands, printed = started(script, script_environment, tree, "--dry-run")
    assert code == (2 if script == "scripts/completion.sh" else 0), printed  # it prints itself, and takes no such word
    assert all("--dry-run" in command.split() for command in commands)
    assert commands or printed


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_link_to_a_script_does_what_the_script_does(tmp_path: Path, script: str) -> None:
    link = tmp_path / "links" / "mine.sh"
    link.parent.mkdir()
    link.symlink_to(Path("..", "again.sh"))
    (tmp_path / "again.sh").symlink_to(ROOT / script)
    done = subprocess.run(["bash", "mine.sh", "--help"], cwd=link.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: bash {script}" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("words", [["--nonsense"], ["--dry-run", "--nonsense"]], ids=" ".join)
def test_an_unknown_argument_starts_nothing(
    script_environment: dict[str, str], tree: Path, script: str, words: list[str]
) -> None:
    if script in ("scripts/benchmark.sh", "scripts/test.sh") and "--dry-run" in words:
        pytest.skip("its dry run prints the commands as they are given")
    code, commands, printed = started(script, script_environment, tree, *words)
    assert code == 2, printed
    assert all("--nonsense" in command for command in commands)  # which refuse it
    assert commands or "--nonsense" in printed.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_relative_paths_in_variables_are_of_the_callers_folder(
    script_environment: dict[str, str], tree: Path, script: str
) -> None:
    here = Path(script_environment["HOME"], "here")
    here.mkdir()
    started(script, script_environment, tree, "--help")  # makes what notes the commands
    given = {"RUNS_DIR": "mine", "DATA_DIR": "images", "WEIGHTS": "w.pt", "VENV": "../venv"}
    script_environment.pop("RUNS_DIR")
    command = ["bash", str(Path("..", "tree", script)), *NEEDED.get(script, [])]
    done = subprocess.run(
        command, env=script_environment | given, cwd=here, capture_output=True, text=True, check=False
    )
    notes = Path(script_environment["HOME"], "started")
    words = notes.read_text().split() if notes.exists() else []
    for option, value in (("--runs-dir", "mine"), ("--data-dir", "images"), ("--weights", "w.pt")):
        for at in (at for at, word in enumerate(words) if word == option):
            assert words[at + 1] == str(here / value)
    assert ("--runs-dir" in words) == ("sweep" in words)
    assert "No such file" not in done.stderr or "figures/" in done.stderr  # there are no tables to copy
    helped = subprocess.run([*command[:2], "--help"], cwd=here, capture_output=True, text=True, check=True)
    assert f"Usage: bash {script}" in helped.stdout


@pytest.mark.slow
def test_the_dry_run_of_all_results_lists_every_run(script_environment: dict[str, str]) -> None:
    titles = dry_run("figures.sh", script_environment)
    for wanted in ("digits: pretrain, seed 233", "digits: asi_int8_derived_20000_1of20, last 4, seed 235"):
        assert wanted in titles
    assert "digits: wasi_0.9_1of20, last all, seed 238" in titles
    assert "digit_scenes: asi_1of20, last 10, seed 234" in titles


SAVES = """#!/usr/bin/env bash
trap 'sleep 0.3; echo saved >> "$HOME/said"; exit 143' TERM
echo "$*" >> "$HOME/said"
for ((;;)); do sleep 0.05; done
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("classification/run.sh", ["a", "mcunet", "digits", "--report"]),
        ("quickstart.sh", []),
        ("segmentation/fcn.sh", ["voc12aug"]),
        ("segmentation/quickstart.sh", []),
    ],
)
def test_who_ends_a_script_ends_its_run_and_what_that_saves_is_waited_for(
    script_environment: dict[str, str], script: str, words: list[str]
) -> None:
    Path(script_environment["VENV"], "bin", "python").write_text(SAVES)
    said = Path(script_environment["HOME"], "said")
    with subprocess.Popen(["bash", str(ROOT / "scripts" / script), *words], env=script_environment) as process:
        while not said.exists() or not said.read_text().endswith("\n"):
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        assert process.wait(100) == 143
    command, *rest = said.read_text().splitlines()
    assert "--report" in command.split()
    assert rest == ["saved"]


@pytest.mark.usefixtures("heard_signals")
def test_ctrl_c_ends_the_run_of_a_script_also_in_its_first_moment(script_environment: dict[str, str]) -> None:
    Path(script_environment["VENV"], "bin", "python").write_text('#!/bin/sh\necho > "$HOME/said"\nexec sleep 600\n')
    command = ["bash", str(ROOT / "scripts" / "segmentation" / "quickstart.sh")]
    with subprocess.Popen(command, env=script_environment, start_new_session=True) as process:
        try:
            while not Path(script_environment["HOME"], "said").exists():
                assert process.poll() is None
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            assert process.wait(30) == 130
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_the_script_of_the_encoder_lists_its_runs(script_environment: dict[str, str]) -> None:
    titles = dry_run("classification/transformers/minilm.sh", script_environment | {"LAYERS": "13 all"})
    plain = ["vanilla", "vanilla_fused", "wsi_0.8", "wsi_0.9"]
    ranked = ["asi_1of20", "asi_int8_1of20", "wasi_0.8_1of20", "wasi_0.9_1of20"]
    rows = [(method, layers) for layers in (13, "all") for method in plain + ranked]
    assert titles[:2] == [f"review_sentences: perplexity, last {layers}, seed 233" for layers in (13, "all")]
    assert titles[2:] == [f"review_sentences: {method}, last {layers}, seed 233" for method, layers in rows]


def completed(*words: str) -> set[str]:
    """What bash offers for the last of these words, after what the script prints was evaluated."""
    script = 'eval "$(bash scripts/completion.sh)"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
    script += '_lowrank "$1" "${*: -1}" "${*: -2:1}"; printf "%s\\n" "${COMPREPLY[@]}"'
    command = ["bash", "-euc", script, "-", sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.slow
def test_commands_options_and_what_they_may_be_are_completed() -> None:
    assert completed("seg") == {"segmentation"}
    assert completed("classification", "") == COMMANDS.keys()
    options = {name for name in parser()._option_string_actions if name.startswith("--")}
    assert completed("report", "--") == options
    assert completed("report", "--columns", "") == {"few", "all"}
    methods = {path.stem for path in (ROOT / "configs/segmentation/methods").iterdir() if path.suffix == ".py"}
    assert completed("segmentation", "sweep", "--methods", "asi", "") == methods
    assert completed("http.server", "--") == set()
