"""What comes about from what is kept anyway takes nothing, in the ways in which people write networks; exact."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from leaks import no_tensor_left
from references import DEVICE, random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI, ChangedError, Vanilla
from lowrank.exact import origins

TOKENS, WIDTH = 12, 16
UNIT = 2 * TOKENS * WIDTH * 8  # bytes of an activation (2, TOKENS, WIDTH) in double precision


class Root(nn.Module):
    """An RMSNorm as language models write it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        mean = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean + 1e-6))


class First(nn.Module):
    """A linear layer ahead of all others, so that the first block's input is an output of the model."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.layer(x) + x


class Gated(nn.Module):
    def __init__(self, gate=lambda x, y: F.silu(x) * y):
        super().__init__()
        self.norm, self.gate = Root(), gate
        self.first, self.second, self.last = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x):
        y = self.norm(x)
        return x + self.last(self.gate(self.first(y), self.second(y)))


def rotated(x):
    angles = torch.arange(TOKENS * x.shape[-1], dtype=x.dtype, device=x.device).view(TOKENS, -1) / 7
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class Attention(nn.Module):
    """Causal, grouped queries, rotated positions."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.kv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.norm(x)
        q = self.q(y).view(*y.shape[:2], 4, -1).transpose(1, 2)
        k, v = self.kv(y).view(*y.shape[:2], 4, -1).transpose(1, 2).split(2, 1)
        k = rotated(k)[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape)
        v = v.repeat_interleave(2, dim=1)
        z = F.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
        return x + self.out(z.transpose(1, 2).reshape(y.shape))


GATES = {
    "silu": lambda x, y: F.silu(x) * y,
    "gelu": lambda x, y: F.gelu(x) * y,
    "tanh gelu by hand": lambda x, y: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3.0)))) * y,
    "quick gelu": lambda x, y: x * torch.sigmoid(1.702 * x) * y,
    "sigmoid": lambda x, y: x.sigmoid() * y,
    "relu squared": lambda x, y: F.relu(x) ** 2 * y,
    "in place": lambda x, y: F.silu(x, inplace=True) * y,
    "softmax": lambda x, y: F.softmax(x, -1) * y,
    "chunks": lambda x, y: torch.mul(*F.mish(torch.cat([x, y], -1)).chunk(2, -1)),
}


def stack(kind, **options):
    torch.manual_seed(0)
    return nn.Sequential(First(), kind(**options), kind(**options)).double()


def results(model, x, loss=None):
    model.zero_grad()
    leaf = x.clone().requires_grad_(True)
    y = model(leaf * 1)
    y.backward(random_tensor(*y.shape, seed=5).to(y.dtype))
    return [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]


def converted(model, method=None):
    model = copy.deepcopy(model)
    return lowrank.convert(model, lowrank.trailing_layers(model, "all", "linear"), method or Vanilla())


def kept(model, x):
    return lowrank.saved_bytes(model, lambda model, x: model(x * 1).sum(), x.clone().requires_grad_())


def tokens():
    return random_tensor(2, TOKENS, WIDTH)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_gates_are_exact_and_keep_the_input_of_their_normalisation_alone(gate):
    stock = stack(Gated, gate=gate)
    model, x = converted(stock), tokens()
    for found, wanted in zip(results(model, x), results(stock, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    in_place = 4 * UNIT if gate is GATES["in place"] else 0  # the copy that PyTorch makes too
    assert kept(model, x) <= 3 * UNIT + 2 * 2 * 2 * TOKENS * 8 + 2 * in_place  # inputs, and two means of each
    assert kept(stock, x) >= 2 * 8 * UNIT


@pytest.mark.parametrize("method", [Vanilla(), ASI(999), ASI([2, 8, 8])], ids=["vanilla", "full ranks", "compressed"])
def test_attention_in_functions_keeps_the_input_of_its_normalisation(method):
    stock, x = stack(Attention), tokens()
    model = converted(stock, method)
    if method != ASI([2, 8, 8]):
        for found, wanted in zip(results(model, x), results(stock, x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    else:
        torch.testing.assert_close(results(model, x)[1], results(stock, x)[1], rtol=1e-10, atol=1e-12)
    if method == Vanilla():
        angles = 4 * TOKENS * 4 * 8
        assert kept(model, x) <= UNIT + 2 * (UNIT + 2 * 2 * TOKENS * 8 + angles)
        assert kept(stock, x) >= 2 * 5 * UNIT


@pytest.mark.parametrize("kind", [Gated, Attention])
def test_under_autocast_in_bfloat16_and_without_gradients(kind):
    stock = stack(kind).float()
    x = tokens().float()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.float32):
            own, wanted = (results(m.to(dtype), x.to(dtype)) for m in (converted(stock), copy.deepcopy(stock)))
        for found, expected in zip(own, wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    with torch.no_grad():
        assert torch.equal(converted(stock)(x), stock(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [Gated, Attention])
def test_in_checkpoints_of_blocks_and_of_parts_of_them(kind, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = stack(kind)[1:]
            for block in self.blocks:
                block.norm = Through(block.norm)

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    class Through(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    stock = Checkpointed()
    model, x = converted(stock), tokens()
    for found, wanted in zip(results(model, x), results(stock, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_hooks_see_and_may_replace_what_they_see_in_the_stock_model():
    stock, x = stack(Gated), tokens()
    stock[1].first.register_forward_hook(lambda module, inputs, y: y * 2)
    stock[2].norm.register_forward_hook(lambda module, inputs, y: y + inputs[0])
    for found, wanted in zip(results(converted(stock), x), results(stock, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_two_backward_passes_of_one_graph_give_the_same():
    model, x = converted(stack(Attention)), tokens().requires_grad_()
    y = model(x * 1)
    first, second = (torch.autograd.grad(y.sum(), [x, *model.parameters()], retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_a_factor_that_is_changed_in_place_is_an_error_as_in_the_stock_model():
    class Changing(Gated):
        def forward(self, x):
            y = super().forward(x)
            with torch.no_grad():
                x.mul_(2)
            return y

    for model in (stack(Changing), converted(stack(Changing))):
        with pytest.raises(RuntimeError) as caught:
            model(tokens().requires_grad_() * 1).sum().backward()
        assert isinstance(caught.value, ChangedError) or "inplace operation" in str(caught.value)


class Indexed(Gated):
    """Its code changes an index of NumPy, of which nobody keeps a version, once it has used it."""

    def __init__(self):
        super().__init__()
        self.index = np.arange(WIDTH)

    def forward(self, x):
        y = self.norm(x)[..., self.index]
        y = torch.einsum(y, [0, 1, 2], self.index_in(y), [0, 2, 3], [0, 1, 3])
        self.index[:] = self.index[::-1].copy()
        return x + self.last(self.gate(self.first(y), self.second(y)))

    def index_in(self, y):
        return y.mT[:, self.index[::-1].copy()] @ y


def test_an_argument_that_is_changed_behind_its_use_is_not_used_again():
    expected, found = results(stack(Indexed), tokens()), results(converted(stack(Indexed)), tokens())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_gradient_of_a_product_that_is_computed_again_is_differentiated_again():
    found = []
    for model in (stack(Gated), converted(stack(Gated))):
        x = tokens().requires_grad_()
        (grad,) = torch.autograd.grad(model(x * 1).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])


class Dense(nn.Module):
    """As in DenseNet: each layer reads all that is ahead of it, put together."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4 + 4 * at, 4, 3, padding=1) for at in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 4 * at) for at in range(4))

    def forward(self, x):
        found = [x]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            found.append(conv(torch.relu(norm(torch.cat(found, 1)))))
        return torch.cat(found, 1)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_put_together_of_parts_is_no_second_copy_of_them(training):
    torch.manual_seed(0)
    stock, x = Dense().double().train(training), random_tensor(2, 4, 6, 6)
    model = lowrank.convert(copy.deepcopy(stock), lowrank.trailing_layers(stock, "all"), Vanilla())
    for found, wanted in zip(results(model, x), results(stock, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert kept(model, x) < 0.6 * kept(stock, x)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)], ids=str)
@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU6(True), nn.LeakyReLU(0.1), nn.SiLU(True), nn.Hardswish(), nn.Mish(True)], ids=str
)
def test_behind_a_normalisation_that_needs_its_input_an_activation_takes_nothing(norm, activation):
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(4, 4, 1), norm, activation, nn.Conv2d(4, 4, 3)).double()
    model, x = copy.deepcopy(stock), random_tensor(2, 4, 6, 6)
    lowrank.convert(model, ["0", "3"], Vanilla())
    for found, wanted in zip(results(model, x), results(stock, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    map_bytes = x.nbytes
    assert kept(model, x) < (2 + isinstance(activation, nn.SiLU | nn.Mish) * getattr(activation, "inplace", False)) * (
        map_bytes + 200
    )


def test_nothing_is_kept_alive_by_a_backward_pass_that_never_comes():
    model, x = converted(stack(Attention)), tokens().requires_grad_()
    model(x * 1).sum().backward()
    with no_tensor_left():
        for _ in range(3):
            y = model(x * 1)
            torch.autograd.grad(y.sum(), model[2].out.weight)
            del y


def test_an_origin_adds_the_bytes_of_each_of_its_sources_once():
    """Not by the identity of a number that is gone, which another may have: then chance would say what is kept."""
    sources = [random_tensor(3 + at, 5) for at in range(6)]
    first = sources[0]
    parts = [origins.itself(x).sources[0] for x in (*sources, first.view(-1), first[1:])]
    kept = origins.itself(random_tensor(100), kept=True).sources[0]
    origin = origins.Origin(origins.Step(None), (*parts, kept))
    for _ in range(20):
        assert origin.nbytes == sum(x.nbytes for x in sources)


class Shuffled(nn.Module):
    """As in ShuffleNet: branches are put together, shuffled, and one half of that is convolved."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        y = torch.cat([self.relu(self.first(x)), self.relu(self.second(x))], 1)
        y = y.view(len(x), 2, 8, *x.shape[2:]).transpose(1, 2).contiguous().flatten(1, 2)
        return self.third(y.chunk(2, 1)[1])


def test_half_of_a_tensor_is_not_computed_from_the_whole_where_a_copy_takes_less():
    model, x = (
        lowrank.convert(Shuffled().double(), ["first", "second", "third"], Vanilla(), recompute=False),
        random_tensor(2, 4, 6, 6),
    )
    kept = lowrank.saved_bytes(model, lambda m, b: m(b).sum(), x)
    half, bits = 8 * 2 * 8 * 6 * 6, 2 * 2 * 8 * 6 * 6 // 8
    assert kept == x.nbytes + half + bits
