"""A driver's way into Ray: the cluster that its job was submitted to, or one of its own.

Knows `ray.init`; knows nothing of how clusters are started for others (that is `cluster.local`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from cluster.progress import heard


@contextlib.contextmanager
def session(*, num_cpus: int | None = None, log_to_driver: bool = True) -> Iterator[None]:
    """Connected to Ray for as long as this lasts. A job that was submitted joins its cluster; any
    other process, unless it is connected already, starts one of `num_cpus` (None: all) for itself.
    What workers say of their progress is shown as this process's own.
    """
    # Ray holds lines back that several workers print; it reads this when it is imported.
    os.environ.setdefault("RAY_DEDUP_LOGS_ALLOW_REGEX", "::")
    import ray

    if ray.is_initialized():
        yield
        return
    joining = "RAY_ADDRESS" in os.environ
    with heard():
        ray.init(
            num_cpus=None if joining else num_cpus,
            logging_level=logging.ERROR,
            log_to_driver=log_to_driver,
        )
        try:
            yield
        finally:
            ray.shutdown()
