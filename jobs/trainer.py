"""Training under Ray Train with DeepSpeed ZeRO: the one door to both.

A `Run` is data: a student, maybe a teacher, and stages to go through. Every worker runs `_train`:
build, then for each stage one engine, then export. Batches are a pure function of the step, so a
run that is interrupted goes on where its last checkpoint was, with the same batches.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.progress import Progress, note
from cluster.session import session
from jobs.run import FlashShape, Heads, Run, Shape, Stage
from linearized.errors import ConfigError, DataError, JobError
from linearized.training.objective import OBJECTIVES
from linearized.training.tokenizer import check_tokenizer


def fit(run: Run) -> dict[str, Any]:
    """Train, export to `run.out`, and return what `run.out/run.json` holds. A run that finished
    with the same settings and inputs is not repeated."""
    run = run.absolute()
    run.check_out()
    key = run.key()
    for model in run.inputs:
        if model != run.data:
            check_tokenizer(run.data, model)
    report = run.out / "run.json"
    if run.fresh:
        shutil.rmtree(run.out, ignore_errors=True)
        shutil.rmtree(run.storage, ignore_errors=True)
    if report.exists():
        done = json.loads(report.read_text())
        if done.get("key") == key:
            note(f"{run.name}: reused {run.out}")
            return done
    started = time.perf_counter()
    with session(num_cpus=run.workers.count * run.workers.cpus):
        result = _trainer(run, key).fit()
    if result.error is not None:
        raise JobError(f"training {run.name} failed: {result.error}", job=run.name, status="FAILED")
    done = {
        "name": run.name,
        "key": key,
        "seconds": round(time.perf_counter() - started, 1),
        **json.loads((run.out / "training.json").read_text()),
    }
    (run.out / "training.json").unlink()
    report.write_text(json.dumps(done, indent=2) + "\n")
    shutil.rmtree(run.storage, ignore_errors=True)
    return done


def _trainer(run: Run, key: str) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = run.workers
    return TorchTrainer(
        _train,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if workers.gpu else {})},
        ),
        run_config=RunConfig(
            name=key,  # a run of this name that left a checkpoint is taken up again by Ray
            storage_path=str(run.storage),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )


def _train(config: dict[str, Any]) -> None:
    """The function that every worker runs."""
    import torch
    from ray import train

    from linearized.training.blocks import Blocks

    run: Run = config["run"]
    torch.set_num_threads(run.workers.cpus)
    torch.manual_seed(run.seed)
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    blocks, held_out = Blocks(run.data / "train"), Blocks(run.data / "held_out")
    student, teacher = _models(run, train.torch.get_device())
    measure = functools.partial(_perplexity, held_out=held_out, run=run, rank=rank, world=world)
    perplexity: dict[str, float] = {}
    resume = _resume()
    if teacher is not None:
        perplexity["teacher"] = measure(teacher)
    if isinstance(run.student, Path):
        perplexity["before"] = measure(student)
    losses: list[list[float]] = []
    for index in range(len(run.stages)):
        if resume is not None and index < resume["stage"]:
            continue
        losses += _stage(run, index, student, teacher, blocks, resume)
        resume = None
    found: dict[str, Any] = {"perplexity": perplexity}
    if isinstance(run.student, Heads):
        found["accuracies"] = student.accuracies = _accuracies(
            student, teacher, held_out, run, rank, world
        )
    else:
        perplexity["after"] = measure(student)
    if rank == 0:
        results = {
            **found,
            "parameters": sum(p.numel() for p in student.parameters()),
            "tokens": sum(stage.steps * stage.batch for stage in run.stages) * blocks.block,
            "losses": losses,
        }
        _export(run, student, results)
    train.report(perplexity)


def _stage(
    run: Run, index: int, student: Any, teacher: Any, blocks: Any, resume: dict[str, Any] | None
) -> list[list[float]]:
    """Train one stage; the loss of every few steps as [stage, step, loss]."""
    import torch
    from ray import train

    stage = run.stages[index]
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    objective = OBJECTIVES[stage.objective]
    engine = _engine(objective(student, teacher if objective.needs_teacher else None), run, stage)
    first = 0
    if resume is not None:
        engine.load_checkpoint(resume["folder"], tag="state")
        first = resume["step"]
    losses: list[list[float]] = []
    title = run.name if len(run.stages) == 1 else f"{run.name}: {stage.objective}"
    with Progress(title, total=stage.steps, unit="steps", quiet=rank != 0) as progress:
        started = time.perf_counter()
        for step in range(first, stage.steps):
            batch = blocks.batch(
                step, batch_size=stage.batch, rank=rank, world_size=world, seed=run.seed + index
            )
            loss = engine(batch.tokens.to(engine.device))
            engine.backward(loss)
            engine.step()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DataError(f"the loss is {value} at step {step}; lower the learning rate")
            if step % 10 == 0 or step + 1 == stage.steps:
                losses.append([index, step, round(value, 4)])
            rate = (step + 1 - first) * stage.batch * blocks.block / (time.perf_counter() - started)
            progress.update(step + 1, loss=round(value, 3), tokens_per_second=round(rate))
            if (step + 1) % stage.checkpoint_every == 0 or step + 1 == stage.steps:
                _checkpoint(engine, index, step + 1, value)
    engine.destroy()
    torch.distributed.barrier()
    return losses


def _engine(objective: Any, run: Run, stage: Stage) -> Any:
    import deepspeed
    import torch

    groups = stage.optim.groups(objective)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    scale = functools.partial(stage.optim.scale, steps=stage.steps)
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, scale),
        config={
            "train_micro_batch_size_per_gpu": stage.batch // run.workers.count,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": stage.optim.clip,
            "zero_optimization": {"stage": run.workers.zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": run.workers.gpu},
            "torch_autocast": {"enabled": run.workers.autocast, "dtype": "bfloat16"},
            "steps_per_print": 1_000_000_000,
        },
    )
    return engine


def _models(run: Run, device: Any) -> tuple[Any, Any]:
    """(student, teacher or None) on this worker's device. On a GPU the teacher is bfloat16, as the
    student is for DeepSpeed."""
    import torch
    import transformers

    import linearized
    from linearized.medusa import MedusaHeads

    dtype = torch.bfloat16 if run.workers.gpu else torch.float32
    teacher = None if run.teacher is None else linearized.load(run.teacher, dtype=dtype).to(device)
    if isinstance(run.student, Heads):
        if teacher is None:
            raise ConfigError("Medusa's heads need a target, as the run's teacher")
        heads = MedusaHeads.on(teacher, run.student.count, linearized.fingerprint(teacher))
        return heads.train().to(device), teacher
    if isinstance(run.student, Path):
        student = linearized.load(run.student)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(run.data / "tokenizer")
        vocab_size = len(tokenizer) if teacher is None else teacher.config.vocab_size
        shape, of = run.student, (tokenizer, vocab_size)
        config = _flash(shape, *of) if isinstance(shape, FlashShape) else _llama(shape, *of)
        student = transformers.AutoModelForCausalLM.from_config(config)
    if run.linear is not None:
        linearized.linearize(student, run.linear)
    if teacher is not None and teacher.config.vocab_size != student.config.vocab_size:
        raise ConfigError(
            f"teacher {run.teacher} has a vocabulary of {teacher.config.vocab_size}, the student "
            f"of {student.config.vocab_size}; they must share one tokenizer"
        )
    return student.train().to(device), teacher


def _llama(shape: Shape, tokenizer: Any, vocab_size: int) -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.max_context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _flash(shape: FlashShape, tokenizer: Any, vocab_size: int) -> Any:
    from linearized import FlashConfig

    return FlashConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        head_dim=shape.head_dim,
        group=shape.group,
        augment=shape.augment,
        taps=shape.taps,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _perplexity(model: Any, *, held_out: Any, run: Run, rank: int, world: int) -> float:
    """Of all workers together, each on its share of the held-out blocks."""
    import torch

    from linearized.evaluation.perplexity import negative_log_likelihood

    totals = negative_log_likelihood(model, _share(held_out, run, rank, world))
    sums = torch.tensor(totals, dtype=torch.float64, device=model.device)
    torch.distributed.all_reduce(sums)
    return round(math.exp(sums[0] / sums[1]), 4)


def _accuracies(
    heads: Any, target: Any, held_out: Any, run: Run, rank: int, world: int
) -> list[list[float]]:
    """[head][rank], how often a guess is what the target says, on held-out text."""
    import torch

    heads.eval()
    batches = _share(held_out, run, rank, world)
    found = sum(heads.right(target, tokens.to(target.device)) for tokens in batches)
    sums = torch.as_tensor(found, device=target.device)
    torch.distributed.all_reduce(sums)
    rates = sums[:, :-1] / sums[:, -1:]
    return [[round(rate, 4) for rate in row] for row in rates.tolist()]


def _share(held_out: Any, run: Run, rank: int, world: int) -> Iterator[Any]:
    """This worker's batches of the held-out blocks that are evaluated."""
    count = min(run.eval_blocks, len(held_out))
    spread = [i * len(held_out) // count for i in range(count)]  # over all documents
    mine = spread[rank::world]
    return (held_out.rows(mine[i : i + 8]) for i in range(0, len(mine), 8))


def _checkpoint(engine: Any, stage: int, step: int, loss: float) -> None:
    """Every rank writes its shard; Ray gathers them into one checkpoint."""
    from ray import train

    with tempfile.TemporaryDirectory(prefix="lin-") as folder:
        engine.save_checkpoint(
            folder, tag="state", client_state={"stage": stage, "step": step}, save_latest=False
        )
        (Path(folder) / "at.json").write_text(json.dumps({"stage": stage, "step": step}))
        metrics = {"stage": stage, "step": step, "loss": loss}
        train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))


def _resume() -> dict[str, Any] | None:
    """Where the last checkpoint of this run was, if there is one."""
    from ray import train

    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        return None
    folder = checkpoint.to_directory()
    return {"folder": folder, **json.loads((Path(folder) / "at.json").read_text())}


def _export(run: Run, student: Any, results: dict[str, Any]) -> None:
    """Write the model's folder with its tokenizer. It is complete or not there at all."""
    part = run.out.with_name(run.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    student.save_pretrained(part)
    for file in (run.data / "tokenizer").iterdir():
        shutil.copy(file, part / file.name)
    (part / "training.json").write_text(json.dumps(results))
    shutil.rmtree(run.out, ignore_errors=True)
    part.rename(run.out)
