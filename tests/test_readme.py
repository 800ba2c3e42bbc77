"""Every snippet of the README runs as it stands there, and its commands are real ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import classification.sweep
import lowrank
import report.__main__
from classification.backbones import build_model
from classification.backbones import registry as backbone_registry
from classification.cli import main
from classification.data import load_splits
from classification.data import registry as data_registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = dict(re.findall(r"<!-- snippet: (.+?) -->\n```python\n(.+?)```", README, re.DOTALL))


def run(name: str, **names: object) -> dict[str, object]:
    """Run a snippet with these names given; returns all names afterwards."""
    exec(compile(SNIPPETS[name], f"README: {name}", "exec"), names)
    return names


def commands() -> list[list[str]]:
    """Every command of the README's bash blocks, as words, without comments."""
    blocks = re.findall(r"```bash\n(.+?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("$c/", "configs/classification/").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def test_every_python_block_is_a_snippet_that_is_run() -> None:
    assert README.count("```python") == len(SNIPPETS) == 6


def test_own_model_in_three_lines_and_ranks_by_perplexity(capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model("mobilenet_v2", num_classes=4)
    names = run("three lines", model=model)
    assert [layer.layer_name for layer in lowrank.converted_layers(model)] == names["names"]
    assert not model.features[0][0].weight.requires_grad

    batch = (torch.randn(8, 3, 64, 64), torch.randint(0, 4, (8,)))
    names |= run("ranks by perplexity", **names, torch=torch, batch=batch)
    printed = capsys.readouterr().out.split()
    run("explain", **names)
    explained = capsys.readouterr().out
    assert names["names"][-1] in explained
    assert explained.splitlines()[-1].endswith("in all")
    plan = names["plan"]
    assert isinstance(plan, lowrank.RankPlan)
    assert plan.nbytes <= 200_000
    assert printed == [str(names["kept"]), str(names["peak"]), str(plan.nbytes), printed[3]]


def test_new_data_set_and_new_model_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data_registry.dataset.entries, "stripes", None)  # so that neither outlives this test
    monkeypatch.setitem(backbone_registry.backbone.entries, "tiny", None)
    run("data set")
    assert np.array_equal(load_splits("stripes", tmp_path).val.labels, np.arange(16) % 2)
    run("model")
    assert build_model("tiny", 5)(torch.randn(2, 3, 16, 16)).shape == (2, 5)


def test_new_method_trains_and_is_accounted_for() -> None:
    method = run("method")["HalfPrecision"]
    layer = torch.nn.Linear(6, 5)
    x, upstream = torch.randn(4, 6), torch.randn(4, 5)
    layer(x.bfloat16().float()).backward(upstream)
    expected = layer.weight.grad
    model = lowrank.convert(torch.nn.Sequential(layer), ["0"], method())
    layer.weight.grad = None
    model(x).backward(upstream)
    torch.testing.assert_close(layer.weight.grad, expected)
    assert lowrank.account(model, ["0"], x).total.activation_bytes == 4 * 6 * 2


def test_commands_of_the_readme_exist(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    seen = set()
    for program, *arguments in commands():
        if program == "bash":
            assert (ROOT / arguments[0]).is_file(), arguments
            seen.add("bash")
        elif arguments[:2] == ["-m", "classification"]:
            command, *options = arguments[2:]
            options = [*options, "--runs_dir", str(tmp_path), "--dry_run"]
            if command == "sweep":
                assert classification.sweep.main(options) == 0
            elif options[1] != "...":
                assert main([command, *options, "--model.pretrained", "false"]) == 0, options
                assert "would run" in capsys.readouterr().out
            else:
                assert command in ("measure", "fit", "test")
            seen.add(command)
        elif arguments[:2] == ["-m", "report"]:
            assert report.__main__.main([str(tmp_path)]) == 2  # no runs there
            seen.add("report")
    assert seen == {"bash", "measure", "fit", "test", "sweep", "report"}


def test_pictures_and_files_that_the_readme_names_are_there() -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)\)|src=\"([^\"]+)\"", README)
    for path in (a or b for a, b in linked):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:lowrank|classification|configs|scripts|figures)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path


def test_the_table_of_the_readme_is_the_generated_one() -> None:
    generated = (ROOT / "figures" / "digits_table.md").read_text()
    lines = [line for line in generated.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 * 5  # two of heading; five methods at two depths
    assert "\n".join(lines) in README


def test_the_rows_of_measured_memory_are_generated_ones() -> None:
    section = README.partition("## Measured memory")[2].partition("## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert set(rows) <= set((ROOT / "figures" / "memory.md").read_text().splitlines())
