"""The backend for GPUs, in Triton. Imported by `linearized/ops` alone, and only when it is chosen.

`attend_sequence` is training and prefill, `attend_tree` a decoding step, `fold_` a commit: the same
functions as of every backend (`linearized/ops/backends.py`), for causal forms whose near pairs
weigh relu², a softmax or nothing, and for linear ones.
"""

from __future__ import annotations

from linearized.ops.kernels.fold import fold_
from linearized.ops.kernels.sequence import attend_sequence
from linearized.ops.kernels.tree import attend_tree

__all__ = ["attend_sequence", "attend_tree", "fold_"]
