"""/openapi.json, and whatever schemathesis makes of it."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig

from serve_apps.http.schema import ERRORS

MESSAGE = {"message", "type", "param", "code"}


def loaded(url, *, coverage):
    """`coverage`: also with what lies at the edges of what the schema allows, and just outside."""
    config = SchemathesisConfig.from_dict({"phases": {"coverage": {"enabled": coverage}}})
    return schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)


@pytest.fixture(scope="session")
def api(served_briefly):
    return loaded(served_briefly.url, coverage=False)


@pytest.fixture(scope="session")
def edges(served_briefly):
    return loaded(served_briefly.url, coverage=True)


def check(case):
    response = case.call(timeout=60)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.status_code in ERRORS or response.status_code == 405
        body = response.json()
        assert body["error"].keys() == MESSAGE and body["error"]["message"]
        assert body["error"]["type"] == "invalid_request_error"
        assert body["request_id"] == response.headers["x-request-id"][0]


@schemathesis.pytest.from_fixture("api").parametrize()
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
def test_every_answer_has_a_shape(case):
    check(case)


@pytest.mark.slow
@schemathesis.pytest.from_fixture("edges").parametrize()
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
def test_every_answer_has_a_shape_at_the_edges_too(case):
    check(case)
