"""What a target says of its engine, in numbers."""

from __future__ import annotations

import asyncio

import pytest

from linearized.speculative import Sampling
from serve_apps import metrics
from serve_apps.generation import Finished, Generation, Started
from serve_apps.target.config import TargetConfig
from serve_apps.target.replica import TargetReplica

PROMPT = (260, 311, 278, 258, 290, 78, 307, 88) * 8


@pytest.fixture
async def target(folders, meter):
    config = TargetConfig(path=str(folders["target"]), max_sessions=1, pack=False)
    target = TargetReplica(config, meter=meter)
    yield target
    await target.close()


async def read(target, **values):
    options = {"prompt": PROMPT, "max_tokens": 12, "sampling": Sampling(), **values}
    return [event async for event in target.complete(Generation(**options))]


async def test_what_texts_took(target, meter):
    texts = await asyncio.gather(*(read(target, trees=True) for _ in range(2)))
    ends = [events[-1] for events in texts]
    assert all(isinstance(end, Finished) for end in ends)
    assert meter.counts[metrics.ROUNDS,] == sum(end.rounds for end in ends)
    for metric, levels in (
        (metrics.DRAFTED, [end.drafted for end in ends]),
        (metrics.ACCEPTED, [end.accepted for end in ends]),
    ):
        counted = sum(count for (one, *_), count in meter.counts.items() if one is metric)
        assert counted == sum(map(sum, levels))
    assert len(meter.values[metrics.QUEUED]) == 2
    assert max(meter.values[metrics.QUEUED]) > min(meter.values[metrics.QUEUED])
    assert meter.counts[metrics.ENGINE, "read"] > 0 < meter.counts[metrics.ENGINE, "verify"]
    assert meter.counts[metrics.QUERIES,] == 2 * len(PROMPT)
    cached = [e.cached_tokens for events in texts for e in events if isinstance(e, Started)]
    assert meter.counts[metrics.HITS,] == sum(cached) > 0


async def test_how_full_it_is(target, meter):
    running = asyncio.create_task(read(target, max_tokens=2000))
    waiting = asyncio.create_task(read(target, max_tokens=1))
    while not (meter.gauges.get(metrics.RUNNING) and meter.gauges.get(metrics.WAITING)):
        await asyncio.sleep(0.01)
        await target.check_health()
    described = await target.ready()
    assert meter.gauges[metrics.RUNNING] == meter.gauges[metrics.WAITING] == 1
    assert meter.gauges[metrics.STATE_BYTES] == described.state_bytes > 0
    for task in (running, waiting):
        task.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    await read(target, max_tokens=1)
    await target.check_health()
    assert meter.gauges[metrics.RUNNING] == meter.gauges[metrics.WAITING] == 0
    assert meter.gauges[metrics.SNAPSHOT_BYTES] > 0 < meter.gauges[metrics.SNAPSHOTS]


async def test_what_a_softmax_model_would_need(target):
    described = await target.ready()
    # Two layers, two key/value heads of width 16, in float32.
    assert described.cache_token_bytes == 2 * 2 * 2 * 16 * 4
    assert described.state_token_bytes == 0
