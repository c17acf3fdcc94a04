from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linearized.errors import ConfigError, DataError
from linearized.training.blocks import (
    BEGINS,
    TRAINED,
    Blocks,
    Document,
    _place,
    fill,
    write_shard,
)


def shard(path, rows, *, tokenizer="abc"):
    """Rows of one document."""
    rows = np.asarray(rows, np.int32)
    filled = fill([Document(rows.reshape(-1))], block=rows.shape[1])
    write_shard(path, filled, tokenizer=tokenizer, source="test", split="train")


def relabel(path, **changes):
    """Change what a shard's metadata says."""
    table = pa.ipc.open_file(path).read_all()
    said = {**json.loads(table.schema.metadata[b"linearized.blocks"]), **changes}
    table = table.replace_schema_metadata({b"linearized.blocks": json.dumps(said)})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


@pytest.fixture
def folder(tmp_path):
    """23 blocks of 4 tokens in shards of 10, 0, 12 and 1; block i begins with 4 i."""
    rows = np.arange(23)[:, None] * 4 + np.arange(4)
    for name, (start, stop) in enumerate([(0, 10), (10, 10), (10, 22), (22, 23)]):
        shard(tmp_path / f"{name:05d}.arrow", rows[start:stop])
    return tmp_path


documents = st.lists(
    st.lists(st.tuples(st.integers(1, 2**31 - 1), st.booleans()), max_size=40), max_size=20
)


@given(documents, st.integers(2, 33))
def test_every_token_is_packed_or_counted_as_dropped(documents, block):
    given_ = [
        Document(
            np.array([token for token, _ in document], np.int32),
            np.array([learned for _, learned in document], bool),
        )
        for document in documents
    ]
    found = fill(iter(given_), block=block)
    stream = [token for document in documents for token, _ in document]
    marks = [
        BEGINS if place == 0 else TRAINED * learned
        for document in documents
        for place, (_, learned) in enumerate(document)
    ]
    assert found.tokens.dtype == np.int32 and found.tokens.shape[1] == block
    assert found.tokens.flatten().tolist() == stream[: found.tokens.size]
    assert found.marks.shape == found.tokens.shape
    assert found.marks.flatten().tolist() == marks[: found.tokens.size]
    assert found.dropped == len(stream) - found.tokens.size < block
    assert found.documents == len(documents)


def test_a_document_is_learned_but_for_its_first_token(tmp_path):
    """Its end included, also where a block ends between the two."""
    filled = fill([Document([5, 6, 0]), Document([7, 0]), Document([8, 9, 8, 0])], block=4)
    write_shard(tmp_path / "0.arrow", filled, tokenizer="abc", source="test", split="train")
    blocks = Blocks(tmp_path)
    batch = blocks.batch_of([1, 0])
    assert batch.tokens.tolist() == [[0, 8, 9, 8], [5, 6, 0, 7]]
    assert batch.segment_ids.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert batch.trained.tolist() == [[False, False, True, True], [False, True, True, False]]
    assert batch.predictions() == 4
    assert blocks.shards[0].dropped == 1 and blocks.shards[0].trained == 5


def test_rows_of_one_document_need_no_marks(folder):
    batch = Blocks(folder).batch_of([1, 0])
    assert batch.segment_ids is None and batch.trained is None
    assert batch.predictions() == 6


def test_a_block_that_predicts_nothing():
    with pytest.raises(ConfigError, match="at least 2"):
        fill([Document([1])], block=1)


def test_what_a_split_holds(folder):
    blocks = Blocks(folder)
    assert (len(blocks), blocks.block, blocks.tokens, blocks.tokenizer) == (23, 4, 92, "abc")
    assert [info.blocks for info in blocks.shards] == [10, 0, 12, 1]
    rows = blocks.rows([22, 0, 10, 9, 21, 0])
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[i * 4 + j for j in range(4)] for i in (22, 0, 10, 9, 21, 0)]
    assert Blocks(folder / "00003.arrow").rows([0]).tolist() == [[88, 89, 90, 91]]
    assert blocks.rows([]).shape == (0, 4)
    for index in (-1, 23):
        with pytest.raises(IndexError, match="0 to 22"):
            blocks.rows([index])


def test_a_shard_is_plain_arrow(folder):
    table = pa.ipc.open_file(folder / "00000.arrow").read_all()
    assert table["tokens"].type == pa.list_(pa.int32(), 4)
    assert table["tokens"][1].as_py() == [4, 5, 6, 7]
    assert table["marks"][0].as_py() == [BEGINS, TRAINED, TRAINED, TRAINED]
    assert b"linearized.blocks" in table.schema.metadata


def test_a_large_corpus_takes_no_more_memory_than_a_small_one(tmp_path):
    """What is mapped can be given back at any time, and is no memory of the process's own."""
    shard(tmp_path / "00000.arrow", np.ones((12_000, 1024), np.int32))  # 61 MB
    code = """
import sys
from linearized.training.blocks import Blocks

def own():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon"))

blocks = Blocks(sys.argv[1])
blocks.batch(0, batch_size=8)
before = own()
for step in range(1000):
    blocks.batch(step, batch_size=8)
print(own() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 20_000  # KB


def test_shards_of_the_first_version_are_read(tmp_path):
    """Parquet without marks: each row is one document."""
    flat = pa.array(np.arange(12, dtype=np.int32))
    said = dict(
        block=4, blocks=3, tokens=12, dropped=0, documents=1, tokenizer="abc", source="test",
        split="train", format=1,
    )  # fmt: skip
    table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(flat, 4)})
    table = table.replace_schema_metadata({b"linearized.blocks": json.dumps(said)})
    pq.write_table(table, tmp_path / "00000.parquet", compression="zstd")
    blocks = Blocks(tmp_path)
    batch = blocks.batch_of([2, 0])
    assert batch.tokens.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]] == blocks.rows([2, 0]).tolist()
    assert batch.segment_ids is None and batch.trained is None


@pytest.mark.parametrize("batch_size", [12, 24, 60])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_batch_of_a_step_does_not_depend_on_the_world_size(folder, batch_size, world_size):
    """24 does not divide 23, 60 is more than two epochs: batches reach over their ends."""
    alone, together = Blocks(folder), Blocks(folder)
    for step in (0, 1, 2, 7, 1000):
        whole = alone.batch(step, batch_size=batch_size, seed=3)
        shares = [
            together.batch(step, batch_size=batch_size, rank=rank, world_size=world_size, seed=3)
            for rank in range(world_size)
        ]
        assert all(len(share) == batch_size // world_size for share in shares)
        assert torch.equal(torch.cat([share.tokens for share in shares]), whole.tokens)


def test_a_run_goes_on_where_it_was(folder):
    blocks = Blocks(folder)
    through = [blocks.batch(step, batch_size=4, seed=1) for step in range(40)]
    resumed = Blocks(folder)
    for step in range(39, 19, -1):
        assert torch.equal(resumed.batch(step, batch_size=4, seed=1).tokens, through[step].tokens)


def test_an_epoch_holds_every_block_once_in_an_order_of_its_own(folder):
    blocks = Blocks(folder)

    def seen(steps, seed=0):
        rows = [blocks.batch(step, batch_size=1, seed=seed).tokens for step in range(steps)]
        return torch.cat(rows)[:, 0] // 4

    epochs = seen(23 * 3).reshape(3, 23).tolist()
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = seen(23, seed=1).tolist()
    assert sorted(other) == list(range(23)) and other not in epochs


@given(st.integers(1, 500), st.integers(-3, 3), st.integers(0, 5))
def test_every_order_is_a_permutation(size, seed, epoch):
    order = [_place(at, size, seed) for at in range(epoch * size, (epoch + 1) * size)]
    assert sorted(order) == list(range(size))


def test_the_order_never_changes():
    """Written down, because a run may be taken up by a later version."""
    assert [_place(at, 10, 0) for at in range(10)] == [0, 3, 9, 1, 6, 2, 4, 7, 8, 5]
    assert [_place(at, 10, 0) for at in range(10, 20)] == [1, 0, 5, 8, 7, 6, 3, 2, 9, 4]
    assert [_place(at, 10, -1) for at in range(10)] == [9, 7, 2, 6, 3, 1, 4, 0, 8, 5]


def test_the_order_is_fair():
    """Each place of the first ten sees each tenth of the blocks about equally often."""
    tenths = np.array([[_place(at, 1000, seed) // 100 for at in range(10)] for seed in range(500)])
    counts = np.array([np.bincount(place, minlength=10) for place in tenths.T])
    assert counts.min() > 20 and counts.max() < 90  # 50 expected, six standard deviations


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"batch_size": 0}, "batch_size .*got 0"),
        ({"batch_size": 5, "world_size": 2}, "multiple of world_size 2, got 5"),
        ({"batch_size": 4, "world_size": 2, "rank": 2}, "rank 2 of 2"),
        ({"batch_size": 4, "rank": -1}, "rank -1"),
        ({"batch_size": 4, "step": -1}, "no step -1"),
    ],
)
def test_a_batch_that_cannot_be(folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        Blocks(folder).batch(**{"step": 0, **settings})


def test_shards_that_do_not_belong_together(folder):
    last = folder / "00004.arrow"
    shard(last, [[1, 2, 3]])
    with pytest.raises(DataError, match="00004.arrow holds blocks of 3.*of 4.*again"):
        Blocks(folder)
    shard(last, [[1, 2, 3, 4]], tokenizer="xyz")
    with pytest.raises(DataError, match="by tokenizer xyz"):
        Blocks(folder)
    relabel(last, format=99)
    with pytest.raises(DataError, match="format 99.*again"):
        Blocks(folder)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="no blocks at .*none; run jobs.data first"):
        Blocks(tmp_path / "none")
    with pytest.raises(DataError, match="no shards"):
        Blocks(tmp_path)
    file = tmp_path / "00000.arrow"
    shard(file, np.empty((0, 8)))
    with pytest.raises(DataError, match="no whole block of 8"):
        Blocks(tmp_path)
    table = pa.table({"text": ["a"]})
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="no token blocks"):
        Blocks(tmp_path)
    shard(file, np.ones((100, 8)))
    whole = file.read_bytes()
    for content in (b"broken", b"", whole[:-200]):
        file.write_bytes(content)
        with pytest.raises(DataError, match="00000.arrow is no file .* or not whole.* again"):
            Blocks(tmp_path)


def test_a_shard_is_written_as_a_whole_or_not(tmp_path, monkeypatch):
    def fails(sink, schema):
        sink.write(b"half")
        raise OSError("disk full")

    shard(tmp_path / "00000.arrow", [[1, 2]])
    monkeypatch.setattr(pa.ipc, "new_file", fails)
    with pytest.raises(OSError, match="disk full"):
        shard(tmp_path / "00000.arrow", [[3, 4]])
    assert [path.name for path in tmp_path.iterdir()] == ["00000.arrow"]
    assert Blocks(tmp_path).rows([0]).tolist() == [[1, 2]]
