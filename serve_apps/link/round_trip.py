"""What a round trip over the link takes between two processes of this machine.

    python -m serve_apps.link.round_trip

A text of no tokens is asked for and answered by a target that has no model. Prints one line of
JSON, in seconds.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

from linearized.speculative import Sampling
from serve_apps.generation import Description, Event, Finished, Generation, Started
from serve_apps.link.protocol import Endpoint
from serve_apps.link.targets import Targets
from serve_apps.link.text_server import TextServer

TIMES = 2000
JOB = Generation(prompt=tuple(range(256)), max_tokens=0, sampling=Sampling())


def main() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_answer, args=(theirs,))
    process.start()
    try:
        near: Endpoint = ours.recv()
        found = {
            "unix": asyncio.run(_ask(near)),
            "tcp": asyncio.run(_ask(replace(near, path=""))),
        }
    finally:
        process.terminate()
        process.join()
    print(json.dumps(found))


class _Nothing:
    """A target that answers at once."""

    async def ready(self) -> Description:
        return Description(fingerprint="", vocab_size=1, max_context=1, draft="none")

    async def check_health(self) -> None:
        pass

    async def lend(self, tokens: Sequence[int], owner: str) -> bytes:
        return b""

    def leave(self, job: Generation) -> None:
        pass

    async def complete(self, job: Generation) -> AsyncGenerator[Event, None]:
        yield Started()
        yield Finished(reason="length", rounds=0)


def _answer(pipe: Connection) -> None:
    async def serve() -> None:
        pipe.send(await TextServer(_Nothing()).endpoint())
        await asyncio.Event().wait()

    asyncio.run(serve())


async def _ask(endpoint: Endpoint) -> dict[str, float]:
    async def find() -> list[Endpoint]:
        return [endpoint]

    targets = Targets(find)
    link = await targets.pick(seconds=60)
    assert link is not None
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        async for _event in link.complete(JOB):
            pass
        seconds.append(time.perf_counter() - began)
    await targets.close()
    cuts = statistics.quantiles(seconds[TIMES // 10 :], n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


if __name__ == "__main__":
    main()
