"""Workers of a run as processes of their own, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import linearized
from jobs.run import Run, Stage, Workers
from jobs.train import checkpoints
from jobs.train.worker import Task
from linearized.training.blocks import Document, fill, write_shard
from linearized.training.optim import Optim
from linearized.training.tokenizer import fingerprint

BLOCK = 24
LINEAR = linearized.LinearConfig(attention="grouped", group=8, taps=4)

RANK = """
import os, torch
from jobs.train import log
torch.set_num_threads(1)
log.EVERY = 1
from jobs.train.worker import Worker
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
torch.distributed.init_process_group(
    "gloo", init_method="file://" + meeting, rank=rank, world_size=world
)
exec(before)
Worker(task, rank=rank, world=world, device=torch.device("cpu")).work()
torch.distributed.barrier()
os._exit(0)  # DeepSpeed leaves threads behind
"""


@pytest.fixture(scope="session")
def server():
    """A process that has imported what ranks need, and forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs.train.worker", "deepspeed", "linearized"])
    return context


@pytest.fixture(scope="session")
def folders(tokenizer, tmp_path_factory) -> Path:
    """`data`, rows of several documents, and `teacher`, a random Llama with tied weights."""
    base = tmp_path_factory.mktemp("folders")
    random = np.random.default_rng(0)
    for split in ("train", "held_out"):
        (base / "data" / split).mkdir(parents=True)
        documents = [
            Document(np.cumsum(random.integers(0, 3, size)).astype(np.int32) % len(tokenizer))
            for size in random.integers(5, 60, 60)
        ]
        file = base / "data" / split / "0.arrow"
        write_shard(file, fill(documents, block=BLOCK), tokenizer="x", source="x", split=split)
    for folder in (base / "data" / "tokenizer", base / "teacher"):
        tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(base / "teacher")
    (base / "data" / "data.json").write_text(f'{{"key": "{fingerprint(base / "teacher")}"}}')
    return base


@pytest.fixture
def run(folders, tmp_path) -> Run:
    """Two stages of a few steps."""
    optim = Optim(lr=5e-3, warmup=2)
    both = [
        Stage(objective=objective, steps=4, batch=4, optim=optim, checkpoint_every=2)
        for objective in ("transfer", "distillation")
    ]
    return Run(
        name="linearize", data=folders / "data", out=tmp_path / "out", student=folders / "teacher",
        linear=LINEAR, teacher=folders / "teacher", stages=tuple(both),
        workers=Workers(count=1, zero=0), eval_blocks=8,
    )  # fmt: skip


Go = Callable[..., list[int]]


@pytest.fixture
def go(server, tmp_path) -> Go:
    """Do a run on its workers, from its last checkpoint if there is one. Returns how their
    processes ended. `before` is code that they go through first."""

    def go(run: Run, *, before: str = "") -> list[int]:
        run = run.absolute()
        key = run.key()
        root = run.checkpoints(key)
        found, damaged = checkpoints.latest(root)
        assert not damaged
        attempt = f"{time.monotonic_ns():x}"
        task = Task(run=run, key=key, root=root, attempt=attempt, checkpoint=found)
        meeting = str(tmp_path / f"meeting-{attempt}")
        world = run.workers.count
        ranks = [
            server.Process(
                target=exec,
                args=(RANK, {"task": task, "rank": rank, "world": world, "meeting": meeting,
                             "before": before}),
            )
            for rank in range(world)
        ]  # fmt: skip
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        return [rank.exitcode for rank in ranks]

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return go
