"""Guided texts of a target replica: with and without a draft, refused, and beside others."""

from __future__ import annotations

import asyncio
import contextlib
import json

import jsonschema
import pytest

from linearized.errors import ConfigError, RequestError
from linearized.speculative import Sampling
from serve_apps.draft.replica import DraftConfig, DraftReplica
from serve_apps.generation import GUIDES, Delta, Finished, Generation, Guide, Refused
from serve_apps.target import guiding
from serve_apps.target.config import TargetConfig
from serve_apps.target.guiding import Guiding
from serve_apps.target.replica import TargetReplica

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"enum": [1, 22, 333]}},
    "required": ["name", "age"],
}


def job(guide: Guide | None, **values) -> Generation:
    options = {"prompt": (260, 311, 278), "max_tokens": 120, "sampling": Sampling(), **values}
    return Generation(guide=guide, **options)


@contextlib.asynccontextmanager
async def replica(folders, find=None):
    target = TargetReplica(TargetConfig(path=str(folders["target"])), find)
    try:
        yield target
    finally:
        await target.close()


async def read(target, wanted) -> tuple[str, str]:
    events = [event async for event in target.complete(wanted)]
    assert isinstance(events[-1], Finished), events[-1]
    text = "".join(event.text for event in events if isinstance(event, Delta))
    return text, events[-1].reason


async def test_json_comes_with_every_drafter(folders):
    draft = DraftReplica(DraftConfig(path=str(folders["draft"])))
    try:

        async def find():
            return [await draft.endpoint()]

        async with replica(folders, find) as target:
            for sampling in (Sampling(), Sampling(temperature=1.0, seed=2)):
                wanted = Guide("json_schema", json.dumps(SCHEMA))
                texts = {
                    await read(target, job(wanted, sampling=sampling, speculate=one))
                    for one in ("none", "ngram", "model")
                }
                (text, reason), *others = texts
                assert reason == "stop" and not others
                jsonschema.validate(json.loads(text), SCHEMA)
    finally:
        await draft.close()


async def test_a_guide_that_cannot_be_had_is_refused_and_others_go_on(folders):
    async with replica(folders) as target:
        for guide, param in (
            (Guide("json_schema", '{"not": {}}'), "response_format"),
            (Guide("regex", "(a"), "guided"),
            (Guide("choice", "[]"), "guided"),
            (Guide("xml"), "guided"),
        ):
            events = [event async for event in target.complete(job(guide))]
            assert [type(one) for one in events] == [Refused]
            assert (events[0].status, events[0].param) == (400, param)
            assert events[0].message and events[0].code == "invalid_value"
        texts = await asyncio.gather(
            read(target, job(Guide("choice", '["yes", "no"]'))), read(target, job(None))
        )
        assert texts[0][0] in ("yes", "no") and texts[1] == await read(target, job(None))


async def test_the_event_loop_goes_on_while_a_guide_is_compiled(tokenizer, monkeypatch):
    begun, free = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    class Slow:
        def __init__(self, *given):
            pass

        def compile(self, kind, source):
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(free.wait(), loop).result(10)
            return "compiled"

        def close(self):
            pass

    monkeypatch.setattr(guiding.speculative, "Guides", Slow)
    guides = Guiding(tokenizer, len(tokenizer), [])
    await guides.start()
    waiting = asyncio.create_task(guides.compile(Guide("json")))
    await begun.wait()
    assert not waiting.done()
    free.set()
    assert await waiting == "compiled"
    guides.close()


async def test_a_tokenizer_that_cannot_be_guided_serves_other_texts(tokenizer, monkeypatch):
    def refuse(*given):
        raise ConfigError("no such tokenizer")

    monkeypatch.setattr(guiding.speculative, "Guides", refuse)
    guides = Guiding(tokenizer, len(tokenizer), [])
    await guides.start()
    with pytest.raises(RequestError, match="no such tokenizer") as caught:
        await guides.compile(Guide("regex", "a"))
    assert caught.value.param == "guided"
    guides.close()


def test_kinds_are_the_library_s():
    from linearized.speculative.guide import KINDS

    assert GUIDES == KINDS
