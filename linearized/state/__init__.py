"""Decode states: what a model remembers of a text, and what it takes in."""

from linearized.state.decode import DecodeState, new_stamps
from linearized.state.group import GroupState
from linearized.state.history import PAGE, History
from linearized.state.pending import Fresh, Pending
from linearized.state.saved import FORMAT

__all__ = [
    "FORMAT",
    "PAGE",
    "DecodeState",
    "Fresh",
    "GroupState",
    "History",
    "Pending",
    "new_stamps",
]
