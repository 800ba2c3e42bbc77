"""Swin-T and ViT-B/32 whole, in double precision: at full rank every gradient is autograd's."""

import pytest
import torch
import torch.nn.functional as F

import lowrank
from classification.backbones import build_model


def gradients(model, images, labels):
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("network", "size"), [("vit_b_32", 64), ("swin_t", 64)])
def test_at_full_rank_a_whole_network_has_autograds_gradients(network, size):
    torch.manual_seed(0)
    model = build_model(network, num_classes=5, pretrained=False).double().eval()
    torch.nn.init.normal_(model.get_submodule("heads.head" if network == "vit_b_32" else "head").weight, std=0.02)
    images, labels = torch.randn(2, 3, size, size).double(), torch.tensor([1, 3])
    lowrank.open_attention(model)
    names = lowrank.trailing_layers(model, "all", "linear")
    mlp = lowrank.trailing_layers(model, "all", "linear", "mlp")
    expected = gradients(model, images, labels)
    largest = {name: float(grad.abs().max()) for name, grad in expected.items()}
    assert len(mlp) == 24
    assert len(names) > 48
    assert min(largest.values()) > 0 or network == "vit_b_32"
    for chosen, method in ((mlp, lowrank.HOSVD(1.0)), (names, lowrank.ASI(ranks=10**4))):
        lowrank.convert(model, chosen, method)
        found = gradients(model, images, labels)
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            error = float((found[name] - grad).abs().max())
            assert error <= 1e-9 * max(largest[name], 1e-3 * max(largest.values())), (name, error)
        lowrank.revert(model)
        lowrank.open_attention(model)
