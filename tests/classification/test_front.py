"""The frozen front, computed once per image: the same network, the same training."""

import pytest
import torch
import torch.nn.functional as F
from commands import trainer
from torch import nn

import lowrank
from classification.backbones import build_model
from classification.data import ImageDataModule
from classification.front import split
from classification.module import FineTune
from experiment import ExperimentError

BACKBONES = ["mcunet", "mobilenet_v2", "resnet18", "resnet34"]


def fine_tuned(backbone, layers):
    """A network in the mode and with the frozen layers of a fine-tuning run."""
    network = build_model(backbone, num_classes=5)
    names = lowrank.trailing_layers(network, layers)
    lowrank.freeze_before(network, names)
    lowrank.convert(network, names, lowrank.ASI(ranks=2))
    network.train()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    return network


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2, 4, "all"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_front_and_tail_are_the_network(backbone, layers):
    network = fine_tuned(backbone, layers)
    modes = [module.training for module in network.modules()]
    images = torch.randn(3, 3, 64, 64)
    parts = split(network, images)
    assert [module.training for module in network.modules()] == modes
    activations = parts.front(images)
    network.eval()  # without dropout
    torch.testing.assert_close(parts.tail(*activations), network(images), rtol=1e-4, atol=1e-4)
    if layers == "all":
        assert [tuple(part.shape) for part in activations] == [(3, 3, 64, 64)]
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    assert trained <= {id(parameter) for parameter in parts.tail.parameters()}
    assert not trained & {id(parameter) for parameter in parts.front.parameters()}


def test_the_tail_holds_no_convolution_ahead_of_the_trained_ones():
    network = fine_tuned("mcunet", 2)
    tail = split(network, torch.randn(2, 3, 64, 64)).tail
    convolutions = [layer for layer in tail.modules() if isinstance(layer, nn.Conv2d)]
    assert convolutions == list(lowrank.converted_layers(network))


class Own(nn.Module):
    """A network whose path, constants and random layers a test chooses."""

    def __init__(self, front):
        super().__init__()
        self.front, self.scale = front, nn.Parameter(torch.ones(1))
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x = self.front(x)
        if self.training and isinstance(self.front, nn.Identity):
            x = F.dropout(x, 0.5)
        return self.head(x * self.scale).mean((2, 3))


@pytest.mark.parametrize(
    ("front", "scale_is_trained"),
    [(nn.Dropout(0.5), False), (nn.BatchNorm2d(3, affine=False), False), (nn.Tanh(), True)],
)
def test_what_changes_or_is_random_is_not_in_the_front(front, scale_is_trained):
    network = Own(front).train()
    network.scale.requires_grad_(scale_is_trained)
    images = torch.randn(4, 3, 5, 5)
    crossing = split(network, images).front(images)[-1]
    expected = images.tanh() if isinstance(front, nn.Tanh) else images
    assert torch.equal(crossing, expected) or torch.equal(crossing, network.scale)
    if isinstance(front, nn.BatchNorm2d):
        assert front.num_batches_tracked == 0


def test_a_network_with_another_path_in_training_is_refused():
    with pytest.raises(ExperimentError, match="another path in training"):
        split(Own(nn.Identity()), torch.randn(2, 3, 4, 4))


class Remembering(nn.Module):
    """Notes what passes, in an attribute, a list and a buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.seen, self.last = nn.Conv2d(3, 2, 1), [], None
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.last = x
        self.seen.append(x)
        self.calls += 1
        return self.conv(x)


def test_tracing_leaves_no_mark():
    network, images = Remembering(), torch.randn(2, 3, 4, 4)
    split(network, images)
    assert network.last is images, "from the check of the parts"
    assert network.seen == [images]
    assert network.calls == 1
    assert all(type(value) is not torch.fx.Proxy for value in vars(network).values())


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


def test_a_network_that_cannot_be_traced_is_refused_in_one_line():
    with pytest.raises(ExperimentError, match=r"cannot be cached: .*set --model\.cache_front false"):
        split(Untraceable(), torch.randn(2, 3, 4, 4))


def train(weights, cache_front, epochs=2, folder=None, method=None, **options):
    torch.manual_seed(0)
    method = method or lowrank.ASI(ranks=4)
    module = FineTune("mcunet", 10, weights=str(weights), layers=2, method=method, cache_front=cache_front)
    module.front_folder = folder
    data = ImageDataModule(
        "digits", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=64, partition="finetune", cache=True
    )
    seen = []
    module.backbone.stem[0].register_forward_hook(lambda layer, inputs, output: seen.append(len(output)))
    own = trainer(epochs, num_sanity_val_steps=0, **options)
    own.fit(module, datamodule=data)
    metrics = own.test(module, datamodule=data, verbose=False)[0]
    return module.backbone.state_dict(), metrics, seen, data


@pytest.mark.slow
def test_training_with_a_cached_front_is_the_same_training(weights):
    # One step an epoch: after more on these tiny images, weights that differ by 1e-7 at the start are 0.2 apart.
    state, metrics, seen, _ = train(weights, cache_front=False, limit_train_batches=1)
    cached_state, cached_metrics, _, _ = train(weights, cache_front=True, limit_train_batches=1)
    assert len(seen) == 6  # one batch to train and one to validate an epoch, two to test
    assert cached_metrics["test_accuracy"] == pytest.approx(metrics["test_accuracy"], abs=2 / 314)
    assert state.keys() == cached_state.keys()
    for key, value in state.items():
        torch.testing.assert_close(cached_state[key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.slow
def test_a_cached_front_sees_every_image_once_however_many_epochs(weights):
    counts = []
    for epochs in (1, 3):
        _, _, seen, data = train(weights, cache_front=True, epochs=epochs)
        counts.append(sum(seen))
        images, _ = data.first_batch(seed=0)
        assert images.shape == (64, 3, 32, 32), "measurements go on getting images"
    # Every image, and the batch of the check, which goes through the whole network and through the front.
    images = sum(len(part) for part in (data.train, data.val, data.test))
    assert counts == [images + 2 * 64] * 2


CHECKED = 2 * 64  # images of the batch that goes through the whole network and through the front


@pytest.mark.slow
def test_runs_with_the_same_front_and_images_compute_it_once(weights, tmp_path, capsys):
    alone = train(weights, cache_front=True)
    assert capsys.readouterr().out.startswith(
        "  frozen front: 107 of 113 layers, up to blocks.13.layers.3 (is trained); "
    )
    first = train(weights, cache_front=True, folder=tmp_path)
    second = train(weights, cache_front=True, folder=tmp_path)
    assert sum(first[2]) == sum(alone[2]) > sum(second[2]) == CHECKED
    for state, metrics, *_ in (first, second):
        assert metrics == alone[1]
        assert all(torch.equal(state[key], value) for key, value in alone[0].items())
    _, _, seen, _ = train(weights, cache_front=True, folder=tmp_path, method=lowrank.Vanilla())
    assert sum(seen) == CHECKED, "another method, with the same layers ahead of it"
    assert len(list(tmp_path.glob("*.pt"))) == 1


@pytest.mark.slow
def test_other_weights_or_images_are_another_file(weights, tmp_path):
    def files(**options):
        settings = {"image_size": 32, "batch_size": 8, "limit": 64, **options}
        module = FineTune("mcunet", 10, weights=str(weights), layers=settings.pop("layers", 2), cache_front=True)
        with torch.no_grad():
            module.backbone.stem[0].weight.mul_(settings.pop("scale", 1))
        module.front_folder = tmp_path
        limits = {"limit_train_batches": 1, "limit_val_batches": 1}
        trainer(1, **limits).fit(module, datamodule=ImageDataModule("digits", **settings))
        return len(list(tmp_path.glob("*.pt")))

    others = [{}, {"layers": 3}, {"scale": 2}, {"image_size": 40}, {"partition": "finetune"}, {"std": (1.0, 1.0, 0.5)}]
    assert [files(**options) for options in others] == list(range(1, 1 + len(others)))


@pytest.mark.parametrize(
    "change",
    [
        lambda front: front[0].bias.add_(1),
        lambda front: setattr(front[0], "stride", (2, 2)),
        lambda front: setattr(front[1], "eps", 0.1),
        lambda front: front[1].running_mean.add_(1),
        lambda front: front.append(nn.Identity()),
    ],
)
@torch.no_grad()
def test_whatever_changes_the_front_changes_its_fingerprint(change):
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), nn.Conv2d(4, 2, 1))
    network[0].requires_grad_(False)
    images = torch.randn(2, 3, 8, 8)
    before = split(network, images).fingerprint()
    network[1].weight.add_(1)
    assert split(network, images).fingerprint() == before, "what is behind it does not"
    change(network[0])
    assert split(network, images).fingerprint() != before


class Padded(nn.Module):
    """A frozen front of layers without parameters among frozen ones."""

    def __init__(self):
        super().__init__()
        pads = (nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ConstantPad2d(1, 0.5))
        self.front = nn.Sequential(*pads, nn.Upsample(scale_factor=2), nn.Conv2d(3, 8, 1), nn.PixelShuffle(2))
        self.drop, self.head = nn.Dropout(0.5), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.head(self.drop(self.front(x)))


def test_padding_and_upsampling_are_in_the_front_and_what_it_ends_at_is_said():
    network = Padded().train()
    network.front.requires_grad_(False)
    parts = split(network, torch.randn(2, 3, 6, 6))
    assert (parts.layers, parts.stops) == ((6, 8), ("drop (Dropout differs in training)",))
    assert str(parts) == "6 of 8 layers, up to drop (Dropout differs in training)"
    network.drop.eval()
    parts = split(network, torch.randn(2, 3, 6, 6))
    assert (parts.layers, parts.stops) == ((7, 8), ("head (is trained)",))


def test_a_cached_front_needs_the_data_module(weights, digits_32):
    module = FineTune("mcunet", 10, weights=str(weights), layers=2, cache_front=True)
    with pytest.raises(ExperimentError, match="cache_front needs the data module"):
        trainer().fit(module, digits_32.train_dataloader())
