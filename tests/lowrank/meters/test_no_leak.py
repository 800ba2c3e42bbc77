"""A measurement leaves nothing alive: no entry, no tensor, no graph, with the garbage collector out of action."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from leaks import no_tensor_left
from networks import Own, frozen_statistics
from torch import nn

import lowrank
from lowrank import ASI
from lowrank.meters import memory


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation=F.gelu, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x.flatten(2)[..., :8])


MODELS = {
    "convolutions": lambda: frozen_statistics(Own()),
    "trained": lambda: Own().train(),
    "transformer": Transformer,
}


def loss(model, batch):
    return model(batch).square().mean()


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("measure", [lowrank.saved_bytes, lowrank.explain, lowrank.peak_bytes, memory.held_bytes])
@pytest.mark.parametrize("method", [None, ASI(2)], ids=["stock", "asi"])
@pytest.mark.parametrize("name", ["convolutions", "transformer"])
def test_a_second_measurement_finds_no_more_alive_than_the_first(name, method, measure):
    torch.manual_seed(0)
    model, batch = MODELS[name](), torch.randn(2, 3, 17, 16)
    if method is not None:
        kind = "linear" if name == "transformer" else "conv"
        lowrank.convert(model, lowrank.trailing_layers(model, "all", kind), method)
    measure(model, loss, batch)  # makes the tables that are kept for the whole process
    first = measure(model, loss, batch)
    first = getattr(first, "nbytes", first)
    with no_tensor_left(collect=False):
        second = measure(model, loss, batch)
        assert getattr(second, "nbytes", second) == first
        del second


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("measure", [lowrank.saved_bytes, lowrank.explain])
@pytest.mark.parametrize("name", MODELS)
def test_no_entry_outlives_its_measurement(monkeypatch, name, measure):
    entries = []

    class Watching(memory._Kept):
        def __init__(self, tensor):
            super().__init__(tensor)
            entries.append(weakref.ref(self))

    monkeypatch.setattr(memory, "_Kept", Watching)
    model = MODELS[name]()
    measure(model, loss, torch.randn(2, 3, 17, 16))
    assert entries
    assert not any(entry() for entry in entries)


@pytest.mark.slow
@pytest.mark.usefixtures("no_collector")
def test_a_failed_measurement_leaves_nothing_either():
    model, batch = MODELS["convolutions"](), torch.randn(2, 3, 17, 16)

    def failing(model, batch):
        loss(model, batch)
        raise KeyError("labels")

    for measure in (lowrank.saved_bytes, lowrank.explain, lowrank.peak_bytes):
        for _ in range(2):
            with no_tensor_left(collect=False), pytest.raises(KeyError):
                measure(model, failing, batch)
