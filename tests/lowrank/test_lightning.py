"""LowRankCallback against a loop that is written out by hand, uninterrupted and resumed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank

pl = pytest.importorskip("pytorch_lightning")
from lowrank.lightning import LowRankCallback  # noqa: E402

pytestmark = pytest.mark.cpu_only("the Trainer moves modules itself")
BUDGET, LITTLE = 6_000, 800
EPOCHS, BATCH = 2, 8


def network() -> nn.Sequential:
    torch.manual_seed(3)
    convolutions = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Module(pl.LightningModule):
    """An ordinary module, which knows nothing of lowrank."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.logged: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return {"loss": loss}

    def on_train_batch_end(self, *_: object) -> None:
        self.logged.append(float(self.trainer.callback_metrics["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(32, 3, 12, 12, generator=generator), torch.randint(0, 4, (32,), generator=generator)


def fit(
    folder: Path,
    callback: LowRankCallback,
    epochs: int = EPOCHS,
    resume: Path | None = None,
    module: Module | None = None,
) -> tuple[Module, Path]:
    """Train, and say where the checkpoint is."""
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=BATCH)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        enable_checkpointing=False,
        accelerator="cpu",
        log_every_n_steps=1,
        **quiet,
    )
    module = module or Module()
    trainer.fit(module, loader, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, folder / "last.ckpt"


def by_hand() -> nn.Sequential:
    """The same training without Lightning."""
    model = network()
    names = lowrank.trailing_layers(model, 2)
    lowrank.freeze_before(model, names)
    images, labels = data()

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    first = (images[:BATCH], labels[:BATCH])
    table = lowrank.measure_perplexity(model, names, loss_fn, first, mode_energies=lowrank.MODE_ENERGIES)
    ranks = lowrank.select_ranks(table, BUDGET).ranks
    # Names take part in the first bases, so the callback's prefix is the model's here as well.
    wrapped = nn.ModuleDict({"network": model})
    prefixed = {f"network.{name}": each for name, each in ranks.items()}
    lowrank.convert(wrapped, list(prefixed), lowrank.ASI(ranks=prefixed))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(EPOCHS):
        for start in range(0, len(images), BATCH):
            optimizer.zero_grad()
            loss_fn(model, (images[start : start + BATCH], labels[start : start + BATCH])).backward()
            optimizer.step()
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_it_trains_as_a_loop_by_hand_does_and_a_resumed_run_as_one_without_a_break(tmp_path: Path) -> None:
    for name in ("whole", "half", "rest"):
        (tmp_path / name).mkdir()
    whole, _ = fit(tmp_path / "whole", LowRankCallback(lowrank.ASI(), layers=2, budget=BUDGET))
    assert same(whole.network.state_dict(), by_hand().state_dict())
    assert len(set(whole.logged)) == EPOCHS * 4  # a step, a value: perplexity logs none

    _, checkpoint = fit(tmp_path / "half", LowRankCallback(lowrank.ASI(), layers=2, budget=BUDGET), epochs=1)
    callback = LowRankCallback(lowrank.ASI(), layers=2, budget=BUDGET)
    resumed, _ = fit(tmp_path / "rest", callback, resume=checkpoint)
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(lowrank.training_state(resumed), lowrank.training_state(whole))
    assert set(callback.ranks) == {"network.2", "network.4"}
    assert Module().load_state_dict(torch.load(checkpoint)["state_dict"], strict=True).missing_keys == []

    with pytest.raises(lowrank.StateError, match=r"ranks of network\.2, network\.4, not of network\.4"):
        fit(tmp_path, LowRankCallback(lowrank.ASI(), layers=1, budget=BUDGET), resume=checkpoint)
    foreign = torch.load(checkpoint)
    del foreign["lowrank"]
    torch.save(foreign, tmp_path / "foreign.ckpt")
    with pytest.raises(lowrank.StateError, match="saved without LowRankCallback"):
        fit(tmp_path, LowRankCallback(lowrank.ASI(), layers=2, budget=BUDGET), resume=tmp_path / "foreign.ckpt")


def test_factors_are_there_before_the_optimizer_is(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, LowRankCallback(lowrank.WSI(energy=1.0), layers=["network.8"]), epochs=1)
    (group,) = module.optimizers().param_groups
    held = {id(parameter) for parameter in group["params"]}
    layer = module.network[8]
    assert {id(layer.left), id(layer.right), id(layer.bias)} == held
    assert not module.network[4].weight.requires_grad


def test_what_cannot_go_together_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    with pytest.raises(lowrank.SettingError, match=r"whose ranks are not chosen yet.*not ASI\(ranks=2"):
        LowRankCallback(lowrank.ASI(ranks=2), budget=BUDGET)
    with pytest.raises(lowrank.SettingError, match="not HOSVD"):
        LowRankCallback(lowrank.HOSVD(0.8), budget=BUDGET)
    with pytest.raises(lowrank.SettingError, match="give it ranks in place of a budget"):
        LowRankCallback(lowrank.WASI(), budget=BUDGET)
    module = Module()
    with pytest.raises(lowrank.ConversionError, match=r"network\.9"):
        fit(tmp_path, LowRankCallback(lowrank.ASI(), layers=["network.9"], budget=BUDGET), module=module)
    assert all(parameter.requires_grad for parameter in module.parameters())
    manual = Module()
    manual.automatic_optimization = False
    with pytest.raises(lowrank.SettingError, match="give LowRankCallback a loss_fn"):
        fit(tmp_path, LowRankCallback(lowrank.ASI(), layers=2, budget=BUDGET), module=manual)


@pytest.mark.slow
def test_without_the_frameworks_their_modules_say_what_they_need_and_the_library_works() -> None:
    code = """
import importlib, sys
for name in ("lightning", "pytorch_lightning", "transformers"):
    sys.modules[name] = None
import lowrank
for name in ("lightning", "transformers"):
    try:
        importlib.import_module(f"lowrank.{name}")
    except ModuleNotFoundError as error:
        print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "lowrank.lightning needs Lightning, which is not here; pip install lightning",
        "lowrank.transformers needs Transformers, which is not here; pip install transformers",
    ]


class Counting(Module):
    """Counts the samples that it is trained on, by a metric."""

    def __init__(self) -> None:
        super().__init__()
        torchmetrics = pytest.importorskip("torchmetrics")
        self.samples = torchmetrics.SumMetric()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        self.samples.update(len(batch[0]))
        return super().training_step(batch, batch_idx)


def test_the_batch_that_perplexity_is_measured_on_counts_once_in_the_metrics_of_its_epoch(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, LowRankCallback(lowrank.ASI(), layers=2, budget=BUDGET), epochs=1, module=Counting())
    assert module.samples.compute() == 32


class Bottlenecks(Module):
    """An inverted bottleneck at the end, whose two wide inputs follow from the narrow one; statistics are frozen."""

    def __init__(self) -> None:
        super().__init__()
        torchvision = pytest.importorskip("torchvision")
        torch.manual_seed(3)
        self.network = torchvision.models.mobilenet_v2(num_classes=4, width_mult=0.25)
        for layer in self.network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0
        with torch.no_grad():
            self.network(data()[0])
        self.train()  # the Trainer keeps the mode in which it gets each layer

    def train(self, mode: bool = True) -> Bottlenecks:
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d | nn.Dropout):
                layer.eval()
        return self


@pytest.mark.slow
@pytest.mark.parametrize("follow", [True, False])
def test_inputs_that_follow_from_others_are_not_kept_where_that_is_chosen_and_resuming_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follow: bool
) -> None:
    def chosen(*given: Any, derive: bool, **options: Any) -> lowrank.RankPlan:
        return lowrank.select_ranks(*given, derive=derive and follow, **options)

    monkeypatch.setattr("lowrank.lightning.select_ranks", chosen)
    runs = {}
    for name, epochs, resume in (("whole", EPOCHS, None), ("half", 1, None), ("rest", EPOCHS, "half")):
        (tmp_path / name).mkdir()
        callback = LowRankCallback(lowrank.ASI(storage="int8", derive=True), layers=4, budget=LITTLE)
        checkpoint = None if resume is None else runs[resume][1]
        module, saved = fit(tmp_path / name, callback, epochs, checkpoint, Bottlenecks())
        runs[name] = module, saved, callback
        states = [layer._lowrank for layer in lowrank.converted_layers(module) if layer._lowrank.chosen]
        first, *wide = (f"network.{name}" for name in lowrank.trailing_layers(module.network, 4)[:3])
        assert callback.derived == (dict.fromkeys(wide, first) if follow else {})
        assert {state.name: state.derived for state in states if state.derived} == callback.derived
        assert 0 < sum(state.kept_bytes for state in states) <= LITTLE
    (whole, _, before), (rest, _, after) = runs["whole"], runs["rest"]
    assert before.ranks == after.ranks
    assert same(rest.state_dict(), whole.state_dict())
    assert lowrank.training_state(rest)
    assert same(lowrank.training_state(rest), lowrank.training_state(whole))
    stock = Bottlenecks().state_dict()
    moved = {name for name, value in whole.state_dict().items() if not torch.equal(value, stock[name])}
    assert moved >= {f"{name}.weight" for name in (first, *wide)}


def test_deriving_needs_to_know_what_lies_between_the_layers() -> None:
    with pytest.raises(lowrank.SettingError, match=r"fuse is off with ASI\(derive=True\).*leave fuse out"):
        LowRankCallback(lowrank.ASI(derive=True), budget=BUDGET, fuse=False)


AGAIN = {
    "a budget": lambda: LowRankCallback(lowrank.ASI(), 2, BUDGET),
    "ranks": lambda: LowRankCallback(lowrank.ASI([2, 3, 2, 2]), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["a budget", "ranks"])
def test_a_module_that_a_callback_like_it_has_converted_goes_on(settings: str, tmp_path: Path) -> None:
    """As when a notebook's cell is run again; its checkpoints are as good as the first one's."""
    first = AGAIN[settings]()
    module, checkpoint = fit(tmp_path, first)
    second = AGAIN[settings]()
    fit(tmp_path, second, EPOCHS + 1, checkpoint, module)
    assert (second.names, second.ranks) == (first.names, first.ranks)
    third = AGAIN[settings]()
    _, again = fit(tmp_path, third, module=module)
    fresh, _ = fit(tmp_path, AGAIN[settings](), EPOCHS + 1, again)
    assert isinstance(fresh.network[4], nn.Conv2d)
    assert lowrank.training_state(fresh)


@pytest.mark.parametrize(
    "other",
    [
        lambda: LowRankCallback(lowrank.ASI([2, 3, 2, 2]), 3),
        lambda: LowRankCallback(lowrank.ASI([2, 2, 2, 2]), 2),
        lambda: LowRankCallback(lowrank.HOSVD(0.9), 2),
        lambda: LowRankCallback(lowrank.ASI(storage="int8"), 2, BUDGET),
    ],
)
def test_a_module_that_is_converted_in_another_way_is_refused(other: Any, tmp_path: Path) -> None:
    module, _ = fit(tmp_path, AGAIN["ranks"]())
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    with pytest.raises(lowrank.ConversionError, match=r"converted already.*lowrank\.revert\(module\) first"):
        fit(tmp_path, other(), module=module)
    assert before == {name: p.requires_grad for name, p in module.named_parameters()}
    lowrank.revert(module)
    fit(tmp_path, other(), module=module)
