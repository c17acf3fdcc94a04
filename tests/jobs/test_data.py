from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import transformers

import jobs.data
from jobs import shards
from jobs.data import DataConfig, prepare
from linearized.errors import ConfigError, DataError
from linearized.training import corpus, pieces
from linearized.training.blocks import Blocks

ROOT = Path(__file__).parent.parent.parent


def files(folder: Path) -> dict[str, bytes]:
    """Everything but how long it took."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    contents = {name: path.read_bytes() for name, path in found.items()}
    report = json.loads(contents["data.json"])
    kept = [report[k] for k in sorted(report) if k not in ("seconds", "speed")]
    contents["data.json"] = repr(kept).encode()
    return contents


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """60 documents, enough for three shards of training, and one that is no text."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        word = f"x{i % 7}"
        (folder / f"{i:02d}.txt").write_text(f"def f({word}):\n    return {word}\n" * (i * 60))
    (folder / "latin.txt").write_bytes("größer".encode("latin-1"))
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
    """The twin of Ray: the same tasks one after another, last first, as JSON."""

    def one_by_one(function, tasks, **settings):
        for task in reversed(tasks):
            yield json.loads(json.dumps(function(json.loads(json.dumps(task)), **settings)))

    monkeypatch.setattr(jobs.data, "_map", one_by_one)
    monkeypatch.setattr(jobs.data, "_cluster", contextlib.nullcontext)


def streams(config: DataConfig) -> dict[str, list[str]]:
    """split → the texts of its documents."""
    table = corpus.read(config.source)
    sides = corpus.split_documents(table["document"].to_pylist(), config.held_out)
    return {
        split: table.take(side)["text"].to_pylist()
        for split, side in zip(("train", "held_out"), sides, strict=True)
    }


def rows_as_lines(config: DataConfig, folder: Path) -> Path:
    """The documents of a source as rows of JSON Lines, some without text among them."""
    folder.mkdir()
    rows = [json.dumps({"text": text}) for text in corpus.read(config.source)["text"].to_pylist()]
    rows[7:7] = ['{"text": ""}', "{broken"]
    (folder / "a.jsonl").write_text("\n".join(rows))
    return folder / "a.jsonl"


@pytest.mark.parametrize("kind", ["text", "lines"])
def test_every_token_is_accounted_for(config, without_ray, kind, tmp_path, monkeypatch):
    if kind == "lines":
        monkeypatch.setattr(pieces, "RANGE", 300_000)
        config = replace(config, source=str(rows_as_lines(config, tmp_path / "lines")))
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
            firsts = [place == 0 for ids in expected[at : at + info.documents] for place in
                      range(len(ids))]  # fmt: skip
            batch = blocks.batch_of(range(row, row + info.blocks))
            assert batch.tokens.flatten().tolist() == mine[: info.tokens]
            assert len(mine) - info.tokens == info.dropped < 32
            want = torch.tensor(firsts[: info.tokens]).view(-1, 32)
            want[:, 0] = False
            found = torch.nn.functional.pad(batch.segment_ids.diff(dim=1), (1, 0)).bool()
            assert torch.equal(found, want)
            assert torch.equal(batch.trained[:, 1:], ~want[:, 1:])
            at, row = at + info.documents, row + info.blocks
    assert len(Blocks(config.out / "train").shards) > 1
    assert done["skipped"]["unreadable"] == 1 and len(done["skipped"]["examples"]) == 1
    assert done["skipped"]["empty"] == (kind == "lines")
    assert done["speed"]["tokens_per_second"] > 0 and done["speed"]["tokenizer_alone"] > 0


@pytest.mark.ray
def test_ray_writes_what_one_process_writes(config, tmp_path, monkeypatch, capfd):
    config = replace(config, source=str(rows_as_lines(config, tmp_path / "lines")))
    prepare(config)
    shown = capfd.readouterr()
    for line in shown.out.splitlines():
        assert line.startswith(("  data: ", "✓ data: ", "data: ")), line
    assert "INFO" not in shown.err and "WARN" not in shown.err, shown.err
    assert "a.jsonl, row 8: is no JSON" in shown.out
    in_this_process(monkeypatch)
    twin = replace(config, out=tmp_path / "twin")
    prepare(twin)
    assert files(config.out) == files(twin.out)


def test_finished_work_is_reused(config, texts, without_ray, capsys):
    first = prepare(config)
    before = {p: p.stat().st_mtime_ns for p in config.out.rglob("*")}
    assert prepare(config) == first
    assert "data: reused" in capsys.readouterr().out
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

    monkeypatch.setattr(jobs.data, "_fill", fails)
    with pytest.raises(RuntimeError, match="a worker died"):
        prepare(replace(config, fresh=True))
    assert files(config.out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_a_worker_refuses_is_one_sentence(config, without_ray, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_shard", full)
    with pytest.raises(DataError, match="No space left on device"):
        prepare(config)
    assert not config.out.exists()


@pytest.mark.parametrize("name", ["data", "data.part"])
@pytest.mark.parametrize("file", ["thesis.txt", "data.json"])
def test_a_folder_of_somebody_else_is_left_alone(config, without_ray, tmp_path, name, file):
    if name == "data":
        prepare(config)
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / file).write_text("{}")
    with pytest.raises(ConfigError, match=f"{name} holds {file}, which is not this job's"):
        prepare(replace(config, fresh=True))
    assert (tmp_path / name / file).read_text() == "{}"


def test_an_existing_tokenizer(config, tmp_path, without_ray):
    first = prepare(config)
    second = replace(
        config, tokenizer=str(config.out / "tokenizer"), block=16, out=tmp_path / "second"
    )
    assert prepare(second)["tokenizer"] == first["tokenizer"]
    assert transformers.AutoTokenizer.from_pretrained(second.out / "tokenizer").eos_token_id == 0


def test_the_token_between_documents_can_be_chosen(config, tmp_path, without_ray):
    done = prepare(replace(config, end="<|pad|>"))
    rows = Blocks(config.out / "held_out").rows(range(done["held_out"]["blocks"]))
    assert not (rows == 0).any() and (rows == 1).any()
    with pytest.raises(ConfigError, match="end='</s>' is no token"):
        prepare(replace(config, end="</s>"))


def test_conversations_need_their_models_tokenizer(config, tmp_path, without_ray):
    row = {"prompt": "2 + 2?", "completion": " 4"}
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "a.jsonl").write_text(f"{json.dumps(row)}\n" * 200)
    prepare(config)
    folder = config.out / "tokenizer"
    chat = replace(config, source=str(tmp_path / "chat"), out=tmp_path / "talk")
    with pytest.raises(ConfigError, match="holds conversations; set tokenizer"):
        prepare(chat)
    done = prepare(replace(chat, tokenizer=str(folder)))
    ids = transformers.AutoTokenizer.from_pretrained(folder)
    asked, answer = (len(ids(row[name]).input_ids) for name in row)
    assert done["train"]["trained"] < done["train"]["tokens"] * (answer + 2) / (asked + answer)
    batch = Blocks(tmp_path / "talk" / "train").batch_of([0])
    assert ids.decode(batch.tokens[0]).startswith("2 + 2? 4<|endoftext|>2 + 2?")
    learned = batch.tokens[batch.trained]
    assert ids.decode(learned).startswith(" 4<|endoftext|> 4<|endoftext|>")
    messages = {"messages": [{"role": "user", "content": "a"}]}
    (tmp_path / "chat" / "a.jsonl").write_text(f"{json.dumps(messages)}\n" * 200)
    with pytest.raises(DataError, match="no chat template"):
        prepare(replace(chat, tokenizer=str(folder)))


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
