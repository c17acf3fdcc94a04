"""The Serve app: three deployments, bound together. The one file that knows Ray.

    serve run serve_apps.app:build target=runs/demo/target draft=runs/demo/draft

Classes become deployments here and nowhere else. A handle is asked for endpoints only: the ingress
talks to targets, and a target to drafts, over connections of their own.
"""
# No `from __future__ import annotations`: Serve reads the type of `build`'s argument from its
# signature, and would not see AppArgs in a string.

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Collection
from pathlib import Path
from typing import Any, Literal, Self

import ray
from click import ClickException
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from linearized.errors import ConfigError
from serve_apps import logs
from serve_apps.checks import check_folders
from serve_apps.draft.replica import DraftConfig, DraftReplica
from serve_apps.generation import Description, Event, Generation
from serve_apps.http.ingress import IngressConfig, http_app
from serve_apps.http.keys import load as load_keys
from serve_apps.http.metered import Metered
from serve_apps.http.relay import Relay
from serve_apps.link.connection import LinkError
from serve_apps.link.listener import ANY_PORT
from serve_apps.link.protocol import Endpoint
from serve_apps.link.targets import Targets
from serve_apps.prometheus import ServeMeter
from serve_apps.target.replica import TargetConfig, TargetReplica

TEXTS = "texts"
"""A target's metric by which Serve scales: texts in progress or waiting."""
RETRY_S = 0.2
"""Seconds until a handle that found no replica is asked again."""


class AppArgs(BaseModel):
    """Settings of the app: `key=value` on the command line of `serve run`, `args:` in a Serve
    config file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Path
    """Hugging Face folder of the linearized model, tokenizer included."""
    draft: Path | None = None
    """Hugging Face folder of the draft model. Without one, texts are drafted from themselves
    (n-grams)."""
    model: str | None = None
    """Name under which the model is served. The default is the name of the target's folder."""
    max_context: int = Field(default=32768, ge=1)
    """Largest number of tokens of prompt and completion of one request together."""
    max_sessions: int = Field(default=16, ge=1)
    """Largest number of texts in progress in one target replica."""
    max_waiting: int = Field(default=64, ge=0)
    """Largest number of texts that wait there. Further ones are answered with status 503."""
    max_body: int = Field(default=8 * 2**20, ge=1)
    """Largest number of bytes of a request."""
    request_s: float = Field(default=600.0, gt=0)
    """Seconds within which an answer must be complete."""
    keys: Path | None = None
    """YAML file of the API keys' hashes; see `serve_apps.http.keys`. Without it the environment
    variable LINEARIZED_KEYS holds them. Without both everybody may ask."""
    rate: str | None = None
    """Requests in a time, such as `60/minute`, for each key that has no rate of its own."""
    concurrency: int | None = Field(default=None, ge=1)
    """Requests in progress at a time, for each key that has no number of its own."""
    cors: str = ""
    """Origins of web pages that may ask, separated by commas."""
    read_ms: float = Field(default=200.0, gt=0)
    """Milliseconds that texts in progress wait, between two of their rounds, for prompts to be
    read."""
    prefix_mb: int = Field(default=256, ge=0)
    """Megabytes of states of prompts and answers that each target keeps, for texts that begin
    alike. 0 keeps none."""
    depth: int = Field(default=8, ge=1)
    """Largest number of levels of a drafted tree. How many pay is measured."""
    width: int = Field(default=4, ge=1)
    """Number of guesses that a draft follows at a time."""
    pack: bool = True
    """Whether to lay out the weights a second time for the CPU, which needs that memory again. See
    `linearized.pack`."""
    compile: bool = False
    """Whether to compile the steps. Replicas then need some minutes more for their first start. See
    `linearized.compile`."""

    transport: Literal["link", "handle"] = "link"
    """How texts reach a target replica: over connections of the app's own, or through Serve's
    handles, which are slower."""
    link_ports: str = "any"
    """Ports at which replicas wait for each other, such as `20000-20100`: one for each replica on a
    machine. `any`: whichever are free."""
    heartbeat_s: float = Field(default=2.0, gt=0)
    """Seconds between two signs of life of a connected replica. Three missing ones, and its texts
    go on on another."""
    stuck_s: float = Field(default=60.0, gt=0)
    """Seconds that one forward pass of a target may take. Beyond that its texts go on on another,
    and Serve replaces it."""
    patience_s: float = Field(default=60.0, gt=0)
    """Seconds that a text waits for a target to go on with it, if it has lost its own."""
    drain_s: float = Field(default=15.0, ge=0)
    """Seconds that a target which is to end waits for its texts to end or to move."""

    ingress_replicas: int = Field(default=1, ge=1)
    target_replicas: int = Field(default=1, ge=1)
    target_max_replicas: int | None = None
    """Largest number of target replicas. If it is set, Serve adds and removes replicas by load,
    from `target_replicas` up to this number."""
    draft_replicas: int = Field(default=1, ge=1)
    """Number of draft replicas. It is fixed, as Serve does not see a draft's load."""

    # What is reserved of the cluster's CPUs, for each replica. The defaults fill two.
    ingress_cpus: float = Field(default=0.1, ge=0)
    target_cpus: float = Field(default=1.0, gt=0)
    draft_cpus: float = Field(default=0.9, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        most = self.target_max_replicas
        if most is not None and most < self.target_replicas:
            raise ValueError(f"target_max_replicas {most} is below {self.target_replicas}")
        _ports(self.link_ports)
        return self


def build(args: AppArgs) -> serve.Application:
    """
    Raises:
        ClickException: the app would not start. `serve run` shows its message in one line.
    """
    try:
        check_folders(args.target, args.draft)
    except ConfigError as error:
        raise ClickException(str(error)) from error
    draft = None
    if args.draft is not None:
        draft = _deployment(
            ServedDraft, "draft", args.draft_cpus, num_replicas=args.draft_replicas
        ).bind(_draft_config(args))
    target = _deployment(ServedTarget, "target", args.target_cpus, **_target_scale(args)).bind(
        _target_config(args), draft, args.drain_s
    )
    ingress = _deployment(
        serve.ingress(_asgi(_ingress_config(args), args))(Ingress),
        "ingress",
        args.ingress_cpus,
        num_replicas=args.ingress_replicas,
        max_ongoing_requests=4096,
        shutdown_s=args.request_s + 10,  # until the last of its streams has ended
    )
    return ingress.bind(target)


class ServedDraft(DraftReplica):
    def __init__(self, config: DraftConfig) -> None:
        _set_up_logs()
        super().__init__(config, host=ray.util.get_node_ip_address(), meter=ServeMeter())

    async def __del__(self) -> None:
        """Serve calls and awaits it when the replica is stopped in good order."""
        await self.close()


class ServedTarget(TargetReplica):
    def __init__(
        self, config: TargetConfig, draft: DeploymentHandle | None, drain_s: float
    ) -> None:
        _set_up_logs()
        self._drain_s = drain_s

        async def find() -> list[Endpoint]:
            assert draft is not None
            # To ask a deployment without replicas is to have Serve start one.
            if not await asyncio.to_thread(_runs, draft):
                raise LinkError("no draft replica is running")
            return [await draft.endpoint.remote()]

        host = ray.util.get_node_ip_address()
        find_drafts = find if draft is not None else None
        super().__init__(config, find_drafts, host=host, meter=ServeMeter())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve does not see texts that come over the link."""
        return {TEXTS: float(self.num_texts)}

    async def __del__(self) -> None:
        await self.close(drain_s=self._drain_s)


class Ingress:
    """The HTTP deployment, with the routes of `serve_apps.http.ingress`. It takes the target's
    handle so that Serve deploys the target with it."""

    def __init__(self, target: DeploymentHandle) -> None:
        _set_up_logs()


class Handle:
    """All target replicas behind Serve's handle, as if they were one. Each text goes to the one
    that Serve chooses."""

    leaving = False

    def __init__(self, handle: DeploymentHandle) -> None:
        self.description: Description | None = None
        self._ready = handle.ready
        self._complete = handle.options(stream=True).complete

    async def ready(self) -> Description:
        self.description = await self._ready.remote()
        return self.description

    async def pick(
        self, *, seconds: float, fingerprint: str | None, avoid: Collection["Handle"]
    ) -> "Handle | None":
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        found = await self.ready()
                    except RayError:  # replicas change
                        found = None
                    if found is not None and fingerprint in (None, found.fingerprint):
                        return self
                    await asyncio.sleep(RETRY_S)
        return None

    def others(self, link: "Handle", avoid: Collection["Handle"], /) -> bool:
        return False

    async def complete(self, job: Generation) -> AsyncGenerator[Event, None]:
        events = self._complete.remote(job)
        finished = False
        try:
            async for event in events:  # type: ignore[union-attr]
                yield event
            finished = True
        except RayError as error:
            raise LinkError(f"a target replica failed: {type(error).__name__}") from error
        finally:
            if not finished:
                events.cancel()


def scale_by_texts(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """How many target replicas there should be: as many as their texts fill."""
    config = context.config
    assert config is not None
    texts = sum((context.aggregated_metrics or {}).get(TEXTS, {}).values())
    wanted = math.ceil(texts / config.get_target_ongoing_requests())
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, wanted)), {}


def _asgi(config: IngressConfig, args: AppArgs) -> Any:
    transport, heartbeat_s, patience_s = args.transport, args.heartbeat_s, args.patience_s

    def app() -> FastAPI:
        """Called by Serve inside the ingress replica, where there are handles to be had."""
        name = serve.get_replica_context().app_name
        handle = serve.get_deployment_handle("target", name)
        replicas: Any = Handle(handle)
        if transport == "link":

            async def find() -> list[Endpoint]:
                return [await handle.endpoint.remote()]

            replicas = Targets(find, heartbeat_s=heartbeat_s)
        meter = ServeMeter()
        relay = Relay(replicas, patience_s=patience_s, meter=meter)
        return http_app(Metered(relay, meter), config)

    return app


def _runs(handle: DeploymentHandle) -> bool:
    """Is there a replica of this deployment?"""
    app = serve.status().applications.get(handle.app_name)
    deployment = app.deployments.get(handle.deployment_name) if app is not None else None
    return deployment is not None and "RUNNING" in deployment.replica_states


def _deployment(
    cls: type, name: str, cpus: float, *, shutdown_s: float = 20.0, **options: Any
) -> serve.Deployment:
    deployment: serve.Deployment = serve.deployment(cls)  # type: ignore[assignment]
    return deployment.options(
        name=name,
        ray_actor_options={"num_cpus": cpus},
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        graceful_shutdown_timeout_s=shutdown_s,
        **options,
    )


def _target_scale(args: AppArgs) -> dict[str, Any]:
    # Our own queue refuses texts before Serve's would make them wait unseen.
    options = {
        "max_ongoing_requests": args.max_sessions + args.max_waiting + 64,
        "shutdown_s": args.drain_s + 10,
    }
    if args.target_max_replicas is None:
        return {"num_replicas": args.target_replicas, **options}
    scale = AutoscalingConfig(
        min_replicas=args.target_replicas,
        max_replicas=args.target_max_replicas,
        target_ongoing_requests=args.max_sessions,
        policy=AutoscalingPolicy(policy_function=scale_by_texts),
    )
    return {"autoscaling_config": scale, **options}


def _target_config(args: AppArgs) -> TargetConfig:
    return TargetConfig(
        path=_folder(args.target),
        max_context=args.max_context,
        max_sessions=args.max_sessions,
        max_waiting=args.max_waiting,
        depth=args.depth,
        read_ms=args.read_ms,
        prefix_bytes=args.prefix_mb * 2**20,
        ports=_ports(args.link_ports),
        heartbeat_s=args.heartbeat_s,
        stuck_s=args.stuck_s,
        pack=args.pack,
        compile=args.compile,
        threads=_threads(args.target_cpus),
    )


def _draft_config(args: AppArgs) -> DraftConfig:
    assert args.draft is not None
    return DraftConfig(
        path=_folder(args.draft),
        depth=args.depth,
        width=args.width,
        ports=_ports(args.link_ports),
        heartbeat_s=args.heartbeat_s,
        pack=args.pack,
        compile=args.compile,
        threads=_threads(args.draft_cpus),
    )


def _ingress_config(args: AppArgs) -> IngressConfig:
    return IngressConfig(
        model=args.model or args.target.name,
        path=_folder(args.target),
        max_body=args.max_body,
        request_s=args.request_s,
        keys=load_keys(args.keys),
        rate=args.rate,
        concurrency=args.concurrency,
        cors=tuple(filter(None, args.cors.split(","))),
    )


def _folder(path: Path) -> str:
    """Replicas have a working folder of their own; a name that is no folder here stays as it is."""
    return str(path.absolute() if path.exists() else path)


def _ports(text: str) -> tuple[int, int]:
    """
    Raises:
        ValueError: it is no range of ports.
    """
    if text == "any":
        return ANY_PORT
    ends = text.split("-")
    if not 1 <= len(ends) <= 2 or not all(end.isdecimal() for end in ends):
        raise ValueError(f"link_ports must be a range such as 20000-20100, got {text!r}")
    first, last = int(ends[0]), int(ends[-1])
    if not 0 < first <= last < 2**16:
        raise ValueError(f"link_ports must lie between 1 and 65535, got {text!r}")
    return first, last


def _threads(cpus: float) -> int:
    """Never more than are reserved: torch is many times slower on cores that it has to share."""
    return max(1, int(cpus))


def _set_up_logs() -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logs.to_stderr()
