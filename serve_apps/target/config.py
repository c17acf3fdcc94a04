"""How a target replica is set up."""

from __future__ import annotations

from dataclasses import dataclass

from linearized.errors import ConfigError
from serve_apps.link.connection import HEARTBEAT_S
from serve_apps.link.listener import ANY_PORT
from serve_apps.link.protocol import MAX_DEPTH


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig:
    path: str
    """Hugging Face folder of the linearized model, tokenizer included."""
    max_context: int = 32768
    """Largest number of tokens of prompt and completion together. It does not make the state
    larger, but requests may take longer."""
    max_sessions: int = 16
    """Largest number of texts in progress at a time."""
    max_waiting: int = 64
    """Largest number of texts that wait for one of those to end. Further ones are refused."""
    read_ms: float = 200.0
    """Milliseconds that texts in progress wait, between two of their rounds, for prompts to be
    read."""
    prefix_bytes: int = 2**28
    """Bytes of states that are kept of prompts and answers, for texts that begin alike; 0: none."""
    draft: str | None = None
    """Hugging Face folder of a draft model that drafts here, beside the target, and not in replicas
    of its own; it shares the target's tokenizer."""
    expects_draft: bool = True
    """Whether draft replicas run from the start. Then this one is ready with a link to one."""
    depth: int = 8
    """Largest number of levels of a drafted tree."""
    width: int = 4
    """Number of guesses that a draft model here follows on each level."""
    pack: bool = True
    """Whether to lay out the weights a second time for the CPU. See `linearized.pack`."""
    compile: bool = False
    """Whether to compile the steps. See `linearized.compile`."""
    dtype: str = "float32"
    """Of weights and states: one of `weights.DTYPES`."""
    device: str = "cpu"
    """One of `weights.DEVICES`."""
    draft_dtype: str = "float32"
    """Of a draft model here."""
    draft_device: str = "cpu"
    threads: int = 1
    ports: tuple[int, int] = ANY_PORT
    """First and last of the ports at which ingresses may be waited for; (0, 0): any."""
    heartbeat_s: float = HEARTBEAT_S
    """Seconds between two signs of life to an ingress. It takes three without one for gone."""
    stuck_s: float = 60.0
    """Seconds that a forward pass may take. Beyond that the replica is ill: its texts go on on
    others, and Serve replaces it."""

    def __post_init__(self) -> None:
        for name in ("max_context", "max_sessions", "depth", "width", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"depth must be at most {MAX_DEPTH}, got {self.depth}")
        for name in ("max_waiting", "prefix_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("heartbeat_s", "stuck_s", "read_ms"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
