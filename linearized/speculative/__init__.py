"""Speculation: trees, drafters, one acceptance rule, and an engine for many texts."""

from linearized.speculative.drafters import (
    Ask,
    Drafter,
    Foresight,
    LayersDrafter,
    MedusaDrafter,
    ModelDrafter,
    NgramDrafter,
)
from linearized.speculative.engine import Engine
from linearized.speculative.generate import generate
from linearized.speculative.guide import Guide, Guides
from linearized.speculative.prefixes import Prefixes
from linearized.speculative.sampling import Sampler, Sampling
from linearized.speculative.text import Alternatives, Piece, Text
from linearized.speculative.tree import Shape, TokenTree

__all__ = [
    "Alternatives",
    "Ask",
    "Drafter",
    "Engine",
    "Foresight",
    "Guide",
    "Guides",
    "LayersDrafter",
    "MedusaDrafter",
    "ModelDrafter",
    "NgramDrafter",
    "Piece",
    "Prefixes",
    "Sampler",
    "Sampling",
    "Shape",
    "Text",
    "TokenTree",
    "generate",
]
