"""The Lightning module: recipe, frozen statistics, what is trained and what is not."""

import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from commands import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowrank
from classification.backbones import build_model
from classification.callbacks import History
from classification.identity import method_tag
from classification.module import FineTune, learning_rate_factor
from experiment import ExperimentError
from experiment.ranks import Budget
from lowrank import ASI, HOSVD, SVD, GradientFilter, NonFiniteError, Vanilla

METHODS = [
    *(Vanilla(), SVD(0.8), HOSVD(0.8), ASI(ranks=4), lowrank.FixedBases(ranks=4), lowrank.Rounded()),
    *(GradientFilter(2), GradientFilter(4), GradientFilter(7)),
]
FACTORED = [lowrank.WSI(0.5), lowrank.WASI(ranks=4, energy=0.5)]  # of linear layers alone


@pytest.mark.parametrize(
    ("epoch", "setting", "factor"),
    [
        # epochs, warm-up, first share, last share
        (0, (90, 4, 0.25, 0.0), 0.25),
        (1, (90, 4, 0.25, 0.0), 0.4375),
        (3, (90, 4, 0.25, 0.0), 0.8125),
        (4, (90, 4, 0.25, 0.0), 1.0),
        (47, (90, 4, 0.25, 0.0), 0.5),
        (90, (90, 4, 0.25, 0.0), 0.0),
        (0, (50, 0, 0.25, 0.1), 1.0),
        (25, (50, 0, 0.25, 0.1), 0.55),
        (50, (50, 0, 0.25, 0.1), 0.1),
        (2, (2, 4, 0.5, 0.0), 0.75),
        (4, (4, 4, 0.25, 0.0), 1.0),
    ],
)
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(epoch, setting, factor):
    assert learning_rate_factor(epoch, *setting) == pytest.approx(factor, abs=1e-12)


def module(weights, **options):
    settings = {"num_classes": 10, "weights": str(weights), "layers": 2, "learning_rate": 0.05}
    return FineTune("mcunet", **settings | options)


def loader(digits, count=16, batch=8):
    images, labels = zip(*(digits.train[index] for index in range(count)), strict=True)
    return DataLoader(TensorDataset(torch.stack(images), torch.tensor(labels)), batch)


def changed(before, after):
    """Names of the tensors that differ."""
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


def copy(state):
    return {key: value.clone() for key, value in state.items()}


def test_every_method_of_the_library_is_tried_here():
    exported = {
        value for value in vars(lowrank).values() if isinstance(value, type) and issubclass(value, lowrank.Method)
    }
    assert {type(method) for method in (*METHODS, *FACTORED)} == exported - {lowrank.Method}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.tag)
def test_what_is_trained_changes_and_nothing_ahead_of_it(weights, digits_32, method):
    model = module(weights, method=method, momentum=0.9)
    before = copy(model.backbone.state_dict())
    trainer().fit(model, loader(digits_32))
    assert changed(before, model.backbone.state_dict()) == {
        *("blocks.13.layers.3.weight", "blocks.13.layers.6.weight"),
        *(f"blocks.13.layers.{index}.{name}" for index in (4, 7) for name in ("weight", "bias")),
        *("classifier.weight", "classifier.bias"),
    }
    assert [layer._lowrank.name for layer in lowrank.converted_layers(model)] == [
        "blocks.13.layers.3",
        "blocks.13.layers.6",
    ]


@pytest.mark.parametrize("freeze", [True, False])
def test_statistics_are_frozen_or_updated_in_training_as_asked(weights, digits_32, freeze):
    model = module(weights, layers="all", freeze_statistics=freeze)
    before = copy(model.backbone.state_dict())
    trainer().fit(model, loader(digits_32))
    different = changed(before, model.backbone.state_dict())
    statistics = {key for key in before if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert len(statistics) == 3 * 42
    assert statistics & different == (set() if freeze else statistics)
    assert different >= {key for key in before if key not in statistics and "bias" in key}


@pytest.mark.slow
def test_statistics_are_frozen_again_after_validation(weights, digits_32):
    model = module(weights)
    trainer(epochs=2).fit(model, loader(digits_32), loader(digits_32))
    model.train()
    normalisations = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert not any(layer.training for layer in normalisations)
    assert model.backbone.classifier.training
    assert all(layer.weight.requires_grad for layer in normalisations[-2:])


@pytest.mark.slow
def test_two_epochs_are_those_of_a_loop_written_out(weights, digits_32):
    settings = {
        "learning_rate": 0.4,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "warmup_epochs": 1,
        "final_learning_rate": 0,
    }
    model = module(weights, method=Vanilla(), warmup_start=0.5, **settings)
    batches = loader(digits_32)
    trainer(epochs=3, gradient_clip_val=0.5).fit(model, batches)

    plain = build_model("mcunet", num_classes=10, weights=str(weights)).eval()
    tail = nn.ModuleList([*plain.blocks[13].layers[3:], plain.classifier])
    plain.requires_grad_(False)
    tail.requires_grad_(True)
    velocity = {parameter: torch.zeros_like(parameter) for parameter in tail.parameters()}
    for epoch in range(3):
        rate = 0.4 * (0.5, 1.0, (1 + math.cos(math.pi / 2)) / 2)[epoch]
        for images, labels in batches:
            plain.zero_grad()
            F.cross_entropy(plain(images), labels).backward()
            norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in velocity))
            assert norm > 0.5  # or clipping would not be tried
            for parameter, moving in velocity.items():
                moving.mul_(0.9).add_(parameter.grad * 0.5 / norm + 0.01 * parameter.detach())
                parameter.data -= rate * moving
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.backbone.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("method", [Vanilla(), HOSVD(0.8), ASI(ranks=4)], ids=lambda method: method.tag)
def test_an_image_with_nan_stops_the_run_at_its_batch(weights, digits_32, method):
    batches = loader(digits_32)
    batches.dataset.tensors[0][9, 0, 3, 3] = math.nan
    with pytest.raises(NonFiniteError, match="epoch 0, batch 1"):
        trainer().fit(module(weights, method=method), batches)


def test_nan_in_a_later_epoch_is_named_with_its_epoch(weights, digits_32):
    batches = loader(digits_32)

    class Spoil(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            batches.dataset.tensors[0][1] = math.nan  # in the first batch

    with pytest.raises(NonFiniteError, match="epoch 1, batch 0"):
        trainer(epochs=2, callbacks=[Spoil()]).fit(module(weights), batches)


def test_weights_that_the_last_step_spoils_are_an_error(weights, digits_32, tmp_path):
    """No training loss shows it any more."""
    spoilt = module(weights, learning_rate=1e38)
    batches = loader(digits_32)
    run = trainer(callbacks=[History(tmp_path)], limit_train_batches=1)
    with pytest.raises(NonFiniteError, match="weights are no longer finite; lower the learning rate"):
        run.fit(spoilt, batches, batches)


def test_asi_without_ranks_and_budget_says_what_to_give(weights):
    with pytest.raises(ExperimentError, match="ASI needs ranks: give its own, or a budget"):
        module(weights, method=ASI())


def test_the_budget_chooses_the_ranks_of_asi(weights, digits_32, tmp_path):
    network = build_model("mcunet", num_classes=10, weights=str(weights))
    layers = lowrank.trailing_layers(network, 4)
    images, labels = digits_32.first_batch(0)
    table = lowrank.measure_perplexity(network, layers, lambda net, batch: F.cross_entropy(net(batch), labels), images)
    table.save(tmp_path / "table.json")
    ranks = {}
    for share in (1.0, 0.5):
        least, most = (sum(choose(layer.nbytes) for layer in table.only(layers[-2:]).layers) for choose in (min, max))
        budget = Budget(str(tmp_path / "table.json"), mib=(least + share * (most - least)) / 2**20)
        model = module(weights, method=ASI(), budget=budget)
        kept = 0
        for layer in lowrank.converted_layers(model):
            row = table.only([layer._lowrank.name]).layers[0]
            kept += row.nbytes[row.ranks.index(tuple(layer._lowrank.method.ranks))]
        assert kept <= budget.nbytes
        ranks[share] = [layer._lowrank.method.ranks for layer in lowrank.converted_layers(model)]
    assert ranks[1.0] != ranks[0.5]


@pytest.mark.parametrize(
    ("method", "fuse", "tag", "lean"),
    [
        (None, None, "vanilla", False),
        ("Vanilla", True, "vanilla_fused", True),
        ("HOSVD", None, "hosvd_0.8", True),
        ("HOSVD", True, "hosvd_0.8", True),
        ("HOSVD", False, "hosvd_0.8_unfused", False),
    ],
)
def test_vanilla_is_ordinary_training_and_everything_else_is_fused(weights, method, fuse, tag, lean):
    settings = {"energy": 0.8} if method == "HOSVD" else {}
    config = method and {"class_path": f"lowrank.{method}", "init_args": settings}
    assert method_tag({"method": config, "fuse": fuse, "rank_choice": "perplexity"}) == tag
    model = module(weights, method=method and getattr(lowrank, method)(**settings), fuse=fuse)
    assert any(type(layer) is not nn.ReLU6 for layer in model.modules() if isinstance(layer, nn.ReLU6)) == lean


@pytest.mark.slow
def test_fused_training_is_the_same_training(weights, digits_32):
    states = []
    for fuse in (False, True):
        model = module(weights, method=Vanilla(), fuse=fuse)
        trainer(epochs=2, precision="64-true").fit(model, loader(digits_32))
        states.append(model.backbone.state_dict())
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        assert value.dtype in (torch.float64, torch.int64)
        torch.testing.assert_close(states[1][key], value, rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize(
    ("part", "count", "name"), [("mlp", 8, "mlp.0"), ("attention", 8, "out_proj"), ("all", 17, "head")]
)
def test_layers_of_a_transformer_are_trained_by_part(part, count, name):
    module = FineTune("vit_mini", 10, kind="linear", part=part, method=lowrank.HOSVD(0.8))
    assert len(module.names) == count
    assert any(name in layer for layer in module.names)
    assert len(list(lowrank.converted_layers(module.backbone))) == count


def test_weights_held_as_factors_get_the_optimizer_that_moves_them():
    module = FineTune("vit_mini", 10, kind="linear", part="mlp", method=lowrank.WASI(energy=0.5, ranks=4))
    module.trainer = trainer()
    assert isinstance(module.configure_optimizers()["optimizer"], lowrank.SGD)
    with pytest.raises(ExperimentError, match="WASI needs ranks"):
        FineTune("vit_mini", 10, kind="linear", part="mlp", method=lowrank.WASI(energy=0.5))


@pytest.mark.parametrize("method", FACTORED, ids=lambda method: method.tag)
def test_factors_are_trained_and_nothing_ahead_of_them(digits_32, method):
    model = FineTune("vit_mini", 10, kind="linear", part="mlp", layers=2, method=method)
    before = copy(model.backbone.state_dict())
    trainer().fit(model, loader(digits_32))
    after = model.backbone.state_dict()
    assert after.keys() == build_model("vit_mini", 10).state_dict().keys()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert {f"{name}.weight" for name in model.names} <= changed
    assert not any(key.startswith("encoder.layers.encoder_layer_2") for key in changed)


def test_measuring_what_follows_from_what_leaves_the_network_as_it_was(weights, digits_32):
    network = module(weights, layers=4, method=Vanilla()).train().backbone
    names = lowrank.trailing_layers(network, 4)
    images, labels = digits_32.first_batch(0)

    def loss_fn(network, batch):
        return F.cross_entropy(network(batch), labels)

    def described():
        loss = loss_fn(network, images)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        network.zero_grad()
        kinds = [(type(each), list(vars(each)), each.training) for each in network.modules()]
        return kinds, {"": loss.detach(), **gradients, **copy(network.state_dict())}

    kinds, before = described()
    order = list(network.state_dict())
    assert lowrank.measure_perplexity(network, names, loss_fn, images, derive=True).derives
    again, after = described()
    assert kinds == again
    assert list(network.state_dict()) == order
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value is after[name] is None or torch.equal(value, after[name]), name
