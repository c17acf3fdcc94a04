"""A driver's way into Ray: the cluster that its job was submitted to, or one of its own.

Knows `ray.init`; knows nothing of how clusters are started for others (that is `cluster.local`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator


@contextlib.contextmanager
def session(*, num_cpus: int | None = None, log_to_driver: bool = True) -> Iterator[None]:
    """Connected to Ray for as long as this lasts. A job that was submitted joins its cluster; any
    other process, unless it is connected already, starts one of `num_cpus` (None: all) for itself.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    joining = "RAY_ADDRESS" in os.environ
    ray.init(
        num_cpus=None if joining else num_cpus,
        logging_level=logging.ERROR,
        log_to_driver=log_to_driver,
    )
    try:
        yield
    finally:
        ray.shutdown()
