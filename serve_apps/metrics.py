"""What the app counts and times: the names, and where numbers go. Knows neither Ray nor Prometheus.

Names are vLLM's where they mean the same. Whoever has numbers is given a Meter; the deployments
give the one of `serve_apps.prometheus`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PREFIX = "linearized_"
_BELOW_ONE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75)
_SECONDS = (*_BELOW_ONE, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)

METRICS: dict[str, Metric] = {}
"""All that are exported, by name."""


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    """With PREFIX."""
    kind: str
    """`counter`, `gauge` or `histogram`."""
    help: str
    labels: tuple[str, ...] = ()
    """Besides those that Ray Serve adds: application, deployment, replica."""
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""


class Meter:
    """Takes numbers, from any thread. This one forgets them."""

    def add(self, metric: Metric, value: float = 1, **labels: str) -> None:
        """To a counter."""

    def set(self, metric: Metric, value: float) -> None:
        """A gauge."""

    def observe(self, metric: Metric, value: float) -> None:
        """One of the values whose distribution a histogram shows."""


class Growth:
    """What was added to totals since the last look, for counters."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}

    def of(self, totals: Mapping[str, float]) -> dict[str, float]:
        grown = {name: total - self._before.get(name, 0) for name, total in totals.items()}
        self._before.update(totals)
        return {name: value for name, value in grown.items() if value > 0}


def _counter(name: str, help: str, *labels: str) -> Metric:
    return _known(Metric(f"{PREFIX}{name}_total", "counter", help, labels))


def _gauge(name: str, help: str) -> Metric:
    return _known(Metric(PREFIX + name, "gauge", help))


def _seconds(name: str, help: str) -> Metric:
    return _known(Metric(f"{PREFIX}{name}_seconds", "histogram", help, (), _SECONDS))


def _known(metric: Metric) -> Metric:
    METRICS[metric.name] = metric
    return metric


# Of the ingress: what clients see.
FIRST_TOKEN = _seconds("time_to_first_token", "From a text's start to its first token.")
INTER_TOKEN = _seconds("inter_token_latency", "From a round that gave tokens to the next one.")
PER_TOKEN = _seconds(
    "request_time_per_output_token", "Of a text that has ended, between tokens, on average."
)
WHOLE = _seconds("e2e_request_latency", "From a text's start to its end.")
ENDED = _counter("request_success", "Texts that have ended, by reason.", "finished_reason")
REFUSED = _counter("request_refused", "Texts that were not begun, by error code.", "code")
ABANDONED = _counter("request_abandoned", "Texts whose clients or requests ended before them.")
PROMPT_TOKENS = _counter("prompt_tokens", "Tokens of prompts.")
CACHED_TOKENS = _counter("cached_prompt_tokens", "Those of them that did not have to be read.")
GENERATED_TOKENS = _counter("generation_tokens", "Tokens of texts.")
FAILOVERS = _counter("failovers", "Times that a text went on on another replica.")
GAP = _seconds("failover_gap", "From the loss of a text's replica to its next token.")

# Of a target.
RUNNING = _gauge("num_requests_running", "Texts that the engine reads or goes on with.")
WAITING = _gauge("num_requests_waiting", "Texts that wait for room in the engine.")
QUEUED = _seconds("request_queue_time", "From a text's arrival at the engine to its first reading.")
ENGINE = _counter("engine_seconds", "What the engine spent its time on.", "phase")
ROUNDS = _counter("spec_decode_num_rounds", "Verifications; each gives a token at least.")
DRAFTED = _counter("spec_decode_num_draft_tokens", "Guesses that were verified.", "position")
ACCEPTED = _counter("spec_decode_num_accepted_tokens", "Guesses that were right.", "position")
QUERIES = _counter("prefix_cache_queries", "Tokens of prompts that were looked for in snapshots.")
HITS = _counter("prefix_cache_hits", "Those of them that were found there.")
SNAPSHOTS = _gauge("prefix_cache_snapshots", "States of prompts and answers that are kept.")
SNAPSHOT_BYTES = _gauge("prefix_cache_bytes", "What they take.")
LENT = _counter("prefix_cache_lent", "Tokens that another replica's snapshots spared a text.")
STATE_BYTES = _gauge("state_bytes", "What the states of all texts in progress take.")
DRAFT_LATENCY = _seconds("draft_latency", "From asking a draft replica for a tree to its answer.")
DRAFT_LATE = _counter("draft_late", "Trees that came after the text had gone on.")

# Of a draft.
SESSIONS = _gauge("draft_sessions", "Texts that a draft replica drafts for.")
DRAFTING = _counter("drafting_seconds", "What a draft replica spent on drafting.")
