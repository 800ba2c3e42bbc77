from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from references import (
    TOLERANCE,
    MultiplicationCounter,
    autograd,
    filtered_gradients,
    random_tensor,
    svd_rank,
)
from strategies import convolutions
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, WASI, WSI, GradientFilter, SettingError, Vanilla
from lowrank.tensors.geometry import ConvGeometry, LinearGeometry
from lowrank.tensors.tucker import iteration_order


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HOSVD(energy=0), "energy"),
        (lambda: HOSVD(energy=1.5), "energy"),
        (lambda: SVD(energy=float("nan")), "energy"),
        (lambda: SVD(energy="0.8"), "energy"),
        (lambda: ASI(ranks=0), "ranks"),
        (lambda: ASI(ranks=[2, -1, 2, 2]), "ranks"),
        (lambda: ASI(ranks=[2, 2.5, 2, 2]), "ranks"),
        (lambda: ASI(ranks="2222"), "ranks"),
        (lambda: ASI(ranks=[]), "ranks"),
        (lambda: ASI(ranks={"layer": [0]}), "ranks"),
        (lambda: ASI(ranks=True), "ranks"),
        (lambda: ASI(ranks=[4, True, 2, 2]), "ranks"),
        (lambda: ASI(ranks=2, algorithm="svd"), "sequential, published"),
        (lambda: GradientFilter(patch=0), "patch"),
        (lambda: GradientFilter(patch=2.0), "patch"),
        (lambda: GradientFilter(patch=True), "patch"),
        (lambda: GradientFilter(patch={"0": 2, "1": 0}), "patch"),
    ],
)
def test_a_setting_out_of_range_raises_and_is_named(make, message):
    with pytest.raises(SettingError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "tag"),
    [
        (Vanilla(), "vanilla"),
        (SVD(0.8), "svd_0.8"),
        (HOSVD(0.8), "hosvd_0.8"),
        (ASI(), "asi"),
        (ASI([2, 3]), "asi"),
        (ASI(2), "asi_rank2"),
        (ASI([2, 3], algorithm="published"), "asi_published"),
        (ASI([2, 3], warm_start=False), "asi_cold"),
        (ASI(refresh=10), "asi_every10"),
        (ASI(2, refresh="energy"), "asi_rank2_by_energy"),
        (WSI(0.9), "wsi_0.9"),
        (WSI(0.9, update="svd"), "wsi_0.9_svd"),
        (WASI(energy=0.9), "wasi_0.9"),
        (WASI(20, energy=0.1, algorithm="published"), "wasi_0.1_rank20_published"),
        (GradientFilter(7), "gradient_filter_r7"),
        (GradientFilter({"0": 7}), "gradient_filter"),
    ],
)
def test_tags_tell_methods_apart(method, tag):
    assert method.tag == tag


def test_ranks_above_the_dimensions_are_cut_to_them():
    assert ASI([9, 2, 9, 3]).ranks_for((4, 5, 6, 7)) == (4, 2, 6, 3)
    assert ASI(5).ranks_for((4, 5, 6, 7)) == (4, 5, 5, 5)


def test_asi_takes_ranks_per_layer_from_a_mapping_and_from_a_plan():
    plan = lowrank.RankPlan(ranks={"a": (1, 2, 2), "b": (3, 4, 5)}, energies={}, nbytes=0, perplexity=0.0)
    for ranks in (plan, plan.ranks):
        assert ASI(ranks).for_layer("b").ranks_for((9, 9, 9)) == (3, 4, 5)
        with pytest.raises(SettingError, match=r"'c'.*a, b"):
            ASI(ranks).for_layer("c")


# The gradient filter


def filtered(conv, x, grad, patch):
    model = lowrank.convert(nn.Sequential(conv), ["0"], GradientFilter(patch))
    return autograd(model, x, grad)


@pytest.mark.slow
@given(convolutions(padding_modes=st.just("zeros")), st.integers(1, 4))
def test_gradient_filter_equals_a_naive_loop_over_patches(setting, patch):
    conv, x, grad = setting.layer(), setting.x(), setting.grad()
    weight_gradient, input_gradient = filtered_gradients(conv, x, grad, patch)
    y, grad_x, gradients = filtered(conv, x, grad, patch)
    torch.testing.assert_close(y, setting.layer()(x), **TOLERANCE)
    torch.testing.assert_close(gradients["0.weight"], weight_gradient, **TOLERANCE)
    torch.testing.assert_close(grad_x, input_gradient, **TOLERANCE)
    if conv.bias is not None:
        torch.testing.assert_close(gradients["0.bias"], grad.sum((0, 2, 3)), **TOLERANCE)


@given(convolutions(padding_modes=st.just("zeros")))
def test_gradient_filter_with_one_pixel_patches_is_exact_for_pointwise_layers(setting):
    options = {**dict(setting.options), "kernel_size": 1, "padding": 0, "stride": 1}
    conv, x = nn.Conv2d(**options, dtype=torch.float64), setting.x()
    grad = random_tensor(*conv(x).shape, seed=setting.seed)
    y, grad_x, gradients = autograd(nn.Sequential(conv), x, grad)
    for result, expected in zip(filtered(conv, x, grad, 1), (y, grad_x, gradients), strict=True):
        torch.testing.assert_close(result, expected, **TOLERANCE)


@given(convolutions(padding_modes=st.just("zeros")), st.integers(1, 3))
def test_gradient_filter_is_exact_where_input_and_patches_are_constant(setting, patch):
    # A constant input and a gradient constant on each patch are what the filter assumes; then dW has no error.
    options = {**dict(setting.options), "padding": 0}
    conv = nn.Conv2d(**options, dtype=torch.float64)
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    stride = [min(s, k) for s, k in zip(conv.stride, conv.kernel_size, strict=True)]
    conv.stride = tuple(stride)
    assume(all(r // 2 + s <= r + 1 for r, s in zip(reach, stride, strict=True)))  # patches stay inside the input
    x = random_tensor(2, setting.shape[1], 1, 1, seed=setting.seed).expand(-1, -1, reach[0] + 9, reach[1] + 8)
    rows, columns = conv(x).shape[2:]
    coarse = random_tensor(2, conv.out_channels, -(-rows // patch), -(-columns // patch), seed=setting.seed + 1)
    grad = F.interpolate(coarse, scale_factor=patch)[:, :, :rows, :columns].contiguous()
    expected = autograd(conv, x, grad)[2]["weight"]
    torch.testing.assert_close(filtered(conv, x, grad, patch)[2]["0.weight"], expected, **TOLERANCE)


@pytest.mark.parametrize("patch", [1, 2, 3, 7])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_gradient_filter_keeps_the_total_of_the_input_gradient(patch, stride, dilation):
    conv = nn.Conv2d(4, 6, 3, stride=stride, dilation=dilation, groups=2, dtype=torch.float64)
    x = random_tensor(2, 4, 13, 12)
    grad = random_tensor(*conv(x).shape, seed=1)
    _, exact, _ = autograd(conv, x, grad)
    _, coarse, _ = filtered(conv, x, grad, patch)
    torch.testing.assert_close(coarse.sum((2, 3)), exact.sum((2, 3)), **TOLERANCE)


def test_gradient_filter_keeps_one_number_per_channel_and_patch():
    conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    kept, _ = GradientFilter(2).compress(torch.ones(2, 3, 10, 9), ConvGeometry.of(conv), (), "")
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 3, 3, 3)]  # 5 x 5 outputs in patches of 2 x 2


# Costs

CONV = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, dtype=torch.float64)
CONV_SHAPE, CONV_OUTPUT, CONV_RANKS = (5, 6, 9, 7), (5, 8, 5, 6), (2, 3, 4, 5)


def paper_conv(shape, output, ranks, kernel):
    """papers, A7.1: the released counts, summand by summand."""
    (b, c, h, w), (_, o, rows, columns), (k0, k1, k2, k3) = shape, output, ranks
    forward = kernel * o * c * h * w * b
    unfoldings = [(n, prod(shape) // n) for n in shape]
    return {
        "forward": forward,
        "vanilla_backward": kernel * c * o * rows * columns * b,
        "subspace": sum(2 * b * c * h * w * k + k**3 for k in ranks),
        "svds": [max(n, p) ** 2 * min(n, p) for n, p in unfoldings],
        "backward": k0 * o * rows * columns * b
        + h * k0 * k1 * k2 * k3
        + h * w * k0 * k1 * k3
        + o * k0 * k1 * kernel * rows * columns
        + o * c * kernel * k1,
        "numel": prod(ranks) + sum(n * k for n, k in zip(shape, ranks, strict=True)),
    }


def conv_cost(method, x=None, input_gradient=True):
    x = random_tensor(*CONV_SHAPE) if x is None else x
    return method.cost(x, ConvGeometry.of(CONV), CONV.out_channels, input_gradient)


def test_vanilla_cost_is_the_papers():
    paper, cost = paper_conv(CONV_SHAPE, CONV_OUTPUT, CONV_RANKS, 6), conv_cost(Vanilla())
    assert cost.flops_paper == paper["forward"] + paper["vanilla_backward"]
    assert cost.activation_bytes == 8 * prod(CONV_SHAPE)
    assert cost.flops == 3 * 2 * prod(CONV_OUTPUT) * 3 * 6


def test_asi_cost_is_the_papers():
    paper, cost = paper_conv(CONV_SHAPE, CONV_OUTPUT, CONV_RANKS, 6), conv_cost(ASI(CONV_RANKS))
    assert cost.flops_paper == paper["forward"] + paper["subspace"] + paper["backward"]
    assert cost.activation_bytes == 8 * paper["numel"]


def test_hosvd_cost_is_the_papers_at_the_ranks_of_the_data():
    x = random_tensor(*CONV_SHAPE)
    ranks = tuple(svd_rank(x, mode, 0.8) for mode in range(4))
    paper, cost = paper_conv(CONV_SHAPE, CONV_OUTPUT, ranks, 6), conv_cost(HOSVD(0.8), x)
    assert cost.flops_paper == paper["forward"] + sum(paper["svds"]) + paper["backward"]
    assert cost.activation_bytes == 8 * paper["numel"]


def test_svd_cost_is_the_papers_with_the_input_rebuilt():
    x = random_tensor(*CONV_SHAPE)
    rank = svd_rank(x, 0, 0.8)
    paper, cost = paper_conv(CONV_SHAPE, CONV_OUTPUT, CONV_RANKS, 6), conv_cost(SVD(0.8), x)
    assert cost.flops_paper == paper["forward"] + paper["svds"][0] + paper["vanilla_backward"]
    assert cost.activation_bytes == 8 * rank * (CONV_SHAPE[0] + prod(CONV_SHAPE[1:]))


def test_gradient_filter_cost_is_the_papers():
    conv, (b, c, h, w), o, r = nn.Conv2d(6, 8, 3, padding=1), (5, 6, 8, 12), 8, 4
    cost = GradientFilter(r).cost(torch.zeros(b, c, h, w), ConvGeometry.of(conv), o, True)
    dense = 9 * c * o * b * h * w
    forward = dense + (h // r) * (w // r) * (r**2 - 1) * c * b
    backward = 2 * b * o * (h // r) * (w // r) + o * c * (9 - 1) + dense
    assert cost.flops_paper == forward + backward
    assert cost.activation_bytes == 4 * b * c * (h // r) * (w // r)


def test_gradient_filter_counts_sums_over_the_output_patches_as_the_paper_does():
    # With a stride the patches lie on the output: h and w of the output's part of the count are the output's.
    conv, (b, c, h, w), o, r = nn.Conv2d(6, 8, 3, padding=1, stride=2), (5, 6, 16, 24), 8, 2
    cost = GradientFilter(r).cost(torch.zeros(b, c, h, w), ConvGeometry.of(conv), o, True)
    dense = 9 * c * o * b * h * w
    forward = dense + (h // r) * (w // r) * (r**2 - 1) * c * b
    backward = 2 * b * o * (h // 2 // r) * (w // 2 // r) + o * c * (9 - 1) + dense
    assert cost.flops_paper == forward + backward


@pytest.mark.parametrize(
    ("shape", "ranks", "forward", "vanilla", "low_rank"),
    [
        # papers, A7.2, for inputs (B, N, I) and (B, H, W, C)
        (
            (4, 5, 6),
            (2, 3, 4),
            4 * 5 * 7 * (2 * 6 - 1),
            7 * 6 * (2 * 4 * 5 - 1),
            4 * 5 * 7 * 2 + 2 * 3 * 4 * 5 + 2 * 4 * 6 * 5 + 6 * 7 * 5 * 2,
        ),
        (
            (4, 5, 6, 8),
            (2, 3, 4, 5),
            4 * 5 * 6 * 7 * (2 * 8 - 1),
            7 * 8 * (2 * 4 * 5 * 6 - 1),
            4 * 2 * 5 * 6 * 7 + 5 * 2 * 3 * 4 * 5 + 6 * 4 * 2 * 5 * 7 + 8 * 5 * 2 * 5 * 4 + 2 * 4 * 5 * 8 * 7,
        ),
    ],
    ids=["3-D", "4-D"],
)
def test_linear_costs_are_the_papers(shape, ranks, forward, vanilla, low_rank):
    x, geometry = torch.zeros(shape), LinearGeometry()
    subspace = sum(2 * prod(shape) * k + k**3 for k in ranks)
    assert Vanilla().cost(x, geometry, 7, True).flops_paper == forward + vanilla
    assert ASI(ranks).cost(x, geometry, 7, True).flops_paper == forward + subspace + low_rank


@pytest.mark.parametrize(
    ("options", "once"), [({}, True), ({"warm_start": False}, False), ({"algorithm": "published"}, False)]
)
@pytest.mark.parametrize("ranks", [(2, 3, 4, 5), (2, 6, 4, 7), (5, 6, 9, 7)])
def test_asi_flops_are_those_of_its_matrix_products_and_qr(options, once, ranks):
    method, geometry, x = ASI(ranks, **options), ConvGeometry.of(CONV), random_tensor(*CONV_SHAPE)
    _, state = method.compress(x, geometry, (), "layer")
    with MultiplicationCounter() as counter:
        kept, _ = method.compress(x, geometry, state, "layer")
        method.weight_gradient(kept, random_tensor(*CONV_OUTPUT), geometry, CONV_SHAPE)
    qr = sum(4 * n * r**2 for n, r in zip(CONV_SHAPE, ranks, strict=True) if r < n)
    first = next((m for m in iteration_order(CONV_SHAPE, ranks) if ranks[m] < CONV_SHAPE[m]), 0)
    if once and first >= 2:  # the QR of (2 r, r), and a triangular solve
        qr += 9 * ranks[first] ** 3
    forward = 2 * prod(CONV_OUTPUT) * 3 * 6
    assert method.cost(x, geometry, 8, False).flops == forward + 2 * counter.total + qr


@pytest.mark.parametrize("method", [HOSVD(0.8), SVD(0.8)])
def test_decomposition_flops_are_those_of_its_matrix_products_and_eigenvectors(method):
    geometry, x = ConvGeometry.of(CONV), random_tensor(*CONV_SHAPE)
    with MultiplicationCounter() as counter:
        kept, _ = method.compress(x, geometry, (), "layer")
        method.weight_gradient(kept, random_tensor(*CONV_OUTPUT), geometry, CONV_SHAPE)
    modes = CONV_SHAPE if isinstance(method, HOSVD) else CONV_SHAPE[:1]
    eigenvectors = sum(9 * min(n, prod(CONV_SHAPE) // n) ** 3 for n in modes)
    forward = 2 * prod(CONV_OUTPUT) * 3 * 6
    assert method.cost(x, geometry, 8, False).flops == forward + 2 * counter.total + eigenvectors


def test_gradient_filter_flops_are_those_of_its_small_product_and_the_pooling():
    method, geometry, x = GradientFilter(2), ConvGeometry.of(CONV), random_tensor(*CONV_SHAPE)
    with MultiplicationCounter() as counter:
        kept, _ = method.compress(x, geometry, (), "layer")
        method.weight_gradient(kept, random_tensor(*CONV_OUTPUT), geometry, CONV_SHAPE)
    forward, additions = 2 * prod(CONV_OUTPUT) * 3 * 6, prod(CONV_SHAPE) + prod(CONV_OUTPUT)
    assert method.cost(x, geometry, 8, False).flops == forward + 2 * counter.total + additions


@pytest.mark.parametrize("shape", [(40, 2, 5), (3, 4, 30), (3, 50)])
@pytest.mark.parametrize("method", [HOSVD(0.8), SVD(0.8)])
def test_decomposition_flops_count_unfoldings_that_are_taller_than_wide(method, shape):
    geometry, x, grad = LinearGeometry(), random_tensor(*shape), random_tensor(*shape[:-1], 7, seed=1)
    with MultiplicationCounter() as counter:
        kept, _ = method.compress(x, geometry, (), "layer")
        method.weight_gradient(kept, grad, geometry, shape)
    modes = shape if isinstance(method, HOSVD) else shape[:1]
    eigenvectors = sum(9 * min(n, prod(shape) // n) ** 3 for n in modes)
    ranks = [svd_rank(x, mode, 0.8) for mode in range(len(modes))]  # also where the input is then kept itself
    qr = sum(4 * n * r**2 for n, r in zip(modes, ranks, strict=True) if n**2 > prod(shape) and r < n)
    expected = 2 * prod(shape) * 7 + 2 * counter.total + eigenvectors + qr
    assert method.cost(x, geometry, 7, False).flops == expected


@pytest.mark.parametrize("method", [Vanilla(), HOSVD(0.8), SVD(0.8), ASI(2), GradientFilter(2)])
def test_kept_bytes_are_the_formulas(method):
    x = random_tensor(*CONV_SHAPE)
    kept, _ = method.compress(x, ConvGeometry.of(CONV), (), "layer")
    measured = sum(tensor.nbytes for tensor in kept if tensor is not None)
    assert measured == conv_cost(method, x).activation_bytes


def test_gradient_filter_takes_a_patch_per_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    lowrank.convert(model, ["0", "1"], GradientFilter({"0": 2, "1": 5}))
    assert [layer._lowrank.method for layer in lowrank.converted_layers(model)] == [
        GradientFilter(2),
        GradientFilter(5),
    ]
    with pytest.raises(lowrank.ConversionError, match=r"layer '1' .*the patches name no layer '1'; they name 0"):
        lowrank.convert(model, ["0", "1"], GradientFilter({"0": 2}))
