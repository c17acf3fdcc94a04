from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linearized.errors import DataError
from linearized.training import corpus, pieces
from linearized.training.corpus import Skipped


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing of a test stays in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def pairs(table: pa.Table) -> dict[str, str]:
    return dict(zip(table["document"].to_pylist(), table["text"].to_pylist(), strict=True))


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_the_standard_library_without_tests_and_packages():
    table = corpus.read("stdlib")
    documents = table["document"].to_pylist()
    assert documents == sorted(documents) and len(set(documents)) == len(documents) > 300
    assert {"abc.py", "asyncio/base_events.py", "json/decoder.py"} <= set(documents)
    unwanted = ("test", "tests", "idle_test", "site-packages", "dist-packages")
    assert not any(part in unwanted for name in documents for part in name.split("/"))
    assert table["text"].nbytes > 5_000_000


def test_a_folder_of_texts(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"\xff")
    (tmp_path / "b" / "two.md").write_bytes("zwei\r\n\tü 🙂".encode())
    (tmp_path / "a.py").write_text("one = 1\n")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfbom")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "d.txt.bz2").write_bytes(bz2.compress(b"packed too"))
    expected = {
        "a.py": "one = 1\n",
        "b/two.md": "zwei\r\n\tü 🙂",
        "bom.txt": "bom",
        "c.txt.gz": "packed",
        "d.txt.bz2": "packed too",
    }
    assert pairs(corpus.read(str(tmp_path))) == expected
    # Names are those below the part of a glob that is fixed, so the split stays the same.
    assert pairs(corpus.read(f"{tmp_path}/**/*.md")) == {"b/two.md": "zwei\r\n\tü 🙂"}
    assert pairs(corpus.read(str(tmp_path / "a.py"))) == {"a.py": "one = 1\n"}


def test_json_lines(tmp_path):
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines({"text": "c\r\nd"}).encode()))
    rows = [{"text": "a", "n": 1}, {"text": ""}, {"text": None}, {"text": "b"}]
    (tmp_path / "a [1].jsonl").write_text(lines(*rows))
    # A row keeps its number, whatever is left out before it.
    assert pairs(corpus.read(str(tmp_path))) == {"0": "a", "3": "b", "4": "c\r\nd"}


def test_parquet(tmp_path):
    table = pa.table({"id": [1, 2], "body": ["x", "y"], "title": ["t", "u"]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = str(tmp_path / "a.parquet")
    assert pairs(corpus.read(source, text_column="body")) == {"0": "x", "1": "y"}
    with pytest.raises(DataError, match="Set text_column.*body, title"):
        corpus.read(source)
    with pytest.raises(DataError, match="no text column 'id'.*body, title"):
        corpus.read(source, text_column="id")


def test_the_only_column_of_strings_is_the_text(tmp_path):
    (tmp_path / "a.json").write_text(lines({"n": 1, "content": "x"}))
    assert pairs(corpus.read(str(tmp_path / "a.json"))) == {"0": "x"}


def test_a_dataset_by_name(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert pairs(corpus.read("owner/name:en", split="validation")) == {"0": "a", "1": "b"}
    assert pairs(corpus.read("name")) == {"0": "a", "1": "b"}
    assert asked == [("owner/name", "en", "validation"), ("name", None, "train")]


@pytest.mark.parametrize(
    "error,message",
    [
        (ConnectionError("no route"), "cannot be reached.*no route.*check the name or the network"),
        (datasets.exceptions.DatasetNotFoundError("gone"), "no file, folder or Hugging Face"),
        (ValueError("Unknown split"), "split 'train': Unknown split"),
    ],
)
def test_a_dataset_that_cannot_be_had(monkeypatch, error, message):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=f"'owner/name'.*{message}|{message}"):
        corpus.read("owner/name")


@pytest.mark.parametrize(
    "source", ["./none", "/none/there", "none.txt", "a/b/c", "~/none.jsonl.gz"]
)
def test_a_path_that_is_not_there(source):
    with pytest.raises(DataError, match="there is no file or folder"):
        corpus.read(source)


@pytest.mark.parametrize(
    "files,message",
    [
        ({}, "matches no files"),
        ({"a.txt": b""}, "holds no text: all of its 1 files are empty"),
        ({"b.bin": b"ab\xff"}, "holds no text .*b.bin: is not UTF-8.*at byte 2.*name another"),
        ({"b.bin": b"ab\x00"}, "b.bin: is no text: byte 2 is zero"),
        ({"a.txt": b"good", "b.jsonl": b"{}"}, "holds json, text files; choose one kind"),
        ({"a.txt.gz": b"not compressed"}, "a.txt.gz: cannot be read"),
        ({"a.txt.zst": b"not compressed"}, "a.txt.zst: cannot be read"),
        ({"a.txt.gz": gzip.compress(b"text" * 99)[:-9]}, "a.txt.gz: cannot be read"),
        ({"a.jsonl": b""}, "files are empty"),
        ({"a.jsonl": b"\n"}, "is empty, or cannot be read as json"),
        ({"a.jsonl": b'{"text": "a"\n'}, "cannot be read as json: a row is no JSON .*delimiter"),
        ({"a.jsonl": b'"text"\n'}, "cannot be read as json: a row is no object"),
        ({"a.jsonl": b'{"text": null}\n'}, "is empty, or cannot be read as json"),
        ({"a.jsonl": b'{"text": ""}\n'}, "holds no text; name another"),
        ({"a.json": b'[{"text": "a"},'}, "cannot be read as json: a row is no JSON"),
        ({"a.jsonl": b"[" * 99_999}, "cannot be read as json: a row is no JSON"),
        ({"a.parquet": b"not parquet"}, "cannot be read as parquet.*a.parquet"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        corpus.read(str(tmp_path))
    assert "\n" not in str(caught.value)


def skipped_in(source: str) -> Skipped:
    skipped = Skipped()
    found = corpus.find(source, scratch=Path("/none"))
    found = found.numbered([pieces.count(piece) for piece in found.pieces])
    for piece in found.pieces:
        list(corpus.documents(piece, found, skipped))
    return skipped


def test_a_bad_file_among_good_ones_is_named_and_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\x00\x00")
    assert pairs(corpus.read(str(tmp_path))) == {"a.txt": "good"}
    skipped = skipped_in(str(tmp_path))
    assert skipped.unreadable == 2 and len(skipped.examples) == 2
    assert "latin.txt: is not UTF-8 (invalid start byte at byte 2)" in skipped.examples[0]


def test_a_bad_row_among_good_ones_is_named_and_left_out(tmp_path):
    """Rows keep their numbers, whatever is wrong with those before them."""
    rows = [
        b'{"text": "a"}', b'{"text": "gr\xf6\xdfer"}', b'{"text": 3}', b'{"text": null}', b"{,}",
        b'{"other": 1}', b'{"text": "\\ud800"}', b"[1]", b"", b'{"text": "b"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    assert pairs(corpus.read(str(tmp_path), text_column="text")) == {"0": "a", "8": "b"}


def test_columns_that_nobody_asked_for_may_hold_anything(tmp_path):
    rows = [{"text": "a", "x": 1}, {"text": "b", "x": [{"y": "z"}]}, {"text": "c", "x": "1"}]
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    assert list(pairs(corpus.read(str(tmp_path))).values()) == ["a", "b", "c"]
    odd = pa.array([b"\xff", None, b""], pa.binary())
    table = pa.table({"text": ["d", "e", None], "x": odd, "y": [[{"z": 1}], None, []]})
    (tmp_path / "p").mkdir()
    pq.write_table(table, tmp_path / "p" / "a.parquet")
    pq.write_table(table.drop_columns(["x"]), tmp_path / "p" / "b.parquet")
    found = corpus.read(str(tmp_path / "p"))
    assert pairs(found) == {"0": "d", "1": "e", "3": "d", "4": "e"}


def test_parquet_that_is_no_utf8_costs_its_own_rows(tmp_path):
    values = pa.array([b"a", b"\xff", b"c"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert pairs(corpus.read(str(tmp_path))) == {"0": "a", "2": "c"}


def test_links_to_folders_are_followed_once(tmp_path):
    real, source = tmp_path / "real", tmp_path / "source"
    (source / "own").mkdir(parents=True)
    real.mkdir()
    (real / "a.txt").write_text("a")
    (source / "own" / "b.txt").write_text("b")
    (source / "linked").symlink_to(real)
    (source / "again").symlink_to(source / "own")
    (real / "loop").symlink_to(source)
    assert pairs(corpus.read(str(source))) == {"linked/a.txt": "a", "own/b.txt": "b"}


def test_names_that_are_no_text(tmp_path):
    for name, content in ((b"\xff.txt", "a"), (b"\xfe.txt", "b")):
        path = os.path.join(os.fsencode(tmp_path), name)
        try:
            with open(path, "w") as file:
                file.write(content)
        except OSError:
            pytest.skip("this file system refuses such names")
    table = corpus.read(str(tmp_path))
    assert table["document"].to_pylist() == ["\ufffd.txt"] * 2
    assert sorted(table["text"].to_pylist()) == ["a", "b"]
    assert corpus.split_documents(table["document"].to_pylist(), 0.5)
    assert corpus.fingerprint(str(tmp_path))


def test_lines_belong_to_the_range_in_which_they_begin(tmp_path, monkeypatch):
    """However ranges fall, also on line ends and within a line that is longer than several."""
    rows = [{"text": "x" * size} for size in (1, 40, 3, 500, 2, 16, 7)]
    (tmp_path / "a.jsonl").write_text(lines(*rows) + "\n\n" + lines({"text": "end"}))
    whole = pairs(corpus.read(str(tmp_path)))
    assert len(whole) == 8
    for size in (1, 2, 16, 17, 63, 64, 100):
        monkeypatch.setattr(pieces, "RANGE", size)
        assert pairs(corpus.read(str(tmp_path))) == whole


@pytest.mark.parametrize("suffix,compress", [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_lines(tmp_path, suffix, compress):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(lines(*[{"text": "a"}] * 3).encode()))
    assert len(corpus.read(str(tmp_path))) == 3


def test_lines_that_arrow_decompresses(tmp_path):
    with pa.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as stream:
        stream.write(lines({"text": "a"}, {"text": "b"}).encode())
    assert pairs(corpus.read(str(tmp_path))) == {"0": "a", "1": "b"}


def test_one_array_of_json(tmp_path):
    (tmp_path / "a.json").write_text("\n" + json.dumps([{"text": "a"}, {"text": "b"}], indent=2))
    assert pairs(corpus.read(str(tmp_path))) == {"0": "a", "1": "b"}


@pytest.mark.parametrize(
    "row,columns",
    [
        ({"messages": [{"role": "user", "content": "a"}]}, ("messages",)),
        ({"prompt": "a", "completion": "b"}, ("prompt", "completion")),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
         ("prompt", "completion")),
    ],
)  # fmt: skip
def test_conversations(tmp_path, row, columns):
    (tmp_path / "a.jsonl").write_text(lines(row))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        found = corpus.find(str(tmp_path / name), scratch=tmp_path)
        assert found.chat and found.columns == columns
        found = found.numbered([1])
        [(document, text)] = corpus.documents(found.pieces[0], found, Skipped())
        assert document == "0" and json.loads(text) == row
    with pytest.raises(DataError, match="holds conversations"):
        corpus.read(str(tmp_path / "a.jsonl"))


def test_a_glob_that_matches_nothing(tmp_path):
    with pytest.raises(DataError, match="matches no files"):
        corpus.read(f"{tmp_path}/*.txt")


def test_the_fingerprint_follows_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    before = corpus.fingerprint(str(tmp_path))
    assert corpus.fingerprint(str(tmp_path)) == before
    (tmp_path / "b.txt").write_text("b")
    assert corpus.fingerprint(str(tmp_path)) != before
    assert corpus.fingerprint("owner/name") != corpus.fingerprint("owner/name", "test")


POSITIONS = {  # written down, because a later version must hold out the same documents
    "asyncio/base_events.py": 0.2552256031790102,
    "abc.py": 0.2703966808253566,
    "0": 0.5162886151263629,
    "1": 0.9647866495940682,
    "ünïcode.txt": 0.04211872181059639,
}


@pytest.mark.parametrize("document", POSITIONS)
def test_the_split_never_changes(document):
    at = POSITIONS[document]
    assert corpus.held_out(document, at + 1e-12)
    assert not corpus.held_out(document, at)


def test_the_split_is_the_same_in_another_process():
    names = [f"folder/{i}.txt" for i in range(200)]
    code = (
        "import sys; from linearized.training.corpus import held_out;"
        "print([held_out(f'folder/{i}.txt', 0.3) for i in range(200)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == str([corpus.held_out(name, 0.3) for name in names])


def test_the_split_keeps_its_fraction_and_grows_with_it():
    names = [str(i) for i in range(20_000)]
    small = {n for n in names if corpus.held_out(n, 0.05)}
    large = {n for n in names if corpus.held_out(n, 0.2)}
    assert small < large
    assert abs(len(small) / len(names) - 0.05) < 0.005
    assert abs(len(large) / len(names) - 0.2) < 0.01


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 50])
def test_both_sides_of_the_split_hold_something(fraction, count):
    names = [str(i) for i in range(count)]
    train, held_out = corpus.split_documents(names, fraction)
    assert train and held_out
    assert sorted(train + held_out) == list(range(count))
    assert train == sorted(train) and held_out == sorted(held_out)


def test_one_document_cannot_be_split():
    with pytest.raises(DataError, match="at least two"):
        corpus.split_documents(["only"], 0.5)
