"""The main job, end to end, on this machine: a cluster, training, serving, a report.

Starts a local Ray head, submits each stage to it as users would (`ray job submit`), deploys the
app, measures it over HTTP, and stops all that it started, whatever happens.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cluster.local import LocalCluster
from cluster.submit import submit
from jobs import cli, models, report
from jobs.serve import interrupt, start_command, wait_until_healthy

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "stages.transfer.steps=60",
    "stages.transfer.batch=2",
    "stages.distillation.steps=40",
    "stages.distillation.batch=2",
    "eval_blocks=16",
)
"""The recipe `adapt`, as short as a demo has to be: 61,440 tokens of transfer, 40,960 of
distillation."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    run: Path = Path("runs/demo")
    """Folder for everything that the demo makes."""
    model: str | None = None
    """The model to linearize: a Hugging Face folder, a GGUF file, or a name on the Hub. null trains
    a small softmax Llama first."""
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
    run.mkdir(parents=True, exist_ok=True)
    model = None if config.model is None else models.folder_of(config.model, run / models.CACHE)
    began = time.perf_counter()
    console.print("Starting a local Ray cluster")
    cpus = max(2, os.cpu_count() or 2)
    with LocalCluster(num_cpus=cpus, log=run / "logs" / "head.log") as cluster:
        seconds = {"cluster": round(time.perf_counter() - began, 1)}
        serving = start_command(cluster.http_port, run / "target", run / "draft")
        stages = {**_training(run, model, config), "serve": serving}
        for name, entrypoint in stages.items():
            started = time.perf_counter()
            _submit(cluster, run, name, entrypoint)
            if name == "serve":
                wait_until_healthy(cluster.http_port)
            seconds[name] = round(time.perf_counter() - started, 1)
        url = f"http://127.0.0.1:{cluster.http_port}"
        softmax = model or run / "teacher"
        settings = [
            f"run={run}",
            f"model={softmax}",
            f"url={url}",
            f"seconds={json.dumps(json.dumps(seconds))}",
        ]
        _submit(cluster, run, "report", ["python", "-m", "jobs.report", "demo", *settings])
    done = json.loads((run / "report.json").read_text())
    done["seconds"]["total"] = round(time.perf_counter() - began, 1)
    (run / "report.json").write_text(json.dumps(done, indent=2) + "\n")
    report.show(done, console)
    console.print(f"\nReport: {run / 'report.json'}, {run / 'report.png'}")


def _training(run: Path, model: Path | None, config: DemoConfig) -> dict[str, list[str]]:
    """Stage by stage, the command of its job. `model`: the user's own."""
    source = config.source
    teacher = (model or run / "teacher").absolute()
    if Path(source).exists():  # the job runs in a copy of the repository
        source = str(Path(source).absolute())
    data, target, draft = run / "data", run / "target", run / "draft"
    made = {
        "data": ["jobs.data", "demo", f"source={source}", f"out={data}"],
        "teacher": ["jobs.finetune", "pretrain", f"data={data}", f"out={teacher}"],
        "probe": ["jobs.probe", "demo", f"model={teacher}", f"text={source}"],
        "linearize": ["jobs.finetune", "demo", f"model={teacher}", f"data={data}", f"out={target}"],
        "draft": ["jobs.finetune", "draft", f"target={target}", f"data={data}", f"out={draft}"],
    }
    made["probe"].append(f"out={run / 'probe'}")
    if model is None:  # whose texts are short: with groups of 64 all of them would be near
        made["probe"].append("settings={group: 16}")
        made["linearize"].append("linear.group=16")
    else:
        del made["teacher"]
        made["data"] += [f"tokenizer={teacher}", "block=512"]
        made["probe"] += ["row=512", "length=null", "rows=4", "tokens=16384"]
        made["linearize"][1:2] = ["adapt", *SHORT]
    fresh = ["fresh=true"] if config.fresh else []  # each job knows what it has made
    return {name: ["python", "-m", *command, *fresh] for name, command in made.items()}


def _submit(cluster: LocalCluster, run: Path, name: str, entrypoint: list[str]) -> None:
    log = run / "logs" / f"{name}.log"
    submit(cluster.env, entrypoint, name=name, working_dir=ROOT, log=log)


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
