"""Turn text into token blocks: read, split by document, tokenize, fill blocks, write Arrow files.

Writes to `out`: tokenizer/, train/*.arrow, held_out/*.arrow and data.json, all of it or nothing.
Workers read and write the files themselves: with several nodes, the source and `out` must be on
storage that all of them see. A second run with the same settings and the same files reuses what is
there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.progress import Progress, note
from cluster.session import session
from jobs import cli, models
from jobs.shards import HELD_OUT, TRAIN, Shard, Sides, Writer, plan, speed, texts
from linearized.errors import ConfigError, DataError
from linearized.training import chat, corpus, pieces, tokenizer
from linearized.training.blocks import FORMAT
from linearized.training.corpus import Skipped, Source
from linearized.training.pieces import Piece

REPORT = "data.json"
_OURS = {REPORT, "tokenizer", TRAIN, HELD_OUT, "download"}
"""What this job writes into a folder."""
TOKENIZER_BYTES = 2**28
"""A tokenizer is trained on at most about this much text, documents evenly spaced."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    source: str = corpus.STDLIB
    """Where the text comes from: "stdlib", a file, folder or glob of text, JSON Lines or Parquet,
    or a Hugging Face dataset as name or name:config. Rows of `messages`, or of `prompt` and
    `completion`, are conversations; only what the assistant says is learned."""
    split: str = "train"
    """The split of a Hugging Face dataset to read."""
    text_column: str | None = None
    """The column of JSON Lines, Parquet or a dataset that holds the text. null means `text`, or the
    only column of strings."""
    tokenizer: str | None = None
    """Folder or Hub name of an existing tokenizer, or a GGUF file. null trains one."""
    vocab_size: int = 2048
    """Number of entries of a tokenizer that is trained here."""
    end: str | None = None
    """The token that ends a document. null means the tokenizer's own end of text, which chat models
    often say at the end of a turn, too."""
    block: int = 256
    """Number of tokens in a block."""
    held_out: float = 0.05
    """Fraction of the documents that are kept from training."""
    out: Path = Path("runs/demo/data")
    fresh: bool = field(default=False, compare=False, repr=False)
    """Whether to start over even if this has been done."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must lie between 0 and 1, got {self.held_out}")
        if self.block < 2:
            raise ConfigError(f"block must be at least 2, got {self.block}")
        if self.tokenizer is None and self.vocab_size < tokenizer.SMALLEST:
            raise ConfigError(
                f"vocab_size must be at least {tokenizer.SMALLEST}, got {self.vocab_size}"
            )


def demo() -> DataConfig:
    """The Python standard library with a vocabulary of 2,048: 3.6M tokens."""
    return DataConfig()


def bench() -> DataConfig:
    """The same with a vocabulary of 4,096, for jobs.bench_decode."""
    return DataConfig(vocab_size=4096, out=Path("runs/bench/data"))


RECIPES = {"demo": demo, "bench": bench}


def main(config: DataConfig) -> None:
    if config.tokenizer is not None:
        cache = config.out.parent / models.CACHE
        config = replace(config, tokenizer=models.tokenizer_of(config.tokenizer, cache))
    prepare(config)


def prepare(config: DataConfig) -> dict[str, Any]:
    """Do the job, and return what `out/data.json` holds."""
    out = config.out.absolute()
    key = _key(config)
    part = out.with_name(out.name + ".part")
    for folder in (out, part):
        _check_ours(folder)
    done = _report(out)
    if done.get("key") == key and not config.fresh:
        note(f"data: reused {out}")
        return done
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        done = {"key": key, **_write(config, part)}
        (part / REPORT).write_text(json.dumps(done, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return done


def _check_ours(folder: Path) -> None:
    """
    Raises:
        ConfigError: it holds what this job did not write, and would be deleted.
    """
    if not folder.exists():
        return
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    strange = sorted(there - _OURS)
    if strange or (REPORT in there and not _report(folder)):
        raise ConfigError(
            f"{folder} holds {(strange or [REPORT])[0]}, which is not this job's; choose another "
            "out"
        )


def _report(folder: Path) -> dict[str, Any]:
    """What an earlier run said, if there was one."""
    try:
        found = json.loads((folder / REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "tokenizer" in found else {}


def _write(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Everything but data.json, whose contents it returns."""
    began = time.perf_counter()
    scratch = folder / "download"
    source = corpus.find(
        config.source, text_column=config.text_column, split=config.split, scratch=scratch
    )
    if source.chat and config.tokenizer is None:
        raise ConfigError(
            f"{config.source!r} holds conversations; set tokenizer to that of the model that is to "
            "learn from them"
        )
    with _cluster():
        if not source.is_text:
            source = source.numbered(_counts(source))
        sides = Sides.of(source, config.held_out)
        shards = plan(source, sides, folder)
        read = time.perf_counter()
        edges = _tokenizer(config, source, sides, shards, folder / "tokenizer")
        writer = Writer(
            source=replace(source, pieces=()),
            sides=sides,
            folder=str(folder / "tokenizer"),
            edges=edges,
            tokenizer=tokenizer.fingerprint(folder / "tokenizer"),
            block=config.block,
        )
        alone = _alone(writer, shards)
        tokenized = time.perf_counter()
        counts, skipped = _fill(writer, shards, folder)
    seconds = {"read": read - began, "tokenizer": tokenized - read}
    seconds |= {"fill": time.perf_counter() - tokenized, "total": time.perf_counter() - began}
    _check(config, counts, skipped)
    tokens = sum(count["tokens"] + count["dropped"] for count in counts.values())
    rates = {"tokens_per_second": tokens / seconds["fill"], "tokenizer_alone": alone}
    note(
        f"data: {tokens:,} tokens, {rates['tokens_per_second']:,.0f} a second; "
        f"the tokenizer alone makes {alone:,.0f}"
    )
    shutil.rmtree(scratch, ignore_errors=True)
    return {
        "format": FORMAT,
        "block": config.block,
        "tokenizer": writer.tokenizer,
        "source": config.source,
        **counts,
        "skipped": asdict(skipped),
        "speed": {name: round(value) for name, value in rates.items()},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def _counts(source: Source) -> list[int]:
    """Number of rows of each piece."""
    tasks = [{"at": at, **asdict(piece)} for at, piece in enumerate(source.pieces)]
    counts = [0] * len(tasks)
    with Progress("data: count rows", total=len(tasks), unit="pieces") as progress:
        for done, found in enumerate(_map(_count, tasks)):
            counts[found["at"]] = found["rows"]
            progress.update(done + 1)
    return counts


def _count(task: dict[str, Any]) -> dict[str, Any]:
    piece = Piece(**{name: value for name, value in task.items() if name != "at"})
    return {"at": task["at"], "rows": pieces.count(piece)}


def _tokenizer(
    config: DataConfig, source: Source, sides: Sides, shards: Sequence[Shard], folder: Path
) -> tokenizer.Edges:
    """Train or open the tokenizer, and save it to the folder. What it puts around a document."""
    if config.tokenizer is not None:
        opened = tokenizer.load(config.tokenizer)
        edges = tokenizer.edges(opened, config.end)
        opened.save_pretrained(folder)
        if source.chat and "prompt" not in source.columns:
            chat.check_template(folder)
        return edges
    train = [shard for shard in shards if shard.split == TRAIN]
    size = sum(shard.size for shard in train)
    train = train[:: size // (4 * TOKENIZER_BYTES) + 1]
    size = sum(shard.size for shard in train)
    stride = -(-size // TOKENIZER_BYTES)
    with Progress("data: train tokenizer", total=len(train), unit="shards") as progress:

        def sample() -> Iterator[str]:
            number = 0
            for done, shard in enumerate(train):
                for _, text in texts(shard, source, sides, Skipped()):
                    if number % stride == 0:
                        yield text
                    number += 1
                progress.update(done + 1)

        return tokenizer.edges(tokenizer.train(sample(), config.vocab_size, folder), config.end)


def _alone(writer: Writer, shards: Sequence[Shard]) -> float:
    """Tokens a second that the tokenizer makes on this machine, without anything around it."""
    documents = (
        text
        for shard in shards
        if shard.split == TRAIN
        for _, text in texts(shard, writer.source, writer.sides, Skipped())
    )
    return speed(tokenizer.Encoder(writer.folder), documents)


def _fill(
    writer: Writer, shards: Sequence[Shard], folder: Path
) -> tuple[dict[str, dict[str, int]], Skipped]:
    """Write the shards of all splits in parallel; the counts of each split."""
    skipped = Skipped()
    names = ("documents", "tokens", "trained", "blocks", "dropped")
    counts = {split: dict.fromkeys(names, 0) for split in (TRAIN, HELD_OUT)}
    for split in counts:
        (folder / split).mkdir()
    tasks = [asdict(shard) for shard in shards]
    with Progress("data: tokenize and fill blocks", total=len(tasks), unit="shards") as progress:
        for done, shard in enumerate(_map(_write_shard, tasks, writer=writer)):
            if "error" in shard:
                raise DataError(shard["error"])
            for name in names:
                counts[shard["split"]][name] += shard[name]
            skipped.join(Skipped(**shard["skipped"]))
            tokens = sum(count["tokens"] for count in counts.values())
            progress.update(done + 1, tokens=tokens)
    return counts, skipped


def _write_shard(task: dict[str, Any], *, writer: Writer) -> dict[str, Any]:
    return writer.write(Shard.from_dict(task))


def _check(config: DataConfig, counts: dict[str, dict[str, int]], skipped: Skipped) -> None:
    """Say what was left out.

    Raises:
        DataError: nothing, or too little, is left.
    """
    if not any(count["documents"] for count in counts.values()):
        raise corpus.no_text(config.source, skipped)
    if skipped.unreadable:
        note(
            f"data: left out {skipped.unreadable:,} files or rows that cannot be used; the first: "
            + "; ".join(skipped.examples[:3])
        )
    for split, count in counts.items():
        if count["blocks"] == 0:
            raise DataError(
                f"the {split} split of {config.source!r} has {count['dropped']} tokens, fewer than "
                f"one block of {config.block}; bring more text, or change block or held_out"
            )


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """In which `_map` works."""
    import ray.data

    with warnings.catch_warnings():
        # Ray's own defaults touch a setting of Ray's that is deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with session(log_to_driver=False):
        yield


def _map(
    function: Callable[..., dict[str, Any]], tasks: Sequence[dict[str, Any]], **settings: Any
) -> Iterator[dict[str, Any]]:
    """The function of each task, on the cluster, in the order in which they are done. What goes
    there and back is JSON: file names need not be text for Arrow's taste."""
    import ray.data

    def call(row: dict[str, Any]) -> dict[str, Any]:
        return {"json": json.dumps(function(json.loads(row["json"]), **settings))}

    rows = [{"json": json.dumps(task)} for task in tasks]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(call)
    for row in dataset.iter_rows():
        yield json.loads(row["json"])


def _key(config: DataConfig) -> str:
    """Equal for runs with equal settings and equal inputs, wherever they write."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "fresh")}
    settings["format"] = FORMAT
    settings["files"] = corpus.fingerprint(config.source, config.split)
    if config.tokenizer is not None and Path(config.tokenizer).is_dir():
        settings["tokenizer"] = tokenizer.fingerprint(config.tokenizer)
        settings["vocab_size"] = None
    return hashlib.blake2b(
        json.dumps(settings, sort_keys=True).encode(), digest_size=16
    ).hexdigest()


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
