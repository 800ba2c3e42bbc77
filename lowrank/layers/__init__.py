"""Stock layers with another forward pass."""
