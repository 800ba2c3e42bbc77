"""Hooks that kill the second process of a run, or halt the only one, when they are told to."""

import os
import signal
import time

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from experiment.signals import pending


@HOOKS.register_module(force=True)
class KillSecond(Hook):
    """As a system does that is out of memory, after the iteration that `KILL_SECOND` in the environment names."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if get_rank() == 1 and os.environ.get("KILL_SECOND") == str(runner.iter):
            os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module(force=True)
class Halt(Hook):
    """Says so ahead of the iteration that `HALT` in the environment names, and waits there for a signal."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if os.environ.get("HALT") == str(runner.iter):
            print("halted", flush=True)
            while not pending():
                time.sleep(0.01)
