"""The Serve app: its deployments, bound together. The one file that knows Ray.

    serve run serve_apps.app:build target=runs/demo/target draft=runs/demo/draft

Classes become deployments here and nowhere else. A handle is asked for endpoints only: the ingress
talks to targets, and a target to drafts, over connections of their own.
"""
# No `from __future__ import annotations`: Serve reads the type of `build`'s argument from its
# signature, and would not see AppArgs in a string.

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Collection, Coroutine
from typing import Any, TypeVar

import ray
from click import ClickException
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from linearized.errors import LinearizedError
from serve_apps import logs
from serve_apps.checks import check_app
from serve_apps.draft.replica import DraftConfig, DraftReplica
from serve_apps.generation import Description, Event, Generation
from serve_apps.http.ingress import http_app
from serve_apps.http.metered import Metered
from serve_apps.http.models import Model
from serve_apps.http.relay import Relay
from serve_apps.link.connection import LinkError
from serve_apps.link.protocol import Endpoint
from serve_apps.link.targets import Targets
from serve_apps.prometheus import ServeMeter
from serve_apps.scaling import TEXTS, scale_drafts, scale_targets
from serve_apps.settings import AppArgs, device, place
from serve_apps.target.config import TargetConfig
from serve_apps.target.replica import TargetReplica

T = TypeVar("T")
ANSWER_S = 3.0
"""Seconds within which all replicas say where they are."""
RETRY_S = 0.2
"""Seconds until a handle that found no replica is asked again."""
LOOK_BACK_S = (11.0, 30.0)
"""Shortest and longest time over which Serve averages what replicas say of their load, which they
do every 10 s."""


class Given(AppArgs):
    """As Serve reads it. What is wrong is said in one line, too."""

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> "Given":
        """
        Raises:
            ClickException: something is wrong.
        """
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise ClickException("; ".join(map(_complaint, error.errors()))) from error


def build(args: Given) -> serve.Application:
    """
    Raises:
        ClickException: the app would not start. `serve run` shows its message in one line.
    """
    try:
        check_app(args)
    except LinearizedError as error:
        raise ClickException(str(error)) from error
    draft = None
    if args.drafts_apart:
        draft = _deployment(
            ServedDraft,
            "draft",
            cpus=args.draft_cpus,
            gpus=args.draft_gpus if device(args.draft_device) == "cuda" else 0,
            **_scale(args, "draft", args.draft_sessions, scale_drafts),
        ).bind(args.draft_config())
    targets = {
        name: _deployment(
            ServedTarget,
            "target" if args.target is not None else f"target-{name}",
            cpus=args.target_cpus,
            gpus=args.target_gpus if device(args.target_device) == "cuda" else 0,
            # Our own queue refuses texts before Serve's would make them wait unseen.
            max_ongoing_requests=args.max_sessions + args.max_waiting + 64,
            shutdown_s=args.drain_s + 10,
            **_scale(args, "target", args.max_sessions, scale_targets),
        ).bind(args.target_config(folder), draft, args.drain_s)
        for name, folder in args.folders.items()
    }
    ingress = _deployment(
        serve.ingress(_asgi(args))(Ingress),
        "ingress",
        cpus=args.ingress_cpus,
        num_replicas=args.ingress_replicas,
        max_ongoing_requests=4096,
        shutdown_s=args.request_s + 10,  # until the last of its streams has ended
    )
    return ingress.bind(*targets.values())


class ServedDraft(DraftReplica):
    async def __init__(self, config: DraftConfig) -> None:  # type: ignore[misc]
        """Serve awaits it: a replica that runs is warm."""
        _set_up_logs()
        super().__init__(config, host=ray.util.get_node_ip_address(), meter=ServeMeter())
        await self.endpoint()

    async def __del__(self) -> None:
        """Serve calls and awaits it when the replica is stopped in good order."""
        await self.close()


class ServedTarget(TargetReplica):
    async def __init__(  # type: ignore[misc]
        self, config: TargetConfig, draft: DeploymentHandle | None, drain_s: float
    ) -> None:
        """Serve awaits it: a replica that runs is warm."""
        _set_up_logs()
        self._drain_s = drain_s
        drafts = Deployed(draft) if draft is not None else None
        super().__init__(
            config,
            drafts.endpoints if drafts is not None else None,
            drafts.wake if drafts is not None else None,
            host=ray.util.get_node_ip_address(),
            meter=ServeMeter(),
        )
        await self.endpoint()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve does not see texts that come over the link."""
        return {TEXTS: float(self.num_texts)}

    async def __del__(self) -> None:
        await self.close(drain_s=self._drain_s)


class Ingress:
    """The HTTP deployment, with the routes of `serve_apps.http.ingress`. It takes the targets'
    handles so that Serve deploys the targets with it."""

    def __init__(self, *targets: DeploymentHandle) -> None:
        _set_up_logs()


class Deployed:
    """The replicas of a deployment, by Serve's handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def endpoints(self) -> list[Endpoint]:
        """Of all that run. One that ends in this moment is left out."""
        try:
            found = await _within(ANSWER_S, self._all())
        except DeploymentUnavailableError:
            return []
        except TimeoutError:  # one of them hangs; Serve knows one that does not
            found = [await _within(ANSWER_S, self._one())]
        return [one for one in found if isinstance(one, Endpoint)]

    async def wake(self) -> None:
        """A call that waits for a replica is what makes Serve start one where there is none."""
        await _within(None, self._one())

    async def _all(self) -> list[Any]:
        answers = self._handle.broadcast("endpoint")
        return await answers.results_async(return_exceptions=True)

    async def _one(self) -> Any:
        response = self._handle.endpoint.remote()
        try:
            return await response
        finally:
            response.cancel()


class Handle:
    """All target replicas behind Serve's handle, as if they were one. Each text goes to the one
    that Serve chooses."""

    leaving = False

    def __init__(self, handle: DeploymentHandle) -> None:
        self.description: Description | None = None
        self._ready = handle.ready
        self._complete = handle.options(stream=True).complete

    async def close(self) -> None:
        pass

    async def ready(self) -> Description:
        self.description = await self._ready.remote()
        return self.description

    async def pick(
        self,
        *,
        seconds: float,
        fingerprint: str | None = None,
        avoid: Collection["Handle"] = (),
        job: Generation | None = None,
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

    async def lend(self, job: Generation, link: "Handle", /) -> Generation:
        return job  # nobody knows on which replica it will be

    def leave(self, job: Generation) -> None:
        pass  # Serve lets texts end before it ends a replica

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


async def _within(seconds: float | None, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives. Whoever is late or cancelled here does not wait for it to stop: a call
    to a replica that has gone may not.

    Raises:
        TimeoutError: it takes longer.
    """
    task = asyncio.create_task(work)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
    finally:
        task.cancel()
    if not done:
        raise TimeoutError
    return task.result()


def _complaint(error: Any) -> str:
    said = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return said
    name = ".".join(map(str, error["loc"]))
    given = "" if error["type"] in ("missing", "value_error") else f", got {error['input']!r}"
    return f"{name}: {said}{given}"


def _asgi(args: AppArgs) -> Any:
    """What Serve calls inside the ingress replica, where there are handles to be had."""
    config = args.ingress_config()
    folders = {name: place(folder) for name, folder in args.folders.items()}
    single, transport = args.target is not None, args.transport
    heartbeat_s, patience_s, wait_s = args.heartbeat_s, args.patience_s, args.request_s

    def app() -> FastAPI:
        here, meter = serve.get_replica_context().app_name, ServeMeter()
        models = []
        for name, folder in folders.items():
            deployment = "target" if single else f"target-{name}"
            handle = serve.get_deployment_handle(deployment, here)
            replicas: Any = Handle(handle)
            if transport == "link":
                replicas = Targets(Deployed(handle).endpoints, heartbeat_s=heartbeat_s)
            relay = Relay(replicas, patience_s=patience_s, meter=meter)
            models.append(Model(name, folder, Metered(relay, meter), wait_s=wait_s))
        return http_app(models, config)

    return app


def _deployment(
    cls: type, name: str, *, cpus: float, gpus: float = 0, shutdown_s: float = 20.0, **options: Any
) -> serve.Deployment:
    deployment: serve.Deployment = serve.deployment(cls)  # type: ignore[assignment]
    return deployment.options(
        name=name,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        graceful_shutdown_timeout_s=shutdown_s,
        **options,
    )


def _scale(args: AppArgs, kind: str, texts: int, policy: Any) -> dict[str, Any]:
    """A fixed number of replicas, or so many that each has about so many texts."""
    least, most = getattr(args, f"{kind}_replicas"), getattr(args, f"{kind}_max_replicas")
    if most is None:
        return {"num_replicas": least}
    scale = AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        target_ongoing_requests=texts,
        upscale_delay_s=args.scale_up_s,
        downscale_delay_s=args.scale_down_s,
        look_back_period_s=min(max(args.scale_up_s, LOOK_BACK_S[0]), LOOK_BACK_S[1]),
        policy=AutoscalingPolicy(policy_function=policy),
    )
    return {"autoscaling_config": scale}


def _set_up_logs() -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logs.to_stderr()
