"""A model that is served: its name, who completes its texts, its tokenizer, and what is known of
it. Knows no request.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

from serve_apps.generation import Description
from serve_apps.http.errors import ApiError
from serve_apps.http.fields import Limits
from serve_apps.http.streams import Target
from serve_apps.http.tokens import Tokenizer


class Model:
    def __init__(self, name: str, path: str, target: Target, *, wait_s: float = 600.0) -> None:
        """`path`: the target's Hugging Face folder, for its tokenizer. `wait_s`: seconds that a
        request waits while the target is not ready. The target is closed with the model.

        Raises:
            ConfigError: the folder holds no tokenizer.
        """
        self.name = name
        self.target = target
        self.tokenizer = Tokenizer(path)
        self._wait_s = wait_s
        self._created = int(time.time())
        self._described: Description | None = None

    async def close(self) -> None:
        self.tokenizer.close()
        await self.target.close()

    async def ready(self, seconds: float) -> Description:
        """Ask the target how it is.

        Raises:
            ApiError: it does not answer within so long.
        """
        try:
            async with asyncio.timeout(seconds):
                self._described = await self.target.ready()
        except Exception:  # whatever Serve raises: there is no target
            message = f"the model {self.name} is not ready yet"
            headers = {"Retry-After": "1"}
            raise ApiError(503, message, code="not_ready", headers=headers) from None
        return self._described

    async def description(self) -> Description:
        """What the target has said of itself last."""
        return self._described or await self.ready(self._wait_s)

    async def limits(self) -> Limits:
        described = await self.description()
        return Limits(
            max_context=described.max_context,
            vocab_size=described.vocab_size,
            max_characters=described.max_context * self.tokenizer.longest,
        )

    async def shown(self, seconds: float) -> dict[str, Any]:
        """As OpenAI shows models; and what else is known, if the target answers within so long."""
        found: dict[str, Any] = {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "linearized",
            "chat": self.tokenizer.chats,
        }
        with suppress(ApiError):
            described = self._described or await self.ready(seconds)
            found |= {
                "max_model_len": described.max_context,
                "state_bytes": described.state_bytes,
                "state_token_bytes": described.state_token_bytes,
                "cache_token_bytes": described.cache_token_bytes,
            }
        return found
