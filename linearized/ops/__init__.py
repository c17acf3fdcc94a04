"""The mathematics of linear attention: one door in front of its backends.

Shapes: q [B, H, T, D], k [B, K, T, D], v [B, K, T, E], as in torch's scaled_dot_product_attention;
each of the K key/value heads serves H/K query heads. `alpha` [H] or None, `taps` [H, M] with
column i the weight of lag i, or None. `attend`, `mix` and `attend_tree` are grouped linear
attention; `linear_attention` is the operator beneath, which takes any `Form`. Definitions:
`reference.py`. Source: You et al., "When Linear Attention Meets Autoregressive Decoding", ICML
2024; exactness across group boundaries, in sequences and in trees, is this project's.
"""

from linearized.ops.backends import BACKENDS, Backend, choose
from linearized.ops.form import Form
from linearized.ops.grouped import attend, attend_tree, mix
from linearized.ops.layout import FEW, Layout
from linearized.ops.memory import pick, recall, remember
from linearized.ops.narrow import attend_narrow
from linearized.ops.operator import convolve, fold_, linear_attention
from linearized.ops.reference import unit

__all__ = [
    "BACKENDS",
    "FEW",
    "Backend",
    "Form",
    "Layout",
    "attend",
    "attend_narrow",
    "attend_tree",
    "choose",
    "convolve",
    "fold_",
    "linear_attention",
    "mix",
    "pick",
    "recall",
    "remember",
    "unit",
]
