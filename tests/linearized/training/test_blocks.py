from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linearized.errors import ConfigError, DataError
from linearized.training.blocks import Blocks, ShardInfo, _order, fill, write_shard

END = 0


def shard(path, rows, **changes):
    rows = np.asarray(rows, np.int32)
    fields = dict(
        block=rows.shape[1], blocks=len(rows), tokens=rows.size, dropped=0, documents=1,
        tokenizer="abc", source="test", split="train",
    )  # fmt: skip
    write_shard(path, rows, ShardInfo(**{**fields, **changes}))


@pytest.fixture
def folder(tmp_path):
    """23 blocks of 4 tokens in shards of 10, 0, 12 and 1; block i begins with 100 + i."""
    rows = np.arange(23)[:, None] * 4 + np.arange(4)
    for name, (start, stop) in enumerate([(0, 10), (10, 10), (10, 22), (22, 23)]):
        shard(tmp_path / f"{name:05d}.parquet", rows[start:stop])
    return tmp_path


@given(
    st.lists(st.lists(st.integers(1, 2**31 - 1), max_size=40), max_size=20),
    st.integers(2, 33),
)
def test_every_token_is_packed_or_counted_as_dropped(documents, block):
    rows, dropped = fill(documents, block=block, end=END)
    stream = [token for ids in documents for token in [*ids, END]]
    assert rows.dtype == np.int32 and rows.shape[1] == block
    assert rows.flatten().tolist() == stream[: rows.size]
    assert dropped == len(stream) - rows.size < block


def test_a_block_that_predicts_nothing():
    with pytest.raises(ConfigError, match="at least 2"):
        fill([[1]], block=1, end=END)


def test_what_a_split_holds(folder):
    blocks = Blocks(folder)
    assert (len(blocks), blocks.block, blocks.tokens, blocks.tokenizer) == (23, 4, 92, "abc")
    assert [info.blocks for info in blocks.shards] == [10, 0, 12, 1]
    rows = blocks.rows([22, 0, 10, 9, 21, 0])
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[i * 4 + j for j in range(4)] for i in (22, 0, 10, 9, 21, 0)]
    assert Blocks(folder / "00003.parquet").rows([0]).tolist() == [[88, 89, 90, 91]]
    assert blocks.rows([]).shape == (0, 4)
    for index in (-1, 23):
        with pytest.raises(IndexError, match="0 to 22"):
            blocks.rows([index])


def test_a_shard_is_plain_parquet(folder):
    table = pq.read_table(folder / "00000.parquet")
    assert table["tokens"].type == pa.list_(pa.int32(), 4)
    assert table["tokens"][1].as_py() == [4, 5, 6, 7]
    assert b"linearized.blocks" in table.schema.metadata


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
        assert torch.equal(torch.cat(shares), whole)


def test_a_run_goes_on_where_it_was(folder):
    blocks = Blocks(folder)
    through = [blocks.batch(step, batch_size=4, seed=1) for step in range(40)]
    resumed = Blocks(folder)
    for step in range(39, 19, -1):
        assert torch.equal(resumed.batch(step, batch_size=4, seed=1), through[step])


def test_an_epoch_holds_every_block_once_in_an_order_of_its_own(folder):
    blocks = Blocks(folder)
    first = torch.cat([blocks.batch(step, batch_size=1) for step in range(23 * 3)])[:, 0] // 4
    epochs = first.reshape(3, 23).tolist()
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = torch.cat([blocks.batch(step, batch_size=1, seed=1) for step in range(23)])[:, 0] // 4
    assert sorted(other.tolist()) == list(range(23)) and other.tolist() not in epochs


def test_the_order_never_changes():
    """Written down, because a run may be taken up by a later version."""
    assert _order(10, 0, 0).tolist() == [4, 8, 0, 1, 7, 6, 2, 5, 3, 9]
    assert _order(10, 0, 1).tolist() == [9, 7, 0, 1, 6, 3, 4, 5, 2, 8]
    assert _order(10, -1, 0).tolist() == [5, 4, 9, 6, 2, 3, 7, 1, 8, 0]


def test_the_order_is_fair():
    """Each place of the first ten sees each tenth of the blocks about equally often."""
    tenths = np.array([_order(1000, seed, 0)[:10] // 100 for seed in range(500)])
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
    shard(folder / "00004.parquet", [[1, 2, 3]])
    with pytest.raises(DataError, match="00004.parquet holds blocks of 3.*of 4.*again"):
        Blocks(folder)
    shard(folder / "00004.parquet", [[1, 2, 3, 4]], tokenizer="xyz")
    with pytest.raises(DataError, match="by tokenizer xyz"):
        Blocks(folder)
    shard(folder / "00004.parquet", [[1, 2, 3, 4]], format=99)
    with pytest.raises(DataError, match="format 99.*again"):
        Blocks(folder)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="no blocks at .*none; run jobs.data first"):
        Blocks(tmp_path / "none")
    with pytest.raises(DataError, match="no .parquet files"):
        Blocks(tmp_path)
    shard(tmp_path / "00000.parquet", np.empty((0, 8)))
    with pytest.raises(DataError, match="no whole block of 8"):
        Blocks(tmp_path)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "00000.parquet")
    with pytest.raises(DataError, match="no token blocks"):
        Blocks(tmp_path)
    (tmp_path / "00000.parquet").write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot be read|can be read"):
        Blocks(tmp_path)


def test_a_shard_is_written_as_a_whole_or_not(tmp_path, monkeypatch):
    def fails(table, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    shard(tmp_path / "00000.parquet", [[1, 2]])
    monkeypatch.setattr(pq, "write_table", fails)
    with pytest.raises(OSError, match="disk full"):
        shard(tmp_path / "00000.parquet", [[3, 4]])
    assert [path.name for path in tmp_path.iterdir()] == ["00000.parquet"]
    assert Blocks(tmp_path).rows([0]).tolist() == [[1, 2]]
