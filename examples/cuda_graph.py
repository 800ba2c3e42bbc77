"""Training steps that are recorded once as a CUDA graph and replayed, so that the host need not start each operator.

Run: python examples/cuda_graph.py   (needs torch, torchvision and scikit-learn; without a GPU its steps are plain)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits

import lowrank

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def recorded(step: Callable[[], torch.Tensor], warm: int = 3) -> Callable[[], object]:
    """A step as a graph: each call of the result does to the same tensors what `step` did when it was recorded."""
    if DEVICE == "cpu":
        return step
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is only made in first steps, such as the bases of ASI, has to be there
        for _ in range(warm):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main(steps: int = 31, batch: int = 32, size: int = 32) -> list[float]:
    """Train all convolutions of a ResNet-18 on scikit-learn's handwritten digits; the losses."""
    torch.manual_seed(0)
    scans = load_digits()
    data = F.interpolate(torch.tensor(scans.images, dtype=torch.float32)[:, None] / 8 - 1, size).repeat(1, 3, 1, 1)
    targets = torch.tensor(scans.target)
    model = torchvision.models.resnet18(num_classes=10).to(DEVICE)
    lowrank.convert(model, lowrank.trailing_layers(model, "all"), lowrank.ASI(ranks=[8, 8, 4, 4]))
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    # A graph reads and writes the same memory each time, so a batch is copied to where the recorded one was.
    images, labels = data[:batch].to(DEVICE), targets[:batch].to(DEVICE)
    loss = torch.zeros((), device=DEVICE)

    def step() -> torch.Tensor:
        model.zero_grad()  # recorded with it: a replay writes gradients and adds to none
        found = F.cross_entropy(model(images), labels)
        found.backward()
        return loss.copy_(found.detach())

    replay = recorded(step)
    losses = []
    for at in range(steps):
        first = at * batch % (len(data) - batch)  # of batches of one size
        images.copy_(data[first : first + batch])
        labels.copy_(targets[first : first + batch])
        replay()
        optimizer.step()  # outside, so that a scheduler may change its rate
        if at % 10 == 0:
            losses.append(loss.item())
            print(f"step {at}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
