"""Speculation: trees, drafters, one acceptance rule."""

from linearized.speculative.drafters import Drafter, ModelDrafter, NgramDrafter
from linearized.speculative.generate import generate
from linearized.speculative.sampling import Sampling
from linearized.speculative.sequence import Sequence
from linearized.speculative.tree import TokenTree

__all__ = [
    "Drafter",
    "ModelDrafter",
    "NgramDrafter",
    "Sampling",
    "Sequence",
    "TokenTree",
    "generate",
]
