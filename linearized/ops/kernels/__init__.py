"""The backend for GPUs, in Triton. Imported by `linearized/ops` alone, and only when it is chosen.

`scan` is training and prefill, `attend_tree` a decoding step, `fold_` a commit: the same functions
as in `ops/cpu.py`, for the forms whose weights are products of queries and keys.
"""

from __future__ import annotations

from linearized.ops.kernels.fold import fold_
from linearized.ops.kernels.sequence import scan
from linearized.ops.kernels.tree import attend_tree

__all__ = ["attend_tree", "fold_", "scan"]
