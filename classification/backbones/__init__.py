"""Backbones by name. One file a family; every file here is found by itself, and registers its builders."""

from classification.backbones.registry import build_model, names

__all__ = ["build_model", "names"]
