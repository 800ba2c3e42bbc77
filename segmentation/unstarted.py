"""All parts of a run built as MMEngine builds them, of a run that is not begun: what a dry run has to refuse.

MMEngine's runner, as it is made, seeds the generators, starts what draws and logs, and writes; and most parts are built
when training begins. Here its own builders are called alone, so that what they refuse is what they would refuse then.
"""

from __future__ import annotations

import copy
from collections.abc import Sized
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_dist_info
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from segmentation.quiet import quietly

_BATCHES = range(1000)  # of an epoch, where there are no data to tell


def require_parts(config: Config, model: Any, with_data: bool) -> None:
    """Refuse optimizer, schedule, hooks and all else of a run that cannot be built, by their types or settings.

    Args:
        config: as MMEngine's runner is given it.
        model: built, not converted; stays as it is.
        with_data: whether the data are there, of which samplers, transforms and loops are built as well.

    Raises:
        Exception: whatever the part says that cannot be built; see `segmentation.building.mendable_parts`.
    """
    with quietly():
        _Unstarted(copy.deepcopy(config), model).build(with_data)


class _Unstarted(Runner):
    """A runner that has what its builders look at, and nothing that was begun."""

    def __init__(self, config: Config, model: Any) -> None:
        self.cfg, self.model = config, model
        self._experiment_name, self._log_dir = str(config.experiment_name), str(config.work_dir)
        self._randomness_cfg, self._seed = config.randomness, config.randomness.seed
        self._hooks: list[Any] = []
        self._train_loop: Any = None
        self._train_dataloader, self._val_dataloader = config.train_dataloader, config.get("val_dataloader")
        self.param_schedulers = config.get("param_scheduler")
        self._val_evaluator = config.get("val_evaluator")
        self._rank, self._world_size = get_dist_info()
        self.logger = MMLogger.get_current_instance()

    @property
    def train_dataloader(self) -> Sized:
        """That of the loop, if it is built."""
        return _BATCHES if self._train_loop is None else self._train_loop.dataloader

    def build(self, with_data: bool) -> None:
        """Build in the order of a run; see `require_parts`."""
        config = self.cfg
        self.build_log_processor(config.get("log_processor") or {})
        self.visualizer = self.build_visualizer(config.get("visualizer"))
        self.register_hooks(config.get("default_hooks"), config.get("custom_hooks"))
        for hook in self._hooks:
            if isinstance(hook, EMAHook):  # which builds what averages the weights as it begins
                hook.before_run(self)
        if with_data:
            self._train_loop = self.build_train_loop(config.train_cfg)
        self.optim_wrapper = self.build_optim_wrapper(config.optim_wrapper)
        self.scale_lr(self.optim_wrapper, config.get("auto_scale_lr"))
        if config.get("param_scheduler") is not None:
            self.build_param_scheduler(config.param_scheduler)
        if with_data and config.get("val_cfg") is not None:
            self.build_val_loop(config.val_cfg)
