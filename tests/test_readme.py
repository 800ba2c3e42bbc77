"""Every snippet of README and docs runs as it stands there, their commands are real ones, and so are their tables."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import transformers
from mmengine.registry import HOOKS, MODELS, init_default_scope
from PIL import Image

import classification.convert_weights
import classification.plans
import classification.prepare
import classification.sweep
import lowrank
import report.__main__
import segmentation.cli
import segmentation.sweep
from classification.backbones import build_model
from classification.backbones import registry as backbone_registry
from classification.cli import main
from classification.data import load_splits
from classification.data import registry as data_registry
from lowrank import HOSVD, Vanilla
from segmentation.compose import load_config
from segmentation.hook import LowRankHook

ROOT = Path(__file__).parent.parent
PAGES = {
    path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "RESULTS.md")
}
README, RESULTS = (PAGES[ROOT / name] for name in ("README.md", "RESULTS.md"))
SHOWN = "\n".join(PAGES.values())
VADER = ["download", "--no-deps", "--no-binary", ":all:", "vaderSentiment==3.3.2"]
OUTSIDE = (("true", []), (".", [".venv/bin/activate"]), ("pip", ["install", "."]), ("pip", VADER))
OTHERS = {"prepare": classification.prepare.main, "weights": classification.convert_weights.main}
SNIPPETS = dict(re.findall(r"<!-- snippet: (.+?) -->\n```python\n(.+?)```", SHOWN, re.DOTALL))


class ImageModule(pl.LightningModule):
    """An ordinary module, to be trained for a step."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU()]
        self.network = torch.nn.Sequential(*convolutions, torch.nn.Conv2d(8, 4, 3), torch.nn.AdaptiveAvgPool2d(1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.network(batch[0]).flatten(1), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(name: str, **names: object) -> dict[str, object]:
    """Run a snippet with these names given; returns all names afterwards."""
    exec(compile(SNIPPETS[name], f"snippet: {name}", "exec"), names)
    return names


def commands(blocks: Sequence[str] | None = None) -> list[list[str]]:
    """Every command of the pages' bash blocks, or of these, as words, without comments.

    Blocks under a comment have a test of their own.
    """
    if blocks is None:
        blocks = re.findall(r"(?<!-->\n)```bash\n(.+?)```", SHOWN, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("$c/", "configs/classification/").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def test_every_python_block_is_a_snippet_that_is_run() -> None:
    shown = re.findall(r"<!-- snippet: (.+?) -->\n```python\n", SHOWN)
    assert SHOWN.count("```python") == len(shown)
    assert SHOWN.count("<!-- snippet: three lines -->") == 2  # README and the guide
    assert len(set(shown)) == len(shown) - 1 == len(SNIPPETS) == 14
    assert len(set(re.findall(r"<!-- snippet: three lines -->\n(.+?)```\n", SHOWN, re.DOTALL))) == 1


def test_the_readme_is_short_and_says_that_there_is_no_licence() -> None:
    assert len(README.splitlines()) <= 150
    assert "No licence has been chosen by the owner" in README


def test_a_callback_of_lightning_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where Lightning writes
    module = ImageModule()
    trainer = run("lightning", pl=pl, lowrank=lowrank)["trainer"]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4)), 4)
    trainer.fit(module, loader)  # type: ignore[attr-defined]
    chosen = [layer._lowrank.name for layer in lowrank.converted_layers(module) if layer._lowrank.chosen]
    assert chosen == ["network.2", "network.4"]


def test_the_trainer_gets_its_callback(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none")
    names = {"model": torch.nn.Linear(2, 2), "arguments": arguments, "data": [], "Trainer": transformers.Trainer}
    after = run("trainer", **names)
    found = [type(callback) for callback in after["trainer"].callback_handler.callbacks]  # type: ignore[attr-defined]
    assert after["TrainingStateCallback"] in found


def test_own_model_in_three_lines_and_ranks_by_perplexity(capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model("mobilenet_v2", num_classes=4)
    names = run("three lines", model=model)
    assert [layer._lowrank.name for layer in lowrank.converted_layers(model)] == names["names"]
    assert not model.features[0][0].weight.requires_grad

    batch = (torch.randn(8, 3, 64, 64), torch.randint(0, 4, (8,)))
    lowrank.revert(model)
    whole = lowrank.account(model, names["names"], batch[0]).total.activation_bytes
    names |= run("ranks by perplexity", **names, torch=torch, batch=batch)
    printed = capsys.readouterr().out.split()
    run("explain", **names)
    explained = capsys.readouterr().out
    assert all(name in explained for name in names["names"])
    assert explained.splitlines()[-1].endswith("in all")
    plan = names["plan"]
    assert isinstance(plan, lowrank.RankPlan)
    assert plan.nbytes <= whole / 20
    assert set(plan.storages.values()) == {"int8"}
    kept, peak, formula = map(int, printed)
    assert (kept, peak) == (names["kept"], names["peak"])
    assert 0 < formula <= plan.nbytes  # a rank above what the other modes allow is cut


@pytest.mark.slow
def test_inputs_that_follow_from_others_take_nothing() -> None:
    model = build_model("mobilenet_v2", num_classes=4).eval()
    names = lowrank.trailing_layers(model, 4)
    batch = (torch.randn(8, 3, 64, 64), torch.randint(0, 4, (8,)))
    given = {"model": model, "names": names, "batch": batch, "lowrank": lowrank, "whole": 10**6}
    given["loss_fn"] = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    given["measured"] = {"energies": (0.5, 0.9), "mode_energies": (0.5, 0.9), "storages": ("int8",)}
    plan = run("derived inputs", **given)["plan"]
    assert isinstance(plan, lowrank.RankPlan)
    account = lowrank.account(model, names, batch[0])
    assert plan.derived == account.derived == {names[1]: names[0], names[2]: names[0]}
    assert account.total.activation_bytes > 0


def test_what_speaks_against_a_conversion_is_listed_and_each_layer_has_its_own_method(capsys) -> None:
    model = build_model("mobilenet_v2", num_classes=4)
    names = lowrank.trailing_layers(model, 2)
    run("check", lowrank=lowrank, model=model, names=names)
    assert not capsys.readouterr().out
    assert [layer._lowrank.method for layer in lowrank.converted_layers(model)] == [Vanilla(), HOSVD(0.8)]


def test_training_goes_on_from_a_saved_state(tmp_path: Path) -> None:
    model = lowrank.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), ["0"], lowrank.ASI(2))
    x = torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    before = lowrank.training_state(model)
    run("training state", lowrank=lowrank, torch=torch, model=model, path=tmp_path / "state.pt")
    after = lowrank.training_state(model)
    assert before.keys() == after.keys()
    assert len(before) == 4
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_as_factors_are_trained() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.GELU(), torch.nn.Linear(24, 6))
    optimizer = run("factors", lowrank=lowrank, model=model, names=["0", "2"])["optimizer"]
    assert isinstance(optimizer, lowrank.SGD)
    before = [parameter.clone() for parameter in model.parameters()]
    model(torch.randn(4, 5, 12)).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.shape not in {(24, 12), (6, 24)} for parameter in model.parameters())


def test_the_hook_of_a_segmentation_config_is_built() -> None:
    config = run("segmentation config")
    (hook,) = [HOOKS.build(settings) for settings in config["custom_hooks"]]  # type: ignore[attr-defined]
    assert isinstance(hook, LowRankHook)
    assert config["custom_imports"] == {"imports": [LowRankHook.__module__.partition(".")[0]]}


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


def follow(block: str, *options: str) -> None:
    """Do a block's commands as they stand, but for what is added to the sweep."""
    for line in block.replace("\\\n", "").splitlines():
        (words,) = commands([line])
        if words[:4] == ["python", "-m", "classification", "sweep"]:
            assert classification.sweep.main([*words[4:], *options]) == 0
        elif words[:4] == ["python", "-m", "segmentation", "sweep"]:
            assert segmentation.cli.main([*words[3:], *options]) == 0
        elif words[:3] == ["python", "-m", "report"]:
            assert report.__main__.main(words[3:]) == 0
        else:
            subprocess.run(["bash", "-euc", line], check=True)


@pytest.mark.slow
def test_a_new_data_set_model_and_method_become_rows_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"<!-- commands: all three -->\n```bash\n(.+?)```", SHOWN, re.DOTALL)
    shutil.copytree(ROOT / "configs" / "classification", tmp_path / "configs" / "classification")
    monkeypatch.setattr(classification.plans, "CONFIGS", tmp_path / "configs" / "classification")
    monkeypatch.setitem(data_registry.dataset.entries, "stripes", None)  # so that neither outlives this test
    monkeypatch.setitem(backbone_registry.backbone.entries, "tiny", None)
    run("data set")
    run("model")
    package = types.ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", package)
    exec(SNIPPETS["method"], vars(package))
    monkeypatch.chdir(tmp_path)
    follow(block)
    (table,) = (tmp_path / "runs" / "report").rglob("stripes/*.md")
    rows = [line.split("|")[2].strip() for line in table.read_text().splitlines() if line.startswith("|  ")]
    assert rows[1:] == ["vanilla", "half_precision"]


@pytest.mark.slow
def test_a_folder_of_images_becomes_rows_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"<!-- commands: new data set -->\n```bash\n(.+?)```", SHOWN, re.DOTALL)
    assert len(block.splitlines()) < 10
    home, shipped = tmp_path / "home", tmp_path / "configs" / "classification"
    random = np.random.default_rng(0)
    for kind in ("bass", "carp", "pike"):
        (home / "pictures" / "fish" / kind).mkdir(parents=True)
        for number in range(20):
            picture = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8))
            picture.save(home / "pictures" / "fish" / kind / f"{number}.jpg")
    shutil.copytree(ROOT / "configs" / "classification", shipped)
    monkeypatch.setattr(classification.plans, "CONFIGS", shipped)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    small = ("--trainer.max_epochs", "1", "--data.image_size", "64", "--data.batch_size", "8")
    follow(block, "--model.pretrained", "false", *small)  # no download
    (table,) = (tmp_path / "runs" / "report").rglob("fish/*.md")
    rows = [line.split("|")[2].strip() for line in table.read_text().splitlines() if line.startswith("|  ")]
    assert rows[1:] == ["vanilla", "hosvd_0.8", "asi_hosvd_0.8"]


@pytest.mark.slow
def test_a_folder_of_images_and_masks_becomes_rows_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"<!-- commands: images with masks -->\n```bash\n(.+?)```", SHOWN, re.DOTALL)
    configs = tmp_path / "configs"
    shutil.copytree(ROOT / "configs" / "segmentation", configs)
    (configs / "data" / "fields.py").write_text(SNIPPETS["images with masks"])
    short = (configs / "stages" / "calibrate_digit_scenes.py").read_text().replace("60", "2")
    (configs / "stages" / "calibrate_fields.py").write_text(short)
    monkeypatch.setattr(segmentation.sweep, "CONFIGS", configs)
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        folder = tmp_path / "data" / "fields" / part
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True)
        for number in range(count):
            mask = np.kron(random.integers(0, 3, (4, 6)), np.ones((16, 16))).astype(np.uint8)
            Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
            Image.fromarray(np.stack([80 * mask] * 3, 2)).save(folder / "images" / f"{number}.jpg")
    monkeypatch.chdir(tmp_path)
    init_default_scope("mmseg")
    network = load_config([configs / "networks" / "pspnet_small.py", configs / "data" / "digit_scenes.py"])
    torch.save(MODELS.build(network.model).state_dict(), "other.pth")
    here = [
        f"{part}_dataloader.{key}" for part in ("train", "val") for key in ("num_workers=0", "persistent_workers=False")
    ]
    small = ("--model", "pspnet_small", "--iterations", "2", "--cfg-options", *here)
    follow(block, "--weights", "other.pth", *small)  # no download
    (table,) = (tmp_path / "runs" / "report").rglob("finetune/*/fields/*.md")
    rows = [line.split("|")[2].strip() for line in table.read_text().splitlines() if line.startswith("|  ")]
    assert rows[1:] == ["vanilla", "hosvd_0.8", "asi_hosvd_0.8"]


def test_commands_of_the_pages_exist(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    prepared, converted = [], []
    digits = load_splits("digits", tmp_path)
    monkeypatch.setattr(classification.prepare.Preparation, "run", lambda self: prepared.append(self.name) or digits)
    monkeypatch.setattr(classification.convert_weights, "convert_file", lambda *words: converted.append(words[0]))
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands():
        if words[0] == "srun":  # Slurm's, with its options ahead of the command that it starts
            words = words[words.index("python") :]
        program, *arguments = [*itertools.dropwhile(lambda word: re.match(r"[A-Za-z]+=", word), words)] or ["true"]
        if program == "make":
            assert set(arguments) <= set(targets)
        elif program == "bash":
            assert (ROOT / arguments[0]).is_file(), arguments
            seen.add("bash")
        elif arguments[:2] == ["-m", "classification"]:
            command, *options = arguments[2:]
            seen.add(command)
            if command in OTHERS:
                assert OTHERS[command](options) == 0
                continue
            options = [*options, "--runs_dir", str(tmp_path), "--dry_run"]
            if command == "sweep":
                assert classification.sweep.main(options) == 0
            elif options[1] != "...":
                assert main([command, *options, "--model.pretrained", "false"]) == 0, options
                assert "would run" in capsys.readouterr().out
            else:
                assert command in ("measure", "fit", "test")
        elif arguments[:2] == ["-m", "report"]:
            assert report.__main__.main([str(tmp_path)]) == 2  # no runs there
            seen.add("report")
        else:
            assert (program, arguments) in OUTSIDE, (program, arguments)
    assert seen == {"bash", "measure", "fit", "test", "sweep", "report", "prepare", "weights"}
    assert set(prepared) <= set(data_registry.source.names())
    assert converted == ["mcunet"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pictures_and_files_that_a_page_names_are_there(path: Path) -> None:
    page = PAGES[path]
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:lowrank|classification|configs|scripts|figures)/[\w/.]*)`", page):
        assert (ROOT / name).exists(), name


def test_links_within_a_page_lead_to_a_heading() -> None:
    headings = re.findall(r"^#+ (.+)$", RESULTS, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    named = set(re.findall(r"\]\(#([^)]+)\)", RESULTS))
    assert named
    assert named <= anchors


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


TABLES = {
    "digits_table": 2 + 2 * 6,  # two of heading; six methods at two depths
    "swin_mini_digits": 2 + 5,
    "digit_scenes_table": 2 + 4,
    "segmentation_memory": 2 + 6,
}


@pytest.mark.parametrize(("name", "count"), TABLES.items(), ids=TABLES)
def test_the_tables_of_results_are_the_generated_ones(name: str, count: int) -> None:
    lines = rows((ROOT / "figures" / f"{name}.md").read_text())
    assert len(lines) == count
    assert "\n".join(lines) in RESULTS


@pytest.mark.parametrize(("page", "heading"), [(README, "What it brings"), (RESULTS, "Measured memory")])
def test_the_rows_of_measured_memory_are_generated_ones(page: str, heading: str) -> None:
    shown = rows(page.partition(f"## {heading}\n")[2].partition("\n## ")[0])
    assert len(shown) > 10
    assert set(shown) <= set(rows((ROOT / "figures" / "memory.md").read_text()))
