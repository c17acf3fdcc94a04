"""Logs as JSON lines, each with the name of the request that it is about. Prompts and texts are no
matter of a log: callers say numbers, names and reasons.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

REQUEST: ContextVar[str | None] = ContextVar("request", default=None)
"""The name of the request that is being answered."""
OURS = ("serve_apps", "linearized")
"""Loggers whose lines are written."""


def to_stderr(level: int = logging.INFO) -> None:
    """Write what our loggers say, from this level on, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


class JsonLines(logging.Formatter):
    """One object a record: `time`, `level`, `logger`, `message`, `request_id` if there is one, what
    was given as `extra={"fields": …}`, and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        name = REQUEST.get()
        if name is not None:
            line["request_id"] = name
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)
