"""What users say about an app: `key=value` on the command line of `serve run`, `args:` in a Serve
config file. Knows what each replica is to be told of it; knows no Ray.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serve_apps.draft.replica import DraftConfig
from serve_apps.http.ingress import IngressConfig
from serve_apps.http.keys import load as load_keys
from serve_apps.link.listener import ANY_PORT
from serve_apps.target.config import TargetConfig

_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


def _mapping(value: Any) -> Any:
    """The command line has texts only."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        example = '{"small": "runs/small/target", "large": "runs/large/target"}'
        raise ValueError(f"they must be names with folders, such as {example}") from None


class AppArgs(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Path | None = None
    """Hugging Face folder of the linearized model, tokenizer included."""
    model: str | None = None
    """Name under which it is served. The default is the name of the target's folder."""
    targets: Annotated[dict[str, Path], BeforeValidator(_mapping)] = {}
    """Instead of `target`: several of them, by the names under which they are served. They share
    the drafts, and these settings. On the command line a JSON object."""
    draft: Path | None = None
    """Hugging Face folder of the draft model. Without one, texts are drafted from themselves
    (n-grams)."""
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
    target_dtype: Dtype = "float32"
    """Of a target's weights and states."""
    draft_dtype: Dtype = "float32"
    target_device: Device = "auto"
    """Where targets run. `auto`: on a GPU if the machine that starts the app has one."""
    draft_device: Device = "auto"

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
    """Replicas of each target."""
    target_max_replicas: int | None = None
    """Largest number of target replicas. If it is set, Serve adds and removes replicas by load,
    from `target_replicas` up to this number."""
    draft_replicas: int = Field(default=1, ge=0)
    """Number of draft replicas. 0: the draft runs in the targets' processes, and takes turns with
    them."""
    draft_max_replicas: int | None = Field(default=None, ge=1)
    """Largest number of draft replicas. If it is set, Serve adds and removes replicas by load, from
    `draft_replicas` up to this number. From 0 on, one is started when there is a text to draft
    for."""
    draft_sessions: int = Field(default=8, ge=1)
    """Texts for which one draft replica is to draft, where Serve adds and removes them."""
    scale_up_s: float = Field(default=30.0, ge=0)
    """Seconds for which more load must last until a replica is added, …"""
    scale_down_s: float = Field(default=600.0, ge=0)
    """… and less of it until one is removed."""

    # What is reserved of the cluster, for each replica. The defaults fill two CPUs.
    ingress_cpus: float = Field(default=0.1, ge=0)
    target_cpus: float = Field(default=1.0, gt=0)
    draft_cpus: float = Field(default=0.9, gt=0)
    target_gpus: float = Field(default=1.0, gt=0)
    """Only where it runs on a GPU."""
    draft_gpus: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.target is None) == (not self.targets):
            raise ValueError("give either target=FOLDER or targets={NAME: FOLDER, …}")
        if self.targets and self.model is not None:
            raise ValueError("model= names a single target; targets have names of their own")
        for name in self.targets:
            if not _NAME.fullmatch(name):
                allowed = "letters, digits, dots, dashes and underscores, at most 64"
                raise ValueError(f"targets: a name has {allowed}; got {name!r}")
        for kind in ("target", "draft"):
            least, most = getattr(self, f"{kind}_replicas"), getattr(self, f"{kind}_max_replicas")
            if most is not None and most < least:
                raise ValueError(f"{kind}_max_replicas {most} is below {kind}_replicas {least}")
        if self.draft is None and self.draft_max_replicas is not None:
            raise ValueError("draft_max_replicas needs a draft=FOLDER")
        _ports(self.link_ports)
        return self

    @property
    def folders(self) -> dict[str, Path]:
        """Of the targets, by the names under which they are served."""
        if self.target is None:
            return self.targets
        return {self.model or self.target.name: self.target}

    @property
    def drafts_apart(self) -> bool:
        """Does the draft run in replicas of its own?"""
        return self.draft is not None and bool(self.draft_replicas or self.draft_max_replicas)

    def target_config(self, folder: Path) -> TargetConfig:
        beside = self.draft is not None and not self.drafts_apart
        return TargetConfig(
            path=place(folder),
            max_context=self.max_context,
            max_sessions=self.max_sessions,
            max_waiting=self.max_waiting,
            draft=place(self.draft) if beside and self.draft is not None else None,
            expects_draft=self.draft_replicas > 0,
            depth=self.depth,
            width=self.width,
            read_ms=self.read_ms,
            prefix_bytes=self.prefix_mb * 2**20,
            ports=_ports(self.link_ports),
            heartbeat_s=self.heartbeat_s,
            stuck_s=self.stuck_s,
            pack=self.pack,
            compile=self.compile,
            dtype=self.target_dtype,
            draft_dtype=self.draft_dtype,
            device=device(self.target_device),
            draft_device=device(self.draft_device),
            threads=_threads(self.target_cpus),
        )

    def draft_config(self) -> DraftConfig:
        assert self.draft is not None
        return DraftConfig(
            path=place(self.draft),
            depth=self.depth,
            width=self.width,
            ports=_ports(self.link_ports),
            heartbeat_s=self.heartbeat_s,
            pack=self.pack,
            compile=self.compile,
            dtype=self.draft_dtype,
            device=device(self.draft_device),
            threads=_threads(self.draft_cpus),
        )

    def ingress_config(self) -> IngressConfig:
        return IngressConfig(
            max_context=self.max_context,
            max_body=self.max_body,
            request_s=self.request_s,
            keys=load_keys(self.keys),
            rate=self.rate,
            concurrency=self.concurrency,
            cors=tuple(filter(None, self.cors.split(","))),
        )


def device(wanted: str) -> str:
    """`cpu` or `cuda`."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def place(path: Path) -> str:
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
