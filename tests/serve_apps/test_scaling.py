"""How many replicas there should be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from serve_apps.scaling import scale_drafts, scale_targets


def context(per_replica, *, least=1, most=4, **metrics):
    return SimpleNamespace(
        config=SimpleNamespace(get_target_ongoing_requests=lambda: per_replica),
        aggregated_metrics={
            name: {f"replica{i}": value for i, value in enumerate(values)}
            for name, values in metrics.items()
        },
        capacity_adjusted_min_replicas=least,
        capacity_adjusted_max_replicas=most,
    )


@pytest.mark.parametrize(
    "texts, replicas", [([], 1), ([8.0], 1), ([8.0, 1.0], 2), ([99.0], 4), ([0.0, 0.0], 1)]
)
def test_targets_are_as_many_as_their_texts_fill(texts, replicas):
    assert scale_targets(context(8, texts=texts)) == (replicas, {})


@pytest.mark.parametrize(
    "sessions, utilisation, lateness, replicas",
    [
        ([0.0], [0.0], [0.0], 0),
        ([0.2], [0.0], [0.0], 1),
        ([8.0], [0.5], [0.0], 1),
        ([9.0], [0.5], [0.0], 2),
        ([4.0], [0.9], [0.0], 2),  # its work fills more than one
        ([1.0], [0.9], [0.9], 1),  # one text is never drafted for by two
        ([4.0], [0.5], [0.5], 2),  # trees come late
        ([2.0, 2.0], [0.3, 0.3], [0.0, 0.1], 1),
        ([4.0, 4.0], [0.5, 0.5], [0.5, 0.5], 3),
        ([99.0], [1.0], [0.0], 4),
    ],
)
def test_drafts_are_as_many_as_their_work_fills(sessions, utilisation, lateness, replicas):
    metrics = {"sessions": sessions, "utilisation": utilisation, "lateness": lateness}
    assert scale_drafts(context(8, least=0, **metrics)) == (replicas, {})


def test_drafts_without_replicas_stay_as_few():
    assert scale_drafts(context(8, least=0)) == (0, {})
    assert scale_drafts(context(8, least=1)) == (1, {})
