"""A run of a config of one's own draws by places alone: as one without a break, however many processes load images."""

from __future__ import annotations

import signal
import tempfile

import pytest
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from own_configs import dataset, settings, write_config, write_data

from benchmarks.kills import differences
from segmentation.cli import main
from segmentation.data.draws import PlacedEpochs, PlacedSampler, place_draws
from segmentation.history import History

LOADING = {"num_workers": 2, "persistent_workers": True}
DRAWN = [{"type": "RandomFlip", "prob": 0.5}, {"type": "PhotoMetricDistortion"}]
KINDS = {
    "iterations": ("InfiniteSampler", {"type": "IterBasedTrainLoop", "max_iters": 8, "val_interval": 4}, 4),
    "epochs": ("DefaultSampler", {"type": "EpochBasedTrainLoop", "max_epochs": 4, "val_interval": 2}, 1),
}
OWN_SAMPLER = """
from mmengine.dataset import InfiniteSampler
from mmengine.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module(force=True)
class OwnSampler(InfiniteSampler):
    pass
"""


@pytest.fixture
def _short_folder(monkeypatch, tmp_path):  # pytest makes its own folder first
    """What loads images lives as long as this process, and leaves its socket among the temporary files."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield


def config_of(path, data, kind, loading, sampler=None):
    name, loop, interval = KINDS[kind]
    content = settings(dataset(data, "train"), dataset(data, "val"))
    loader = content["train_dataloader"]
    loader |= {"sampler": {"type": sampler or name, "shuffle": True}, **loading}
    loader["dataset"]["pipeline"][2:2] = DRAWN
    by_epoch = kind == "epochs"
    content["train_cfg"] = loop
    saving = {"type": "CheckpointHook", "interval": interval, "by_epoch": by_epoch, "max_keep_ckpts": 2}
    content["default_hooks"] = {"checkpoint": saving}
    if sampler:
        content["custom_imports"]["imports"].append("own_sampler")
    return ["train", write_config(path / "net.py", content), "--runs-dir", str(path / "runs")]


def stop_at(step):
    """Have a signal come ahead of a step."""
    patch = pytest.MonkeyPatch()

    def come(hook, runner, *arguments, **options):
        if runner.iter == step:
            patch.undo()
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(History, "before_train_iter", come)


@pytest.mark.slow
@pytest.mark.usefixtures("_short_folder")
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_draws_as_one_without_a_break(kind, tmp_path, capsys):
    data, found = write_data(tmp_path / "own"), []
    for name, loading, stop in (("whole", {"num_workers": 0}, None), ("broken", LOADING, 5)):
        (tmp_path / name).mkdir()
        words = config_of(tmp_path / name, data, kind, loading)
        if stop is not None:
            stop_at(stop)
            assert main(words) == 128 + signal.SIGTERM
            capsys.readouterr()
        assert main(words) == 0
        said = capsys.readouterr()
        assert ("resuming: " in said.out) == (stop is not None)
        assert "warning" not in said.out
        found.append(next((tmp_path / name).rglob("result.json")).parent)
    assert differences(*found) == []


@pytest.mark.slow
def test_with_a_sampler_of_ones_own_a_resumed_run_says_that_it_does_not(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_sampler.py").write_text(OWN_SAMPLER)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = config_of(tmp_path, write_data(tmp_path / "own"), "iterations", {"num_workers": 0}, sampler="OwnSampler")
    stop_at(5)
    assert main(words) == 128 + signal.SIGTERM
    assert "warning" not in capsys.readouterr().out
    assert main(words) == 0
    assert capsys.readouterr().out.count("warning: train_dataloader has a sampler of type OwnSampler") == 1


@pytest.mark.parametrize(("placed", "stock"), [(PlacedSampler, InfiniteSampler), (PlacedEpochs, DefaultSampler)])
def test_samples_are_those_of_mmengine_each_with_a_draw_of_its_own(placed, stock):
    data, draws = range(7), set()
    ours, theirs = (kind(data, shuffle=True, seed=3) for kind in (placed, stock))
    for epoch in range(2):
        for sampler in (ours, theirs):
            sampler.set_epoch(epoch)
        indices = [index for _, index in zip(range(7), iter(ours), strict=False)]
        assert indices == [index for _, index in zip(range(7), iter(theirs), strict=False)]
        draws |= {index.draw for index in indices}
    assert len(draws) == (14 if placed is PlacedEpochs else 7)


def test_what_is_in_place_stays_and_what_is_asked_of_a_data_set_is_answered_by_it(tmp_path):
    inner = dataset(write_data(tmp_path / "own"), "train")
    for given in (inner, {"type": "PlacedDataset", "dataset": inner}):
        for sampler in ("InfiniteSampler", "mmengine.InfiniteSampler", InfiniteSampler, "PlacedSampler"):
            config = Config({"train_dataloader": {"sampler": {"type": sampler}, "dataset": given}})
            assert place_draws(config) is None
            assert config.train_dataloader.sampler.type == "PlacedSampler"
            assert config.train_dataloader.dataset.dataset.to_dict() == inner
    config = Config({"train_dataloader": {"sampler": {"type": "Other"}, "dataset": inner}})
    before = config.to_dict()
    assert (place_draws(config), config.to_dict()) == ("Other", before)
