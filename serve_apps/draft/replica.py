"""A draft replica: loads the draft model once and drafts for the targets that link to it.

A plain class; `serve_apps.app` makes a deployment of it. Knows no text, and of a tokenizer only
whether it is the target's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import linearized
from linearized.errors import ConfigError, LinearizedError
from linearized.speculative import Foresight, ModelDrafter, Sampling, Text
from serve_apps import metrics, weights
from serve_apps.draft.server import DraftServer
from serve_apps.forward import Forward
from serve_apps.link.connection import HEARTBEAT_S
from serve_apps.link.listener import ANY_PORT
from serve_apps.link.protocol import MAX_DEPTH, Endpoint
from serve_apps.metrics import Growth, Meter
from serve_apps.scaling import LATENESS, SESSIONS, UTILISATION
from serve_apps.tokenizers import hash_in

STUCK_S = 60.0
MAX_NODES = 256
"""Guesses that are kept of each text."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftConfig:
    path: str
    """Hugging Face folder of the draft model; it shares the target's tokenizer."""
    depth: int = 8
    """Largest number of levels that targets may ask for. How many they do, they learn."""
    width: int = 4
    """Number of guesses that are followed at a time."""
    max_sessions: int = 64
    """Largest number of texts whose state is kept."""
    pack: bool = True
    """Whether to lay out the weights a second time for the CPU. See `linearized.pack`."""
    compile: bool = False
    """Whether to compile the steps. See `linearized.compile`."""
    dtype: str = "float32"
    """Of weights and states: one of `weights.DTYPES`."""
    device: str = "cpu"
    """One of `weights.DEVICES`."""
    threads: int = 1
    ports: tuple[int, int] = ANY_PORT
    """First and last of the ports at which targets may be waited for; (0, 0): any."""
    heartbeat_s: float = HEARTBEAT_S
    """Seconds between two signs of life to a target. It takes three without one for gone."""

    def __post_init__(self) -> None:
        for name in ("depth", "width", "max_sessions", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"draft {name} must be at least 1, got {getattr(self, name)}")
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"draft depth must be at most {MAX_DEPTH}, got {self.depth}")


class DraftReplica:
    def __init__(
        self, config: DraftConfig, *, host: str = "127.0.0.1", meter: Meter | None = None
    ) -> None:
        """`host` is the address at which targets reach this machine."""
        self._config = config
        self._meter = meter or Meter()
        self._grown = Growth()
        self._forward = Forward(threads=config.threads, name="draft")
        # In its thread: packing chooses by what is fastest with as many threads as that has.
        self._model = self._forward.wait(
            weights.load,
            config.path,
            pack=config.pack,
            compile=config.compile,
            dtype=config.dtype,
            device=config.device,
        )
        self._server = DraftServer(
            self._drafter,
            forward=self._forward,
            fingerprint=linearized.fingerprint(self._model),
            vocab_size=self._model.config.vocab_size,
            tokenizer=hash_in(Path(config.path)),
            max_depth=config.depth,
            max_nodes=MAX_NODES,
            max_sessions=config.max_sessions,
            host=host,
            ports=config.ports,
            heartbeat_s=config.heartbeat_s,
        )
        self._started: asyncio.Task[Endpoint] | None = None
        self._asked = time.perf_counter()
        """When Serve last asked for the load."""

    @property
    def num_sessions(self) -> int:
        """Texts that are drafted for."""
        return self._server.num_sessions

    async def endpoint(self) -> Endpoint:
        """The address to which targets connect and the secret that lets them in. The first call
        starts the server."""
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        return await asyncio.shield(self._started)

    async def check_health(self) -> None:
        """
        Raises:
            LinearizedError: this replica no longer drafts.
        """
        await self.endpoint()
        if not self._server.running:
            raise LinearizedError("the draft replica has stopped drafting")
        self._forward.check(STUCK_S)  # only once it is warm
        self._meter.set(metrics.SESSIONS, self._server.num_sessions)
        spent = self._grown.of({"drafting": self._server.drafting_s})
        self._meter.add(metrics.DRAFTING, spent.get("drafting", 0.0))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for it: the load since it last asked, by the names of `scaling`."""
        now, load = time.perf_counter(), self._server.load()
        seconds, self._asked = max(now - self._asked, 1e-3), now
        return {
            SESSIONS: float(load.sessions),
            UTILISATION: load.seconds / seconds,
            LATENESS: load.late / load.asked if load.asked else 0.0,
        }

    async def close(self) -> None:
        await self._server.close()
        self._forward.close()

    async def _start(self) -> Endpoint:
        began = time.perf_counter()
        await self._forward.run(self._warm_up)
        log.info("draft model warm after %.1f s", time.perf_counter() - began)
        return await self._server.start()

    def _drafter(self) -> ModelDrafter:
        return ModelDrafter(self._model, depth=self._config.depth, width=self._config.width)

    def _warm_up(self) -> None:
        """The first calls of every shape are slow."""
        drafter = self._drafter()
        texts = [Text([0] * 64, sampling=Sampling(), max_new_tokens=0) for _ in range(2)]
        known = [Foresight(text, MAX_NODES) for text in texts]
        for rows in range(1, len(known) + 1):
            for new in range(1, self._config.depth + 2):
                for _ in range(2):
                    drafter.foresee(known[:rows], [2 * self._config.depth + 1] * rows)
                for one in known[:rows]:
                    one.text.tokens += [0] * new
                    one.go_on()
