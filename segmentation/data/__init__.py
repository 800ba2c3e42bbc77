"""Data sets on disk in the layout that MMSegmentation reads."""
