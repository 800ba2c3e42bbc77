"""The ways to train in less memory that are compared: each changes a model, or how its loss is computed.

A peer is given the model, the names of its trained layers, and a batch of the size that will be trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank
from benchmarks.networks import Batch, loss_of
from benchmarks.svd_llm import start_truncated
from lowrank.layers.preserve import LossFunction
from lowrank.methods.deriving import Derive
from lowrank.tensors.factors import factorise

RANKS = (8, 8, 4, 4)  # of ASI, where no published budget fits
WIDE = (16, 16, 8, 8)  # of ASI in eight bits, where inputs that follow from others are not kept
BUDGET = 0.5  # share of the activations that a compiled graph may keep
LORA_RANK = 8
SVD_ENERGY = 0.9  # of the weights that SVD-LLM starts from
SMALLEST = 4096  # elements; smaller tensors are not worth quantising

Peer = Callable[[nn.Module, list[str], Batch], LossFunction]


def vanilla(model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    """Ordinary training of the trailing layers."""
    return loss_of


def _converted(method: lowrank.Method, model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    lowrank.convert(model, names, method, everywhere=True)  # the methods as the papers have them
    return loss_of


def asi(model: nn.Module, names: list[str], batch: Batch, storage: lowrank.Storage = "float32") -> LossFunction:
    """ASI at fixed ranks, cut to the number of modes of the layers."""
    ranks = RANKS if isinstance(model.get_submodule(names[0]), nn.Conv2d) else RANKS[:3]
    return _converted(lowrank.ASI(ranks=ranks, storage=storage), model, names, batch)


def derived(
    model: nn.Module, names: list[str], batch: Batch, derive: Derive = True, whole: bool = False
) -> LossFunction:
    """ASI in eight bits at higher ranks, or every number in eight bits, of inputs that follow from no others."""
    ranks = WIDE if isinstance(model.get_submodule(names[0]), nn.Conv2d) else WIDE[:3]
    method = lowrank.Rounded(derive=derive) if whole else lowrank.ASI(ranks=ranks, storage="int8", derive=derive)
    return _converted(method, model, names, batch)


def wasi(model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    """WASI at energy 0.9, with the ranks of `asi`."""
    return _converted(lowrank.WASI(energy=0.9, ranks=RANKS[:3]), model, names, batch)


def checkpointed_asi(model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    """`asi` within the blocks of `checkpointing`."""
    asi(model, names, batch)
    return checkpointing(model, names, batch)


def checkpointing(model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    """Activation checkpointing of every block: keep its input, and compute it again in the backward pass."""
    for block in _blocks(model):
        if any(parameter.requires_grad for parameter in block.parameters()):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return loss_of


def micro_batches(size: int, model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    """Gradient accumulation over parts of the batch: exact with frozen statistics, at the memory of one part.

    All parts but the last run their backward pass within the loss function.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        whole = len(batch[1])
        parts = list(zip(*(tensor.split(size) for tensor in batch), strict=True))
        done = torch.zeros((), device=batch[0].device)
        for images, labels in parts[:-1]:
            part = loss_of(model, (images, labels)) * (len(labels) / whole)
            if torch.is_grad_enabled():
                part.backward()
            done += part.detach()
        return done + loss_of(model, parts[-1]) * (len(parts[-1][1]) / whole)

    return loss


def micro_batched(peer: Peer, model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    """A peer that converts layers, over micro-batches of 2."""
    peer(model, names, batch)
    return micro_batches(2, model, names, batch)


def fixed_bases(model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    """Bases of one HOSVD, with the ranks of `asi` but for the batch mode."""
    ranks = RANKS if isinstance(model.get_submodule(names[0]), nn.Conv2d) else RANKS[:3]
    return _converted(lowrank.FixedBases(ranks=ranks), model, names, batch)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network: the children of its sequences, where these have children themselves."""
    found: list[nn.Module] = []
    for child in model.children():
        parts = list(child.children())
        if isinstance(child, nn.Sequential) and parts and all(list(part.children()) for part in parts):
            found += parts
        else:
            found += _blocks(child)
    return found


def compiled(model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    """A compiled graph that may keep half of the activations and computes the rest again."""
    import torch._functorch.config as functorch_config

    graph = torch.compile(model, backend="aot_eager_decomp_partition")

    def loss(_: nn.Module, batch: Batch) -> Tensor:
        with functorch_config.patch(activation_memory_budget=BUDGET):  # for this graph alone
            return loss_of(graph, batch)  # type: ignore[arg-type]

    return loss


def autocast(model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    """Mixed precision in bfloat16."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            return loss_of(model, batch)

    return loss


def quantised(bits: int, model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    """Whatever autograd keeps, in whole numbers of 8 or 4 bits with a scale per sample."""
    own = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> object:
        kept_as_it_is = not tensor.is_floating_point() or tensor.numel() < SMALLEST or tensor.ndim < 2
        if kept_as_it_is or tensor.untyped_storage().data_ptr() in own:
            return tensor
        flat = tensor.reshape(len(tensor), -1)
        low, high = flat.aminmax(dim=1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
        codes = ((flat - low) / scale).round_().to(torch.uint8)
        if bits == 4:
            codes = codes if codes.shape[1] % 2 == 0 else nn.functional.pad(codes, (0, 1))
            codes = codes[:, ::2] * 16 + codes[:, 1::2]
        return codes, low, scale, tensor.shape, tensor.dtype

    def unpack(packed: object) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        codes, low, scale, shape, dtype = packed  # type: ignore[misc]
        if bits == 4:
            codes = torch.stack((codes // 16, codes % 16), dim=2).flatten(1)[:, : shape[1:].numel()]
        return (codes.to(dtype) * scale + low).reshape(shape)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return loss_of(model, batch)

    return loss


def lora(model: nn.Module, names: list[str], batch: Batch, **options: object) -> LossFunction:
    """Low-rank updates of the same layers' weights, everything else frozen; peft refuses depthwise ones."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = [name for name in names if getattr(model.get_submodule(name), "groups", 1) == 1]
    inject_adapter_in_model(LoraConfig(r=LORA_RANK, target_modules=targets, **options), model)  # type: ignore[arg-type]
    return loss_of


def velora(model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    """`lora` whose inputs are projected on a vector for each of 64 groups of features, for linear layers alone."""
    from peft import VeloraConfig

    return lora(model, names, batch, velora_config=VeloraConfig())


def svd_llm(model: nn.Module, names: list[str], batch: Batch) -> LossFunction:
    """Linear layers that start from truncated weights and are frozen in them, with low-rank updates on top.

    As SVD-LLM (ICLR 2025) in the comparison of WASI, at the ranks that WASI has; calibrated on the batch.
    """
    linear = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    parts = start_truncated(model, linear, batch[0], lambda weight: factorise(weight, SVD_ENERGY).left.shape[1])
    return lora(model, parts, batch)


PEERS: dict[str, Peer] = {
    "vanilla": vanilla,
    "vanilla_fused": partial(_converted, lowrank.Vanilla()),
    "checkpointing": checkpointing,
    "micro_batch_1": partial(micro_batches, 1),
    "micro_batch_2": partial(micro_batches, 2),
    "micro_batch_4": partial(micro_batches, 4),
    "micro_batch_2_fused": partial(micro_batched, partial(_converted, lowrank.Vanilla())),
    "compile_budget_0.5": compiled,
    "autocast_bf16": autocast,
    "quantised_8_bit": partial(quantised, 8),
    "quantised_4_bit": partial(quantised, 4),
    "lora_8": lora,
    "velora_8": velora,
    "gradient_filter_r2": partial(_converted, lowrank.GradientFilter(2)),
    "gradient_filter_r7": partial(_converted, lowrank.GradientFilter(7)),
    "svd_0.8": partial(_converted, lowrank.SVD(0.8)),
    "hosvd_0.8": partial(_converted, lowrank.HOSVD(0.8)),
    "asi": asi,
    "asi_int8": partial(asi, storage="int8"),
    "asi_int8_derived": derived,
    "asi_int8_derived_20000": partial(derived, derive=20000),
    "asi_int8_derived_slopes": partial(derived, derive="slopes"),
    "rounded_derived": partial(derived, whole=True),
    "rounded_derived_20000": partial(derived, derive=20000, whole=True),
    "rounded_derived_slopes": partial(derived, derive="slopes", whole=True),
    "asi_checkpointed": checkpointed_asi,
    "asi_micro_batch_2": partial(micro_batched, asi),
    "fixed_bases": fixed_bases,
    "svd_llm_0.9": svd_llm,
    "wasi_0.9": wasi,
}
