"""Lightning, in a project of your own: one callback, nothing else changes.

Run: python examples/lightning_callback.py         (needs Lightning, torchvision and scikit-learn)
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import lowrank
from lowrank.lightning import LowRankCallback


class Classifier(pl.LightningModule):
    """An ordinary module, as you have it."""

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = torchvision.models.mobilenet_v2(num_classes=10, dropout=0.0)  # Lightning resumes no random state

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.hparams.learning_rate)


def digits(size: int, batch: int, images: int | None) -> DataLoader:
    """Scikit-learn's handwritten digits, so many of them."""
    scans = load_digits()
    pixels = torch.tensor(scans.images[:images], dtype=torch.float32)[:, None] / 8 - 1
    pixels = F.interpolate(pixels, size, mode="bilinear").expand(-1, 3, -1, -1)
    return DataLoader(TensorDataset(pixels, torch.tensor(scans.target[:images])), batch, drop_last=True)


def main(
    folder: Path,
    epochs: int = 3,
    resume: Path | None = None,
    size: int = 64,
    batch: int = 32,
    images: int | None = None,
) -> Classifier:
    """Train in `folder`, from the beginning or from a checkpoint of an earlier run."""
    pl.seed_everything(0)
    # On the first batch it measures how far each layer's gradient would be off, and chooses ranks within 100 kB.
    # Checkpoints carry the ranks and the bases, so that a resumed run is the run that was never interrupted.
    callback = LowRankCallback(lowrank.ASI(), layers=4, budget=100_000)
    trainer = pl.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=[callback], logger=False)
    module = Classifier()
    trainer.fit(module, digits(size, batch, images), ckpt_path=resume)
    print({name: list(ranks) for name, ranks in callback.ranks.items()})
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


if __name__ == "__main__":
    main(Path("runs/lightning_callback"))
