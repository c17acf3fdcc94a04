"""Linear attention in chunks: time and memory linear in the tokens, built from matrix products.
For CPU, and for any device and any `Form` without Triton. `scan`: tokens that follow each other;
`attend_tree`: the nodes of token trees; `fold_`: the state after more tokens."""

from linearized.ops.cpu.fold import fold_
from linearized.ops.cpu.scan import scan
from linearized.ops.cpu.segment import CHUNK
from linearized.ops.cpu.tree import attend_tree

__all__ = ["CHUNK", "attend_tree", "fold_", "scan"]
