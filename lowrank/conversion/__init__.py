"""Choose layers, check them, convert them in place, and bring the original ones back."""
