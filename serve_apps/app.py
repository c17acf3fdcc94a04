"""The Serve app: three deployments, bound together. The one file that knows Ray.

    serve run serve_apps.app:build target=runs/demo/target draft=runs/demo/draft

Classes become deployments here and nowhere else. The ingress asks targets through a streaming
handle; a target asks the draft deployment's handle for an endpoint only, and then talks to that
replica over a connection of its own.
"""
# No `from __future__ import annotations`: Serve reads the type of `build`'s argument from its
# signature, and would not see AppArgs in a string.

import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Self

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from serve_apps.draft.replica import DraftConfig, DraftReplica
from serve_apps.generation import Description, Event, Generation
from serve_apps.http.ingress import IngressConfig, http_app
from serve_apps.link.protocol import Endpoint
from serve_apps.target.replica import TargetConfig, TargetReplica


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
        return self


def build(args: AppArgs) -> serve.Application:
    draft = None
    if args.draft is not None:
        draft = _deployment(
            ServedDraft, "draft", args.draft_cpus, num_replicas=args.draft_replicas
        ).bind(_draft_config(args))
    target = _deployment(ServedTarget, "target", args.target_cpus, **_target_scale(args)).bind(
        _target_config(args), draft
    )
    ingress = _deployment(
        serve.ingress(_asgi(_ingress_config(args)))(Ingress),
        "ingress",
        args.ingress_cpus,
        num_replicas=args.ingress_replicas,
        max_ongoing_requests=4096,
    )
    return ingress.bind(target)


class ServedDraft(DraftReplica):
    def __init__(self, config: DraftConfig) -> None:
        _be_quiet()
        super().__init__(config, host=ray.util.get_node_ip_address())

    async def __del__(self) -> None:
        """Serve calls and awaits it when the replica is stopped in good order."""
        await self.close()


class ServedTarget(TargetReplica):
    def __init__(self, config: TargetConfig, draft: DeploymentHandle | None) -> None:
        _be_quiet()

        async def find() -> list[Endpoint]:
            assert draft is not None
            return [await draft.endpoint.remote()]

        super().__init__(config, find if draft is not None else None)

    async def __del__(self) -> None:
        await self.close()


class Ingress:
    """The HTTP deployment, with the routes of `serve_apps.http.ingress`. It takes the target's
    handle so that Serve deploys the target with it."""

    def __init__(self, target: DeploymentHandle) -> None:
        _be_quiet()


class TargetHandle:
    """All target replicas behind Serve's handle, as one `Target`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._ready = handle.ready
        self._complete = handle.options(stream=True).complete

    async def ready(self) -> Description:
        return await self._ready.remote()

    async def complete(self, job: Generation) -> AsyncGenerator[Event, None]:
        events = self._complete.remote(job)
        finished = False
        try:
            async for event in events:  # type: ignore[union-attr]
                yield event
            finished = True
        finally:
            if not finished:
                events.cancel()


def _asgi(config: IngressConfig) -> Any:
    def app() -> FastAPI:
        """Called by Serve inside the ingress replica, where there are handles to be had."""
        name = serve.get_replica_context().app_name
        return http_app(TargetHandle(serve.get_deployment_handle("target", name)), config)

    return app


def _deployment(cls: type, name: str, cpus: float, **options: Any) -> serve.Deployment:
    deployment: serve.Deployment = serve.deployment(cls)  # type: ignore[assignment]
    return deployment.options(
        name=name,
        ray_actor_options={"num_cpus": cpus},
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        graceful_shutdown_timeout_s=20,
        **options,
    )


def _target_scale(args: AppArgs) -> dict[str, Any]:
    # Our own queue refuses texts before Serve's would make them wait unseen.
    room = {"max_ongoing_requests": args.max_sessions + args.max_waiting + 64}
    if args.target_max_replicas is None:
        return {"num_replicas": args.target_replicas, **room}
    scale = {
        "min_replicas": args.target_replicas,
        "max_replicas": args.target_max_replicas,
        "target_ongoing_requests": args.max_sessions,
    }
    return {"autoscaling_config": scale, **room}


def _target_config(args: AppArgs) -> TargetConfig:
    return TargetConfig(
        path=_folder(args.target),
        max_context=args.max_context,
        max_sessions=args.max_sessions,
        max_waiting=args.max_waiting,
        depth=args.depth,
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
        pack=args.pack,
        compile=args.compile,
        threads=_threads(args.draft_cpus),
    )


def _ingress_config(args: AppArgs) -> IngressConfig:
    return IngressConfig(model=args.model or args.target.name, max_body=args.max_body)


def _folder(path: Path) -> str:
    """Replicas have a working folder of their own; a name that is no folder here stays as it is."""
    return str(path.absolute() if path.exists() else path)


def _threads(cpus: float) -> int:
    """Never more than are reserved: torch is many times slower on cores that it has to share."""
    return max(1, int(cpus))


def _be_quiet() -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)
