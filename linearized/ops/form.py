"""What a pair of tokens weighs: the one description that every variant and every backend share.

An output is a sum over the tokens that a query sees. A near pair has the weight `inside`; a far
pair has α_h φ(q)·φ(k), summed by way of a memory of fixed size (`linearized/near.py` says what is
near). φ is worked out before the operator is called: the last `features` columns of queries and
keys are φ(q), φ(k).
"""

from __future__ import annotations

from dataclasses import dataclass

from linearized.errors import ConfigError
from linearized.near import Near

INSIDE = ("relu2", "softmax", "laplace", "linear", "none", "slots")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How queries [B, H, T, X], keys [B, K, T, X] and values [B, K, T, U] become outputs.

    If X > features, the first X - features columns are a near pair's own queries and keys; if X =
    features, both parts are the same columns. With s = q·k of the near part:

        relu2    relu(s)²
        softmax  exp(s - the largest s of the query's near pairs); the first column of the values is
                 1 where there is a token
        laplace  (1 + erf((s - √½) √(2π))) / 2
        linear   α_h φ(q)·φ(k), as of far pairs: groups make no difference
        none     0
        slots    no weight is a pair's: with M = Σ φ(k) vᵀ over all tokens that the query sees,
                 v = [key, value], the query [.., D] picks among M's rows by a softmax over q·M_key
                 and is answered by their M_value (Linformer); groups make no difference
    """

    group: int
    """Tokens of a group; 1 where groups make no difference."""
    inside: str
    features: int
    """Width of φ; 0: far pairs weigh nothing, there is no memory."""
    causal: bool = True
    """A query sees its own token and earlier ones; else all."""
    window: int = 0
    """Groups before a query's own that are near."""
    sinks: int = 0
    """First tokens of a document that are near to all of it."""

    def __post_init__(self) -> None:
        if self.inside not in INSIDE:
            choices = ", ".join(INSIDE)
            raise ConfigError(f"unknown weight {self.inside!r}; choose from {choices}")
        if not self.grouped and self.group != 1:
            raise ConfigError(
                f"group must be 1 where groups make no difference, got {self.group} with "
                f"{self.inside!r}"
            )
        if self.window < 0 or not 0 <= self.sinks <= self.group:
            raise ConfigError(
                f"window must be at least 0 and sinks from 0 to group = {self.group}, got "
                f"{self.window} and {self.sinks}"
            )
        if (self.window or self.sinks) and not (self.exact and self.causal):
            raise ConfigError(
                "a window and sinks need weights of near pairs, and go one way: got "
                f"{self.inside!r}, {'' if self.causal else 'not '}causal"
            )

    @property
    def near(self) -> Near:
        return Near(self.group, self.window, self.sinks)

    @property
    def exact(self) -> bool:
        """Do near pairs have weights of their own?"""
        return self.inside in ("relu2", "softmax", "laplace")

    @property
    def grouped(self) -> bool:
        """Do groups make a difference?"""
        return not (
            self.inside in ("linear", "slots") or (self.inside == "none" and not self.features)
        )


CONVOLUTION = Form(group=1, inside="none", features=0)
"""Nothing but the taps."""
