"""A target replica without Ray: the same text with every drafter, queues, and whoever leaves."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import shutil
import time
from dataclasses import dataclass, replace

import pytest
import torch

import linearized
from linearized import packing
from linearized.compiled import is_compiled
from linearized.errors import ConfigError, LinearizedError
from linearized.products import Choice
from linearized.speculative import Engine, Sampling
from serve_apps.draft.replica import DraftConfig, DraftReplica
from serve_apps.generation import Delta, Finished, Generation, Guide, Refused, Started
from serve_apps.link import breaker, discovery, draft_peer, draft_session
from serve_apps.target.config import TargetConfig
from serve_apps.target.replica import TargetReplica

PROMPT = (260, 311, 278, 258, 290, 78, 307, 88)
"""the quick brown fox"""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(discovery, "EVERY_S", (0.01, 0.1))
    monkeypatch.setattr(draft_peer, "RECONNECT_S", 0.01)
    monkeypatch.setattr(breaker, "PAUSE_S", (0.02, 0.1))
    monkeypatch.setattr("serve_apps.target.replica.LINK_S", 2.0)


@pytest.fixture
def always(monkeypatch):
    """All is drafted and waited for, whether it pays or not."""
    monkeypatch.setattr(Engine, "plan", lambda engine, known: None)
    monkeypatch.setattr(draft_peer, "MARGIN_S", 30.0)
    monkeypatch.setattr(draft_session, "LATE_S", 30.0)


def job(**values) -> Generation:
    options = {"prompt": PROMPT, "max_tokens": 48, "sampling": Sampling(), **values}
    return Generation(**options)


@contextlib.asynccontextmanager
async def replica(folders, find=None, **settings):
    target = TargetReplica(TargetConfig(path=str(folders["target"]), **settings), find)
    try:
        yield target
    finally:
        await target.close()


@contextlib.asynccontextmanager
async def drafting(folder):
    draft = DraftReplica(DraftConfig(path=str(folder)))
    try:
        yield draft
    finally:
        await draft.close()


@dataclass(frozen=True)
class End:
    """What the events of a text say about it in the end."""

    reason: str
    completion_tokens: int
    accepted: int
    rejected: int
    rounds: int


def finder(*replicas):
    async def find():
        return [await replica.endpoint() for replica in replicas]

    return find


async def read(target, wanted):
    """A text and its end."""
    seen = [event async for event in target.complete(wanted)]
    first, *deltas, last = seen
    assert isinstance(first, Started) and isinstance(last, Finished)
    assert all(isinstance(event, Delta) for event in deltas)
    accepted = sum(last.accepted)
    assert sum(event.accepted for event in deltas) == accepted
    assert all(event.accepted <= len(event.tokens) for event in deltas)
    return "".join(event.text for event in deltas), End(
        reason=last.reason,
        completion_tokens=sum(len(event.tokens) for event in deltas),
        accepted=accepted,
        rejected=sum(last.drafted) - accepted,
        rounds=last.rounds,
    )


SAMPLINGS = [Sampling(), Sampling(temperature=0.9, top_p=0.95, top_k=40, min_p=0.02, seed=3)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
async def test_the_text_is_the_same_with_every_drafter(folders, tokenizer, sampling, always):
    model = linearized.load(folders["target"])
    settings = {
        name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")
    }
    ids = linearized.generate(model, list(PROMPT), max_new_tokens=48, **settings)
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    for name in ("draft", "wrong"):
        async with drafting(folders[name]) as draft, replica(folders, finder(draft)) as target:
            assert (await target.ready()).draft == "connected"
            for speculate in ("model", "ngram", "none"):
                text, end = await read(target, job(sampling=sampling, speculate=speculate))
                assert text == expected
                assert end.completion_tokens == len(ids)
                if speculate == "none":
                    assert (end.accepted, end.rejected, end.rounds) == (0, 0, len(ids))
                if (speculate, name) == ("model", "draft"):
                    assert end.rounds <= len(ids) / 2 and end.accepted > len(ids) / 2


async def test_a_draft_that_dies_in_the_middle_changes_nothing(folders, always):
    async with drafting(folders["draft"]) as draft:
        endpoints = [await draft.endpoint()]

        async def find():
            return endpoints

        async with replica(folders, find) as target:
            expected, _ = await read(target, job(max_tokens=120, speculate="none"))
            text, rounds = "", 0
            async for event in target.complete(job(max_tokens=120, speculate="model")):
                if isinstance(event, Delta):
                    rounds += 1
                    if rounds == 4:
                        await draft.close()
                    text += event.text
            assert text == expected
            assert (await target.ready()).draft == "away"
            text, _ = await read(target, job(max_tokens=120, speculate="model"))
            assert text == expected


async def test_a_draft_with_another_vocabulary_is_not_used(folders, monkeypatch):
    monkeypatch.setattr("serve_apps.target.replica.LINK_S", 0.3)
    async with drafting(folders["other"]) as draft, replica(folders, finder(draft)) as target:
        assert (await target.ready()).draft == "away"
        await read(target, job(max_tokens=5))


async def test_a_padded_vocabulary(folders, always):
    """Guesses that the target does not have are left out; the others are right as ever. Of a draft
    in a replica, of one beside the target, and of the target."""
    wanted, cheap = job(speculate="model"), {"max_sessions": 1}
    async with (
        drafting(folders["padded"]) as draft,
        replica(folders, finder(draft), **cheap) as target,
    ):
        assert (await target.ready()).draft == "connected"
        plain, _ = await read(target, replace(wanted, speculate="none"))
        text, end = await read(target, wanted)
        assert text == plain and end.accepted > 0
    async with replica(folders, draft=str(folders["padded"]), **cheap) as target:
        text, end = await read(target, wanted)
        assert text == plain and end.accepted >= end.completion_tokens / 2
    async with (
        drafting(folders["draft"]) as draft,
        replica({"target": folders["padded"]}, finder(draft), **cheap) as target,
    ):
        assert (await target.ready()).draft == "connected"
        plain, _ = await read(target, replace(wanted, speculate="none"))
        assert (await read(target, wanted))[0] == plain


async def test_texts_side_by_side_are_those_one_by_one(folders):
    async with replica(folders, max_sessions=3) as target:
        jobs = [job(prompt=PROMPT[: 5 + i], max_tokens=20 + i) for i in range(6)]
        alone = [await read(target, one) for one in jobs]
        together = await asyncio.gather(*(read(target, one) for one in jobs))
        assert together == alone


async def test_texts_take_turns(folders):
    async with replica(folders) as target:
        await target.ready()
        order = []

        async def follow(name, wanted):
            async for event in target.complete(wanted):
                if isinstance(event, Delta):
                    order.append(name)

        long = asyncio.create_task(follow("long", job(max_tokens=200, speculate="none")))
        while len(order) < 20:
            await asyncio.sleep(0.001)
        await follow("short", job(max_tokens=10, speculate="none"))
        seen = order.count("long")
        long.cancel()
        assert seen < 120  # the short one did not wait for the end of the long one
        between = order[order.index("short") :]
        assert "long" in between[: between.count("short") + 5]


async def test_a_stop_string_is_cut_off_wherever_it_falls(folders):
    async with replica(folders) as target:
        text, _ = await read(target, job(max_tokens=60))
        for start, size in ((7, 5), (3, 1), (11, 12)):
            stop = text[start : start + size]
            for speculate in ("ngram", "none"):
                cut, end = await read(target, job(max_tokens=60, stop=(stop,), speculate=speculate))
                assert cut == text[: text.index(stop)]
                assert end.reason == "stop" and end.completion_tokens < 60
        whole, end = await read(target, job(max_tokens=60, stop=(text[-4:] + "never",)))
        assert (whole, end.reason) == (text, "length")


async def test_the_end_of_text_ends_it(folders, tokenizer):
    async with replica(folders) as target:
        assert target._stop_ids == {tokenizer.eos_token_id}
        seen = [event async for event in target.complete(job(max_tokens=30))]
        ids = [token for event in seen if isinstance(event, Delta) for token in event.tokens]
        target._stop_ids = frozenset({ids[9]})
        for speculate in ("ngram", "none"):
            _, end = await read(target, job(max_tokens=30, speculate=speculate))
            assert (end.reason, end.completion_tokens) == ("stop", ids.index(ids[9]) + 1)


async def test_stop_tokens_and_stop_strings_that_name_special_tokens(folders, tokenizer):
    async with replica(folders) as target:
        seen = [event async for event in target.complete(job(max_tokens=30))]
        ids = [token for event in seen if isinstance(event, Delta) for token in event.tokens]
        size = ids.index(ids[9]) + 1
        for speculate in ("ngram", "none"):
            wanted = job(max_tokens=30, speculate=speculate, sampling=Sampling(stop_ids={ids[9]}))
            cut, end = await read(target, wanted)
            assert (end.reason, end.completion_tokens) == ("stop", size)
            assert cut == tokenizer.decode(ids[: size - 1])
        target._stop_ids = frozenset()
        sampling = Sampling(temperature=1.0, logit_bias={tokenizer.eos_token_id: 9.0}, seed=1)
        whole, end = await read(target, job(max_tokens=30, sampling=sampling))
        assert end.reason == "length"
        cut, end = await read(
            target, job(max_tokens=30, sampling=sampling, stop=(tokenizer.eos_token,))
        )
        assert end.reason == "stop" and whole.startswith(cut) and end.completion_tokens < 30


async def test_a_model_that_gives_no_numbers_is_named(folders):
    async with replica(folders) as target:
        target._model.model.norm.register_forward_hook(lambda norm, given, out: out * math.nan)
        seen = [event async for event in target.complete(job())]
        assert seen[-1].reason == "error"
        assert "the model gave NaN logits" in seen[-1].error


async def test_max_tokens_none_at_all(folders):
    async with replica(folders) as target:
        seen = [event async for event in target.complete(job(max_tokens=0))]
        assert seen == [Started(), Finished(reason="length", rounds=0)]


async def test_a_text_goes_on_where_another_replica_left_it(folders):
    sampling = Sampling(temperature=0.9, seed=3, frequency_penalty=0.3)
    async with replica(folders) as target:
        seen = [event async for event in target.complete(job(sampling=sampling))]
        tokens = [token for event in seen if isinstance(event, Delta) for token in event.tokens]
        text, _ = await read(target, job(sampling=sampling))
        for size in (1, 20, 47):
            rest = job(sampling=sampling, text=tuple(tokens[:size]))
            seen = [event async for event in target.complete(rest)]
            found = [token for event in seen if isinstance(event, Delta) for token in event.tokens]
            assert tokens[:size] + found == tokens
            said = "".join(event.text for event in seen if isinstance(event, Delta))
            assert said and text.endswith(said)


async def test_logprobs_are_the_same_with_every_drafter(folders):
    found = []
    async with drafting(folders["draft"]) as draft, replica(folders, draft.endpoint) as target:
        await target.ready()
        for speculate in ("model", "ngram", "none"):
            seen = [event async for event in target.complete(job(logprobs=2, speculate=speculate))]
            deltas = [event for event in seen if isinstance(event, Delta)]
            assert all(len(event.logprobs) == len(event.tokens) for event in deltas)
            found.append([one for event in deltas for one in event.logprobs])
    for other in found[1:]:
        assert [len(one.top) for one in other] == [2] * 48
        assert [one.logprob for one in other] == pytest.approx(
            [one.logprob for one in found[0]], abs=1e-4
        )


async def test_an_end_of_text_outside_the_vocabulary_is_refused_at_the_start(folders, tmp_path):
    shutil.copytree(folders["target"], tmp_path / "target")
    place = tmp_path / "target" / "generation_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "eos_token_id": 50_256}))
    with pytest.raises(ConfigError, match="token id 50256, which ends a text, is outside"):
        TargetReplica(TargetConfig(path=str(tmp_path / "target")))


async def test_a_prompt_seen_before_is_not_read_again(folders):
    """vllm#54504: identical resends that never hit."""
    async with replica(folders) as target:
        events = []
        for owner in ("one", "one", "other"):
            wanted = job(owner=owner, prompt_logprobs=1 if owner == "other" else None)
            events.append([event async for event in target.complete(wanted)])
        starts = [found[0] for found in events]
        assert [start.cached_tokens for start in starts] == [0, len(PROMPT) - 1, 0]
        texts = ["".join(e.text for e in found if isinstance(e, Delta)) for found in events]
        assert texts[0] == texts[1] == texts[2]
        first, *rest = starts[2].prompt_logprobs
        assert first is None and len(rest) == len(PROMPT) - 1


@pytest.mark.parametrize(
    "values, param, code",
    [
        ({"prompt": ()}, "prompt", "invalid_value"),
        ({"prompt": (5, 10_000)}, "prompt", "invalid_value"),
        ({"prompt": PROMPT * 50}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 100}, "max_tokens", "context_length_exceeded"),
        ({"speculate": "model"}, "speculate", "invalid_value"),
        ({"sampling": Sampling(stop_ids={3, 10_000})}, "stop_token_ids", "invalid_value"),
        ({"sampling": Sampling(logit_bias={10_000: 1.0})}, "logit_bias", "invalid_value"),
        ({"guide": Guide("regex", "a(")}, "guided", "invalid_value"),
    ],
)
async def test_refused(folders, values, param, code):
    async with replica(folders, max_context=100) as target:
        (event,) = [event async for event in target.complete(job(**values))]
        assert isinstance(event, Refused)
        assert (event.status, event.param, event.code) == (400, param, code)


async def test_a_full_queue_refuses_and_says_when(folders):
    async with replica(folders, max_sessions=1, max_waiting=1) as target:
        running = [asyncio.create_task(read(target, job(max_tokens=30))) for _ in range(2)]
        await asyncio.sleep(0)
        (event,) = [event async for event in target.complete(job())]
        assert isinstance(event, Refused)
        assert (event.status, event.code) == (503, "overloaded") and event.retry_after >= 1
        await asyncio.gather(*running)
        await read(target, job(max_tokens=3))


@pytest.mark.parametrize("way", ["pack", pytest.param("compile", marks=pytest.mark.slow)])
async def test_fast_weights_and_steps_change_no_text(folders, monkeypatch, way):
    def always(layers, dtype, pack):  # whatever is fastest on this machine
        return {tuple(one.weight.shape): Choice.always("onednn") for one in layers}

    monkeypatch.setattr(packing, "fastest", always)
    plain = {"pack": False, "compile": False}
    texts = []
    for settings in (plain, {**plain, way: True}):
        draft = DraftReplica(DraftConfig(path=str(folders["draft"]), **settings))
        async with replica(folders, finder(draft), **settings) as target:
            packed = [one for one in target._model.modules() if "forward" in vars(one)]
            assert bool(packed) == settings["pack"]
            assert is_compiled(target._model) == settings["compile"]
            texts.append((await read(target, job()))[0])
        await draft.close()
    assert texts[0] == texts[1]


async def test_layouts_are_chosen_with_the_threads_that_steps_have(folders, monkeypatch):
    seen: list[int] = []

    def choose(layers, dtype, pack):
        seen.append(torch.get_num_threads())
        return {tuple(one.weight.shape): Choice.always("onednn") for one in layers}

    monkeypatch.setattr(packing, "fastest", choose)
    draft = DraftReplica(DraftConfig(path=str(folders["draft"]), threads=3))
    await draft.close()
    async with replica(folders, draft=str(folders["draft"]), threads=3):
        assert seen and set(seen) == {3}


async def test_nothing_of_the_end_is_lost_when_it_comes_late(folders, monkeypatch):
    step = Engine.step

    def slowly_at_the_end(engine):
        found = step(engine)
        time.sleep(0.5 * any(text.finished is not None for text, _ in found))
        return found

    monkeypatch.setattr(Engine, "step", slowly_at_the_end)
    async with replica(folders) as target:
        tokens = []
        async for event in target.complete(job(max_tokens=3, speculate="none")):
            if isinstance(event, Delta):
                tokens += event.tokens
                await asyncio.sleep(0.1)
        assert len(tokens) == 3


async def test_whoever_leaves_frees_the_place(folders):
    async with drafting(folders["draft"]) as draft:
        one = replica(folders, finder(draft), max_sessions=1, max_waiting=1)
        async with one as target:
            for _ in range(3):
                leaving = asyncio.create_task(read(target, job(max_tokens=5000)))
                await asyncio.sleep(0.1)
                leaving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await leaving
            events = target.complete(job(max_tokens=5000))
            for _ in range(3):
                await anext(events)
            await events.aclose()
            await asyncio.wait_for(read(target, job(max_tokens=3)), 30)
            assert target._num_texts == 0 and not target._links.num_sessions
            await asyncio.sleep(0.1)
            assert draft._server.num_sessions == 0


async def test_nothing_runs_while_an_ended_text_is_not_read(folders, monkeypatch):
    steps = itertools.count()
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (next(steps), step(engine))[1])
    async with replica(folders) as target:
        events = target.complete(job(max_tokens=4, speculate="none"))
        for _ in range(2):
            await anext(events)
        while target._engine.busy:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        before = next(steps)
        await asyncio.sleep(0.2)
        assert next(steps) == before + 1
        assert [type(event) async for event in events][-1] is Finished


async def test_drafts_come_from_several_replicas_and_from_one_that_is_left(folders, always):
    async with (
        drafting(folders["draft"]) as one,
        drafting(folders["wrong"]) as other,
        replica(folders, finder(one, other)) as target,
    ):
        await target.ready()
        plain = [
            await read(target, job(prompt=PROMPT[: 5 + i], speculate="none")) for i in range(6)
        ]
        async with asyncio.timeout(60):
            while not all(peer.connected for peer in target._links._peers):
                await asyncio.sleep(0.01)
        jobs = [job(prompt=PROMPT[: 5 + i]) for i in range(6)]
        running = [asyncio.create_task(read(target, wanted)) for wanted in jobs]
        async with asyncio.timeout(60):
            while not (one._server.num_sessions and other._server.num_sessions):
                await asyncio.sleep(0.001)
        await one.close()
        assert [text for text, _ in await asyncio.gather(*running)] == [text for text, _ in plain]


async def test_a_planned_draft_changes_no_text(folders):
    """Whatever is found to pay, on whatever machine this is."""
    async with drafting(folders["draft"]) as draft, replica(folders, finder(draft)) as target:
        jobs = [job(prompt=PROMPT[: 5 + i], max_tokens=150) for i in range(3)]
        plain = [await read(target, replace(wanted, speculate="none")) for wanted in jobs]
        drafted = await asyncio.gather(*(read(target, wanted) for wanted in jobs))
        assert [text for text, _ in drafted] == [text for text, _ in plain]


async def test_a_draft_model_beside_the_target(folders, always):
    async with replica(folders, draft=str(folders["draft"]), depth=4) as target:
        assert (await target.ready()).draft == "connected"
        plain, _ = await read(target, job(speculate="none"))
        for speculate in ("model", None):
            text, end = await read(target, job(speculate=speculate))
            assert text == plain and end.rounds <= end.completion_tokens / 2
        _, end = await read(target, job(speculate="ngram"))
        assert end.rounds > end.completion_tokens / 2
        await asyncio.gather(*(read(target, job(max_tokens=9)) for _ in range(3)))
        (drafter,) = [d._drafter for d in target._speculator.drafters if d.depth == 4]
        assert not drafter._pool.keys  # nothing is left of texts that have ended
    with pytest.raises(ConfigError, match="they must share one tokenizer"):
        TargetReplica(TargetConfig(path=str(folders["target"]), draft=str(folders["other"])))


async def test_weights_and_states_of_another_type(folders):
    settings = {"dtype": "bfloat16", "draft_dtype": "bfloat16", "draft": str(folders["draft"])}
    async with replica(folders, **settings) as target:
        assert target._model.dtype == target._engine.pool.first(1).layers.keys.dtype
        assert target._model.dtype == torch.bfloat16
        for speculate in ("none", "model"):
            _, end = await read(target, job(speculate=speculate, max_tokens=20))
            assert end.completion_tokens == 20


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"dtype": "float16"}, "unknown dtype 'float16'; choose from float32, bfloat16"),
        ({"device": "tpu"}, "unknown device 'tpu'; choose from cpu, cuda"),
        ({"device": "cuda"}, "torch finds no GPU"),
    ],
)
def test_no_such_type_or_device(folders, monkeypatch, settings, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=says):
        TargetReplica(TargetConfig(path=str(folders["target"]), **settings))
    with pytest.raises(ConfigError, match=says):
        DraftReplica(DraftConfig(path=str(folders["draft"]), **settings))


async def test_a_replica_that_no_longer_goes_on_is_not_healthy(folders, monkeypatch):
    def broken(text):
        raise RuntimeError("nobody expects this")

    async with replica(folders) as target:
        await target.ready()
        await target.check_health()
        monkeypatch.setattr(target._rounds, "_advance", broken)
        with pytest.raises(LinearizedError, match="in the middle"):
            await read(target, job())
        async with asyncio.timeout(60):
            while not target._rounds.ended:
                await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="nobody expects"):
            await target.check_health()
        with pytest.raises(LinearizedError, match="no longer goes on"):
            await read(target, job())
