"""A callback that resumes a Trainer of Hugging Face exactly. Transformers is needed here alone.

Example:
    lowrank.convert(model, names, lowrank.ASI(ranks=[8, 16, 32]))
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[TrainingStateCallback()])
    trainer.train(resume_from_checkpoint=True)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowrank.errors import StateError
from lowrank.layers.training_state import load_training_state, training_state

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    try:
        from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "lowrank.transformers needs Transformers, which is not here; pip install transformers"
        ) from error


class TrainingStateCallback(TrainerCallback):
    """Saves what the methods of a converted model carry from step to step with each checkpoint, and loads it again.

    It lies in `checkpoint-<step>/` as `lowrank.pt`, or as `lowrank_<process>.pt` of each of several processes. The
    model is converted before the Trainer is made, in the resumed process as in the first. Checkpoints are looked for
    in `output_dir`, where the Trainer writes them.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state beside the weights that were just saved."""
        path = _path(args, state)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        torch.save({name: tensor.cpu() for name, tensor in training_state(kwargs["model"]).items()}, beside)
        beside.replace(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the state that belongs to the step that training goes on from.

        Raises:
            StateError: there is none, or it is of another model.
        """
        if state.global_step == 0:
            return
        path = _path(args, state)
        if not path.is_file():
            raise StateError(
                f"there is no {path}, so training cannot go on as it was; resume from a checkpoint in output_dir that "
                f"was saved with TrainingStateCallback in as many processes, or start anew from its weights"
            )
        load_training_state(kwargs["model"], torch.load(path, map_location="cpu", weights_only=True))


def _path(args: TrainingArguments, state: TrainerState) -> Path:
    name = "lowrank.pt" if args.world_size == 1 else f"lowrank_{args.process_index}.pt"
    return Path(args.output_dir or "", f"checkpoint-{state.global_step}", name)
