"""The whitened truncation: no other weight of the rank has outputs that are nearer."""

import pytest
import torch
from torch import nn

from benchmarks.networks import batch_of, build, loss_of, trained_layers
from benchmarks.peers import PEERS
from benchmarks.svd_llm import input_grams, start_truncated, whitened_truncation
from lowrank.tensors.factors import factorise


def case(tokens=40, inputs=9, outputs=7, seed=0):
    """A weight, and inputs that are correlated and of very different sizes."""
    torch.manual_seed(seed)
    x = (
        torch.randn(tokens, inputs).double()
        @ torch.randn(inputs, inputs).double()
        * torch.logspace(0, 2, inputs).double()
    )
    return torch.randn(outputs, inputs).double(), x


def output_error(x, weight, factors):
    return torch.linalg.norm(x @ (weight - factors.dense()).mT)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("tokens", [40, 5])
def test_the_output_error_is_the_least_that_the_rank_allows(tokens, rank):
    weight, x = case(tokens)
    found = whitened_truncation(weight, x.mT @ x, rank)
    error = output_error(x, weight, found)
    # Eckart and Young, of the outputs themselves: no matrix of the rank is nearer, whatever it comes from.
    values = torch.linalg.svdvals(x @ weight.mT)
    optimum = values[rank:].square().sum().sqrt()
    torch.testing.assert_close(error, optimum, rtol=1e-6, atol=1e-4 * float(values[0]))
    plain = torch.linalg.svd(weight)
    plain_error = torch.linalg.norm(x @ (weight - plain.U[:, :rank] * plain.S[:rank] @ plain.Vh[:rank]).mT)
    assert error < 0.9 * plain_error
    assert found.left.shape == (7, rank)


def test_it_is_the_truncation_of_the_whitened_weight_with_the_whitening_taken_back():
    weight, x = case()
    whitening = torch.linalg.cholesky(x.mT @ x)
    u, s, v = torch.linalg.svd(weight @ whitening, full_matrices=False)
    expected = u[:, :3] * s[:3] @ v[:3] @ torch.linalg.inv(whitening)
    torch.testing.assert_close(whitened_truncation(weight, x.mT @ x, 3).dense(), expected, rtol=1e-6, atol=1e-6)


def test_gram_matrices_are_those_of_the_inputs_and_layers_keep_what_they_compute():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4, bias=False)).double()
    x = torch.randn(3, 5, 6).double()
    grams = input_grams(model, ["0", "2"], x)
    hidden = torch.tanh(model[0](x)).reshape(15, 9)
    torch.testing.assert_close(grams["2"], hidden.mT @ hidden)
    expected = model(x)
    assert start_truncated(model, ["0", "2"], x, lambda weight: min(weight.shape)) == ["0.0", "0.1", "2.0", "2.1"]
    torch.testing.assert_close(model(x), expected)


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
