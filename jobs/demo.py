"""The main job, end to end, on this machine: a cluster, training, serving, a report.

Starts a local Ray head, submits each stage to it as users would (`ray job submit`), deploys the
app, measures it over HTTP, and stops all that it started, whatever happens.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cluster.local import LocalCluster
from cluster.submit import submit
from jobs import cli, report
from jobs.serve import interrupt, start_command, wait_until_healthy

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    run: Path = Path("runs/demo")
    """Folder for everything that the demo makes."""
    model: Path | None = None
    """Hugging Face folder of the model to linearize. null trains a small softmax Llama first."""
    source: str = "stdlib"
    """The corpus, in the form that jobs.data takes."""
    fresh: bool = False
    """Whether to start over instead of reusing finished stages."""


def demo() -> DemoConfig:
    """Sizes for two CPU cores and about twelve minutes."""
    return DemoConfig()


RECIPES = {"demo": demo}


def main(config: DemoConfig) -> None:
    signal.signal(signal.SIGTERM, interrupt)
    console = Console(highlight=False)
    run = config.run.absolute()
    if config.fresh:
        shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    console.print("Starting a local Ray cluster")
    cpus = max(2, os.cpu_count() or 2)
    with LocalCluster(num_cpus=cpus, log=run / "logs" / "head.log") as cluster:
        seconds = {"cluster": round(time.perf_counter() - began, 1)}
        serving = start_command(cluster.http_port, run / "target", run / "draft")
        stages = {**_training(run, config), "serve": serving}
        for name, entrypoint in stages.items():
            started = time.perf_counter()
            _submit(cluster, run, name, entrypoint)
            if name == "serve":
                wait_until_healthy(cluster.http_port)
            seconds[name] = round(time.perf_counter() - started, 1)
        url = f"http://127.0.0.1:{cluster.http_port}"
        settings = [f"run={run}", f"url={url}", f"seconds={json.dumps(json.dumps(seconds))}"]
        _submit(cluster, run, "report", ["python", "-m", "jobs.report", "demo", *settings])
    done = json.loads((run / "report.json").read_text())
    done["seconds"]["total"] = round(time.perf_counter() - began, 1)
    (run / "report.json").write_text(json.dumps(done, indent=2) + "\n")
    report.show(done, console)
    console.print(f"\nReport: {run / 'report.json'}, {run / 'report.png'}")


def _training(run: Path, config: DemoConfig) -> dict[str, list[str]]:
    """Stage by stage, the command of its job."""
    teacher = (config.model or run / "teacher").absolute()
    source = config.source
    if Path(source).exists():  # the job runs in a copy of the repository
        source = str(Path(source).absolute())
    data = [f"source={source}", f"out={run / 'data'}"]
    if config.model is not None:
        data.append(f"tokenizer={teacher}")
    stages = {"data": ["jobs.data", "demo", *data]}
    if config.model is None:
        stages["teacher"] = ["jobs.pretrain", "demo", f"out={teacher}"]
    stages["probe"] = ["jobs.probe", "demo", f"model={teacher}", f"text={source}"]
    stages["probe"].append(f"out={run / 'probe'}")
    target, draft = run / "target", run / "draft"
    stages["linearize"] = ["jobs.finetune", "demo", f"model={teacher}", f"out={target}"]
    stages["draft"] = ["jobs.draft", "demo", f"target={target}", f"out={draft}"]
    if config.model is None:  # whose texts are short: with groups of 64 all of them would be near
        stages["probe"].append("settings={group: 16}")
        stages["linearize"].append("linear.group=16")
    else:
        stages["probe"] += ["row=512", "length=null", "rows=4", "tokens=16384"]
    for name, command in stages.items():
        if name not in ("data", "probe"):
            command.append(f"data={run / 'data'}")
    return {name: ["python", "-m", *command] for name, command in stages.items()}


def _submit(cluster: LocalCluster, run: Path, name: str, entrypoint: list[str]) -> None:
    log = run / "logs" / f"{name}.log"
    submit(cluster.env, entrypoint, name=name, working_dir=ROOT, log=log)


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
