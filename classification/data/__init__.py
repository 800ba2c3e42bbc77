"""Data sets by name. One file a data set; every file here is found by itself, and registers its loader."""

from classification.data.module import ImageDataModule
from classification.data.prepared import load_splits
from classification.data.registry import ImageSet, Splits, names

__all__ = ["ImageDataModule", "ImageSet", "Splits", "load_splits", "names"]
