"""A default device of the user's own: tensors that a converted layer makes are where its input is."""

import pytest
import torch
import torch.nn.functional as F
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, GradientFilter, Vanilla

pytestmark = pytest.mark.cpu_only("the meta device stands for a GPU")
METHODS = [Vanilla(), SVD(0.5), HOSVD(0.5), ASI(2), ASI(2, refresh="energy"), ASI(2, refresh=2), GradientFilter(2)]


class Net(nn.Module):
    """Padding that is not the convolution's own, bits, places, attention and smooth activations."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4).eval()
        self.last, self.layer_norm = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.LayerNorm(4)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        y = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        y = F.adaptive_avg_pool2d(F.dropout(F.relu6(self.last(y)), 0.3), 2).flatten(2).mT
        h = self.layer_norm(y)
        return self.head(F.gelu(y + self.attention(h, h, h, need_weights=False)[0]))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_another_default_device_changes_nothing(method):
    names = ["conv", "last"] if isinstance(method, GradientFilter) else ["conv", "last", "head"]
    x, grad, results = random_tensor(2, 3, 8, 8), random_tensor(2, 4, 3, seed=1), []
    for device in ("cpu", "meta"):  # which stands for a GPU
        torch.manual_seed(0)
        model = lowrank.convert(Net().double(), names, method)
        with torch.device(device):
            for _ in range(3):
                torch.manual_seed(1)
                model.zero_grad()
                model(x).backward(grad)
        results.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(results[1], results[0])
