"""Models that nobody of this project wrote, small and with random weights: what they keep, and that it is exact."""
