"""Compiled kernels, optional: C, built at the first use where there is a compiler, and Triton on a GPU; all works
without them.

`status()` says whether they are in use and why; `LOWRANK_KERNELS=off` switches them off.
"""

from lowrank.kernels.library import Status, status, wanted

__all__ = ["Status", "status", "wanted"]
