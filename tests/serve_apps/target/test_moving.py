"""Texts of real replicas that go on elsewhere, or wait because nobody reads them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch

import linearized
from linearized.speculative import Sampling
from serve_apps.generation import Delta, Finished, Generation, Guide, Left
from serve_apps.http import relay
from serve_apps.http.relay import Relay
from serve_apps.link import targets
from serve_apps.link.connection import LinkError
from serve_apps.link.targets import Targets
from serve_apps.target import rounds
from serve_apps.target.config import TargetConfig
from serve_apps.target.replica import TargetReplica

PROMPT = tuple(range(40, 60))
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "boolean"}, "minItems": 3}},
        "required": ["a"],
        "additionalProperties": False,
    }
)


def job(**values):
    options = {"prompt": PROMPT, "max_tokens": 40, "sampling": Sampling(), **values}
    return Generation(**options)


@contextlib.asynccontextmanager
async def replica(folders, **settings):
    target = TargetReplica(TargetConfig(path=str(folders["target"]), **settings))
    try:
        yield target
    finally:
        await target.close()


async def said(target, wanted):
    """Text, tokens, log-probabilities to a few digits, and reason."""
    text, tokens, logprobs, end = "", [], [], None
    async for event in target.complete(wanted):
        if isinstance(event, Delta):
            text += event.text
            tokens += event.tokens
            logprobs += [
                (round(one.logprob, 3), [id for id, _ in one.top]) for one in event.logprobs
            ]
        if isinstance(event, Finished):
            end = event
    assert sum(end.accepted) <= sum(end.drafted) and end.rounds >= 0
    return text, tokens, logprobs, end.reason


class Dying:
    """Replicas that die after so many events of each text."""

    leaving = False

    def __init__(self, target, events):
        self.description = None
        self._target, self._events = target, events

    async def ready(self):
        return await self._target.ready()

    async def pick(self, **_):
        return self

    async def lend(self, wanted, _):
        return wanted

    def others(self, *_):
        return False

    async def complete(self, wanted):
        async with aclosing(self._target.complete(wanted)) as events:
            left = self._events
            async for event in events:
                if not left:
                    raise LinkError("died")
                left -= 1
                yield event


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(relay, "PAUSE_S", 0.0)


async def test_cut_again_and_again_it_reads_the_same(folders, caplog):
    """dynamo#7930: of a guided text that goes on elsewhere, JSON begins anew within the JSON."""
    async with replica(folders) as target:
        calm, tokens, _, _ = await said(target, job())
        hot = Sampling(temperature=1.3, seed=5)
        wanted = {
            "greedy": job(logprobs=2),
            "a stop string": job(stop=(calm[12:15],)),
            "a stop string that is held back for long": job(
                stop=(calm[:20] + "never", calm[25:27])
            ),
            "bytes of characters": job(sampling=hot, logprobs=0),
            "penalties": job(
                sampling=Sampling(
                    presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2
                )
            ),
            "a stop token, not too early": job(
                sampling=Sampling(stop_ids={tokens[3], tokens[20]}, min_tokens=10)
            ),
            "a stop string, not too early": job(
                stop=(calm[5:7],), sampling=Sampling(min_tokens=12)
            ),
            "plain rounds": job(speculate="none", sampling=hot),
            "JSON": job(guide=Guide("json_schema", SCHEMA), sampling=hot, max_tokens=60),
        }
        for name, one in wanted.items():
            whole = await said(target, one)
            for events in (3, 5):
                with caplog.at_level(logging.WARNING):
                    caplog.clear()
                    assert await said(Relay(Dying(target, events)), one) == whole, name
                assert "disagrees" not in caplog.text
                assert ("elsewhere" in caplog.text) == (len(whole[1]) > 16) or len(whole[1]) <= 16


async def test_a_guided_text_whose_new_replica_has_another_guide_ends_with_an_error(folders):
    """As where replicas of two versions compile a grammar to different rules. Nobody tries again,
    and nobody waits."""
    guide = Guide("regex", "[ab]{30}")
    one = {"max_sessions": 1, "prefix_bytes": 0}
    async with replica(folders, **one) as target, replica(folders, **one) as other:
        compile_ = other._guiding.compile
        other._guiding.compile = lambda _: compile_(Guide("regex", "[0-9]{30}"))
        asked = []

        class Second(Dying):
            async def complete(self, wanted):
                first = not asked
                asked.append(wanted)
                if not first:
                    self._target, self._events = other, 1000
                async with aclosing(super().complete(wanted)) as events:
                    async for event in events:
                        yield event

        wanted = job(guide=guide, speculate="none")
        events = [event async for event in Relay(Second(target, 9)).complete(wanted)]
        said_ = "".join(event.text for event in events if isinstance(event, Delta))
        assert len(said_) == 8 and set(said_) <= {*"ab"}
        assert isinstance(events[-1], Finished) and events[-1].reason == "error"
        assert "does not obey its guide, a regular expression" in events[-1].error
        assert len(asked) == 2 and other.num_texts == target.num_texts == 0


async def test_a_text_that_nobody_reads_gives_up_its_place_and_goes_on_later(folders, monkeypatch):
    monkeypatch.setattr(rounds, "READ_AHEAD", 4)
    async with replica(folders, max_sessions=1) as target:
        sampling = Sampling(temperature=0.9, seed=3, presence_penalty=0.3)
        wanted = job(max_tokens=60, sampling=sampling, speculate="none")
        whole = await said(target, wanted)
        tokens = []
        async with aclosing(target.complete(wanted)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    tokens += event.tokens
                if len(tokens) in (1, 20, 41):
                    async with asyncio.timeout(60):
                        while target._engine.busy or target._rounds.held()["pieces"]:
                            await asyncio.sleep(0.01)
                        assert len((await said(target, job(max_tokens=5)))[1]) == 5
        assert tokens == whole[1] and not any(target.held().values())


async def test_whoever_leaves_a_text_that_waits_leaves_nothing(folders, monkeypatch):
    monkeypatch.setattr(rounds, "READ_AHEAD", 2)
    async with replica(folders) as target:
        for pause in (0.0, 0.3):
            async with aclosing(target.complete(job(max_tokens=1000))) as events:
                for _ in range(3):
                    await anext(events)
                await asyncio.sleep(pause)
        async with asyncio.timeout(60):
            while target._engine.busy or any(target.held().values()):
                await asyncio.sleep(0.01)


async def test_a_target_that_is_closed_hands_its_texts_to_another(folders):
    """dynamo#13952: SIGTERM cuts answers off and calls them cancelled."""
    async with replica(folders) as calm:
        wanted = [
            job(max_tokens=120),
            job(max_tokens=120, sampling=Sampling(temperature=1, seed=2)),
        ]
        whole = [await said(calm, one) for one in wanted]
    async with replica(folders) as first, replica(folders) as second, behind(first, second) as it:
        reading = [asyncio.create_task(said(it, one)) for one in wanted * 2]
        async with asyncio.timeout(60):
            while not (first.num_texts and second.num_texts):
                await asyncio.sleep(0.001)
        await first.close(drain_s=30)
        assert await asyncio.gather(*reading) == whole * 2
        assert it.moved and first.num_texts == second.num_texts == 0


@contextlib.asynccontextmanager
async def behind(*targets):
    """A relay that is linked to all of them."""

    async def find():
        return [await one.endpoint() for one in targets]

    them = Targets(find)
    it = Relay(them)
    await it.ready()
    async with asyncio.timeout(60):
        while sum(link.usable for link in them.links) < len(targets):
            await asyncio.sleep(0.01)
    try:
        yield it
    finally:
        await it.close()


def moving(calm):
    """Texts in the middle of which replicas end, of every kind."""
    hot = Sampling(temperature=1.2, seed=5, presence_penalty=0.5)
    yield "greedy", {"logprobs": 2}
    yield "hot, bytes of characters", {"sampling": hot}
    yield "a stop string that is held back for long", {"stop": (calm[:90] + "never", calm[70:73])}
    yield "a rule", {"guide": Guide("regex", "[a-z ]{140,200}"), "sampling": hot}
    yield "plain rounds", {"speculate": "none"}


@pytest.mark.parametrize("hand_over", [0, 10**9], ids=["its state", "its tokens"])
async def test_a_text_goes_on_from_its_state_as_from_its_tokens(
    folders, monkeypatch, caplog, hand_over
):
    monkeypatch.setattr(relay, "HAND_OVER", hand_over)
    caplog.set_level(logging.INFO)
    prompt = PROMPT * 10
    async with replica(folders) as calm:
        text, *_ = await said(calm, job(prompt=prompt, max_tokens=120))
        for name, values in moving(text):
            wanted = job(prompt=prompt, max_tokens=120, **values)
            whole = await said(calm, wanted)
            caplog.clear()
            async with replica(folders) as first, replica(folders) as second:
                targets = {first: second, second: first}
                async with behind(first, second) as it:
                    reading = asyncio.create_task(said(it, wanted))
                    async with asyncio.timeout(60):
                        while not (found := [one for one in targets if one._running]):
                            await asyncio.sleep(0.001)
                        (old,) = found
                        (running,) = old._running
                        while len(running.tokens) < len(prompt) + 30:
                            await asyncio.sleep(0.001)
                    await old.close(drain_s=30)
                    assert await reading == whole, name
                    assert it.moved == 1
                    handed = "goes on elsewhere from its state" in caplog.text
                    assert handed == (hand_over == 0) and "disagrees" not in caplog.text
                    assert not targets[old]._running


async def test_a_text_that_ends_as_it_is_to_leave_ends(folders):
    """Whether its last piece is on its way, or there, or was read."""
    async with replica(folders) as target:
        whole = await said(target, job(max_tokens=30))
        for tokens in range(26, 31):
            wanted = job(max_tokens=30)
            events = []
            async with aclosing(target.complete(wanted)) as stream:
                async for event in stream:
                    events.append(event)
                    if isinstance(event, Delta) and count(events) >= tokens:
                        target.leave(wanted)
                        target.leave(wanted)
            if isinstance(events[-1], Left):
                ids = tuple(id for e in events if isinstance(e, Delta) for id in e.tokens)
                rest = replace(wanted, text=ids, state=events[-1].state)
                events += [event async for event in target.complete(rest)]
            assert count(events) == 30 and isinstance(events[-1], Finished)
            text = "".join(event.text for event in events if isinstance(event, Delta))
            assert text == whole[0]
        assert not target._running and not any(target.held().values())


def count(events):
    return sum(len(event.tokens) for event in events if isinstance(event, Delta))


async def test_a_state_of_no_use_is_not_used(folders, caplog):
    async with replica(folders) as target:
        whole = await said(target, job())
        ids = tuple(whole[1])
        state = linearized.new_state(target._model)
        linearized.extend(target._model, torch.tensor([PROMPT + ids[:10]]), state)
        blob = state.to_bytes()
        longer = linearized.new_state(target._model)
        linearized.extend(target._model, torch.tensor([PROMPT + ids[:21]]), longer)
        for wrong in (b"nonsense", blob[:-5], longer.to_bytes()):
            caplog.clear()
            rest = await said(target, job(text=ids[:20], state=wrong))
            assert rest[1] == whole[1][20:]
            assert "is of no use here" in caplog.text
        caplog.clear()
        assert (await said(target, job(text=ids[:20], state=blob)))[1] == whole[1][20:]
        assert caplog.text == ""


async def test_a_prefix_that_one_replica_has_read_is_lent_to_another(folders, monkeypatch, caplog):
    monkeypatch.setattr(targets, "WORTH_IT", 10)
    monkeypatch.setattr(targets, "CROWDED", -100.0)  # nobody is chosen for what it has read
    prompt = PROMPT * 10
    wanted = job(prompt=(*prompt, 3, 1, 2), owner="a")
    async with replica(folders) as calm:
        whole = await said(calm, wanted)
    async with replica(folders) as first, replica(folders) as second, behind(first, second) as it:
        await said(it, job(prompt=prompt, max_tokens=5, owner="a"))
        (knows,) = [one for one in (first, second) if len(one._prefixes)]
        other = second if knows is first else first
        (link,) = [one for one in it._replicas.links if one.known.spares(prompt, "a")]
        monkeypatch.setattr(link, "leaving", True)  # new texts go to the other one
        (away,) = [one for one in it._replicas.links if one is not link]
        monkeypatch.setattr(it._replicas, "_able", lambda _: [link, away])
        pick = it._replicas.pick

        async def pick_other(**options):
            return await pick(**{**options, "avoid": [link]})

        monkeypatch.setattr(it._replicas, "pick", pick_other)
        for owner, cached in (("b", 0), ("a", len(prompt) - 1)):
            assert not len(other._prefixes) or owner == "a"
            events = [event async for event in it.complete(replace(wanted, owner=owner))]
            assert events[0].cached_tokens in (cached, cached and len(prompt))
            ids = [id for event in events if isinstance(event, Delta) for id in event.tokens]
            assert ids == whole[1]
        assert caplog.text == ""


async def test_a_prefix_of_no_use_is_not_used(folders, caplog):
    async with replica(folders) as target, replica(folders, prefix_bytes=0) as forgetful:
        whole = await said(target, job())
        blob = await target.lend(PROMPT, "")
        assert blob and await target.lend(PROMPT, "somebody else") == b""
        assert await target.lend((90, 91), "") == await forgetful.lend(PROMPT, "") == b""
        assert await said(forgetful, job(lent=blob)) == whole and caplog.text == ""
        async with replica(folders) as other:
            for wrong in (b"nonsense", blob[:-5]):
                caplog.clear()
                assert await said(other, job(lent=wrong)) == whole
                assert "that another replica lent is of no use here" in caplog.text
                other._prefixes.clear()
            caplog.clear()
            swapped = job(prompt=(*PROMPT[::-1], 5), lent=blob)
            assert (await said(other, swapped))[3] == "length" and "of no use" in caplog.text
