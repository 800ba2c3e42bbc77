"""Every example runs, in small, and does what it says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import lowrank

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """The file as a module, read anew."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def equal_models(one: nn.Module, other: nn.Module) -> bool:
    """Weights and what the methods carry, bit for bit; and there is something that they carry."""
    states = [lowrank.training_state(model) for model in (one, other)]
    return bool(states[0]) and same(*states) and same(one.state_dict(), other.state_dict())


def test_each_is_short_and_run_here() -> None:
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path.name
        assert f'example("{path.stem}")' in text, path.name
        assert re.search(rf"^Run: (PYTHONPATH=\. )?python examples/{path.name} ", path.read_text(), re.MULTILINE)


def test_a_plain_loop_resumes_to_the_same_weights(tmp_path: Path) -> None:
    main, small = example("plain_loop").main, {"batch": 8, "size": 32}
    whole = main(tmp_path / "whole.pt", steps=4, **small)
    main(tmp_path / "half.pt", steps=2, **small)
    resumed = main(tmp_path / "half.pt", steps=4, **small)
    assert equal_models(whole, resumed)


@pytest.mark.slow
def test_lightning_resumes_to_the_same_weights(tmp_path: Path) -> None:
    main, small = example("lightning_callback").main, {"size": 32, "batch": 8, "images": 24}
    whole = main(tmp_path / "whole", epochs=2, **small)
    main(tmp_path / "half", epochs=1, **small)
    resumed = main(tmp_path / "rest", epochs=2, resume=tmp_path / "half" / "last.ckpt", **small)
    assert equal_models(whole, resumed)
    assert len({id(layer) for layer in lowrank.converted_layers(whole)}) >= 4


@pytest.mark.slow
def test_the_trainer_resumes_to_the_same_weights_from_safetensors(tmp_path: Path) -> None:
    main, small = example("huggingface_trainer").main, {"steps": 6, "save_every": 3}
    whole = main(tmp_path / "whole", **small)
    main(tmp_path / "half", until=4, **small)
    saved = tmp_path / "half" / "checkpoint-3"
    assert {"model.safetensors", "lowrank.pt", "optimizer.pt"} <= {path.name for path in saved.iterdir()}
    resumed = main(tmp_path / "half", **small)
    assert resumed.state.global_step == 6
    assert resumed.args.activation_checkpointing
    assert equal_models(whole.model, resumed.model)
    (tmp_path / "half" / "checkpoint-6" / "lowrank.pt").unlink()
    with pytest.raises(lowrank.StateError, match=r"there is no .*checkpoint-6/lowrank\.pt"):
        main(tmp_path / "half", steps=8, save_every=3)


@pytest.mark.slow
def test_wasi_keeps_less_than_lora_and_than_ordinary_training() -> None:
    found = example("wasi_beside_lora").main(steps=2)
    assert found["wasi"]["kept"] < found["lora"]["kept"]
    assert found["wasi"]["kept"] < found["ordinary"]["kept"]
    assert found["wasi"]["trained"] < found["ordinary"]["trained"]


@pytest.mark.slow
def test_a_model_of_timm_keeps_less_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = example("timm_model").main(steps=12, size=64, batch=16)
    assert after < before / 3
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_exact_training_keeps_less_for_the_same_gradients() -> None:
    found = example("exact_memory").main(batch=2, size=64)
    assert found["kept"] > 2
    assert found["error"] < 1e-12


@pytest.mark.slow
def test_a_larger_budget_has_a_lower_perplexity_and_the_picture_is_drawn(tmp_path: Path) -> None:
    perplexity = example("choose_budget").main(tmp_path / "budget.png", layers=4, batch=16, size=96)
    assert list(perplexity.values()) == sorted(perplexity.values())
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_steps_to_record_learn(capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    losses = example("cuda_graph").main()
    assert losses[-1] < 0.7 * losses[0]
    assert len(capsys.readouterr().out.splitlines()) == len(losses)
    assert not [one for one in recwarn if "stores no bases" in str(one.message)]


@pytest.mark.slow
def test_a_config_of_mmsegmentation_trains_with_the_hook(tmp_path: Path) -> None:
    runner = example("mmsegmentation_hook").main(tmp_path, iterations=2, size=32, batch=2)
    names = [layer._lowrank.name for layer in lowrank.converted_layers(runner.model) if layer._lowrank.chosen]
    assert names == runner.cfg.custom_hooks[0].layers
    saved = torch.load(tmp_path / "work" / "iter_2.pth", weights_only=False)
    stock = lowrank.revert(runner.model).state_dict()
    assert same(saved["state_dict"], stock)
