"""What a pair of tokens weighs: the one description that every variant and every backend share.

An output is a sum over the tokens that a query sees. A pair in one group has the weight `inside`;
a pair in different groups has α_h φ(q)·φ(k), summed by way of a memory of fixed size. φ is worked
out before the operator is called: the last `features` columns of queries and keys are φ(q), φ(k).
"""

from __future__ import annotations

from dataclasses import dataclass

from linearized.errors import ConfigError

INSIDE = ("relu2", "softmax", "laplace", "linear", "none", "slots")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How queries [B, H, T, X], keys [B, K, T, X] and values [B, K, T, U] become outputs.

    If X > features, the first X - features columns are the pair's own queries and keys inside the
    group; if X = features, both parts are the same columns. With s = q·k of the inside part:

        relu2    relu(s)²
        softmax  exp(s - the largest s that the query sees in its group); the first column of the
                 values is 1 where there is a token
        laplace  (1 + erf((s - √½) √(2π))) / 2
        linear   α_h φ(q)·φ(k), as across groups: groups make no difference
        none     0
        slots    no weight is a pair's: with M = Σ φ(k) vᵀ over all tokens that the query sees,
                 v = [key, value], the query [.., D] picks among M's rows by a softmax over q·M_key
                 and is answered by their M_value (Linformer); groups make no difference
    """

    group: int
    """Tokens whose pairs have the inside weight; 1 where groups make no difference."""
    inside: str
    features: int
    """Width of φ; 0: pairs of different groups weigh nothing, there is no memory."""
    causal: bool = True
    """A query sees its own token and earlier ones; else all."""

    def __post_init__(self) -> None:
        if self.inside not in INSIDE:
            choices = ", ".join(INSIDE)
            raise ConfigError(f"unknown weight {self.inside!r}; choose from {choices}")
        if not self.grouped and self.group != 1:
            raise ConfigError(
                f"group must be 1 where groups make no difference, got {self.group} with "
                f"{self.inside!r}"
            )

    @property
    def grouped(self) -> bool:
        """Do groups make a difference?"""
        return not (
            self.inside in ("linear", "slots") or (self.inside == "none" and not self.features)
        )


CONVOLUTION = Form(group=1, inside="none", features=0)
"""Nothing but the taps."""
