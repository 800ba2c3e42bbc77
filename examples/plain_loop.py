"""A plain training loop with mixed precision, gradient accumulation and clipping, which resumes exactly.

Run: python examples/plain_loop.py                 (needs torch, torchvision and scikit-learn; about a minute on a CPU)
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits

import lowrank

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def digits(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scikit-learn's handwritten digits as images (N, 3, size, size) and labels (N,)."""
    scans = load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size, mode="bilinear").expand(-1, 3, -1, -1), torch.tensor(scans.target)


def main(checkpoint: Path, steps: int = 60, batch: int = 32, accumulate: int = 2, size: int = 64) -> torch.nn.Module:
    """Train the last four convolutions of a ResNet-18; goes on from `checkpoint` where that is."""
    torch.manual_seed(0)
    images, labels = digits(size)
    model = torchvision.models.resnet18(num_classes=10).to(DEVICE)  # weights="IMAGENET1K_V1" to start from ImageNet

    names = lowrank.trailing_layers(model, 4)
    lowrank.freeze_before(model, names)
    lowrank.convert(model, names, lowrank.ASI(ranks=[8, 16, 2, 2]))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=DEVICE == "cuda")
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        lowrank.load_training_state(model, saved["lowrank"])  # the bases of ASI, as the optimizer's state
        first = saved["step"]

    model.train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()  # by frozen statistics it is computed with its convolution, and keeps nothing
    for step in range(first, steps):
        for part in range(accumulate):
            at = ((step * accumulate + part) * batch) % (len(images) - batch)
            x, y = images[at : at + batch].to(DEVICE), labels[at : at + batch].to(DEVICE)
            with torch.autocast(DEVICE, dtype=torch.bfloat16 if DEVICE == "cpu" else torch.float16):
                loss = F.cross_entropy(model(x), y) / accumulate
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 2.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item() * accumulate:.3f}")

    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    torch.save({**state, "lowrank": lowrank.training_state(model), "step": steps}, checkpoint)
    return model


if __name__ == "__main__":
    main(Path("plain_loop.pt"))
