"""The memory benchmark: every peer trains, what it measures is right, and it goes on where it stopped."""

import functools

import pandas as pd
import pytest
import torch

import lowrank
from benchmarks import memory
from benchmarks.memory import Row, measure
from benchmarks.networks import NETWORKS, batch_of, build, loss_of, trained_layers
from benchmarks.peers import PEERS, quantised
from benchmarks.plots import draw, ratios
from lowrank.meters.memory import held_bytes

NOT_FOR_EVERYTHING = {("gradient_filter_r2", "vit_small"), ("gradient_filter_r7", "vit_small")}
MARKS = {"compile_budget_0.5": pytest.mark.slow}
FOR_LINEAR_LAYERS = {"svd_llm_0.9", "velora_8", "wasi_0.9"}


@functools.cache
def gradients(network, peer):
    model, batch = build(network, 32), batch_of(4, 32)
    names = trained_layers(network, model, 2)
    loss_fn = PEERS[peer](model, names, batch)
    torch.manual_seed(0)
    loss_fn(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("peer", [pytest.param(peer, marks=MARKS.get(peer, ())) for peer in PEERS])
def test_every_peer_trains_every_network(peer, network):
    if peer in FOR_LINEAR_LAYERS and network != "vit_small":
        with pytest.raises((lowrank.ConversionError, ValueError)):
            gradients(network, peer)
        return
    if (peer, network) in NOT_FOR_EVERYTHING:
        with pytest.raises(lowrank.ConversionError, match="a convolution of two dimensions alone has"):
            gradients(network, peer)
        return
    found = gradients(network, peer)
    assert found
    assert all(torch.isfinite(grad).all() for grad in found.values())
    exact = peer in ("vanilla_fused", "checkpointing", "compile_budget_0.5") or peer.startswith("micro_batch")
    if exact:
        for name, grad in gradients(network, "vanilla").items():
            torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_the_gradients_of_a_network_compare(network):
    assert 0 < measure(Row(network, "2", "asi", 2, 32), ["memory"], 0)["gradient_error"] < 1


@pytest.mark.parametrize("network", ["resnet18", "mcunet"])
def test_held_and_saved_bytes_agree(network):
    model, batch = build(network, 64), batch_of(4, 64)
    names = trained_layers(network, model, 4)
    for method in (lowrank.Vanilla(), lowrank.HOSVD(0.8)):
        saved = lowrank.saved_bytes(model, loss_of, batch)
        held = held_bytes(model, loss_of, batch)
        assert held == pytest.approx(saved, abs=4 + batch[1].nbytes), (
            "the loss, four bytes; the labels were there before"
        )
        lowrank.convert(model, names, method)


@pytest.mark.parametrize(("bits", "error"), [(8, 1 / 255), (4, 1 / 15)])
def test_a_quantised_tensor_comes_back_within_a_step(bits, error):
    model = torch.nn.Sequential(torch.nn.Tanh())
    x = torch.rand(4, 2001, requires_grad=True)
    kept = []

    def loss(model, batch):
        y = model[0](batch)
        kept.append(y.detach())
        return y.sum()

    import benchmarks.peers as peers

    original, peers.loss_of = peers.loss_of, loss
    try:
        quantised(bits, model, [], x)(model, x).backward()
    finally:
        peers.loss_of = original
    restored = (1 - x.grad).clamp_min(0).sqrt()  # the derivative is 1 - y^2
    assert (restored - kept[0]).abs().max() <= error
    assert (restored - kept[0]).abs().max() > error / 100


@pytest.mark.slow
def test_a_row_of_numbers():
    result = measure(Row("mcunet", "2", "asi", 8, 64), ["memory", "time"], pairs=1)
    stock = measure(Row("mcunet", "2", "vanilla", 8, 64), ["memory"], pairs=1)
    assert 0 < result["kept_bytes"] < stock["kept_bytes"] / 3
    assert result["peak_bytes"] > result["kept_bytes"]
    assert (
        result["inference_bytes"] == stock["inference_bytes"] > 0
    )  # where nothing is trained, it is the stock network
    assert result["step_over_vanilla"] > 0
    assert "step_over_vanilla" not in stock


@pytest.mark.slow
def test_micro_batches_are_exact_at_the_memory_of_one():
    rows = {
        peer: measure(Row("mcunet", "2", peer, 8, 64), ["memory"], 0) for peer in ("vanilla", "micro_batch_2", "asi")
    }
    one = measure(Row("mcunet", "2", "vanilla", 2, 64), ["memory"], 0)
    assert rows["micro_batch_2"]["kept_bytes"] == pytest.approx(one["kept_bytes"], rel=0.01)
    assert rows["micro_batch_2"]["peak_bytes"] < rows["vanilla"]["peak_bytes"]
    assert rows["micro_batch_2"]["gradient_error"] < 1e-5 < 0.05 < rows["asi"]["gradient_error"] < 1
    assert rows["vanilla"]["gradient_error"] == 0


@pytest.mark.slow
def test_a_peer_that_trains_other_parameters_has_no_gradient_error():
    result = measure(Row("resnet18", "2", "lora_8", 2, 32), ["memory"], 0)
    assert result["gradient_error"] is None


@pytest.mark.slow
def test_a_compiled_graph_is_timed_as_well():
    result = measure(Row("resnet18", "2", "compile_budget_0.5", 2, 32), ["time"], pairs=1)  # the soonest compiled
    assert result["step_over_vanilla"] > 0
    assert "kept_bytes" not in result


class Fake:
    """Stands in for the processes that measure: notes what they are asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, row, parts, pairs):
        self.asked.append((row.layers, row.peer, *parts))
        size = 100 if row.peer == "vanilla" else 20
        memory = {**dict.fromkeys(("kept_bytes", "peak_bytes", "resident_bytes"), size), "inference_bytes": 10}
        numbers = {"memory": memory, "time": {"step_over_vanilla": 1.5}}
        if row.peer == "lora_8":
            return {**vars(row), "failed": "reason"}
        return vars(row) | {name: number for part in parts for name, number in numbers[part].items()}


@pytest.fixture
def fake(monkeypatch):
    processes = Fake()
    monkeypatch.setattr(memory, "_in_a_process", processes)
    return processes


@pytest.mark.slow
def test_the_table_grows_and_nothing_is_measured_twice(tmp_path, fake):
    rows = [Row("mcunet", layers, peer, 8, 64) for layers in ("2", "all") for peer in ("vanilla", "asi", "lora_8")]
    memory.run(rows[:2], 1, tmp_path / "memory.csv")
    frame = memory.run(rows, 1, tmp_path / "memory.csv")
    assert fake.asked == [(row.layers, row.peer, "memory", "time") for row in rows]
    assert list(frame.peer) == ["vanilla", "lora_8", "asi"] * 2, "in the order of the peers, not of the measurements"
    assert list(ratios(frame).kept_times_less[[0, 2]]) == [1.0, 5.0]
    assert list(ratios(frame).peak_over_inference[[0, 2]]) == [10.0, 2.0]
    assert len(pd.read_csv(tmp_path / "memory.csv")) == 6
    paths = draw(frame, tmp_path)
    assert [path.suffix for path in paths] == [".md", ".png", ".svg"]
    assert "| mcunet    | all    | asi     | 0.00         | 5.0" in paths[0].read_text()


@pytest.mark.slow
def test_several_batches_are_told_apart_in_one_table(tmp_path, fake):
    rows = [Row("mcunet", "2", peer, batch, 64) for batch in (16, 8) for peer in ("asi", "vanilla")]
    frame = memory.run(rows, 0, tmp_path / "memory.csv")
    assert list(zip(frame.batch, frame.peer, strict=True)) == [(8, "vanilla"), (8, "asi"), (16, "vanilla"), (16, "asi")]
    text = draw(frame, tmp_path)[0].read_text()
    assert [line.split("|")[3].strip() for line in text.splitlines()[2:]] == ["8", "8", "16", "16"]


def test_of_a_row_without_a_ratio_of_times_only_that_is_measured(tmp_path, fake):
    rows = [Row("mcunet", "2", peer, 8, 64) for peer in ("vanilla", "lora_8", "asi")]
    memory.run(rows, 0, tmp_path / "memory.csv")
    memory.run(rows[1:], 2, tmp_path / "memory.csv")
    frame = memory.run(rows[1:], 2, tmp_path / "memory.csv")
    assert fake.asked == [*(("2", row.peer, "memory") for row in rows), ("2", "asi", "time")]
    (asi,) = frame[frame.peer == "asi"].to_dict("records")
    assert (asi["kept_bytes"], asi["step_over_vanilla"]) == (20, 1.5)
    assert frame.step_over_vanilla.notna().sum() == 1


@pytest.mark.slow
def test_a_row_that_cannot_be_measured_says_why():
    result = memory._in_a_process(Row("vit_small", "2", "gradient_filter_r2", 2, 32), ["memory"], 0)
    assert "a convolution of two dimensions alone has" in result["failed"]
