"""Turn text into token blocks: read, split by document, tokenize, fill blocks, write Arrow.

Writes to `out`: tokenizer/, train/*.arrow, held_out/*.arrow and data.json, all of it or
nothing. With several nodes, `out` must be on storage that all of them see. A second run with the
same settings and the same files reuses what is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.progress import Progress, note
from cluster.session import session
from jobs import cli
from linearized.errors import ConfigError, DataError
from linearized.training import corpus, tokenizer
from linearized.training.blocks import FORMAT, Document, fill, write_shard

TOKENIZER_BYTES = 2**28
"""A tokenizer is trained on at most about this much text, documents evenly spaced."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    source: str = corpus.STDLIB
    """Where the text comes from: "stdlib", a file, folder or glob of text, JSON Lines or Parquet,
    or a Hugging Face dataset as name or name:config."""
    split: str = "train"
    """The split of a Hugging Face dataset to read."""
    text_column: str | None = None
    """The column of JSON Lines, Parquet or a dataset that holds the text. null means `text`, or the
    only column of strings."""
    tokenizer: str | None = None
    """Folder or Hub name of an existing tokenizer. null trains one."""
    vocab_size: int = 2048
    """Number of entries of a tokenizer that is trained here."""
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
    prepare(config)


def prepare(config: DataConfig) -> dict[str, Any]:
    """Do the job, and return what `out/data.json` holds."""
    out = config.out.absolute()
    key = _key(config)
    report = out / "data.json"
    if out.exists() and not report.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not this job's; choose another out")
    if report.exists() and not config.fresh:
        done: dict[str, Any] = json.loads(report.read_text())
        if done.get("key") == key:
            note(f"data: reused {out}")
            return done
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        done = {"key": key, **_write(config, part)}
        (part / "data.json").write_text(json.dumps(done, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return done


def _write(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Everything but data.json, whose contents it returns."""
    began = time.perf_counter()
    table = corpus.read(config.source, text_column=config.text_column, split=config.split)
    train, held_out = corpus.split_documents(table["document"].to_pylist(), config.held_out)
    splits = {"train": table.take(train), "held_out": table.take(held_out)}
    read = time.perf_counter()
    end = _tokenizer(config, splits["train"], folder / "tokenizer")
    info = {
        "block": config.block,
        "tokenizer": tokenizer.fingerprint(folder / "tokenizer"),
        "source": config.source,
    }
    tokenized = time.perf_counter()
    counts = _fill(splits, folder, end, info)
    for name, count in counts.items():
        if count["blocks"] == 0:
            raise DataError(
                f"the {name} split of {config.source!r} has {count['dropped']} tokens, fewer than "
                f"one block of {config.block}; bring more text, or change block or held_out"
            )
    seconds = {"read": read - began, "tokenizer": tokenized - read}
    seconds |= {"fill": time.perf_counter() - tokenized, "total": time.perf_counter() - began}
    return {
        "format": FORMAT,
        **info,
        **counts,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def _tokenizer(config: DataConfig, train: pa.Table, folder: Path) -> int:
    """Train or open the tokenizer, save it to the folder, and return the id of its end of text."""
    if config.tokenizer is not None:
        opened = tokenizer.load(config.tokenizer)
        opened.save_pretrained(folder)
        return int(opened.eos_token_id)
    stride = -(-train["text"].nbytes // TOKENIZER_BYTES)
    sample = range(0, train.num_rows, stride)
    with Progress("data: train tokenizer", total=len(sample), unit="documents") as progress:

        def texts() -> Iterator[str]:
            for done, i in enumerate(sample):
                yield train["text"][i].as_py()
                progress.update(done + 1)

        return int(tokenizer.train(texts(), config.vocab_size, folder).eos_token_id)


def _fill(
    splits: dict[str, pa.Table], folder: Path, end: int, info: dict[str, Any]
) -> dict[str, dict[str, int]]:
    """Write the shards of all splits in parallel; the counts of each split.

    What a shard holds depends on the corpus only, and it carries its own name, so the files are
    the same for any number of workers and any order in which they finish.
    """
    shards = []
    counts = {}
    for split, table in splits.items():
        (folder / split).mkdir()
        counts[split] = dict.fromkeys(("documents", "tokens", "blocks", "dropped"), 0)
        for number, rows in enumerate(_shards(table)):
            path = str(folder / split / f"{number:05d}.arrow")
            size = len(rows)
            columns = {"path": [path] * size, "split": [split] * size, "text": rows["text"]}
            shards.append(pa.table(columns))
    total = sum(map(len, shards))
    done = 0
    with Progress("data: tokenize and fill blocks", total=total, unit="documents") as progress:
        settings = {"folder": str(folder / "tokenizer"), "end": end, "info": info}
        for shard in _dataset(shards, settings):
            for name in counts[shard["split"]]:
                counts[shard["split"]][name] += shard[name]
            done += shard["documents"]
            tokens = sum(count["tokens"] for count in counts.values())
            progress.update(done, tokens=tokens)
    return counts


def _shards(table: pa.Table) -> list[pa.Table]:
    """Consecutive documents of 1 to 64 MiB of text together, at most about 1,000 shards if that
    can be; the sizes follow from the corpus alone."""
    sizes = pc.binary_length(table["text"]).to_numpy()
    limit = min(max(int(sizes.sum()) // 1000, 2**20), 2**26)
    starts, filled = [0], 0
    for row, size in enumerate(sizes):
        if filled and filled + size > limit:
            starts.append(row)
            filled = 0
        filled += int(size)
    ends = [*starts[1:], table.num_rows]
    return [table.slice(start, end - start) for start, end in zip(starts, ends, strict=True)]


def _dataset(shards: Sequence[pa.Table], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row of counts for each shard, as they are written."""
    import ray.data

    with warnings.catch_warnings():
        # Ray's own defaults touch a setting of Ray's that is deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # A table becomes a block, and batch_size=None hands a block over whole.
    fill_shard: Any = _fill_shard
    with session(log_to_driver=False):
        dataset = ray.data.from_arrow(list(shards)).map_batches(
            fill_shard, batch_size=None, batch_format="pyarrow", fn_kwargs=settings
        )
        yield from dataset.iter_rows()


def _fill_shard(shard: pa.Table, *, folder: str, end: int, info: dict[str, Any]) -> pa.Table:
    """Runs in a worker of one CPU."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    paths, splits = set(shard["path"].to_pylist()), set(shard["split"].to_pylist())
    assert len(paths) == len(splits) == 1, "Ray Data split or joined shards"
    encoded = tokenizer.Encoder(folder)(shard["text"].to_pylist())
    documents = (Document(np.array([*ids, end], np.int32)) for ids in encoded)
    filled = fill(documents, block=info["block"])
    counts = write_shard(
        Path(paths.pop()),
        filled,
        tokenizer=info["tokenizer"],
        source=info["source"],
        split=splits.pop(),
    )
    return pa.Table.from_pylist([asdict(counts)])


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
