"""Speed and memory, side by side against ordinary training, as ratios within one run."""
