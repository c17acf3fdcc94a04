"""Drafters: who guesses how a text goes on."""

from linearized.speculative.drafters.base import Ask, Drafter
from linearized.speculative.drafters.foresight import Foresight
from linearized.speculative.drafters.layers import LayersDrafter
from linearized.speculative.drafters.medusa import MedusaDrafter
from linearized.speculative.drafters.model import ModelDrafter
from linearized.speculative.drafters.ngram import NgramDrafter

__all__ = [
    "Ask",
    "Drafter",
    "Foresight",
    "LayersDrafter",
    "MedusaDrafter",
    "ModelDrafter",
    "NgramDrafter",
]
