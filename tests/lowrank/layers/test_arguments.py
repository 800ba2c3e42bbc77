"""What is no model, no switch and no loss function is told in one line, by every function alike; and an input given by
keyword is an input."""

import pytest
import torch
from references import TwoConvolutions, cross_entropy, labelled_batch
from torch import nn

import lowrank
from lowrank import ASI, ConversionError, SettingError

BATCH = labelled_batch()
GIVEN_A_MODEL = {
    "check": lambda model: lowrank.check(model, ["first"], ASI(2)),
    "convert": lambda model: lowrank.convert(model, ["first"], ASI(2)),
    "revert": lowrank.revert,
    "trailing_layers": lambda model: lowrank.trailing_layers(model, "all"),
    "freeze_before": lambda model: lowrank.freeze_before(model, ["first"]),
    "open_attention": lowrank.open_attention,
    "converted_layers": lowrank.converted_layers,
    "training_state": lowrank.training_state,
    "load_training_state": lambda model: lowrank.load_training_state(model, {}),
    "truncate_weights": lambda model: lowrank.truncate_weights(model, ["head"], cross_entropy, BATCH, energy=0.9),
    "measure_perplexity": lambda model: lowrank.measure_perplexity(model, ["first"], cross_entropy, BATCH),
    "account": lambda model: lowrank.account(model, ["first"], BATCH),
    "saved_bytes": lambda model: lowrank.saved_bytes(model, cross_entropy, BATCH),
    "peak_bytes": lambda model: lowrank.peak_bytes(model, cross_entropy, BATCH),
    "explain": lambda model: lowrank.explain(model, cross_entropy, BATCH),
    "weight_memory": lambda model: lowrank.weight_memory(model, ["head"], cross_entropy, BATCH, None),
}


@pytest.mark.parametrize(
    ("given", "named"),
    [(None, "a NoneType"), ([nn.Linear(1, 1)], "a list"), ({}, "a dict"), (nn.Linear, "the class Linear")],
    ids=["none", "list", "dict", "class"],
)
@pytest.mark.parametrize("function", GIVEN_A_MODEL)
def test_what_is_no_model_is_told_in_one_line(function, given, named):
    message = f"the model is {named}; give a torch.nn.Module"
    if function == "check":
        assert GIVEN_A_MODEL[function](given) == [message]
        return
    with pytest.raises(ConversionError) as caught:
        GIVEN_A_MODEL[function](given)
    assert str(caught.value) == message


@pytest.mark.parametrize("given", ["no", None, 1], ids=repr)
@pytest.mark.parametrize("switch", ["fuse", "recompute", "everywhere"])
def test_a_switch_that_is_neither_true_nor_false_is_refused_and_changes_nothing(switch, given):
    model = TwoConvolutions()
    with pytest.raises(SettingError, match=f"{switch} is {given!r}; allowed: True, False"):
        lowrank.convert(model, ["first"], ASI(2), **{switch: given})
    assert type(model.first) is nn.Conv2d


MEASURING = ["truncate_weights", "measure_perplexity", "saved_bytes", "peak_bytes", "explain", "weight_memory"]


def measure(function, model, loss_fn):
    more = {"truncate_weights": [["head"]], "weight_memory": [["head"]], "measure_perplexity": [["first"]]}
    options = {"truncate_weights": {"energy": 0.9}, "weight_memory": {"optimizer": torch.optim.SGD(model.parameters())}}
    return getattr(lowrank, function)(model, *more.get(function, []), loss_fn, BATCH, **options.get(function, {}))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (None, r"loss_fn is None; allowed is a function loss_fn\(model, batch\)"),
        (
            lambda model: model(BATCH[0]).sum(),
            r"loss_fn is called with \(model, batch\), which it does not take: too many",
        ),
        (lambda model, images, labels: 0, r"which it does not take: missing a required argument: 'labels'"),
    ],
    ids=["none", "model alone", "images and labels"],
)
@pytest.mark.parametrize("function", MEASURING)
def test_what_is_no_loss_function_is_told(function, loss_fn, message):
    with pytest.raises(SettingError, match=message):
        measure(function, TwoConvolutions(), loss_fn)


def test_a_loss_function_of_any_kind_that_can_be_called_so_is_one():
    class Loss:
        def __call__(self, model, batch, *more, scale=1.0):
            return scale * cross_entropy(model, batch)

    assert lowrank.saved_bytes(TwoConvolutions(), Loss(), BATCH) == lowrank.saved_bytes(
        TwoConvolutions(), cross_entropy, BATCH
    )


@pytest.mark.parametrize("function", ["measure_perplexity", "saved_bytes", "peak_bytes", "explain", "weight_memory"])
def test_a_loss_without_a_graph_is_told_and_never_measured_as_nothing(function):
    with pytest.raises(SettingError, match="loss_fn gave a tensor without a graph, though parameters want gradients"):
        measure(function, TwoConvolutions(), lambda model, batch: cross_entropy(model, batch).detach())


def test_a_model_of_which_nothing_is_trained_keeps_nothing():
    model = TwoConvolutions().requires_grad_(False)
    assert lowrank.saved_bytes(model, cross_entropy, BATCH) == 0


class Named(nn.Module):
    def __init__(self, by_name):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)
        self.by_name = by_name

    def forward(self, x):
        for layer in (self.first, self.second):
            x = (layer(input=x) if self.by_name else layer(x)).relu()
        x = x.mean((2, 3))
        return self.head(input=x) if self.by_name else self.head(x)


@pytest.mark.parametrize("convert", [False, True])
def test_an_input_given_by_keyword_is_counted_and_measured_as_one_given_by_place(convert):
    names, told, weights = ["first", "second", "head"], [], Named(False).state_dict()
    for by_name in (False, True):
        model = Named(by_name)
        model.load_state_dict(weights)
        ranks = lowrank.truncate_weights(model, ["head"], cross_entropy, BATCH, energy=0.9)
        if convert:
            lowrank.convert(model, names, ASI(2))
        table = lowrank.measure_perplexity(model, names, cross_entropy, BATCH)
        told.append((ranks, dict(lowrank.account(model, names, BATCH)), table.layers))
    assert told[0] == told[1]
