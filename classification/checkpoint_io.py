"""Lightning's checkpoints by the suite's own way of saving and loading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_fabric.plugins import CheckpointIO

from experiment.checkpoints import load_checkpoint, save_checkpoint


class WholeCheckpointIO(CheckpointIO):
    """Saves checkpoints whole or not at all, and loads none that is damaged.

    Args:
        identity: hash of the run's identity, written into each.
    """

    def __init__(self, identity: str) -> None:
        self.identity = identity

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        save_checkpoint(checkpoint, Path(path), self.identity)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; nothing in it is executed, whatever `weights_only` says."""
        return load_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)
