"""The hook in a distributed run, of one process: what is frozen is no longer waited for, and training is the same."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.distributed as dist
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from torch import nn

import lowrank
from segmentation.hook import LowRankHook

SETTINGS = {"method": {"type": "ASI", "ranks": 2}, "layers": ["second"], "freeze": ["first"]}


class Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, *images, mode="loss"):
        return {"loss": self.second(self.first(torch.stack(images)).relu()).square().mean()}


@pytest.fixture
def one_process(monkeypatch):
    """A group of one process."""
    for variable, value in (("LOCAL_RANK", "0"), ("OMP_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1")):
        monkeypatch.setenv(variable, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.barrier()  # its threads are done with every gradient then, and can be joined
    dist.destroy_process_group()


def runner(folder, launcher, steps, **options):
    """A runner over eight images whose model, order of images and random state are the same every time."""
    torch.manual_seed(0)
    data = {"dataset": list(torch.randn(8, 3, 9, 9)), "batch_size": 2, "num_workers": 0}
    return Runner(
        Net(),
        str(folder),
        {**data, "sampler": {"type": "DefaultSampler", "shuffle": False}},
        train_cfg={"by_epoch": False, "max_iters": steps},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}},
        custom_hooks=[{"type": "LowRankHook", **SETTINGS}],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 2, "by_epoch": False}},
        launcher=launcher,
        default_scope="mmseg",
        log_level="CRITICAL",
        experiment_name=f"{folder.name}_{launcher}_{steps}",
        cfg={"model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None}},
        **options,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_a_distributed_run_trains_what_a_plain_one_trains_and_is_resumed(tmp_path):
    plain = runner(tmp_path / "plain", "none", steps=4)
    plain.train()
    distributed = runner(tmp_path / "distributed", "pytorch", steps=4)
    before = distributed.model.module.first.weight.clone()
    distributed.train()
    assert isinstance(distributed.model, MMDistributedDataParallel)
    found, expected = distributed.model.module.state_dict(), plain.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(found["first.weight"], before)
    assert not torch.equal(found["second.weight"], Net().state_dict()["second.weight"])

    again = runner(
        tmp_path / "again", "pytorch", steps=4, load_from=str(tmp_path / "distributed" / "iter_2.pth"), resume=True
    )
    again.train()
    resumed = again.model.module
    assert all(torch.equal(tensor, found[name]) for name, tensor in resumed.state_dict().items())
    states = [lowrank.training_state(model) for model in (resumed, distributed.model.module)]
    assert states[0].keys() == states[1].keys() != set()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_the_first_wrapper_is_gone_and_the_second_waits_for_what_is_trained(tmp_path):
    own = runner(tmp_path, "pytorch", steps=1)
    wrapper = weakref.ref(own.model)
    own._train_loop = own.build_train_loop(own._train_loop)
    (hook,) = (hook for hook in own.hooks if isinstance(hook, LowRankHook))
    hook.before_train(own)
    assert wrapper() is None
    waited = [parameter for parameter in own.model._module_parameters if parameter.requires_grad]
    assert [id(parameter) for parameter in waited] == [id(p) for p in own.model.module.second.parameters()]
