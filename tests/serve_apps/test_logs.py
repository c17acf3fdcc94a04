"""Logs: lines of JSON with names of requests, without what was said in them."""

from __future__ import annotations

import json
import logging

import pytest

from serve_apps.logs import REQUEST, JsonLines


@pytest.fixture
def lines():
    """What is logged, as lines."""
    found: list[dict] = []

    class Lines(logging.Handler):
        def emit(self, record):
            found.append(json.loads(self.format(record)))

    logger, handler = logging.getLogger("serve_apps"), Lines()
    handler.setFormatter(JsonLines())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_line(lines):
    log = logging.getLogger("serve_apps.test")
    log.warning("%d of %s\nare gone", 3, "them")
    token = REQUEST.set("req-1")
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("it broke", extra={"fields": {"tokens": 5}})
    finally:
        REQUEST.reset(token)
    first, second = lines
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "warning",
        "logger": "serve_apps.test",
        "message": "3 of them\nare gone",
    }
    assert (second["request_id"], second["tokens"], second["level"]) == ("req-1", 5, "error")
    assert second["exception"].endswith("ValueError: why\n")
