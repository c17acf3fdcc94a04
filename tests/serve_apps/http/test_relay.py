"""A text that goes on from replica to replica is the text of one that does not."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from linearized.speculative import Alternatives, Sampling, TokenTree
from serve_apps import metrics
from serve_apps.generation import Delta, Description, Finished, Generation, Refused, Started
from serve_apps.http import relay
from serve_apps.http.relay import Relay
from serve_apps.http.streams import TargetLost
from serve_apps.link.connection import LinkError

WHOLE = tuple(range(100, 130))
JOB = Generation(prompt=(1, 2), max_tokens=30, sampling=Sampling(), logprobs=1)


class Scripted:
    """A replica that says `whole`, `step` tokens at a time, and what goes wrong with it."""

    def __init__(self, *, step=2, whole=WHOLE, dies_after=None, refuses=None, fingerprint="f"):
        self.step, self.whole = step, whole
        self.dies_after, self.refuses = dies_after, refuses
        self.leaving = False
        self.description = Description(
            fingerprint=fingerprint, vocab_size=200, max_context=99, draft="none"
        )
        self.jobs, self.ended = [], 0

    async def complete(self, job):
        self.jobs.append(job)
        try:
            if self.refuses is not None:
                yield self.refuses
                return
            yield Started(cached_tokens=len(self.jobs))
            at = len(job.text)
            while at < len(self.whole):
                self.live(at)
                some = self.whole[at : at + self.step]
                at += len(some)
                yield Delta(
                    text="".join(map(letter, some)),
                    tokens=some,
                    accepted=len(some) - 1,
                    logprobs=tuple(Alternatives(-float(token), ()) for token in some),
                    tree=TokenTree.chain(some[:-1]) if job.trees else TokenTree.empty,
                )
            self.live(at)
            yield Finished(reason="length", rounds=len(self.whole) // self.step)
        finally:
            self.ended += 1

    def live(self, at):
        if self.dies_after is not None and at >= self.dies_after:
            raise LinkError("gone")


class Fixed:
    """Replicas, taken in this order."""

    def __init__(self, *replicas):
        self.all = list(replicas)

    async def ready(self):
        return self.all[0].description

    async def lend(self, job, link):
        return job

    async def pick(self, *, seconds, fingerprint, avoid, job):
        able = [one for one in self.all if fingerprint in (None, one.description.fingerprint)]
        able = [one for one in able if not one.leaving]
        able = [one for one in able if one not in avoid] or able[-1:]
        if able:
            return able[0]
        await asyncio.sleep(min(seconds, 0.01))
        return None

    def others(self, link, avoid):
        return any(one is not link and one not in avoid for one in self.all)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(relay, "PAUSE_S", 0.001)
    monkeypatch.setattr(relay, "LONGEST_S", 0.005)


def letter(token):
    return "" if token % 5 == 0 else chr(token)  # some tokens give no text


async def follow(*replicas, job=JOB, patience_s=1.0):
    it = Relay(Fixed(*replicas), patience_s=patience_s)
    return [event async for event in it.complete(job)]


def said(events):
    deltas = [event for event in events if isinstance(event, Delta)]
    text = "".join(delta.text for delta in deltas)
    tokens = sum((delta.tokens for delta in deltas), ())
    logprobs = sum((delta.logprobs for delta in deltas), ())
    return text, tokens, logprobs


@pytest.mark.parametrize("steps", [(1, 1), (2, 3), (3, 2), (5, 1), (1, 5)])
async def test_cut_anywhere_it_reads_the_same(steps):
    calm = said(await follow(Scripted(step=1)))
    for cut in range(len(WHOLE) + 1):
        first, second = Scripted(step=steps[0], dies_after=cut), Scripted(step=steps[1])
        events = await follow(first, second)
        assert said(events) == calm
        assert [type(event) for event in events].count(Started) == 1
        assert isinstance(events[0], Started) and events[-1].reason == "length"
        assert not [one for one in events if isinstance(one, Delta) and not one.tokens]
        assert first.ended == second.ended == 1
        assert sum(events[-1].accepted) <= len(WHOLE)


async def test_several_die_one_after_the_other():
    replicas = [Scripted(dies_after=cut) for cut in (4, 6, 12, 20)]
    events = await follow(*replicas, Scripted())
    assert said(events) == said(await follow(Scripted()))


async def test_what_it_is_asked_for_is_what_was_asked_for():
    job = replace(JOB, sampling=Sampling(temperature=0.7, seed=9, choice=3), stop=("x",))
    first, second = Scripted(dies_after=6), Scripted()
    await follow(first, second, job=job)
    (again,) = second.jobs
    assert replace(again, text=()) == job
    assert again.text == WHOLE[:4]  # the last Delta is asked for once more


async def test_a_replay_that_disagrees_is_logged_and_what_was_sent_stands(caplog):
    other = (*WHOLE[:5], 77, *WHOLE[6:])
    second = Scripted(whole=other)
    with caplog.at_level(logging.WARNING):
        events = await follow(Scripted(dies_after=6), second)
    assert said(events) == said(await follow(Scripted()))
    assert "disagrees" in caplog.text and [len(job.text) for job in second.jobs] == [4, 6]


async def test_a_text_that_a_replay_ends_too_early_goes_on(caplog):
    second = Scripted(whole=WHOLE[:5])
    events = await follow(Scripted(dies_after=6), second)
    assert "disagrees" in caplog.text
    assert said(events)[1] == WHOLE[:6] and events[-1].reason == "length"


async def test_a_replica_that_leaves_hands_its_texts_over():
    first, second = Scripted(), Scripted()
    it = Relay(Fixed(first, second))
    events = []
    async for event in it.complete(JOB):
        events.append(event)
        first.leaving = len(events) > 3
    assert said(events) == said(await follow(Scripted()))
    assert first.ended == 1 and len(second.jobs) == 1


async def test_without_another_replica_it_stays_to_the_end():
    only = Scripted()
    only.leaving = False
    it = Relay(Fixed(only))
    events = []
    async for event in it.complete(JOB):
        events.append(event)
        only.leaving = True
    assert events[-1].reason == "length" and len(only.jobs) == 1


@pytest.mark.parametrize("cut", [0, 6])
async def test_nobody_goes_on_with_it(cut):
    """Its prompt had been read, at least."""
    with pytest.raises(TargetLost, match="gone"):
        await follow(Scripted(dies_after=cut))


async def test_there_is_none():
    one = Scripted()
    one.leaving = True
    (refused,) = await follow(one, patience_s=0.05)
    assert (refused.status, refused.retry_after) == (503, 1)


async def test_another_model_does_not_go_on_with_it():
    other = Scripted(fingerprint="another")
    with pytest.raises(TargetLost):
        await follow(Scripted(dies_after=6), other)
    assert other.jobs == []


FULL = Refused(status=503, message="full", code="overloaded", retry_after=3)


async def test_a_full_replica_is_passed_by_and_if_all_are_that_is_said():
    assert said(await follow(Scripted(refuses=FULL), Scripted()))[1] == WHOLE
    assert await follow(Scripted(refuses=FULL), Scripted(refuses=FULL)) == [FULL]


async def test_a_text_that_was_begun_waits_for_room():
    class Soon(Scripted):
        async def complete(self, job):
            self.refuses = FULL if len(self.jobs) < 3 else None
            async for event in super().complete(job):
                yield event

    first, second = Scripted(dies_after=6), Soon()
    events = await follow(first, second)
    assert said(events)[1] == WHOLE and events[-1].reason == "length"


async def test_other_refusals_are_passed_on():
    bad = Refused(status=400, message="no", code="invalid_value", param="prompt")
    assert await follow(Scripted(refuses=bad), Scripted()) == [bad]


async def test_whoever_stops_reading_ends_it():
    one = Scripted()
    events = Relay(Fixed(one)).complete(JOB)
    for _ in range(3):
        await anext(events)
    await events.aclose()
    assert one.ended == 1


async def test_failovers_and_their_gaps_are_counted(meter):
    replicas = Fixed(Scripted(dies_after=6), Scripted())
    async for _ in Relay(replicas, meter=meter).complete(JOB):
        pass
    assert meter.counts[metrics.FAILOVERS,] == len(meter.values[metrics.GAP]) == 1


async def test_rounds_are_told_of_once(caplog):
    job = replace(JOB, trees=True)
    first, second = Scripted(dies_after=6, step=3), Scripted(step=2)
    events = await follow(first, second, job=job)
    deltas = [event for event in events if isinstance(event, Delta)]
    # The second replica's first round was in part seen already; what it drafted is left out.
    assert [bool(event.tree) for event in deltas[:4]] == [True, True, False, True]
    assert sum(len(event.tokens) for event in deltas) == len(WHOLE)


async def test_the_log_does_not_say_what_was_said(caplog):
    other = (*WHOLE[:5], 77, *WHOLE[6:])
    with caplog.at_level(logging.WARNING):
        await follow(Scripted(dies_after=6), Scripted(whole=other))
    assert "77" not in caplog.text and str(WHOLE[5]) not in caplog.text
