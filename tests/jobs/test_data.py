from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import transformers

import jobs.data
from jobs.data import DataConfig, prepare
from linearized.errors import ConfigError, DataError
from linearized.training import corpus
from linearized.training.blocks import Blocks

ROOT = Path(__file__).parent.parent.parent


def files(folder: Path) -> dict[str, bytes]:
    """Everything but the seconds."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    contents = {name: path.read_bytes() for name, path in found.items()}
    report = json.loads(contents["data.json"])
    contents["data.json"] = repr([report[k] for k in sorted(report) if k != "seconds"]).encode()
    return contents


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """60 documents, enough for three shards of training."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        word = f"x{i % 7}"
        (folder / f"{i:02d}.txt").write_text(f"def f({word}):\n    return {word}\n" * (i * 60))
    return folder


@pytest.fixture
def config(texts, tmp_path) -> DataConfig:
    return DataConfig(
        source=str(texts), vocab_size=300, block=32, held_out=0.2, out=tmp_path / "data"
    )


@pytest.fixture
def without_ray(monkeypatch):
    in_this_process(monkeypatch)


def in_this_process(monkeypatch) -> None:
    """The twin of Ray: the same shards one after another, last first."""

    def one_by_one(shards, settings):
        for shard in reversed(shards):
            yield from jobs.data._fill_shard(shard, **settings).to_pylist()

    monkeypatch.setattr(jobs.data, "_dataset", one_by_one)


def streams(config: DataConfig) -> dict[str, list[str]]:
    """split → the texts of its documents, from the ids in its shards and their dropped tails."""
    table = corpus.read(config.source)
    sides = corpus.split_documents(table["document"].to_pylist(), config.held_out)
    return {
        split: table.take(side)["text"].to_pylist()
        for split, side in zip(("train", "held_out"), sides, strict=True)
    }


def test_every_token_is_accounted_for(config, without_ray):
    done = prepare(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.out / "tokenizer")
    for split, texts in streams(config).items():
        blocks = Blocks(config.out / split)
        expected = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
        assert done[split]["documents"] == len(texts)
        assert done[split]["blocks"] == len(blocks)
        assert done[split]["tokens"] == blocks.tokens == len(blocks) * config.block
        assert done[split]["tokens"] + done[split]["dropped"] == sum(map(len, expected))
        at = 0
        row = 0
        for info in blocks.shards:
            mine = [token for ids in expected[at : at + info.documents] for token in ids]
            rows = blocks.rows(range(row, row + info.blocks)).flatten().tolist()
            assert rows == mine[: info.tokens] and len(mine) - info.tokens == info.dropped < 32
            at, row = at + info.documents, row + info.blocks
    assert len(Blocks(config.out / "train").shards) > 1


@pytest.mark.ray
def test_ray_writes_what_one_process_writes(config, tmp_path, monkeypatch, capfd):
    prepare(config)
    shown = capfd.readouterr()
    assert all(line.startswith("::progress ") for line in shown.out.splitlines()), shown.out
    assert "INFO" not in shown.err and "WARN" not in shown.err, shown.err
    in_this_process(monkeypatch)
    twin = replace(config, out=tmp_path / "twin")
    prepare(twin)
    assert files(config.out) == files(twin.out)


def test_finished_work_is_reused(config, texts, without_ray, capsys):
    first = prepare(config)
    before = {p: p.stat().st_mtime_ns for p in config.out.rglob("*")}
    assert prepare(config) == first
    assert "::note data: reused" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in config.out.rglob("*")} == before
    again = prepare(replace(config, fresh=True))
    assert again["key"] == first["key"]
    changed = prepare(replace(config, block=64))
    assert changed["key"] != first["key"]
    assert Blocks(config.out / "train").block == 64
    # Files that have changed are new work too.
    (texts / "60.txt").write_text("more\n" * 100)
    try:
        assert prepare(replace(config, block=64))["key"] != changed["key"]
    finally:
        (texts / "60.txt").unlink()


def test_work_that_fails_leaves_what_was_there(config, tmp_path, without_ray, monkeypatch):
    prepare(config)
    before = files(config.out)

    def fails(*_):
        raise RuntimeError("a worker died")

    monkeypatch.setattr(jobs.data, "_dataset", fails)
    with pytest.raises(RuntimeError, match="a worker died"):
        prepare(replace(config, fresh=True))
    assert files(config.out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_of_somebody_else_is_left_alone(config, without_ray):
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("three years")
    with pytest.raises(ConfigError, match="is not this job's"):
        prepare(replace(config, fresh=True))
    assert (config.out / "thesis.txt").read_text() == "three years"


def test_an_existing_tokenizer(config, tmp_path, without_ray):
    first = prepare(config)
    second = replace(
        config, tokenizer=str(config.out / "tokenizer"), block=16, out=tmp_path / "second"
    )
    assert prepare(second)["tokenizer"] == first["tokenizer"]
    assert transformers.AutoTokenizer.from_pretrained(second.out / "tokenizer").eos_token_id == 0


def test_a_split_of_less_than_a_block(config, tmp_path, without_ray):
    (tmp_path / "small").mkdir()
    for name in "ab":
        (tmp_path / "small" / f"{name}.txt").write_text("few words\n")
    with pytest.raises(DataError, match="fewer than one block of 32; bring more text"):
        prepare(replace(config, source=str(tmp_path / "small")))
    assert not config.out.exists()


@pytest.mark.parametrize(
    "settings", [{"held_out": 0.0}, {"held_out": 1.0}, {"block": 1}, {"vocab_size": 257}]
)
def test_settings_that_cannot_work(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ConfigError, match=f"{name} .*{value}"):
        DataConfig(**settings)


def test_shards_follow_from_the_corpus_alone(texts):
    table = corpus.read(str(texts))
    shards = jobs.data._shards(table)
    assert [name for shard in shards for name in shard["document"].to_pylist()] == (
        table["document"].to_pylist()
    )
    sizes = [sum(map(len, shard["text"].to_pylist())) for shard in shards]
    assert len(shards) > 2 and max(sizes) <= 2**20
    assert all(
        a + len(b["text"][0].as_py()) > 2**20 for a, b in zip(sizes, shards[1:], strict=False)
    )


def test_an_error_is_one_line(tmp_path):
    command = [sys.executable, "-m", "jobs.data", "demo", "source=/none", f"out={tmp_path / 'x'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no file or folder '/none'")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "x").exists()


def test_the_demo_is_what_the_readme_says():
    config = jobs.data.demo()
    assert (config.source, config.vocab_size, config.block) == ("stdlib", 2048, 256)
    assert config.out == Path("runs/demo/data")


def test_shards_are_arrow_for_everyone(config, without_ray):
    prepare(config)
    tables = [pa.ipc.open_file(path).read_all() for path in (config.out / "train").iterdir()]
    assert sum(map(len, tables)) == len(Blocks(config.out / "train"))
