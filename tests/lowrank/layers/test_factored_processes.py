"""Weights that are held as factors in several processes: data parallel, and sharded."""

import copy
import os

import pytest
import torch
from factored_cases import NAMES, data, loss_of, network, train
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import lowrank
from lowrank import WSI

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cpu_only("gloo"),
    pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo"),
]
METHOD, SHAPE, STEPS = WSI(energy=0.7), (4, 5, 6), 4
SETTINGS = {"momentum": 0.9, "weight_decay": 0.01}


def run(process, work, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=2)
    torch.save(work(process), f"{folder}/{process}.pt")
    distributed.barrier()
    os._exit(0)  # PyTorch's process group may wait for ever when it is taken down, of a stock model too


def in_two_processes(work, folder):
    """What `work(process)` returns in each of two processes."""
    multiprocessing.spawn(run, (work, folder), nprocs=2)
    return [torch.load(folder / f"{process}.pt") for process in range(2)]


def converted():
    return lowrank.convert(network(), NAMES, METHOD, fuse=False)


def train_half(model, optimizer, process):
    for step in range(STEPS):
        half = slice(2 * process, 2 * process + 2)
        optimizer.zero_grad()
        loss_of(model, *(part[half] for part in data(SHAPE, step))).backward()
        optimizer.step()


def data_parallel(process):
    model = DistributedDataParallel(converted())
    train_half(model, lowrank.SGD(model.parameters(), 0.05, **SETTINGS), process)
    factors = {name: parameter.detach() for name, parameter in model.module.named_parameters()}
    return factors, model.module.state_dict()


def test_two_processes_train_as_one_on_the_joined_batch(tmp_path):
    (factors, first), (others, _) = in_two_processes(data_parallel, tmp_path)
    assert all(torch.equal(factors[name], others[name]) for name in factors)  # and do not drift apart
    model = converted()
    train(model, lowrank.SGD(model.parameters(), 0.05, **SETTINGS), SHAPE, STEPS)
    torch.testing.assert_close(first, dict(model.state_dict()), rtol=0, atol=1e-12)


def sharded(process):
    from torch.distributed.fsdp import fully_shard

    model = converted()
    for layer in model:
        if [*layer.parameters()]:
            fully_shard(layer)
    fully_shard(model)
    train_half(model, torch.optim.AdamW(model.parameters(), 0.01), process)
    before = {name: parameter.full_tensor() for name, parameter in model.state_dict().items()}
    refused = []
    for attempt in (lowrank.SGD(model.parameters(), 0.05).step, lambda: model.load_state_dict(model.state_dict())):
        try:
            attempt()
        except lowrank.LowRankError as error:
            refused.append(str(error))
    after = {name: parameter.full_tensor() for name, parameter in model.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    return after, refused


def test_sharded_factors_train_with_another_optimizer_and_sgd_says_that_it_cannot(tmp_path):
    (found, refused), _ = in_two_processes(sharded, tmp_path)
    model = converted()
    train(model, torch.optim.AdamW(model.parameters(), 0.01), SHAPE, STEPS)
    torch.testing.assert_close(found, dict(copy.deepcopy(model.state_dict())), rtol=0, atol=1e-12)
    assert "AdamW" in refused[0]
    assert "before they are sharded" in refused[1]


def with_attention():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(6, 16), block, nn.Linear(16, 4)).double()


def sharded_ahead(process):
    from torch.distributed.fsdp import fully_shard

    model, alone = with_attention(), with_attention()
    fully_shard(model)
    lowrank.convert(model, ["0", "2"], lowrank.Vanilla())
    fully_shard(alone[0])
    refused = [str(problem) for problem in lowrank.check(alone, ["0", "2"], lowrank.Vanilla())]
    x = data((4, 5, 6), 0)[0][2 * process : 2 * process + 2]
    model(x).square().sum().backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}, refused


def test_a_model_with_attention_that_is_sharded_already_is_converted_and_its_sharded_layers_are_refused(tmp_path):
    (found, refused), _ = in_two_processes(sharded_ahead, tmp_path)
    stock = with_attention()
    for process in range(2):
        stock(data((4, 5, 6), 0)[0][2 * process : 2 * process + 2]).square().sum().backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad / 2, rtol=1e-9, atol=1e-11)
    assert len(refused) == 1
    assert "'0'" in refused[0]
    assert "convert the model ahead of fully_shard" in refused[0]
