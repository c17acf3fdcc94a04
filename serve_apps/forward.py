"""The one thread in which a replica's model runs. Knows threads and time; knows no model.

Callers take turns in the order in which they ask, so sessions that ask for one round at a time are
interleaved round by round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

from linearized.errors import LinearizedError

P = ParamSpec("P")
T = TypeVar("T")


class StuckError(LinearizedError):
    """A piece of work has run for far longer than any should."""


class Forward:
    def __init__(self, *, threads: int = 1, name: str = "forward") -> None:
        """`threads` is what torch may use inside; more than the CPUs that the replica has reserved
        make everybody slow."""
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(threads,)
        )
        self._since: float | None = None

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Whoever is cancelled here does not wait; what is running then ends by itself."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._timed, work, args, kwargs)

    def wait(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same where there is no event loop yet: the caller waits."""
        return self._executor.submit(self._timed, work, args, kwargs).result()

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
        """Queue the work without waiting for it."""
        self._executor.submit(self._timed, work, args, kwargs)

    def check(self, longest_s: float) -> None:
        """
        Raises:
            StuckError: what runs now has run for longer than this.
        """
        since = self._since
        if since is not None and time.monotonic() - since > longest_s:
            raise StuckError(f"one forward pass has run for more than {longest_s:.0f} s")

    def close(self) -> None:
        """Let the running work end and drop the waiting work."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _timed(self, work: Callable[..., T], args: tuple[object, ...], kwargs: dict) -> T:
        self._since = time.monotonic()
        try:
            return work(*args, **kwargs)
        finally:
            self._since = None
