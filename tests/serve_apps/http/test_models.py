"""Several models behind one app."""

from __future__ import annotations

import contextlib
from hashlib import sha256

import httpx
import pytest

from serve_apps.http.ingress import IngressConfig, http_app
from serve_apps.http.keys import Key
from serve_apps.http.models import Model


@pytest.fixture
def two(echoing):
    return {"small": echoing(), "large": echoing()}


@pytest.fixture
def asking(two, folder, chat_folder):
    @contextlib.asynccontextmanager
    async def asking(**settings):
        folders = {"small": folder, "large": chat_folder}
        models = [Model(name, folders[name], target) for name, target in two.items()]
        app = http_app(models, IngressConfig(**settings))
        transport = httpx.ASGITransport(app=app)
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
            app.router.lifespan_context(app),
        ):
            yield client

    return asking


async def complete(client, **values):
    return await client.post("/v1/completions", json={"prompt": "a b", "max_tokens": 9, **values})


async def test_each_request_goes_to_the_model_that_it_names(two, asking):
    async with asking() as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["small", "large"]
        assert (await client.get("/v1/models/large")).json()["id"] == "large"
        for name, target in two.items():
            response = await complete(client, model=name)
            assert response.status_code == 200 and response.json()["model"] == name
            assert len(target.jobs) == 1
        schema = (await client.get("/openapi.json")).json()
        body = schema["paths"]["/v1/completions"]["post"]["requestBody"]
        names = body["content"]["application/json"]["schema"]["properties"]["model"]["enum"]
        assert names == ["small", "large"]
    assert all(target.closed for target in two.values())


async def test_each_has_its_own_tokenizer(asking):
    """One of them has a chat template."""
    body = {"messages": [{"role": "user", "content": "a"}]}
    async with asking() as client:
        for path in ("/v1/chat/completions", "/tokenize"):
            answers = [
                await client.post(path, json={"model": name, **body}) for name in ("small", "large")
            ]
            assert [one.status_code for one in answers] == [400, 200]


async def test_which_one_must_be_said(two, asking):
    async with asking() as client:
        for path, body in {
            "/v1/completions": {"prompt": "a"},
            "/tokenize": {"prompt": "a"},
            "/detokenize": {"tokens": [1]},
        }.items():
            response = await client.post(path, json=body)
            assert response.status_code == 400, path
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("missing_parameter", "model")
            assert '"small", "large"' in error["message"]
        response = await complete(client, model="other")
        assert response.status_code == 404
        assert '"small", "large"' in response.json()["error"]["message"]
        assert (await complete(client, model=3)).json()["error"]["code"] == "invalid_type"


async def test_a_key_is_bound_to_some_of_them(two, asking):
    key = Key(name="a", sha256=sha256(b"sk-a").hexdigest(), models=("large",))
    async with asking(keys=(key,)) as client:
        client.headers["authorization"] = "Bearer sk-a"
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["large"]
        assert (await complete(client, model="large")).status_code == 200
        assert (await complete(client, model="small")).status_code == 403
        assert two["small"].jobs == []
        told = (await complete(client, model="other")).json()["error"]["message"]
        assert "large" in told and "small" not in told


async def test_a_key_is_bound_where_the_only_model_is_not_named(two, asking):
    del two["large"]
    key = Key(name="a", sha256=sha256(b"sk-a").hexdigest(), models=("other",))
    async with asking(keys=(key,)) as client:
        client.headers["authorization"] = "Bearer sk-a"
        for path, body in {"/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [1]}}.items():
            response = await client.post(path, json=body)
            assert response.status_code == 403, path
            assert response.json()["error"]["code"] == "model_not_allowed"


async def test_ready_when_all_are(two, asking):
    async with asking() as client:
        assert (await client.get("/health")).status_code == 200
        two["large"].fails = RuntimeError("away")
        response = await client.get("/health")
        assert response.status_code == 503 and "large" in response.json()["error"]["message"]
        assert (await complete(client, model="small")).status_code == 200
