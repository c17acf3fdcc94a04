"""How benchmarks measure: time, memory, what the machine can do. Knows nothing of what is measured.

Contestants are timed in turns, so that whatever else the machine does meets them all; a time is
the median of the turns, with the quartiles beside it. One turn before the first is for warming up.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds."""

    median: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    turns: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            median=statistics.median(ordered),
            low=ordered[last // 4],
            high=ordered[last - last // 4],
            turns=len(ordered),
        )

    def __str__(self) -> str:
        scale, unit = (1e3, "ms") if self.median >= 1e-3 else (1e6, "µs")
        values = [x * scale for x in (self.median, self.low, self.high)]
        digits = 1 if values[0] < 100 else 0
        median, low, high = (f"{x:,.{digits}f}" for x in values)
        return f"{median} {unit} ({low}–{high})"


def in_turns(
    contestants: Mapping[str, Run],
    *,
    turns: int,
    budget: float,
    device: torch.device,
    warm: bool = True,
) -> dict[str, Timing]:
    """Time each, alternating. Fewer turns, at least two, where `budget` seconds for all of them
    would not do; very short ones are repeated within a turn. `warm` False: they are warm."""
    times = dict.fromkeys(contestants, 1)
    if warm:
        once = {}
        for name, run in contestants.items():
            once[name] = min(_seconds(run, 1, device), _seconds(run, 1, device))
            times[name] = max(1, min(50, int(2e-3 / max(once[name], 1e-7))))
        round_ = sum(once[name] * times[name] for name in contestants)
        turns = max(2, min(turns, int(budget / max(round_, 1e-9))))
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns):
        names = list(contestants)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(_seconds(contestants[name], times[name], device))
    return {name: Timing.of(seconds) for name, seconds in found.items()}


def _seconds(run: Run, times: int, device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    for _ in range(times):
        run()
    _wait(device)
    return (time.perf_counter() - begin) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most memory that `run` holds beyond what is held before it, its results included: on a
    CPU from every allocation and release that torch's profiler sees."""
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _wait(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _silent(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        result = run()
    del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """torch's profiler writes a line on stderr each time it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def bfloat16_is_faster(threads: int) -> bool:
    """Whether a processor multiplies faster in bfloat16 than in float32, in a product like a
    layer's. Instructions for it do not say so: of two processors with AVX512-BF16 one trained 2.5
    times as fast in it, the other 0.64 times."""

    def product(dtype: torch.dtype) -> Callable[[], object]:
        x, weight = (torch.ones(rows, 512, dtype=dtype) for rows in (2048, 1408))
        return lambda: torch.nn.functional.linear(x, weight)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = in_turns(
            {"float32": product(torch.float32), "bfloat16": product(torch.bfloat16)},
            turns=20, budget=5, device=torch.device("cpu"),
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return times["bfloat16"].median < times["float32"].median


@dataclass(frozen=True, slots=True)
class Machine:
    """What it is and what it can do, measured in this process."""

    device: str
    """The processor, with family and model where the system gives them, or the GPU."""
    instructions: tuple[str, ...]
    """Of the processor, those that decide how fast it multiplies."""
    threads: int
    cores: int
    version: str
    """Of torch."""
    load: float
    """Processes that ran or waited to, averaged over the minute before."""
    copy: float
    """Bytes a second, read and written, of a large copy."""
    flops: float
    """Floating-point operations a second of a large matrix product, in the benchmark's type."""

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        size = 1 << 29
        source = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
        target = torch.empty_like(source)
        side = 2048 if device.type == "cpu" else 8192
        a = torch.randn(side, side, device=device).to(dtype)
        runs = {"copy": lambda: target.copy_(source), "product": lambda: a @ a}
        timings = in_turns(runs, turns=9, budget=5, device=device)
        info = Path("/proc/cpuinfo")
        name, instructions = processor(info.read_text() if info.exists() else "")
        return cls(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else name,
            instructions=instructions,
            threads=torch.get_num_threads(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
            version=torch.__version__,
            load=os.getloadavg()[0],
            copy=2 * size / timings["copy"].median,
            flops=2 * side**3 / timings["product"].median,
        )

    def __str__(self) -> str:
        return (
            f"{self.device}, {' '.join(self.instructions) or 'instructions unknown'}; "
            f"{self.cores} cores, {self.threads} threads, torch {self.version}; "
            f"copies {self.copy / 1e9:.1f} GB/s, multiplies {self.flops / 1e9:.0f} GFLOP/s; "
            f"load before: {self.load:.1f}"
        )


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure should be at least, or at most."""

    name: str
    value: float | None
    """None: not measured in this run."""
    bound: float
    least: bool = True

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.least else self.value <= self.bound


def console() -> Console:
    """Wide enough for the tables where there is no terminal."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=180)


def show(title: str, columns: list[str], rows: list[list[str]], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_bars(bars: list[Bar], console: Console) -> None:
    words = {True: "met", False: "MISSED", None: "not measured"}
    rows = [
        [
            bar.name,
            "–" if bar.value is None else f"{bar.value:.3g}",
            f"{'≥' if bar.least else '≤'} {bar.bound:g}",
            words[bar.met],
        ]
        for bar in bars
    ]
    show("Bars (for 2 CPU cores, float32)", ["", "value", "bar", ""], rows, console)


def last_line(command: str, machine: Machine, **results: Any) -> str:
    """All of it as one line of JSON."""
    record = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": asdict(machine),
        **results,
    }
    return json.dumps(record, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Timing):
        return asdict(value)
    if isinstance(value, Bar):
        return {**asdict(value), "met": value.met}
    raise TypeError(f"{type(value).__name__} is not JSON")


def commit() -> str:
    """Of the repository that this runs in, as `git describe` says it."""
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


INSTRUCTIONS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimd", "sve", "sve2", "i8mm", "bf16",
)  # fmt: skip
"""As Linux names them; the last line is ARM's."""


def processor(info: str) -> tuple[str, tuple[str, ...]]:
    """Its name and those of `INSTRUCTIONS` that it has, from what /proc/cpuinfo says. Virtual
    machines give several generations one name, so family and model stand beside it."""
    found: dict[str, str] = {}
    for line in info.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= set(found):
        name += f" (family {found['cpu family']}, model {found['model']})"
    flags = set((found.get("flags") or found.get("Features") or "").split())
    return name, tuple(one for one in INSTRUCTIONS if one in flags)
