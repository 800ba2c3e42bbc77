"""What measures a model runs it, and leaves no trace in it, whatever the model's own code notes of a call."""

import collections
import copy

import pytest
import torch
from references import cross_entropy, labelled_batch
from torch import nn

import lowrank
from lowrank import ASI


class Noting(nn.Module):
    """Notes every call in each way that modules do: numbers, tensors, lists and dictionaries, in place and anew."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.calls, self.total, self.seen = 0, torch.zeros(2), torch.zeros(1)
        self.history, self.counts = [torch.zeros(1)], collections.Counter(kept=1)
        self.history.append(self.history)  # a list that holds itself

    def forward(self, x):
        self.calls += 1
        self.total = self.total + 1
        self.seen += len(x)
        self.history[0].add_(1)
        self.history.append(x)
        self.counts["calls"] += 1
        self.latest = self.second(self.first(x).relu())
        return self.latest.mean((2, 3))

    def notes(self):
        held = {"calls": self.calls, "total": self.total, "seen": self.seen, "counts": dict(self.counts)}
        return copy.deepcopy(
            {**held, "history": (self.history[0], len(self.history)), "latest": hasattr(self, "latest")}
        )


METERS = {
    "saved_bytes": lowrank.saved_bytes,
    "peak_bytes": lowrank.peak_bytes,
    "explain": lowrank.explain,
    "account": lambda model, loss_fn, batch: lowrank.account(model, ["first"], batch),
    "measure_perplexity": lambda model, loss_fn, batch: lowrank.measure_perplexity(model, ["first"], loss_fn, batch),
}


@pytest.mark.parametrize("meter", METERS)
@pytest.mark.parametrize("called", [False, True])
def test_what_a_model_notes_of_its_calls_is_as_before_it_was_measured(meter, called):
    model, batch = Noting(), labelled_batch()
    if meter != "measure_perplexity":
        lowrank.convert(model, ["first", "second"], ASI(2))
    if called:
        model(batch[0])
    latest, kept = vars(model).get("latest"), model.seen
    before = model.notes()
    METERS[meter](model, cross_entropy, batch)
    torch.testing.assert_close(model.notes(), before, rtol=0, atol=0)
    assert vars(model).get("latest") is latest, "the same object"
    assert model.seen is kept


class Capturing(nn.Module):
    """Registers hooks at its first call, on modules of its own and of PyTorch, and notes that they are there."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.captured = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 5, 3)), []

    def forward(self, x):
        if not hasattr(self, "installed"):
            self.installed = True
            for module in (self.first, self.second, self.second[0]):
                module.register_forward_hook(lambda module, given, y: self.captured.append(y))
            self.first.register_forward_pre_hook(lambda module, given: self.captured.append(given[0]))
        self.captured.clear()
        y = self.second(self.first(x).relu())
        return y.mean((2, 3)) * len(self.captured)


@pytest.mark.parametrize("meter", METERS)
@pytest.mark.parametrize("called", [False, True])
def test_hooks_that_a_model_registers_while_it_is_measured_are_there_once(meter, called):
    model, batch = Capturing(), labelled_batch()
    if called:
        model(batch[0])
    for _ in range(2):
        METERS[meter](model, cross_entropy, batch)
    assert hasattr(model, "installed") == called
    own = model.register_forward_hook(lambda *_: None)
    model(batch[0])
    assert len(model.captured) == 4
    own.remove()


def test_a_hook_that_is_gone_when_a_model_was_measured_stays_so():
    model, batch = Noting(), labelled_batch()
    handle = model.first.register_forward_hook(lambda *_: handle.remove())
    lowrank.saved_bytes(model, cross_entropy, batch)
    assert not model.first._forward_hooks
