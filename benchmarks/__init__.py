"""Speed and memory, side by side against ordinary training, as ratios within one run."""

import os

# Noted before torch is imported: where OMP_PROC_BIND asks for it, that binds this thread to a single CPU.
CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
