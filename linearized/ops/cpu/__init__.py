"""Linear attention in chunks: time and memory linear in the tokens, built from matrix products.
For CPU, and for any device and any `Form` without Triton. What the three functions are:
`linearized/ops/backends.py`."""

from linearized.ops.cpu.fold import fold_
from linearized.ops.cpu.sequence import attend_sequence
from linearized.ops.cpu.tree import attend_tree

__all__ = ["attend_sequence", "attend_tree", "fold_"]
