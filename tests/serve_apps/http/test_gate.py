"""Keys, rates, and how much at a time."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from linearized.errors import ConfigError
from serve_apps.http import keys
from serve_apps.http.keys import Key


def sha256(secret):
    return hashlib.sha256(secret.encode()).hexdigest()


ALICE = Key(name="alice", sha256=sha256("sk-alice"))
BOB = Key(name="bob", sha256=sha256("sk-bob"), rate="2/hour", concurrency=1, models=("other",))


def by(secret):
    return {"authorization": f"Bearer {secret}"}


def post(client, secret="sk-alice", **values):
    body = {"model": "m", "prompt": "a b", **values}
    return client.post("/v1/completions", json=body, headers=by(secret))


async def test_without_a_known_key_nothing_is_done(target, asking):
    async with asking(keys=(ALICE, BOB)) as client:
        for headers in ({}, by("sk-carol"), by(""), {"authorization": "Basic sk-alice"}):
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/nowhere"):
                response = await client.post(path, json={"model": "m"}, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
            assert (await client.get("/v1/models", headers=headers)).status_code == 401
        for path in ("/health", "/live"):
            assert (await client.get(path)).status_code == 200
        assert target.jobs == []
        assert (await post(client)).status_code == 200
        assert target.jobs[0].owner == sha256("sk-alice")


async def test_a_key_may_use_its_models_only(target, asking):
    async with asking(keys=(BOB,)) as client:
        response = await post(client, "sk-bob")
        assert response.status_code == 403
        assert response.json()["error"]["param"] == "model"
        response = await client.get("/v1/models", headers=by("sk-bob"))
        assert response.json()["data"] == []


async def test_rates(target, asking):
    async with asking(keys=(ALICE, BOB), rate="3/hour") as client:
        answers = [(await post(client)).status_code for _ in range(4)]
        assert answers == [200, 200, 200, 429]
        answers = [await post(client, "sk-bob") for _ in range(3)]  # has a rate of its own
        assert [one.status_code for one in answers] == [403, 403, 429]
        assert 3500 < int(answers[2].headers["retry-after"]) <= 3600
        assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"


async def test_how_much_at_a_time(target, asking):
    target.pause = 0.05
    async with asking(concurrency=2) as client:
        answers = await asyncio.gather(*(post(client, stream=i > 1) for i in range(4)))
        codes = sorted(one.status_code for one in answers)
        assert codes == [200, 200, 429, 429]
        refused = next(one for one in answers if one.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert (await post(client)).status_code == 200


async def test_no_other_origin_may_ask_unless_it_is_named(target, asking):
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with asking() as client:
        response = await client.get("/v1/models", headers=headers)
        assert "access-control-allow-origin" not in response.headers
        assert (await client.options("/v1/completions", headers=headers)).status_code == 405
    async with asking(cors=("https://a.example",)) as client:
        response = await client.get("/nowhere", headers=headers)
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert (await client.options("/v1/completions", headers=headers)).status_code == 200


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(keys.VARIABLE, raising=False)
    assert keys.load(None) == ()
    keys.main("alice")
    secret, *lines = capsys.readouterr().out.splitlines()
    place = tmp_path / "keys.yaml"
    place.write_text("\n".join(lines) + "\n  rate: 5/second\n  models: [m]\n")
    (alice,) = keys.load(place)
    assert (alice.name, alice.rate, alice.models) == ("alice", "5/second", ("m",))
    assert keys.find([BOB, alice, ALICE], secret.removeprefix("# ")) == alice
    assert keys.find([BOB, ALICE], secret) is None
    monkeypatch.setenv(keys.VARIABLE, f"{{alice: {{sha256: {ALICE.sha256}}}}}")
    assert keys.load(None) == (ALICE,)


@pytest.mark.parametrize(
    "text",
    ["", "5", "alice: x", "alice: {sha256: abc}", "a: {sha256: '0', x: 1}", "a: [", "{a: {}}"],
)
def test_files_that_hold_no_keys(tmp_path, text):
    place = tmp_path / "keys.yaml"
    place.write_text(text)
    with pytest.raises(ConfigError):
        keys.load(place)
    with pytest.raises(ConfigError, match="nowhere"):
        keys.load(tmp_path / "nowhere")


@pytest.mark.parametrize("settings", [{"rate": "often"}, {"concurrency": 0}, {"rate": 5}])
def test_limits_that_are_none(settings):
    with pytest.raises(ConfigError):
        Key(name="alice", sha256=ALICE.sha256, **settings)
