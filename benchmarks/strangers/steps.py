"""Step time of five strangers, every parameter trained, against stock: saved exactly, with ASI, and with checkpoints.

    python -m benchmarks.strangers.steps [--help]

Ratios of this process's processor time on one thread, the median of pairs of steps that alternate; stock over itself
says how far such a ratio can be trusted. Kept: bytes that live between forward and backward pass, over stock's. The
table is written anew after each row, and what it has already is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision import models

import lowrank
from benchmarks.pairs import ratio
from benchmarks.strangers.exactness import vanilla
from benchmarks.strangers.stranger import Stranger, all_layers, asi
from experiment.allocator import keep_freed_memory
from experiment.files import write_whole
from lowrank.meters.memory import held_bytes

SIDE, CLASSES, TOKENS, WORDS = 128, 100, 128, 1000
KEY = ["model", "statistics", "way"]
BLOCKS = ("Bottleneck", "MBConv", "CNBlock", "EncoderBlock", "LlamaDecoderLayer")  # what a checkpoint is put around


def _vit(width: int) -> nn.Module:
    return models.VisionTransformer(SIDE, 16, 6, 6, width, 4 * width, num_classes=CLASSES)


def _llama(width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": 4, "vocab_size": WORDS}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, use_cache=False)
    return LlamaForCausalLM(config)


def networks() -> Iterator[Stranger]:
    """Images of 128 x 128, of a ViT in 64 patches; a Llama of four layers on 128 tokens; both in two widths."""
    make: dict[str, Callable[[], nn.Module]] = {
        name: partial(models.get_model, name, weights=None, num_classes=CLASSES)
        for name in ("resnet50", "efficientnet_b0", "convnext_tiny")
    }
    for width in (192, 384):
        make[f"vit {width}"] = partial(_vit, width)
    for name, build in make.items():
        yield Stranger(name, "torchvision", build, lambda samples: torch.randn(samples, 3, SIDE, SIDE))
    for width in (256, 512):
        build = partial(_llama, width)
        yield Stranger(f"llama {width}", "transformers", build, lambda samples: torch.randint(WORDS, (samples, TOKENS)))


def checkpointed(_: Stranger, model: nn.Module) -> nn.Module:
    """Every block computed again from its input."""
    for block in model.modules():
        if type(block).__name__ in BLOCKS:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


WAYS: dict[str, Callable[[Stranger, nn.Module], nn.Module]] = {
    "stock": lambda _, model: model,
    "exact": lambda _, model: vanilla(model),
    "exact, recompute=False": lambda _, model: vanilla(model, recompute=False),
    "asi": lambda stranger, model: lowrank.convert(model, asi(stranger, model, all_layers(model))),
    "checkpoints": checkpointed,
}


def measure(stranger: Stranger, training: bool, way: str, samples: int, pairs: int) -> dict[str, float]:
    """One row: ratios of time, and of what is kept."""
    stock, batch = stranger.build().train(training), stranger.given(samples)
    other = WAYS[way](stranger, copy.deepcopy(stock))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        torch.manual_seed(0)  # stochastic depth leaves out the same blocks
        return stranger.loss(model, batch)

    def step(model: nn.Module) -> float:
        model.zero_grad()
        start = time.process_time()
        loss(model, batch).backward()
        return time.process_time() - start

    found = ratio(partial(step, other), partial(step, stock), pairs)
    kept = held_bytes(other, loss, batch) / held_bytes(stock, loss, batch)
    return {"time": found.median, "lowest": found.low, "highest": found.high, "kept": kept}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strangers.steps", description=__doc__)
    parser.add_argument("--only", default="", help="measure models with this text in their name alone")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("figures"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    table = options.output / "strangers_steps.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    for stranger in networks():
        if options.only not in stranger.name:
            continue
        normalises = any(isinstance(module, nn.BatchNorm2d) for module in stranger.build().modules())
        for statistics in ("stored", "batch") if normalises else ("stored",):
            for way in WAYS:
                key = {"model": stranger.name, "statistics": statistics, "way": way}
                if any(all(row[name] == key[name] for name in KEY) for row in rows):
                    continue
                rows.append(key | measure(stranger, statistics == "batch", way, options.batch, options.pairs))
                print(*(f"{name} {value:.3g}" if name not in KEY else value for name, value in rows[-1].items()))
                frame = pd.DataFrame(rows)
                write_whole(table, frame.to_csv(index=False, float_format="%.4g").encode())
                text = frame.to_markdown(index=False, floatfmt=".2f")
                write_whole(table.with_suffix(".md"), f"{text}\n".encode())


if __name__ == "__main__":
    main()
