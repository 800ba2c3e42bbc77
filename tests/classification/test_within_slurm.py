"""What a command makes of the environment that Slurm's jobs have."""

import os

import pytest
import pytorch_lightning as pl

from classification.start import forbid_requeue, start_of, within_slurm
from experiment import ExperimentError
from experiment.processes import Place

TASK = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "host[3-4]", "SLURM_NODEID": "0"}


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", strategy="ddp", max_epochs=1, **quiet, **options)


def enter(monkeypatch, **changes):
    for name, value in (TASK | changes).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("nodes", [1, 2])
def test_tasks_of_srun_are_the_processes_of_a_run(monkeypatch, nodes):
    told = {"SLURM_NTASKS": str(2 * nodes), "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": str(nodes)}
    enter(monkeypatch, **told, SLURM_PROCID="1", SLURM_LOCALID="1")
    with within_slurm():
        made = trainer(devices=2, num_nodes=nodes)
        start = start_of({"trainer": {"strategy": "ddp"}}, made)
    assert (start.place, start.started) == (Place(1, 2 * nodes), True)
    forbid_requeue(made)
    assert not made.strategy.cluster_environment.auto_requeue


def test_a_job_of_one_task_starts_its_processes_itself(monkeypatch):
    enter(monkeypatch, SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NNODES="1")
    with within_slurm():
        start = start_of({"trainer": {"strategy": "ddp"}}, trainer(devices=2))
    assert (start.place.count, start.started) == (2, False)
    assert os.environ["SLURM_JOB_NAME"] == "train"


def test_processes_on_other_machines_have_to_be_started_by_somebody():
    with within_slurm(), pytest.raises(ExperimentError, match=r"--trainer\.num_nodes is 2.*srun"):
        start_of({"trainer": {"strategy": "ddp"}}, trainer(devices=1, num_nodes=2))
