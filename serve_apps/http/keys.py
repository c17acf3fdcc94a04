"""API keys: who may ask, how often, and for which model. The app knows their hashes only.

    python -m serve_apps.http.keys alice

prints a new key, and the lines for the file of keys.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import limits
import yaml

from linearized.errors import ConfigError

VARIABLE = "LINEARIZED_KEYS"
"""The environment variable that may hold what a file of keys holds."""
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    name: str
    sha256: str
    """Of the key, in hexadecimal digits. Keys are long and random, so that a plain hash does."""
    rate: str | None = None
    """Requests in a time, such as `60/minute`. None: the app's own rate."""
    concurrency: int | None = None
    """Requests in progress at a time. None: the app's own number."""
    models: tuple[str, ...] | None = None
    """Models that it may use. None: all."""

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            problem = "must be 64 hexadecimal digits; `python -m serve_apps.http.keys` makes keys"
            raise ConfigError(f"sha256 of key {self.name!r} {problem}")
        check_rate(self.rate, f"rate of key {self.name!r}")
        if self.concurrency is not None and (
            type(self.concurrency) is not int or self.concurrency < 1
        ):
            problem = f"must be a whole number from 1 on, got {self.concurrency!r}"
            raise ConfigError(f"concurrency of key {self.name!r} {problem}")


def check_rate(rate: object, name: str) -> None:
    """
    Raises:
        ConfigError: this is no rate.
    """
    if rate is None:
        return
    try:
        limits.parse(rate)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        problem = f"{name} must be a number of requests in a time, such as 60/minute"
        raise ConfigError(f"{problem}, got {rate!r}") from None


def find(keys: Sequence[Key], secret: str) -> Key | None:
    """The key that this is, in a time that does not depend on which one."""
    hashed = hashlib.sha256(secret.encode()).hexdigest()
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, hashed):
            found = key
    return found


def load(path: Path | None) -> tuple[Key, ...]:
    """The keys of a YAML file, or of the environment variable LINEARIZED_KEYS, or none: then
    everybody may ask.

        alice:
          sha256: 9f86d0…
          rate: 60/minute

    Raises:
        ConfigError: the file cannot be read, or says something else.
    """
    where = str(path) if path is not None else VARIABLE
    try:
        text = path.read_text() if path is not None else os.environ.get(VARIABLE, "")
        named = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the keys of {where} cannot be read: {error}") from None
    if not isinstance(named, dict) or (path is not None and not named):
        raise ConfigError(f"{where} must hold keys, each a name with its sha256 below")
    return tuple(_key(str(name), values, where) for name, values in named.items())


def _key(name: str, values: Any, where: str) -> Key:
    known = {"sha256", "rate", "concurrency", "models"}
    if not isinstance(values, dict) or "sha256" not in values or values.keys() - known:
        problem = f"must have sha256, and may have {', '.join(sorted(known - {'sha256'}))}"
        raise ConfigError(f"{where}: key {name!r} {problem}")
    models = values.get("models")
    if models is not None and not isinstance(models, list):
        raise ConfigError(f"{where}: models of key {name!r} must be a list, got {models!r}")
    return Key(
        name=name,
        sha256=str(values["sha256"]),
        rate=values.get("rate"),
        concurrency=values.get("concurrency"),
        models=None if models is None else tuple(map(str, models)),
    )


def main(name: str) -> None:
    secret = f"sk-{secrets.token_urlsafe(32)}"
    hashed = hashlib.sha256(secret.encode()).hexdigest()
    print(f"# {secret}\n{name}:\n  sha256: {hashed}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "somebody")
