"""Image classification: fine-tune the trailing layers of a network in little memory."""

from classification.backbones import build_model

__all__ = ["build_model"]
