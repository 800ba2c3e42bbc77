"""SVD-LLM's start: what its layers compute, and that it is nearer to the network than a plain one."""

import pytest
import torch
from torch import nn

from benchmarks.networks import batch_of, build, loss_of, trained_layers
from benchmarks.peers import PEERS
from benchmarks.svd_llm import start_truncated
from lowrank.tensors.factors import factorise


def test_layers_of_full_rank_keep_what_they_compute():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4, bias=False)).double()
    x = torch.randn(3, 5, 6).double()
    expected = model(x)
    assert start_truncated(model, ["0", "2"], x, lambda weight: min(weight.shape)) == ["0.0", "0.1", "2.0", "2.1"]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.slow
def test_the_baseline_starts_nearer_to_the_network_than_plainly_truncated_weights():
    batch = batch_of(8, 32)

    def start():
        model = build("vit_small", 32)
        nn.init.normal_(model.heads.head.weight)  # torchvision's zeros show nothing of what is before them
        return model, trained_layers("vit_small", model, 4)

    model, names = start()
    with torch.no_grad():
        expected = model(batch[0])
        plain, _ = start()
        for name in names:
            weight = plain.get_submodule(name).weight
            weight.copy_(factorise(weight, 0.9).dense())
        PEERS["svd_llm_0.9"](model, names, batch)
        assert (model(batch[0]) - expected).norm() < 0.9 * (plain(batch[0]) - expected).norm()
    loss_of(model, batch).backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * 2 * 4  # two updates of two factors for each layer
    assert all(".lora_" in name for name in trained)
