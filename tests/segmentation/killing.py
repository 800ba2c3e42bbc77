"""A hook that kills the second process of a run when it is told to."""

import os
import signal

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module(force=True)
class KillSecond(Hook):
    """As a system does that is out of memory, after the iteration that `KILL_SECOND` in the environment names."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if get_rank() == 1 and os.environ.get("KILL_SECOND") == str(runner.iter):
            os.kill(os.getpid(), signal.SIGKILL)
