"""Exports the app's numbers through Ray, whose agents Prometheus asks for them. Only deployments
use it: Serve adds the names of application, deployment and replica.
"""

from __future__ import annotations

from typing import Any

from ray.serve import metrics as serve_metrics

from serve_apps.metrics import Meter, Metric


class ServeMeter(Meter):
    """Metrics begin with their first number."""

    def __init__(self) -> None:
        self._exported: dict[str, Any] = {}

    def add(self, metric: Metric, value: float = 1, **labels: str) -> None:
        if value > 0:  # Ray refuses to add nothing
            self._get(metric).inc(value, tags=labels)

    def set(self, metric: Metric, value: float) -> None:
        self._get(metric).set(value)

    def observe(self, metric: Metric, value: float) -> None:
        self._get(metric).observe(value)

    def _get(self, metric: Metric) -> Any:
        exported = self._exported.get(metric.name)
        if exported is None:
            exported = self._exported[metric.name] = _exported(metric)
        return exported


def _exported(metric: Metric) -> Any:
    keys: Any = metric.labels or None  # Ray's own annotation means one label
    match metric.kind:
        case "counter":
            return serve_metrics.Counter(metric.name, metric.help, keys)
        case "gauge":
            return serve_metrics.Gauge(metric.name, metric.help, keys)
        case "histogram":
            return serve_metrics.Histogram(metric.name, metric.help, list(metric.buckets), keys)
    raise AssertionError(f"{metric.name} is a {metric.kind}")
