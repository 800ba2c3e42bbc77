"""Hugging Face's Trainer with gradient checkpointing, AdamW and safetensors; interrupted runs resume exactly.

Run: python examples/huggingface_trainer.py        (needs transformers and accelerate; run again, it goes on)
"""

from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import lowrank
from lowrank.transformers import TrainingStateCallback


class Majority(Dataset):
    """Made-up sentences of two words; which of them is more frequent? Put your tokenised data set here."""

    def __init__(self, count: int, length: int = 31) -> None:
        self.words = torch.randint(0, 2, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = self.words[index]
        return {"input_ids": words + 5, "labels": (words.float().mean() > 0.5).long()}


def build() -> BertForSequenceClassification:
    """A small BERT with random weights; `AutoModelForSequenceClassification.from_pretrained(...)` in real life."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128
    )
    return BertForSequenceClassification(config)


def main(folder: Path, steps: int = 200, save_every: int = 50, until: int | None = None) -> Trainer:
    """Train in `folder`; goes on from its last checkpoint if there is one. `until`: stop early, as if interrupted."""
    model = build()
    names = lowrank.trailing_layers(model.bert, 8, "linear")
    names = [f"bert.{name}" for name in names if "pooler" not in name]
    lowrank.freeze_before(model, names)
    lowrank.convert(model, names, lowrank.ASI(ranks=[8, 16, 16]))  # per mode: batch, tokens, channels

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=save_every,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        optim="adamw_torch",
        activation_checkpointing=True,  # older versions call it gradient_checkpointing
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Majority(2_000), callbacks=[TrainingStateCallback()])
    if until is not None:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step >= until

        trainer.add_callback(Stop())
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=last)
    return trainer


if __name__ == "__main__":
    main(Path("runs/huggingface_trainer"))
