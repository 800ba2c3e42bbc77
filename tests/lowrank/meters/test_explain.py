"""What is still kept, by module: complete, in order, and with a reason that fits."""

import pytest
import torch
import torch.nn.functional as F
from networks import Own, frozen_statistics
from torch import nn

import lowrank
from lowrank import ASI


def loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@pytest.fixture
def batch():
    return torch.randn(4, 3, 17, 16), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("method", [None, ASI(2)], ids=["stock", "asi"])
@pytest.mark.parametrize("mode", [frozen_statistics, nn.Module.train], ids=["frozen", "batch"])
def test_the_rows_are_all_that_is_kept_and_the_largest_come_first(batch, method, mode):
    model = Own()
    mode(model)
    if method is not None:
        lowrank.convert(model, lowrank.trailing_layers(model, 4), method, everywhere=True)
    found = lowrank.explain(model, loss, batch)
    assert found.nbytes == lowrank.saved_bytes(model, loss, batch) > 0
    assert [row.nbytes for row in found] == sorted((row.nbytes for row in found), reverse=True)
    assert len({row.module for row in found}) == len(found)
    assert str(found).splitlines()[-1].endswith("in all")
    assert (" as ASI(ranks=2) keeps it" in str(found)) == (method is not None)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def test_each_kind_has_its_reason(batch):
    class Net(nn.Sequential):
        pass

    model = Net(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ELU(),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    frozen_statistics(model)
    reasons = {row.module: row.reason for row in lowrank.explain(model, loss, batch)}
    assert "name it in convert" in reasons["0"]
    assert "convert computes it with its convolution" in reasons["1"]
    assert "convert makes it keep bits" in reasons["2"]
    assert "derivative takes many values" in reasons["4"]
    assert "convert computes it with its convolution" in reasons["5"]
    assert "loss function" in reasons["(outside the model)"]
    lowrank.convert(model, ["3"], ASI(2))
    rows = {row.module: row for row in lowrank.explain(model, loss, batch)}
    assert "2" not in rows, "an exact input, which takes less than a form and the bits that it spares"
    lowrank.convert(model, ["3"], ASI(2), everywhere=True)
    rows = {row.module: row for row in lowrank.explain(model, loss, batch)}
    assert "1" not in rows
    assert "no convolution's unread output" in rows["5"].reason
    assert "6" not in rows
    assert rows["2"].nbytes == 4 * 4 * 15 * 14 // 8
    assert "least that is exact" in rows["2"].reason
    assert "ASI" in rows["3"].reason
    assert "name it in convert" in rows["0"].reason
    model.train()
    rows = {row.module: row for row in lowrank.explain(model, loss, batch)}
    assert "batch statistics" in rows["1"].reason


def test_a_layer_that_is_named_and_never_called_is_said():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = lowrank.convert(Idle(), ["used", "idle"], ASI(1))
    rows = {row.module: row for row in lowrank.explain(model, lambda m, b: m(b).sum(), torch.randn(8, 6, 4))}
    assert rows["idle"].nbytes == 0
    assert "never calls it" in rows["idle"].reason
    assert rows["used"].nbytes > 0


def test_a_network_that_keeps_nothing():
    model = nn.Sequential(nn.Flatten())
    x = torch.randn(2, 3, requires_grad=True)
    assert str(lowrank.explain(model, lambda m, b: m(b).sum(), x)) == "nothing is kept"


def test_an_error_in_the_forward_pass_leaves_no_hooks(batch):
    model = Own()
    with pytest.raises(RuntimeError):
        lowrank.explain(model, loss, (batch[0][:, :2], batch[1]))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_layer_that_is_exact_for_nothing_says_so(batch, everywhere):
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)),
    )
    loss(model, batch).backward()
    exact, model[3].weight.grad = model[3].weight.grad, None
    lowrank.convert(model, ["0", "3"], ASI(3), everywhere=everywhere)
    found = {row.module: row for row in lowrank.explain(model, loss, batch)}
    assert "as ASI(ranks=3) keeps it" in found["0"].reason
    assert found["3"].reason.startswith("its input, as ASI" if everywhere else "exact: its input is computed again")
    assert (found["3"].nbytes > 0) is everywhere
    loss(model, batch).backward()
    assert torch.allclose(model[3].weight.grad, exact, atol=1e-6) is not everywhere


def test_no_memory_goes_to_who_had_its_address_before(batch):
    """The bits of a ReLU are gone once the layer behind keeps its input exactly: what lies there next is another's."""
    for _ in range(60):
        first, second = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Sequential(nn.ELU(), nn.BatchNorm2d(4))
        head = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
        model = nn.Sequential(*first, nn.ReLU(), nn.Conv2d(4, 4, 3), *second, *head)
        frozen_statistics(model)
        lowrank.convert(model, ["3"], ASI(2))
        assert "2" not in {row.module for row in lowrank.explain(model, loss, batch)}
