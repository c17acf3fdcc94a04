"""What is counted and timed of texts on their way to clients."""

from __future__ import annotations

from contextlib import aclosing

from linearized.speculative import Sampling
from serve_apps import metrics
from serve_apps.generation import Delta, Finished, Generation, Refused, Started
from serve_apps.http.metered import Metered

JOB = Generation(prompt=(1, 2, 3), max_tokens=9, sampling=Sampling())


class Said:
    """A target that says these events, each so long after the one before it."""

    def __init__(self, *events):
        self.events = events
        self.time = 0.0

    async def complete(self, job):
        for after, event in self.events:
            self.time += after
            yield event


def delta(*tokens):
    return Delta(text="x" * len(tokens), tokens=tokens)


async def read(meter, *events):
    target = Said(*events)
    metered = Metered(target, meter, now=lambda: target.time)
    return [event async for event in metered.complete(JOB)]


async def test_a_text(meter):
    events = [
        (1.0, Started(cached_tokens=2)),
        (0.5, delta(5)),
        (0.25, Delta(text="held back", tokens=())),
        (0.25, delta(6, 7, 8)),
        (0.125, Finished(reason="stop", rounds=2)),
    ]
    assert await read(meter, *events) == [event for _, event in events]
    assert meter.values == {
        metrics.FIRST_TOKEN: [1.5],
        metrics.INTER_TOKEN: [0.5],
        metrics.PER_TOKEN: [0.5 / 3],
        metrics.WHOLE: [2.125],
    }
    assert meter.counts == {
        (metrics.PROMPT_TOKENS,): 3,
        (metrics.CACHED_TOKENS,): 2,
        (metrics.GENERATED_TOKENS,): 4,
        (metrics.ENDED, "stop"): 1,
    }


async def test_texts_that_do_not_come_to_their_end(meter):
    await read(meter, (0, Refused(status=503, message="full", code="overloaded")))
    assert meter.counts == {(metrics.REFUSED, "overloaded"): 1}
    target = Said((0, Started()), (0, delta(5)), (0, delta(6)))
    async with aclosing(Metered(target, meter).complete(JOB)) as events:
        await anext(events)
    assert meter.counts[metrics.ABANDONED,] == 1
