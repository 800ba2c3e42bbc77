"""Parts of a model that are compiled on their own: a compiler takes ordinary tensors alone."""

from __future__ import annotations

from torch import nn


def compiled_parts(model: nn.Module) -> list[str]:
    """Names of the outermost modules below `model` that are compiled on their own."""
    found: list[str] = []
    for name, module in model.named_modules():
        if name and _is_compiled(module) and part_of(name, found) is None:
            found.append(name)
    return found


def part_of(name: str, parts: list[str]) -> str | None:
    """The part that a module is or lies in; None: it is in none."""
    return next((part for part in parts if name == part or name.startswith(f"{part}.")), None)


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` was called with it or its forward pass, or its own `compile`."""
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
