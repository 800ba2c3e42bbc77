"""A model of timm, with the ranks chosen for a budget.

Run: python examples/timm_model.py                 (needs timm and scikit-learn)
"""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import lowrank

Batch = tuple[torch.Tensor, torch.Tensor]


def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def digits(size: int, batch: int) -> list[Batch]:
    """Scikit-learn's handwritten digits in batches."""
    scans = load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size, mode="bilinear").expand(-1, 3, -1, -1)
    return list(zip(images.split(batch)[:-1], torch.tensor(scans.target).split(batch)[:-1], strict=True))


def main(name: str = "resnet10t", steps: int = 50, size: int = 64, batch: int = 32) -> tuple[int, int]:
    """Train the last four convolutions; returns the bytes that autograd keeps before and after the conversion."""
    torch.manual_seed(0)
    data = digits(size, batch)
    model = timm.create_model(name, pretrained=False, num_classes=10)  # pretrained=True where there is a network
    model.train()
    with torch.no_grad():  # random weights have no statistics yet; leave this out of pretrained ones
        for images, _ in data[:20]:
            model(images)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()  # frozen statistics; their memory goes to nothing

    names = lowrank.trailing_layers(model, 4)
    lowrank.freeze_before(model, names)
    before = lowrank.saved_bytes(model, loss_fn, data[0])

    table = lowrank.measure_perplexity(model, names, loss_fn, data[0], mode_energies=lowrank.MODE_ENERGIES)
    exact = lowrank.account(model, names, data[0][0]).total.activation_bytes  # of the inputs, as they are
    plan = lowrank.select_ranks(table, budget_bytes=exact / 10)
    lowrank.convert(model, names, lowrank.ASI(ranks=plan))
    after = lowrank.saved_bytes(model, loss_fn, data[0])
    print(f"{name}: autograd keeps {before:,} bytes before and {after:,} after; ranks {plan.ranks}")

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model, data[step % len(data)])
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    return before, after


if __name__ == "__main__":
    main()
