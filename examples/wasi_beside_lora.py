"""A language model: WASI beside LoRA and ordinary training, on the same layers and the same text.

Run: python examples/wasi_beside_lora.py           (needs transformers and peft)
"""

import re

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank

Batch = dict[str, torch.Tensor]


def build() -> LlamaForCausalLM:
    """A small Llama with random weights; `AutoModelForCausalLM.from_pretrained(...)` in real life."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=256, **size))


def batches(steps: int, batch: int = 8, length: int = 64) -> list[Batch]:
    """Pieces of Python's own licence, as letters."""
    text = torch.tensor([min(ord(letter), 127) for letter in re.sub(r"\s+", " ", str(license._Printer__data) * 50)])
    pick = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(text) - length, (steps, batch), generator=pick)
    pieces = [torch.stack([text[at : at + length] for at in row]) for row in starts.tolist()]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Of the next letter."""
    return model(**batch).loss


def ordinary(model: LlamaForCausalLM, names: list[str]) -> torch.nn.Module:
    """Everything from the first of the layers on is trained."""
    lowrank.freeze_before(model, names)
    return model


def wasi(model: LlamaForCausalLM, names: list[str]) -> torch.nn.Module:
    """Weights as two factors, inputs as a core and three: no gradient of a weight's size anywhere."""
    lowrank.freeze_before(model, names)
    return lowrank.convert(model, names, lowrank.WASI(energy=0.9, ranks=[8, 32, 32]))


def lora(model: LlamaForCausalLM, names: list[str]) -> torch.nn.Module:
    """The same layers by peft: they still keep their inputs."""
    return get_peft_model(model, LoraConfig(r=8, target_modules=names))


def main(steps: int = 100) -> dict[str, dict[str, float]]:
    """Train with each, and print what it takes."""
    text = batches(steps)
    found = {}
    for way in (ordinary, wasi, lora):
        model = build()
        names = lowrank.trailing_layers(model, 6, "linear", part="mlp")
        model = way(model, names).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kept = lowrank.saved_bytes(model, loss_fn, text[0])
        optimizer = lowrank.SGD(trained, lr=0.05, momentum=0.9)  # factors move by subspace iteration, the rest as usual
        for batch in text:
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            optimizer.step()
        found[way.__name__] = {"loss": loss.item(), "kept": kept, "trained": sum(p.numel() for p in trained)}
        print(f"{way.__name__:9} loss {loss.item():.2f}  kept {kept / 2**20:.2f} MiB  trained {len(trained)} tensors")
    return found


if __name__ == "__main__":
    main()
