"""Check and measure this project on a GPU: one command, a page and JSON in a folder.

    python -m jobs.gpu_check --out gpu                            # everything
    python -m jobs.gpu_check --out gpu --part tests --part model  # these parts only
    python -m jobs.gpu_check --out tiny --device cpu              # a trial without a GPU

Parts, in this order: `tests` (kernels against their definition), `sanitizer` (compute-sanitizer on
small cases, if it is installed), `model` (decoding and training on the device against the CPU),
`ops` (attention beside SDPA, and beside flash-linear-attention if it is installed), `models` (a 1B
Llama beside its softmax twin), `decode` (batches), `training` (tokens per second).

Each part is one or more commands, each with a time limit; together the limits allow for more than
an hour. After each command report.md and report.json are written anew, and logs/ has what a command
prints as it prints it, so a run that is killed leaves what it had. A command that fails does not
end the run. Results of parts that are not run again are kept. Needs neither Ray nor DeepSpeed nor
any plugin of pytest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
TAIL = 40
"""Last lines of a command's output that the page shows."""
REFRESH_S = 10.0
"""How often the page is written while a command runs."""
STOP_S = 5.0
"""How long a command that is asked to end may take before it is killed."""

_MACHINE = """
import importlib.metadata, json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "device": None}
for name in ("triton", "transformers", "flash-linear-attention"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
if torch.cuda.is_available():
    about = torch.cuda.get_device_properties(0)
    found["device"] = about.name
    found["capability"] = f"{about.major}.{about.minor}"
    found["memory_gib"] = round(about.total_memory / 2**30, 1)
    found["cuda"] = torch.version.cuda
print(json.dumps(found))
"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a part."""

    name: str
    command: list[str]
    limit: float
    """Seconds after which it is ended."""
    env: dict[str, str] = field(default_factory=dict)
    empty_ok: bool = False
    """pytest may find no test."""


@dataclass(kw_only=True)
class Outcome:
    """What became of a command."""

    step: str
    command: str
    status: str = "waiting"
    """`waiting`, `running`, `passed`, `failed`, `out of time`, `interrupted` or `left out`."""
    seconds: float = 0.0
    code: int | None = None
    summary: str = ""
    """pytest's last line, or why there is no result."""
    failures: list[str] = field(default_factory=list)
    """Tests that failed, by name."""
    result: dict[str, Any] | None = None
    """The line of JSON that benchmarks end with."""
    tail: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return self.status not in ("passed", "left out")


def main(
    out: Annotated[Path, typer.Option(help="Folder for the page, the JSON and the logs.")],
    part: Annotated[
        list[str] | None, typer.Option(help="Only this part; may be given again. Default: all.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a trial in tiny sizes.")] = "cuda",
    limit: Annotated[
        float | None, typer.Option(min=1.0, help="Seconds for each command; default: its own.")
    ] = None,
) -> None:
    """Run tests and benchmarks on a GPU, and write a page about them."""
    names = list(dict.fromkeys(part or PARTS))
    if unknown := [name for name in names if name not in PARTS]:
        raise typer.BadParameter(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"device must be cuda or cpu, got {device!r}")
    machine = _machine()
    if device == "cuda" and machine["device"] is None:
        print("error: torch finds no CUDA device; --device cpu tries it in tiny sizes",
              file=sys.stderr)  # fmt: skip
        raise typer.Exit(1)
    signal.signal(signal.SIGTERM, _interrupt)
    report = Report(out, machine, device)
    chosen = {name: PARTS[name](device, out) for name in names}
    for name, steps in chosen.items():
        report.begin(name, steps)
    try:
        for name, steps in chosen.items():
            for step in steps:
                print(f"{name}: {step.name} …", flush=True)
                found = report.run(name, step, limit or step.limit)
                print(f"{name}: {step.name}: {found.status} in {found.seconds:.0f} s. "
                      f"{found.summary}", flush=True)  # fmt: skip
    except KeyboardInterrupt:
        print(f"interrupted; what there is: {out / 'report.md'}", file=sys.stderr)
        raise typer.Exit(130) from None
    bad = [f"{name}: {found.step}" for name in names for found in report.parts[name] if found.bad]
    print(f"report: {out / 'report.md'}, {out / 'report.json'}")
    if bad:
        print(f"not passed: {'; '.join(bad)}")
        raise typer.Exit(1)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _machine() -> dict[str, Any]:
    """Asked in a process of its own: this one never touches the device."""
    done = subprocess.run([PYTHON, "-c", _MACHINE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or "no reason given").split("\n")[-1]
        raise typer.BadParameter(f"torch cannot be used here: {last}")
    return dict(json.loads(done.stdout.strip().split("\n")[-1]))


class Report:
    """The folder: outcomes by part, as a page and as JSON."""

    def __init__(self, out: Path, machine: dict[str, Any], device: str) -> None:
        self.out = out
        self.machine = machine
        self.device = device
        self.parts: dict[str, list[Outcome]] = {}
        (out / "logs").mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads((out / "report.json").read_text())
            if before["machine"] == machine and before["run_on"] == device:
                found = before["parts"].items()
                self.parts = {name: [Outcome(**one) for one in all_] for name, all_ in found}

    def begin(self, part: str, steps: list[Step]) -> None:
        self.parts[part] = [Outcome(step=step.name, command=_shown(step.command)) for step in steps]
        self.write()

    def run(self, part: str, step: Step, limit: float) -> Outcome:
        """The command, until it ends or its time is up."""
        found = next(one for one in self.parts[part] if one.step == step.name)
        if not step.command:
            found.status, found.summary = "left out", step.env["why"]
            self.write()
            return found
        log = self.out / "logs" / f"{part}-{step.name.replace(' ', '-')}.log"
        found.status = "running"
        began = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(
                step.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **step.env},
            )  # fmt: skip
            try:
                found.status = self._wait(process, found, log, began, limit)
            except BaseException:
                found.status = "interrupted"
                raise
            finally:
                _end(process)
                found.seconds = round(time.perf_counter() - began, 1)
                found.code = process.returncode
                _read(found, log, step)
                self.write()
        return found

    def _wait(
        self, process: subprocess.Popen[bytes], found: Outcome, log: Path, began: float,
        limit: float,
    ) -> str:  # fmt: skip
        shown = 0.0
        while process.poll() is None:
            now = time.perf_counter() - began
            if now > limit:
                return "out of time"
            if now - shown >= REFRESH_S or not shown:
                found.seconds, shown = round(now, 1), max(now, 1e-3)
                found.tail = _tail(log)
                self.write()
            time.sleep(0.1)
        return "passed" if process.returncode == 0 else "failed"

    def write(self) -> None:
        ordered = {name: self.parts[name] for name in PARTS if name in self.parts}
        record = {
            "command": "gpu_check",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "machine": self.machine,
            "run_on": self.device,
            "parts": {name: [asdict(one) for one in all_] for name, all_ in ordered.items()},
        }
        _replace(self.out / "report.json", json.dumps(record, indent=1) + "\n")
        _replace(self.out / "report.md", _page(record, ordered))


def _end(process: subprocess.Popen[bytes]) -> None:
    """The command and all that it has started."""
    for sign, patience in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what outlived it


def _read(found: Outcome, log: Path, step: Step) -> None:
    """What the command said of itself."""
    lines = log.read_text(errors="replace").splitlines()
    found.tail = _tail(log)
    for line in reversed(lines):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found.result = json.loads(line)
                break
    if "pytest" in step.command:
        failed = [line.split(" ")[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
        found.failures = list(dict.fromkeys(failed))
        ends = [line.strip("= ") for line in lines if line.strip("= ").endswith(("s", ")"))
                and (" passed" in line or " failed" in line or " deselected" in line
                     or " error" in line or "no tests ran" in line)]  # fmt: skip
        found.summary = ends[-1] if ends else _counted(lines)
        if found.code == 5 and step.empty_ok:
            found.status = "left out"
        elif found.code == 0 and " passed" not in found.summary:
            found.status, found.summary = "failed", f"no test ran ({found.summary})"
    elif found.bad:
        found.summary = next((line for line in reversed(lines) if line.strip()), "no output")[:300]


def _counted(lines: list[str]) -> str:
    """Of pytest that did not come to its end."""
    words = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL")
    counts = {word: sum(f" {word}" in line for line in lines) for word in words}
    return ", ".join(f"{n} {word.lower()}" for word, n in counts.items() if n) or "no test ended"


def _tail(log: Path) -> list[str]:
    """The last lines, without the long line of JSON."""
    lines = log.read_text(errors="replace").splitlines()
    return [line[:200] for line in lines if not line.startswith("{")][-TAIL:]


def _page(record: dict[str, Any], parts: dict[str, list[Outcome]]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items() if value)
    about = f"Commit {record['commit']}, {record['date']}, run on {record['run_on']}."
    lines = ["# GPU check", "", f"{machine}.", "", about]
    if record["run_on"] == "cpu":
        lines += ["", "**A trial on the CPU in tiny sizes: its figures mean nothing.**"]
    lines += ["", "| part | step | | seconds | |", "|---|---|---|---|---|"]
    for name, all_ in parts.items():
        for one in all_:
            said = one.summary.replace("|", "/")
            lines.append(f"| {name} | {one.step} | {one.status} | {one.seconds:.0f} | {said} |")
    for name, all_ in parts.items():
        for one in all_:
            if one.status in ("waiting", "left out"):
                continue
            lines += ["", f"## {name}: {one.step}", "", f"    {one.command}", ""]
            lines += [f"- failed: `{test}`" for test in one.failures]
            shown = one.tail
            if one.result is not None or one.bad:
                lines += ["", "```", *(shown or ["(no output)"]), "```"]
    return "\n".join(lines) + "\n"


def _replace(path: Path, text: str) -> None:
    """Complete, or as it was."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _shown(command: list[str]) -> str:
    return shlex.join("python" if word == PYTHON else word for word in command)


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def _tests(device: str, out: Path) -> list[Step]:
    kernels = "tests/linearized/ops/test_gpu.py"
    if device == "cpu":
        return [_pytest("kernels", device, out, 300, kernels, "-k", "small_trees or folding")]
    return [
        _pytest("kernels", device, out, 500, kernels),
        _pytest("kernels one by one", device, out, 300, "tests/linearized/ops/test_kernels.py"),
    ]


def _sanitizer(device: str, out: Path) -> list[Step]:
    """Small cases only: everything is many times slower under it."""
    tools = ("memcheck", "racecheck")
    program = shutil.which("compute-sanitizer")
    if device == "cpu" or program is None:
        why = "needs a GPU" if device == "cpu" else "compute-sanitizer is not installed"
        return [Step(name=tool, command=[], limit=0, env={"why": why}) for tool in tools]
    steps = []
    for tool in tools:
        cases = (
            "short_texts and 33 and bfloat16 or small_trees and bfloat16 or folding and bfloat16"
        )
        inner = _pytest(tool, device, out, 240, "tests/linearized/ops/test_gpu.py", "-k", cases)
        command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all",
                   *inner.command]  # fmt: skip
        env = {**inner.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        steps.append(Step(name=tool, command=command, limit=inner.limit, env=env))
    return steps


def _model(device: str, out: Path) -> list[Step]:
    tests = "tests/linearized/test_gpu.py"
    if device == "cpu":
        few = "noise or moves_between or drafted and float32-chosen"
        return [_pytest("against the CPU", device, out, 300, tests, "-k", few)]
    return [
        _pytest("against the CPU", device, out, 420, tests, "-k", "not compiled"),
        _pytest("compiled steps", device, out, 300, tests, "-k", "compiled"),
        _pytest("engine and drafters", device, out, 200, "tests/linearized/speculative",
                empty_ok=True),
    ]  # fmt: skip


def _ops(device: str, out: Path) -> list[Step]:
    if device == "cpu":
        return [_bench("quick", 200, "bench_ops", "--quick")]
    kind = ["--device", "cuda", "--dtype", "bfloat16", "--heads", "32"]
    return [
        _bench(f"{tokens} tokens", 240, "bench_ops", *kind, "--lengths", tokens)
        for tokens in ("1024", "2048", "4096", "16384", "65536")
    ]


LLAMA_1B = ["--hidden", "2048", "--layers", "18", "--kv-heads", "8"]
"""Of 64-wide heads; a vocabulary of 8,192."""


def _models(device: str, out: Path) -> list[Step]:
    if device == "cpu":
        return [_bench("quick", 200, "bench_models", "--quick")]
    kind = ["--device", "cuda", "--dtype", "bfloat16", *LLAMA_1B, "--budget", "20"]
    return [
        _bench(f"{backend} {tokens} tokens", 200, "bench_models", *kind, "--contexts", tokens,
               "--prompts", tokens, "--backend", backend)
        for backend in ("triton", "cpu")
        for tokens in ("1024", "8192", "32768", "131072")
    ]  # fmt: skip


def _decode(device: str, out: Path) -> list[Step]:
    if device == "cpu":
        return [_bench("quick", 200, "bench_batches", "--quick")]
    kind = ["--device", "cuda", "--dtype", "bfloat16", *LLAMA_1B]
    steps = [
        _bench(f"{backend} batches", 240, "bench_batches", *kind, "--backend", backend)
        for backend in ("triton", "cpu")
    ]
    graphs = ["--contexts", "8192", "--batches", "1,8", "--compile"]
    steps.append(_bench("compiled batches", 300, "bench_batches", *kind, *graphs))
    if (ROOT / "runs" / "bench" / "target").exists():
        steps.append(_bench("drafters", 600, "bench_decode", "--device", "cuda"))
    return steps


def _training(device: str, out: Path) -> list[Step]:
    if device == "cpu":
        return [_bench("quick", 200, "bench_training", "--quick")]
    kind = ["--device", "cuda", "--dtype", "bfloat16", *LLAMA_1B]
    return [
        _bench(f"{tokens} tokens", 200, "bench_training", *kind, "--lengths", tokens)
        for tokens in ("4096", "32768")
    ]


PARTS: dict[str, Callable[[str, Path], list[Step]]] = {
    "tests": _tests,
    "sanitizer": _sanitizer,
    "model": _model,
    "ops": _ops,
    "models": _models,
    "decode": _decode,
    "training": _training,
}
"""In the order in which they are worth most."""

_INI = """[pytest]
addopts = -v --import-mode=importlib
markers =
    ray: starts Ray processes
    slow: longer than a minute
    gpu: needs an accelerator
"""


def _pytest(
    name: str, device: str, out: Path, limit: float, *what: str, empty_ok: bool = False
) -> Step:
    """Without the repository's own options and plugins, which a GPU machine need not have."""
    ini = out.absolute() / "pytest.ini"
    ini.parent.mkdir(parents=True, exist_ok=True)
    ini.write_text(_INI)
    marked = "gpu" if device == "cuda" else "not gpu and not slow and not ray"
    command = [PYTHON, "-m", "pytest", "-c", str(ini), "--rootdir", str(ROOT), "-p",
               "no:cacheprovider", "-m", marked, *what]  # fmt: skip
    env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return Step(name=name, command=command, limit=limit, env=env, empty_ok=empty_ok)


def _bench(name: str, limit: float, job: str, *options: str) -> Step:
    return Step(name=name, command=[PYTHON, "-m", f"jobs.{job}", *options], limit=limit)


if __name__ == "__main__":
    typer.run(main)
