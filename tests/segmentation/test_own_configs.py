"""Configs of one's own: what works, and what is refused in one line before anything is written."""

from __future__ import annotations

import copy
import importlib
import json
import multiprocessing
import re
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from own_configs import dataset, errors, set_at, write_data
from PIL import Image

from experiment import ExperimentError, Record
from lowrank import PerplexityTable
from segmentation.cli import main, parser, task_of
from segmentation.history import History
from segmentation.identity import dataset_of
from segmentation.sources import own_sources

EPOCHS = {"type": "EpochBasedTrainLoop", "max_epochs": 2}


FAILING = {  # what is changed, and what is said
    "optimizer": ("train", ("optim_wrapper", "optimizer", "lrr", 0.1), "lrr"),
    "layers": ("train", ("custom_hooks", 0, "layers", ["decode_head.nothing"]), "decode_head.nothing"),
    "ranks": ("train", ("custom_hooks", 0, "method", {"type": "ASI"}), "ranks"),
    "layers to measure": ("measure", ("custom_hooks", 0, "layers", ["decode_head.nothing"]), "decode_head.nothing"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILING)
def test_what_fails_before_the_first_step_leaves_nothing_and_the_mended_command_works(name, own, tmp_path, capsys):
    command, change, message = FAILING[name]
    content, words = own
    before = copy.deepcopy(content)
    set_at(content, *change)
    assert main(words(command)) == 2
    (line,) = errors(capsys)
    assert message in line
    assert not (tmp_path / "runs").exists()
    content.clear()
    content.update(before)
    assert main(words(command)) == 0
    if command == "train":
        assert Record.load(next(tmp_path.rglob("result.json"))).run.model == "net"


@pytest.mark.slow
def test_a_table_that_was_measured_for_a_config_gives_its_method_ranks(own, tmp_path, capsys):
    content, words = own
    set_at(content, "custom_hooks", 0, "method", {"type": "ASI"})
    assert main(words("measure")) == 0
    table = next(tmp_path.rglob("perplexity.json"))
    budget = ["--budget-table", str(table), "--budget-mib", "0.1"]
    assert PerplexityTable.load(table).model == "net"
    assert main(words("train", *budget)) == 0
    result = next(tmp_path.rglob("result.json"))
    record = Record.load(result)
    assert (record.run.model, record.provenance["settings"]["budget.mib"]) == ("net", 0.1)
    assert record.provenance["settings"]["budget.energies"] == list(PerplexityTable.load(table).energies)
    capsys.readouterr()
    assert main(["train", str(result.parent / "config.yaml"), "--runs-dir", str(tmp_path / "runs")]) == 0
    assert "done already" in capsys.readouterr().out
    set_at(content, "crop_size", None)
    assert main(words("train", *budget)) == 2
    (line,) = errors(capsys)
    assert "set crop_size to the height and width" in line


@pytest.mark.slow
def test_no_process_that_loads_data_outlives_its_run(own):
    content, words = own
    for part in ("train_dataloader", "val_dataloader"):
        content[part] |= {"num_workers": 1, "persistent_workers": True}
    assert main(words()) == 0
    assert not multiprocessing.active_children()


NO_VALIDATION = {
    "no validation": ("train", [("val_dataloader", None), ("val_evaluator", None), ("val_cfg", None)], "val_evaluator"),
    "no loop": ("train", [("val_cfg", None)], "the config has no val_cfg, and train needs"),
    "no evaluator": ("train", [("val_evaluator", [])], "the config has no val_evaluator"),
    "another measure": ("train", [("val_evaluator", "iou_metrics", ["mDice"])], "no val_evaluator gives the mIoU"),
    "two others": (
        "train",
        [("val_evaluator", [{"type": "IoUMetric", "iou_metrics": ["mDice"]}, {"type": "IoUMetric", "prefix": "x"}])],
        "no val_evaluator gives the mIoU",
    ),
    "none before the end": ("train", [("train_cfg", "val_begin", 5)], "val_begin is 5, and the run ends at 4"),
}


@pytest.mark.parametrize("name", NO_VALIDATION)
def test_a_run_that_no_validation_would_judge_is_refused_before_it_trains(name, own, tmp_path, capsys):
    refused(*NO_VALIDATION[name], own, tmp_path, capsys)


def refused(command, changes, message, own, tmp_path, capsys, options=()):
    content, words = own
    for change in changes:
        set_at(content, *change)
    assert main(words(command, *options)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "OneDL" not in line]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert message in said[0]
    assert not (tmp_path / "runs").exists()


def test_several_measures_are_more_than_is_needed_and_measuring_needs_none(own):
    content, words = own
    set_at(
        content,
        "val_evaluator",
        [{"type": "IoUMetric", "iou_metrics": ["mDice"], "prefix": "x"}, {"type": "IoUMetric"}],
    )
    assert main(words("train", "--dry-run")) == 0
    for part in ("val_dataloader", "val_evaluator", "val_cfg", "train_cfg", "optim_wrapper"):
        set_at(content, part, None)
    assert main(words("measure", "--dry-run")) == 0


def test_a_measure_of_ones_own_that_tells_no_miou_is_one_line(tmp_path):
    history, runner = History(tmp_path), SimpleNamespace(model=torch.nn.Linear(1, 1), iter=1)
    history.history.step_end(runner.model, 0.5)
    with pytest.raises(ExperimentError, match="gives no mIoU, by which a run is judged, but Dice, aAcc;"):
        history.after_val_epoch(runner, {"Dice": 1.0, "aAcc": 1.0})


NO_USE = ["--budget-table", "table.json", "--budget-mib", "1"]
REFUSED = {
    "length of epochs": ([("train_cfg", EPOCHS)], ["--iterations", "2"], "train_cfg has no max_iters; give"),
    "two lengths": (
        [],
        ["--iterations", "4", "--cfg-options", "train_cfg.max_iters=6"],
        "--iterations and --cfg-options train_cfg.max_iters both set the length of the run; give one of them",
    ),
    "a part in words": ([], ["--cfg-options", "train_cfg={'max_iters':6}"], "train_cfg is "),
    "a method in words": (
        [],
        ["--cfg-options", "custom_hooks.0.method={'type':'ASI'}"],
        "the method of LowRankHook is ",
    ),
    "a method of the suite's": (
        [("lowrank", {"method": {"type": "SVD"}})],
        [],
        "lowrank, as of a config of a method, is ",
    ),
    "a budget of no use": ([], NO_USE, "a budget would have no effect, as HOSVD leaves no ranks to a budget; leave it"),
    "a budget of nothing": (
        [("custom_hooks", [])],
        NO_USE,
        "a budget is for the method of a LowRankHook, and custom_ho",
    ),
    "unnamed data": ([], ["--data-dir", "data"], "names its data set, a folder in there, as dataset = 'NAME'"),
    "data in two folders": (
        [("dataset", "own"), ("val_dataloader", "dataset", "data_root", "elsewhere")],
        ["--data-dir", "data"],
        "whose data are below one data_root; this one has ",
    ),
    "no training data": ([("train_dataloader", None)], [], "the config has no train_dataloader.batch_size, train_data"),
    "no optimizer": ([("optim_wrapper", None)], [], "the config has no optim_wrapper, and train needs it"),
    "no data set": (
        [("train_dataloader", "dataset", None)],
        [],
        "the config has no train_dataloader.dataset.type, and train needs it; a data set is given by its type and",
    ),
    **{
        f"an optimizer of {what}": (
            [("optim_wrapper", "optimizer", *change)],
            [],
            f"optimizer.type is {said}; allowed is",
        )
        for what, change, said in (
            ("an unknown type", ("type", "Nope"), "'Nope'"),
            ("no type", ("type", None), "missing"),
            ("nothing", (None,), "missing"),
        )
    },
    "an optimizer with a setting that cannot be": (
        [("optim_wrapper", "optimizer", {"type": "Adam", "betas": (2.0, 3.0)})],
        [],
        "a part of the config cannot be built: Invalid beta parameter at index 0: 2.0; mend",
    ),
    "data nowhere": (
        [("train_dataloader", "dataset", {"type": "BaseSegDataset"})],
        [],
        "train_dataloader.dataset does not say where it is",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_one_line(name, own, tmp_path, capsys):
    changes, options, message = REFUSED[name]
    refused("train", changes, message, own, tmp_path, capsys, options)


@pytest.mark.parametrize("name", [name for name in REFUSED if name.startswith("an optimizer of")])
def test_a_dry_run_refuses_an_optimizer_that_there_is_not(name, own, tmp_path, capsys):
    changes, _, message = REFUSED[name]
    refused("train", changes, message, own, tmp_path, capsys, ["--dry-run"])


@pytest.mark.parametrize(
    ("given", "kind", "name"),
    [
        (None, "BaseSegDataset", "BaseSegDataset"),
        (None, "mmseg.datasets:BaseSegDataset", "mmseg.datasets.BaseSegDataset"),
        (None, dict, "dict"),
        ("mine", "BaseSegDataset", "mine"),
    ],
)
def test_a_data_set_without_a_name_has_that_of_its_type(given, kind, name):
    config = Config({"dataset": given, "train_dataloader": {"dataset": {"type": kind}}})
    assert dataset_of(config) == name


def test_a_picture_has_images(tmp_path, capsys):
    assert main(["picture", str(tmp_path), "--output", str(tmp_path / "p.png"), "--count", "0"]) == 2
    assert capsys.readouterr().err == "error: --count is 0; allowed are whole numbers from 1\n"


@pytest.mark.slow
def test_a_picture_is_of_images_of_any_sizes_and_says_where_there_are_none(own, tmp_path, capsys):
    _, words = own
    for folder in ("img", "ann"):
        path = tmp_path / "own" / folder / "val" / "val_b.png"
        Image.open(path).resize((24, 20)).save(path)
    assert main(words("train")) == 0
    (record,) = (tmp_path / "runs").rglob("result.json")
    draw = ["picture", str(record.parent), "--output", str(tmp_path / "p.png"), "--count", "3"]
    assert main(draw) == 0
    assert Image.open(tmp_path / "p.png").size[0] > 100
    capsys.readouterr()
    (tmp_path / "own").rename(tmp_path / "elsewhere")
    assert main(draw) == 2
    assert capsys.readouterr().err == f"error: there is no data set in {tmp_path / 'own'}\n"


def test_a_schedule_gets_shorter_with_the_run_whatever_is_left_to_mmengine(own):
    content, words = own
    schedulers = [
        {"type": "LinearLR", "start_factor": 0.1, "end": 100, "by_epoch": False},
        {"type": "CosineAnnealingLR", "begin": 100, "T_max": 300, "by_epoch": False},
        {"type": "MultiStepLR", "milestones": [200, 300], "by_epoch": False},
    ]
    for given in (None, schedulers[0], schedulers):
        set_at(content, "train_cfg", {"type": "IterBasedTrainLoop", "max_iters": 400})
        if given is not None:
            set_at(content, "param_scheduler", given)
        task = task_of(parser().parse_args(words("train", "--iterations", "40")))
        assert (task.config.train_cfg.max_iters, task.config.train_cfg.val_interval) == (40, 100)
    linear, cosine, steps = task.config.param_scheduler
    assert (linear.end, cosine.begin, cosine.T_max, steps.milestones) == (10, 10, 30, [20, 30])


@pytest.mark.slow
def test_data_in_two_folders_and_by_full_paths_are_trained_on(own, tmp_path):
    content, words = own
    set_at(content, "val_dataloader", "dataset", dataset(write_data(tmp_path / "other"), "val", rooted=False))
    assert main(words("train", "--iterations", "2")) == 0
    record = Record.load(next(tmp_path.rglob("result.json")))
    assert len(record.provenance["data_fingerprint"]) == 16


OWN_CODE = """from mmengine.registry import TRANSFORMS as OF_ALL
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS


@MODELS.register_module()
class {head}(FCNHead):
    pass


@OF_ALL.register_module()
class {step}(dict):
    def __call__(self, sample):
        return sample
"""


@pytest.fixture
def own_code(own, tmp_path, monkeypatch):
    """The config with a head and a transform of one's own; the file of these, and their names, new to the process."""
    content, _ = own
    path = tmp_path / f"own_code_{tmp_path.name}.py"
    names = {"head": f"Head{tmp_path.name}", "step": f"Step{tmp_path.name}"}
    path.write_text(OWN_CODE.format(**names))
    monkeypatch.syspath_prepend(tmp_path)
    set_at(content, "custom_imports", "imports", ["segmentation", path.stem])
    set_at(content, "model", "decode_head", "type", names["head"])
    content["train_dataloader"]["dataset"]["pipeline"].insert(2, {"type": names["step"]})
    return path, names


@pytest.mark.slow
def test_a_run_of_other_code_of_ones_own_is_not_taken_for_this_one(own, own_code, tmp_path, capsys):
    _, words = own
    path, names = own_code
    assert main(words()) == 0
    (told,) = tmp_path.rglob("sources.json")
    assert set(json.loads(told.read_text())) == {f"model {names['head']}", f"transform {names['step']}"}
    assert main(words()) == 0
    assert "done already" in capsys.readouterr().out
    path.write_text(path.read_text() + "\n")
    assert main(words()) == 2
    assert re.search(r"of other code: the file of the (model|transform) .*\.py, fingerprint", errors(capsys)[0])


def test_code_by_its_path_is_ones_own_as_well_and_the_stock_is_not(own, own_code):
    path, names = own_code
    importlib.import_module(path.stem)
    stock = [{"type": name} for name in ("FCNHead", "mmseg.FCNHead", "SGD", "PlacedSampler", "nowhere.Mine", "Nothing")]
    assert own_sources({"model": stock, "custom_hooks": [{"type": "LowRankHook", "method": {"type": "HOSVD"}}]}) == {}
    for kind in (f"mmseg.{names['head']}", f"{path.stem}.{names['head']}", f"{path.stem}.FCNHead"):
        found = own_sources({"model": {"decode_head": {"type": kind}}})
        assert [source["file"] for source in found.values()] == [str(path)] * (not kind.endswith("FCNHead"))


def hook(**settings):
    return [(("custom_hooks", 0, name, value)) for name, value in settings.items()]


OF_THE_SUITE = {  # what is changed, and what is said
    "typo": ("train", hook(freze=["backbone"]), "LowRankHook has the setting 'freze'; allowed: type, priority, method"),
    "layers": ("train", hook(layers="decode_head.convs.0.conv"), "layers of LowRankHook is 'decode_head.convs.0.conv'"),
    "freeze": ("train", hook(freeze="backbone"), "freeze of LowRankHook is 'backbone'; allowed: a list of paths"),
    "fuse": ("train", hook(fuse="no"), "fuse of LowRankHook is 'no'; allowed: True, False and None"),
    "dropout": ("train", hook(dropout="no"), "dropout of LowRankHook is 'no'; allowed: True and False"),
    "nothing": ("train", hook(layers=[]), "LowRankHook has the method HOSVD and no layers"),
    "budget typo": ("train", hook(budget={"table": "t", "mb": 1}), "the budget of LowRankHook has the setting 'mb'"),
    "budget": ("train", hook(budget={"table": "t", "mib": "1"}, method={"type": "ASI"}), "budget.mib is '1'; allowed"),
    "divisor": (
        "train",
        hook(budget={"table": "t", "run": "r", "divisor": 2.5}, method={"type": "ASI"}),
        "budget.divisor is 2.5; allowed are whole numbers",
    ),
    "energy": ("train", hook(method={"type": "HOSVD", "energy": True}), "energy is True; allowed is a number above 0"),
    "warm start": (
        "train",
        hook(method={"type": "ASI", "ranks": 2, "warm_start": "no"}),
        "warm_start is 'no'; allowed",
    ),
    "processes": ("train", [("processes", "2")], "processes is '2'; allowed are whole numbers from 1"),
    "measured typo": ("measure", [("perplexity", {"enrgies": [0.5]})], "perplexity has the setting 'enrgies'; allowed"),
    "energies": ("measure", [("perplexity", {"energies": "0.5"})], "energies of perplexity is '0.5'; allowed: a list"),
    "energies above 1": ("measure", [("perplexity", {"energies": [1.5]})], "energies of perplexity is '[1.5]'"),
    "no batches": ("measure", [("perplexity", {"batches": 0})], "batches of perplexity is '0'; allowed: whole numbers"),
    "no settings": ("measure", [("perplexity", [0.5])], "perplexity is '[0.5]'; allowed are settings by their names"),
}


@pytest.mark.parametrize("name", OF_THE_SUITE)
def test_settings_of_the_suites_own_parts_are_checked_by_name_and_kind(name, own, tmp_path, capsys):
    refused(*OF_THE_SUITE[name], own, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("loop", [{}, EPOCHS])
def test_a_batch_that_the_images_do_not_fill_is_refused_where_it_would_be_dropped(loop, own, tmp_path, capsys):
    content, _ = own
    content["train_cfg"] = loop or content["train_cfg"]
    sampler = {"type": "DefaultSampler", "shuffle": True}
    loader = {"batch_size": 64, "drop_last": True, "sampler": sampler}
    changes = [("train_dataloader", key, value) for key, value in loader.items()]
    refused("train", changes, "4 training images do not fill one batch of 64", own, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "said"), [({}, "after 4 of 8 iterations"), (EPOCHS, "after 2 of 9 epochs")])
def test_a_run_that_a_hook_ends_early_is_not_done_and_goes_on_without_it(loop, said, own, tmp_path, capsys):
    content, words = own
    lengths = EPOCHS | {"max_epochs": 9} if loop else content["train_cfg"] | {"max_iters": 8}
    content["train_cfg"] = lengths
    if loop:
        content["train_dataloader"]["sampler"]["type"] = "DefaultSampler"
    hooks = content["custom_hooks"]
    early = {"type": "EarlyStoppingHook", "monitor": "mIoU", "patience": 1, "min_delta": 1000}
    content["custom_hooks"] = [*hooks, early]
    assert main(words()) == 2
    (line,) = errors(capsys)
    assert f"stopped {said}, by a hook such as EarlyStoppingHook, so there is no record" in line
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("setting", ["activation_checkpointing=['backbone']", "compile=True"])
def test_what_changes_what_a_run_keeps_is_a_part_of_what_it_is(setting, own, tmp_path, capsys):
    _, words = own
    assert main(words()) == 0
    assert main(words("train", "--dry-run", "--cfg-options", setting)) == 2
    assert f"holds a run with other settings ({setting.partition('=')[0]} is None there" in errors(capsys)[0]
    assert main(words("train", "--dry-run", "--cfg-options", "compile=False")) == 0
