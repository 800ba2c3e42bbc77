"""A perplexity table serves the runs that it was measured for: of its training images, and from its weights."""

from __future__ import annotations

import json

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from own_configs import errors, set_at
from PIL import Image

from segmentation.cli import main
from segmentation.identity import weights_of
from segmentation.quiet import register_modules


@pytest.fixture
def weights(own, tmp_path):
    """Writes weights for the network of one's own, drawn by a seed."""

    def write(seed):
        register_modules()
        torch.manual_seed(seed)
        model = MODELS.build(Config(own[0]).model)
        model.init_weights()
        path = tmp_path / f"weights{seed}.pth"
        torch.save({"state_dict": model.state_dict()}, path)
        return ["--load-from", str(path)]

    return write


@pytest.fixture
def table(own, weights, tmp_path):
    """A table that was measured without validation data, and the words of a run that takes its budget by it."""
    content, words = own
    set_at(content, "custom_hooks", 0, "method", {"type": "ASI"})
    validation = {name: content.pop(name) for name in ("val_dataloader", "val_evaluator", "val_cfg")}
    assert main(words("measure", *weights(1))) == 0
    content |= validation
    (path,) = tmp_path.rglob("perplexity.json")
    return path, ["--budget-table", str(path), "--budget-mib", "0.1"]


def test_a_config_with_a_budget_measures_the_table_that_it_is_to_come_of(own, tmp_path, capsys):
    content, words = own
    path = tmp_path / "runs/segmentation/finetune/net/BaseSegDataset/perplexity/layersall/seed233/perplexity.json"
    content["custom_hooks"][0] |= {"method": {"type": "ASI"}, "budget": {"table": str(path), "mib": 0.1}}
    assert main(words("train", "--dry-run")) == 2
    assert "there is no such file; measure it first, by the command measure with" in errors(capsys)[0]
    assert main(words("measure", "--dry-run")) == 0
    assert main(words("measure")) == 0
    assert main(words("train", "--dry-run")) == 0
    assert main(words("measure", "--budget-table", str(path), "--budget-mib", "0.1")) == 2
    assert "a budget is for train, which" in errors(capsys)[0]


def change(path):
    Image.open(path).rotate(180).save(path)


def test_a_table_is_of_the_images_to_train_on_alone(own, weights, table, tmp_path, capsys):
    _, words = own
    path, budget = table
    run = words("train", *budget, *weights(1), "--dry-run")
    assert main(run) == 0
    change(tmp_path / "own" / "img" / "val" / "val_a.png")
    assert main(run) == 0
    capsys.readouterr()
    assert main(words("measure", *weights(1))) == 0
    assert "done already" in capsys.readouterr().out
    change(tmp_path / "own" / "img" / "train" / "train_a.png")
    for command, told in ((run, "perplexity.json is of other data"), (words("measure", *weights(1)), "on other data")):
        assert main(command) == 2
        assert told in errors(capsys)[0]
    assert path.exists()


def test_a_table_of_an_earlier_version_which_noted_all_data_serves_as_before(own, weights, table, tmp_path, capsys):
    _, words = own
    path, budget = table
    runs = [words("train", *budget, *weights(1)), words("measure", *weights(1))]
    assert main([*runs[0], "--work-dir", str(tmp_path / "run")]) == 0
    whole = json.loads((tmp_path / "run" / "result.json").read_text())["provenance"]["data_fingerprint"]
    identity = path.with_name("identity.json")
    noted = json.loads(identity.read_text())
    assert noted["data_fingerprint"] != whole
    identity.write_text(json.dumps(noted | {"data_fingerprint": whole}))
    for command in runs:
        assert main([*command, "--dry-run"]) == 0
    change(tmp_path / "own" / "img" / "val" / "val_a.png")
    for command in runs:
        assert main([*command, "--dry-run"]) == 2
        assert "other data" in errors(capsys)[0]


def test_a_table_on_other_weights_gives_no_budget(own, weights, table, tmp_path, capsys):
    _, words = own
    budget = table[1]
    assert main(words("train", *budget, *weights(1), "--seed", "7", "--dry-run")) == 0
    for start, here in ((weights(2), r"fingerprint"), ([], "none")):
        for more in (["--dry-run"], []):
            assert main(words("train", *budget, *start, *more)) == 2
            (line,) = errors(capsys)
            assert "was measured on other weights than this run starts from (fingerprint " in line
            assert f" there, {here}" in line
    assert not list(tmp_path.rglob("result.json"))


def test_weights_that_parts_name_count_where_none_are_loaded_over_all():
    init = {"type": "Pretrained", "checkpoint": "a.pth"}
    model = {"pretrained": None, "backbone": {"init_cfg": [init]}, "decode_head": {"pretrained": "b.pth"}}
    assert weights_of({"model": model}) == "a.pth, b.pth"
    assert weights_of({"model": {"backbone": {"init_cfg": {"type": "Kaiming", "checkpoint": "a"}}}}) == "none"
    assert weights_of({"model": model, "load_from": "1a"}) == "fingerprint 1a"
    assert weights_of({"model": "damaged"}) == weights_of({}) == "none"
