"""/openapi.json, and whatever schemathesis makes of it."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from serve_apps.http.schema import ERRORS

MESSAGE = {"message", "type", "param", "code"}


@pytest.fixture(scope="session")
def api(served):
    found = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    for operation in found.raw_schema["paths"].values():
        properties = (
            operation.get("post", {})
            .get("requestBody", {})
            .get("content", {})
            .get("application/json", {})
            .get("schema", {})
            .get("properties", {})
        )
        for name in ("max_tokens", "max_completion_tokens"):
            if name in properties:  # texts are to be short
                properties[name] = {"type": "integer", "minimum": 0, "maximum": 3}
    return found


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
def test_every_answer_has_a_shape(case):
    response = case.call(timeout=60)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.status_code in ERRORS or response.status_code == 405
        body = response.json()
        assert body["error"].keys() == MESSAGE and body["error"]["message"]
        assert body["error"]["type"] == "invalid_request_error"
        assert body["request_id"] == response.headers["x-request-id"][0]
