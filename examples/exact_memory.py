"""The same gradients in less memory: no compression, only what need not be kept. Any model, nothing to choose.

Run: python examples/exact_memory.py               (needs torchvision)
"""

import copy

import torch
import torch.nn.functional as F
import torchvision

import lowrank

Batch = tuple[torch.Tensor, torch.Tensor]


def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def gradients(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Gradient of every parameter, in double precision: there what is not rounding would be seen."""
    model = copy.deepcopy(model).double()
    loss_fn(model, (batch[0].double(), batch[1])).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def main(network: str = "mobilenet_v2", batch: int = 16, size: int = 128) -> dict[str, float]:
    """Convert every convolution with `Vanilla`, and compare."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(network, num_classes=10).train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()  # frozen statistics, as in most fine-tuning; with batch statistics less is saved
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0  # so that two passes can be compared
    data = (torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,)))

    exact = gradients(model, data)
    kept, peak = lowrank.saved_bytes(model, loss_fn, data), lowrank.peak_bytes(model, loss_fn, data)

    lowrank.convert(model, lowrank.trailing_layers(model, "all"), lowrank.Vanilla())

    found = gradients(model, data)
    error = max(float((found[n] - exact[n]).norm() / exact[n].norm().clamp_min(1e-12)) for n in exact)
    kept_after, peak_after = lowrank.saved_bytes(model, loss_fn, data), lowrank.peak_bytes(model, loss_fn, data)
    mib = 2**20
    print(f"kept {kept / mib:.1f} -> {kept_after / mib:.1f} MiB, peak {peak / mib:.1f} -> {peak_after / mib:.1f} MiB")
    print(f"gradients in double precision differ by {error:.1e} of their norm at most, which is rounding")
    return {"kept": kept / kept_after, "peak": peak / peak_after, "error": error}


if __name__ == "__main__":
    main()
