"""Perplexity over several batches: the mean of slow ones at the ranks of the first; and the gradient's norm."""

import json
from dataclasses import replace

import pytest
import torch
from references import TwoConvolutions, autograd, cross_entropy, labelled_batch
from torch import nn

import lowrank
from lowrank import ConversionError, PerplexityTable, TableError
from lowrank.tensors.decompose import allowed_ranks
from lowrank.tensors.storage import kept_ranks

NAMES = ["first", "second", "head"]
ENERGIES = (0.5, 0.8)
MODES = (0.4, 0.7, 0.9)


def batches(count):
    torch.manual_seed(0)
    return [labelled_batch(6, 8, torch.float64) for _ in range(count)]


def inputs_and_gradients(model, batch):
    """What each layer gets in the forward and in the backward pass."""
    found, handles = {}, []

    def hook(name):
        def keep(layer, inputs, output):
            x = inputs[0].detach().clone()
            output = output.clone()  # what is watched is not what the network changes in place
            output.register_hook(lambda grad: found.update({name: (x, grad.clone())}))
            return output

        return keep

    for name in NAMES:
        handles.append(model.get_submodule(name).register_forward_hook(hook(name)))
    cross_entropy(model, batch).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return found


def projected(x, ranks):
    """The input on its leading left singular vectors of every mode, by dense projections."""
    for mode, rank in enumerate(ranks):
        unfolding = x.movedim(mode, 0).flatten(1)
        yield torch.linalg.svd(unfolding, full_matrices=False).U[:, :rank]


def slow(layer, x, grad, ranks):
    """Exact gradient's norm, and how far the gradient from an input at these ranks is from it."""
    low = x
    for mode, basis in enumerate(projected(x, ranks)):
        low = torch.tensordot(basis @ basis.T, low, dims=([1], [mode])).movedim(0, mode)
    exact, found = (autograd(layer, each, grad)[2]["weight"] for each in (x, low))
    return float(exact.norm()), float((found - exact).norm())


@pytest.mark.parametrize("modes", [(), MODES], ids=["energies", "mode energies"])
def test_it_is_the_mean_at_the_ranks_of_the_first_batch(modes):
    model = TwoConvolutions().double()
    first, *others = batches(3)
    alone = lowrank.measure_perplexity(model, NAMES, cross_entropy, first, ENERGIES, modes)
    table = lowrank.measure_perplexity(model, NAMES, cross_entropy, first, ENERGIES, modes, others)
    assert (alone.batches, table.batches) == (1, 3)
    found = [inputs_and_gradients(model, batch) for batch in (first, *others)]
    for one, row in zip(alone.layers, table.layers, strict=True):
        assert (row.ranks, row.nbytes, row.input_shape) == (one.ranks, one.nbytes, one.input_shape)
        candidates, layer = table.candidates(row), model.get_submodule(row.name)
        assert candidates.ranks == alone.candidates(one).ranks
        for at, (ranks, perplexity) in enumerate(zip(candidates.ranks, candidates.perplexity, strict=True)):
            shape = row.input_shape
            cut = ranks if at < len(row.ranks) else kept_ranks(shape, allowed_ranks(shape, ranks))
            measured = [slow(layer, *each[row.name], cut) for each in found]
            norm, expected = (sum(values) / 3 for values in zip(*measured, strict=True))
            assert perplexity == pytest.approx(expected, rel=1e-6, abs=1e-9)
            assert row.gradient_norm == pytest.approx(norm, rel=1e-9)
        assert one.gradient_norm == pytest.approx(slow(layer, *found[0][row.name], row.ranks[0])[0], rel=1e-9)


def test_the_model_is_left_as_it_was():
    model = TwoConvolutions().double().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    first, *others = batches(2)
    lowrank.measure_perplexity(model, NAMES, cross_entropy, first, ENERGIES, (), others)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_of_other_shapes_are_refused():
    model = TwoConvolutions().double()
    with pytest.raises(ConversionError, match=r"'head' has an input of shape .* on a further batch and of"):
        lowrank.measure_perplexity(
            *(model, NAMES, cross_entropy, labelled_batch(6, 8, torch.float64), ENERGIES, ()),
            [labelled_batch(5, 8, torch.float64)],
        )


class Fickle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.a(x) if x[0, 0] > 0 else self.b(x)


def test_a_layer_that_a_further_batch_does_not_use_is_said():
    with pytest.raises(ConversionError, match="does not depend on 'a'"):
        lowrank.measure_perplexity(
            *(Fickle(), ["a"], lambda model, x: model(x).sum(), torch.ones(3, 4), ENERGIES, ()), [-torch.ones(3, 4)]
        )


def test_tables_keep_the_norm_and_the_number_of_batches_and_old_ones_load(tmp_path):
    model = TwoConvolutions().double()
    first, *others = batches(2)
    path = tmp_path / "table.json"
    for further in ([], others):
        table = lowrank.measure_perplexity(model, NAMES, cross_entropy, first, ENERGIES, MODES, further)
        table.save(path)
        assert PerplexityTable.load(path) == table
        content = json.loads(path.read_text())
        assert content.get("batches") == (2 if further else None)
        assert table.only(["head"]).batches == table.batches
    for row in content["layers"]:
        del row["gradient_norm"]
    del content["batches"]
    path.write_text(json.dumps(content))
    old = [replace(row, gradient_norm=None) for row in table.layers]
    assert PerplexityTable.load(path) == replace(table, layers=tuple(old), batches=1)
    for key, value in (("batches", 0), ("batches", 1.5), ("gradient_norm", "x"), ("gradient_norm", -1.0)):
        damaged = json.loads(json.dumps(content))
        (damaged if key == "batches" else damaged["layers"][0])[key] = value
        path.write_text(json.dumps(damaged))
        with pytest.raises(TableError, match=key):
            PerplexityTable.load(path)
