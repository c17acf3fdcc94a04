"""A target that is made up, and the app before a real one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass

import httpx
import pytest
import uvicorn

from linearized.speculative import Alternatives, TokenTree
from serve_apps.generation import Delta, Description, Finished, Refused, Started
from serve_apps.http.ingress import IngressConfig, http_app
from serve_apps.http.models import Model
from serve_apps.target.config import TargetConfig
from serve_apps.target.replica import TargetReplica

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'refused' %}{{ raise_exception('not this one') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Echoing:
    """Answers each prompt with its own words, one a round."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self.jobs = []
        self.ended = 0
        self.closed = False
        self.fails: Exception | None = None
        self.refuses: Refused | None = None
        self.breaks = ""
        self.raises: Exception = ValueError("secret detail")
        self.error = ""
        self.pause = 0.0
        self.drafts = False
        """Whether all but the last token of a word are drafted."""

    async def ready(self):
        if self.fails is not None:
            raise self.fails
        return Description(
            fingerprint="fp",
            vocab_size=len(self._tokenizer),
            max_context=2000,
            draft="none",
            state_bytes=100,
            cache_token_bytes=7,
        )

    async def close(self):
        self.closed = True

    async def complete(self, job):
        self.jobs.append(job)
        try:
            if self.refuses is not None:
                yield self.refuses
                return
            text = self._tokenizer.decode(job.prompt)
            if text == self.breaks:
                raise ValueError("cannot start")
            yield Started(cached_tokens=1, prompt_logprobs=self._logprobs(job, job.prompt, True))
            words = text.split()
            for word in words:
                await asyncio.sleep(self.pause)
                if word == "fail":
                    raise self.raises
                tokens = tuple(self._tokenizer(f" {word}")["input_ids"])
                drafted = tokens[:-1] if self.drafts else ()
                yield Delta(
                    text=f" {word}",
                    tokens=tokens,
                    accepted=len(drafted),
                    logprobs=self._logprobs(job, tokens, False),
                    tree=TokenTree.chain([*drafted, 7]) if job.trees else TokenTree.empty,
                )
            yield Delta(text="!", tokens=())
            yield Finished(
                reason="error" if self.error else "length",
                drafted=(2, 1),
                accepted=(1, 0),
                rounds=len(words),
                error=self.error,
            )
        finally:
            self.ended += 1

    def _logprobs(self, job, tokens, of_prompt):
        asked = job.prompt_logprobs if of_prompt else job.logprobs
        if asked is None:
            return ()
        found = [Alternatives(-0.5, ((token, -0.5), (7, -1.5))[:asked]) for token in tokens]
        return (None, *found[1:]) if of_prompt else tuple(found)


@pytest.fixture
def echoing(tokenizer):
    return lambda: Echoing(tokenizer)


@pytest.fixture
def target(echoing):
    return echoing()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """Of a tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory, folder):
    """Of a tokenizer with a chat template."""
    import transformers

    path = tmp_path_factory.mktemp("chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def asking(target, chat_folder):
    """A client of the app before the target that is made up."""

    @contextlib.asynccontextmanager
    async def asking(*, path=chat_folder, **settings):
        app = http_app([Model("m", path, target)], IngressConfig(**settings))
        transport = httpx.ASGITransport(app=app)
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
            app.router.lifespan_context(app),
        ):
            yield client

    return asking


@pytest.fixture
async def client(asking):
    async with asking(max_body=10_000) as client:
        yield client


@dataclass
class Served:
    url: str
    app: object
    target: object
    tokenizer: object


@pytest.fixture(scope="session")
def served(folders, chat_folder):
    """The app before a real, tiny model, on a port of its own."""
    with serving(tiny(folders["target"], max_context=4096), chat_folder) as served:
        yield served


@pytest.fixture(scope="session")
def served_briefly(folders, chat_folder):
    """The same with short texts only."""
    with serving(tiny(folders["target"], max_context=24), chat_folder) as served:
        yield served


@pytest.fixture(scope="session")
def serving_echo(tokenizer):
    """The app before the target that is made up, on a port of its own."""

    def serving_echo(path, **settings):
        return serving(lambda: Echoing(tokenizer), path, tokenizer=tokenizer, **settings)

    return serving_echo


def tiny(folder, *, max_context):
    return lambda: TargetReplica(
        TargetConfig(path=str(folder), max_context=max_context, pack=False)
    )


@contextlib.contextmanager
def serving(make, path, *, tokenizer=None, **settings):
    """`make` makes the target, in the thread in which it is used."""
    started, ended = threading.Event(), threading.Event()
    found = {}

    async def main():
        target = make()
        try:
            await target.ready()
            app = http_app([Model("tiny", path, target)], IngressConfig(**settings))
            options = {"host": "127.0.0.1", "port": 0, "log_level": "warning", "ws": "none"}
            server = uvicorn.Server(uvicorn.Config(app, **options))
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            found["served"] = Served(f"http://127.0.0.1:{port}", app, target, tokenizer)
            started.set()
            while not ended.is_set():
                await asyncio.sleep(0.02)
            server.should_exit = True
            await serving
        finally:
            started.set()
            await target.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    started.wait(60)
    try:
        yield found["served"]
    finally:
        ended.set()
        thread.join(30)
