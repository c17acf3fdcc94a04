"""How well would this model linearize? In one process, in minutes, without Ray and DeepSpeed.

Fits each candidate's attention layer by layer to that of the softmax model on a few ten thousand
tokens, distils it if asked to, and then measures on held-out text what it costs: perplexity over
the softmax model's, by position up to four times the length of the rows it was fitted on; the extra
nats by the place in a group; each layer's error; and what its far part, its convolution and each
layer's softmax are worth. Writes tables, a picture and probe.json to `out`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.progress import Progress, note
from jobs import cli, measure, models, probe_report
from linearized.config import ATTENTIONS, NAMED, LinearConfig
from linearized.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from jobs.probe_text import Texts


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    model: str
    """The softmax model: a Hugging Face folder, a GGUF file, or a name on the Hub."""
    text: str = "stdlib"
    """What to fit on, in the form that jobs.data takes."""
    held_out: tuple[str, ...] = ()
    """What to measure on, each in that form. Nothing: the documents of `text` that jobs.data would
    hold out."""
    text_column: str | None = None
    """The column of JSON Lines, Parquet or a dataset that holds the text."""
    candidates: tuple[str, ...] = ("anchored", "grouped")
    """Names of attentions, or of combinations such as `anchored`, which are fitted; or folders of
    models that have been linearized from `model`, which are measured as they are."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of LinearConfig that all candidates share, such as {group: 128}."""
    tokens: int = 50_000
    """Number of tokens to fit on."""
    row: int = 1024
    """Number of tokens in a row to fit on. Every row is a step."""
    rows: int = 16
    """Number of rows of each held-out text."""
    length: int | None = None
    """Number of tokens in a row of held-out text. null means four times `row`, or as many as the
    model was made for."""
    passkeys: int = 0
    """Number of rows with a pass key to be found again, as long as those of held-out text."""
    softmax: float = 0.25
    """Share of the layers that a hybrid keeps. They are chosen by what each is worth alone, on rows
    of `text` that are neither fitted nor measured on."""
    keep: tuple[int, ...] | None = None
    """The layers that a hybrid keeps, if they are known: then it is not measured what each layer is
    worth, which takes a forward of four rows a layer."""
    lr: float = 5e-4
    """Learning rate of the projections."""
    new_lr: float = 2e-2
    """Learning rate of the parameters that linearizing adds."""
    distil: int = 0
    """Number of tokens to distil every candidate on after its fit, a row a step: it learns to say
    what the softmax model says. 0 leaves it as it was fitted."""
    distil_lr: float = 1e-4
    """Learning rate of the weights in distillation."""
    distil_new_lr: float = 2e-3
    """Learning rate of the added parameters in distillation."""
    trained: str = "layers"
    """What learns in distillation: `all` weights, those of the `layers`, or of `attention`."""
    autocast: bool | None = None
    """Whether to multiply in bfloat16. null does so on a GPU, and on a CPU if that is faster."""
    threads: int = 0
    """Number of torch's threads; 0 leaves the choice to torch."""
    seed: int = 0
    """Chooses the rows, and a variant's random features."""
    save: bool = False
    """Whether to keep the fitted models, as folders in `out`."""
    out: Path = Path("runs/probe")
    fresh: bool = False
    """Whether to start over even if this has been done."""

    def __post_init__(self) -> None:
        least_of = {
            "tokens": 2, "row": 2, "rows": 1, "length": 2, "passkeys": 0, "threads": 0, "distil": 0,
        }  # fmt: skip
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if self.tokens < self.row:
            raise ConfigError(f"tokens={self.tokens} do not fill a row of {self.row}")
        if 0 < self.distil < self.row:
            raise ConfigError(f"distil={self.distil} tokens do not fill a row of {self.row}")
        if not self.candidates:
            raise ConfigError("candidates must name an attention, such as anchored")
        if not 0 <= self.softmax < 1:
            raise ConfigError(f"softmax must be at least 0 and less than 1, got {self.softmax}")
        for name in self.candidates:
            if not self.is_folder(name):
                self.candidate(name)
            elif not Path(name).is_dir():
                raise ConfigError(
                    f"there is no folder {name}; name an attention, or the folder of a linear model"
                )

    @staticmethod
    def is_folder(candidate: str) -> bool:
        """Is it no name of an attention, but a place? A folder that has such a name is `./name`."""
        named = candidate in (*ATTENTIONS, *NAMED)
        return "/" in candidate or (not named and Path(candidate).is_dir())

    def candidate(self, name: str) -> LinearConfig:
        return LinearConfig.named(name, **{"seed": self.seed, **self.settings})


def probe() -> ProbeConfig:
    """The demo's softmax model, on the Python standard library."""
    return ProbeConfig(model="runs/demo/teacher", row=256)


def demo() -> ProbeConfig:
    """A minute of it, for the demo's report: the recommended attention beside the paper's."""
    return replace(
        probe(), tokens=32_768, rows=16, length=256, softmax=0.0, out=Path("runs/demo/probe")
    )


def smollm2() -> ProbeConfig:
    """SmolLM2-135M with a window of eight groups, as docs/quality.md shows it."""
    return ProbeConfig(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        candidates=("anchored",),
        settings={"window": 7, "augment": False},
        keep=(8, 17, 18, 20, 23, 24, 28),
        tokens=32_768,
        row=2048,
        rows=8,
        length=2048,
        lr=1e-4,
        distil=102_400,
        save=True,
        out=Path("runs/smollm2/probe"),
    )


ON_THE_WAY = 2
"""Rows of each held-out text on which distillation is watched."""
RECIPES = {"probe": probe, "demo": demo, "smollm2": smollm2}


def main(config: ProbeConfig) -> None:
    import torch

    from jobs import probe_text
    from linearized.folder import load
    from linearized.training.tokenizer import check_tokenizer

    if config.threads:
        torch.set_num_threads(config.threads)
    began = time.perf_counter()
    config.out.mkdir(parents=True, exist_ok=True)
    config = replace(config, model=str(models.folder_of(config.model, config.out / models.CACHE)))
    asked = _asked(config)
    if not config.fresh and _done(config.out / "probe.json") == asked:
        note(f"probe: {config.out / 'probe.json'} is of the same model, texts and settings")
        return
    for name in filter(config.is_folder, config.candidates):
        check_tokenizer(config.model, name)
    teacher = load(config.model).float().eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher.to(device)  # type: ignore[arg-type]
    length = _length(config, getattr(teacher.config, "max_position_embeddings", None))
    texts = probe_text.read(
        config.model, config.text, config.held_out, text_column=config.text_column,
        tokens=config.tokens, distil=config.distil, row=config.row, rows=config.rows, length=length,
        passkeys=config.passkeys, seed=config.seed,
    )  # fmt: skip
    autocast = config.autocast
    if autocast is None:
        autocast = device.type == "cuda" or measure.bfloat16_is_faster(torch.get_num_threads())
    narrow = torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    with narrow:
        wanted = {
            name: _losses(teacher, rows, f"softmax model on {name}")
            for name, rows in texts.held_out.items()
        }
        recalled = None
        if texts.passkeys:
            recalled = _recalled(teacher, texts.passkeys, "softmax model")
        found = [_candidate(config, name, teacher, texts, wanted) for name in config.candidates]
    machine = measure.Machine.measure(device, torch.float32)
    result: dict[str, Any] = {
        "model": config.model,
        "text": config.text,
        "tokens": int(texts.fit.numel()),
        "distil": int(texts.distil.numel()),
        "row": config.row,
        "rows": {name: list(rows.shape) for name, rows in texts.held_out.items()},
        "seed": config.seed,
        "autocast": bool(autocast),
        "perplexity": {name: probe_report.perplexity(x) for name, x in wanted.items()},
        "passkey": recalled,
        "candidates": found,
        "seconds": round(time.perf_counter() - began, 1),
        "asked": asked,
    }
    console = measure.console()
    console.print(f"\n{machine}")
    probe_report.show(result, console)
    probe_report.draw(result, config.out / "probe.png")
    line = measure.last_line("jobs.probe", machine, **result)
    (config.out / "probe.json").write_text(line + "\n")
    note(f"picture: {config.out / 'probe.png'}")
    print(line)


def _length(config: ProbeConfig, limit: int | None) -> int:
    """Tokens of a row to measure on, for a model that has positions for so many."""
    length = config.length or min(4 * config.row, limit or 4 * config.row)
    if limit is not None and max(config.row, length) > limit:
        raise ConfigError(
            f"rows of {max(config.row, length)} tokens are longer than the {limit} that the model "
            "was made for; choose a smaller row or length"
        )
    return length


def _asked(config: ProbeConfig) -> dict[str, Any]:
    """What a result depends on, as JSON has it."""
    from linearized.training import corpus

    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "fresh")}
    texts = [corpus.fingerprint(source) for source in (config.text, *config.held_out)]
    folders = [config.model, *filter(config.is_folder, config.candidates)]
    files = sorted(file for folder in folders for file in Path(folder).glob("*.safetensors"))
    weights = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    asked = {"settings": settings, "texts": texts, "weights": weights}
    return dict(json.loads(json.dumps(asked)))


def _done(file: Path) -> Any:
    """What an earlier result was asked."""
    try:
        return json.loads(file.read_text()).get("asked")
    except (OSError, ValueError):
        return None


def _candidate(
    config: ProbeConfig,
    name: str,
    teacher: PreTrainedModel,
    texts: Texts,
    wanted: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Fit one and measure it."""
    from linearized.evaluation import ablation
    from linearized.models import linear_config, new_state
    from linearized.slots import layer_number
    from linearized.training import fit

    fitted = not config.is_folder(name)
    curve: list[float] = []
    started = time.perf_counter()
    if fitted:
        student = fit.student_of(teacher, config.candidate(name), shared=not config.distil)
        curve = _fit(config, name, student, teacher, texts)
    else:
        student = _linearized(name, teacher)
    seconds = time.perf_counter() - started
    distilled = _distil(config, name, student, teacher, texts, wanted) if config.distil else None
    if config.save and (fitted or config.distil):  # before measuring, which may be given up
        student.save_pretrained(config.out / (name if fitted else Path(name).name))
    linear = linear_config(student)
    errors = fit.errors(student, teacher, list(texts.aside[:, None]))
    found: dict[str, Any] = {
        "name": name,
        "config": linear.to_dict(),
        "state_bytes": new_state(student, 1).nbytes,
        "fit_seconds": round(seconds, 1),
        "curve": [round(x, 5) for x in curve],
        "distilled": distilled,
        "errors": {layer_number(module): round(x, 5) for module, x in errors.items()},
        "texts": {text: {} for text in wanted},
    }

    def extra(kind: str, rows: Mapping[str, Tensor], of: str) -> None:
        for text, tokens in rows.items():
            losses = _losses(student, tokens, f"{name}{of} on {text}")
            than = wanted[text][: len(tokens), : tokens.shape[1] - 1]
            found["texts"][text][kind] = probe_report.compare(losses, than, linear.group)

    extra("whole", texts.held_out, "")
    if texts.passkeys:
        found["passkey"] = _recalled(student, texts.passkeys, name)
    if ablation.has_far_part(student):
        with ablation.without_far_part(student):
            extra("far part off", texts.held_out, " without far part")
            if texts.passkeys:
                found["passkey, far part off"] = _recalled(student, texts.passkeys, name)
    if ablation.has_convolution(student):
        with ablation.without_convolution(student):
            extra("convolution off", texts.held_out, " without convolution")
    keep = sorted(config.keep or ())
    if config.keep is None:
        worth = _worth(student, name, texts.aside)
        order = sorted(worth, key=lambda layer: -worth[layer])
        found["worth"] = {layer: round(worth[layer], 5) for layer in sorted(worth)}
        found["order"] = order
        keep = sorted(order[: int(config.softmax * len(order))])
    if keep:
        found["kept"] = keep
        with ablation.softmax_in(student, keep):
            extra("hybrid", texts.held_out, f", {len(keep)} layers softmax,")
    return found


def _fit(
    config: ProbeConfig,
    name: str,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Texts,
) -> list[float]:
    """The error, averaged over the layers, after each row."""
    from linearized.training import fit
    from linearized.training.optim import Optim

    optim = Optim(lr=config.lr, new_lr=config.new_lr, warmup=5, weight_decay=0.0)
    curve: list[float] = []
    with Progress(f"fit {name}", total=len(texts.fit), unit="rows") as progress:

        def report(step: int, errors: dict[str, float]) -> None:
            curve.append(sum(errors.values()) / len(errors))
            progress.update(step, error=round(curve[-1], 4))

        fit.fit(student, teacher, list(texts.fit[:, None]), optim=optim, report=report)
    return curve


def _distil(
    config: ProbeConfig,
    name: str,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Texts,
    wanted: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The loss of each row, and perplexity over the softmax model's on the way, on a few rows of
    each held-out text: [tokens, ratio], before the first row, after an eighth, a quarter, …"""
    from linearized.training.distil import distil
    from linearized.training.optim import Optim

    optim = Optim(lr=config.distil_lr, new_lr=config.distil_new_lr, warmup=5, weight_decay=0.0)
    steps = len(texts.distil)
    stops = {steps // 8, steps // 4, steps // 2, steps}
    losses: list[float] = []
    ratios: dict[str, list[tuple[int, float]]] = {text: [] for text in wanted}

    def measure_on() -> None:
        for text, rows in texts.held_out.items():
            found = _losses(student, rows[:ON_THE_WAY], f"{name} on {text}")
            extra = found - wanted[text][:ON_THE_WAY, : found.shape[1]]
            ratio = math.exp(float(extra.double().mean()))
            ratios[text].append((len(losses) * config.row, round(ratio, 4)))

    measure_on()
    seconds, began = 0.0, time.perf_counter()
    with Progress(f"distil {name}", total=steps, unit="rows") as progress:

        def report(step: int, loss: float) -> None:
            nonlocal seconds, began
            losses.append(round(loss, 4))
            seconds += time.perf_counter() - began
            rate = round(step * config.row / seconds)
            progress.update(step, nats=losses[-1], tokens_per_second=rate)
            if step in stops:
                measure_on()
            began = time.perf_counter()

        distil(
            student, teacher, list(texts.distil[:, None]), optim=optim, trained=config.trained,
            report=report,
        )  # fmt: skip
    return {"seconds": round(seconds, 1), "losses": losses, "ratios": ratios}


def _linearized(folder: str, teacher: PreTrainedModel) -> PreTrainedModel:
    """The model in a folder, beside the softmax model that it came from.

    Raises:
        ModelError: it is not linear. ConfigError: it came from a model of another shape.
    """
    from linearized.folder import load
    from linearized.models import linear_config

    student = load(folder).float().eval()
    linear_config(student)
    for size in ("vocab_size", "hidden_size", "num_hidden_layers"):
        own, other = getattr(student.config, size), getattr(teacher.config, size)
        if own != other:
            raise ConfigError(
                f"{folder} was not linearized from this softmax model: its {size} is {own}, the "
                f"softmax model's {other}; name the folder of the model that it came from"
            )
    student.to(teacher.device)  # type: ignore[arg-type]
    return student


def _worth(student: PreTrainedModel, name: str, rows: Tensor) -> dict[int, float]:
    """By how many nats a token it is better with softmax in each layer alone."""
    from linearized.evaluation.ablation import softmax_in
    from linearized.evaluation.perplexity import token_losses
    from linearized.slots import layer_number, linear_modules

    layers = [layer_number(module) for module in linear_modules(student)]

    def losses() -> float:
        return sum(float(token_losses(student, row[None]).mean()) for row in rows) / len(rows)

    worth, whole = {}, losses()
    with Progress(f"layers of {name}", total=len(layers), unit="layers") as progress:
        for count, layer in enumerate(layers, start=1):
            with softmax_in(student, [layer]):
                worth[layer] = whole - losses()
            progress.update(count, worth=round(worth[layer], 4))
    return worth


def _recalled(
    model: PreTrainedModel, keys: list[tuple[Tensor, int]], name: str
) -> dict[str, float]:
    """The share of pass keys that a model would say, and nats a token of them."""
    from linearized.evaluation.recall import answer

    losses, right = [], 0
    with Progress(f"pass keys, {name}", total=len(keys), unit="rows") as progress:
        for count, (row, size) in enumerate(keys, start=1):
            found, said = answer(model, row, size)
            losses.append(found)
            right += said
            progress.update(count, nats=round(found, 3))
    return {"right": right / len(losses), "nats": round(sum(losses) / len(losses), 4)}


def _losses(model: PreTrainedModel, rows: Tensor, stage: str) -> Tensor:
    """[R, T-1], of one row after the other."""
    import torch

    from linearized.evaluation.perplexity import token_losses

    found = []
    with Progress(stage, total=len(rows), unit="rows") as progress:
        for count, row in enumerate(rows, start=1):
            found.append(token_losses(model, row[None]).cpu())
            progress.update(count, nats=round(float(found[-1].mean()), 3))
    return torch.cat(found)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(RECIPES, main, __doc__)
