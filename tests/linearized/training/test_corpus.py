from __future__ import annotations

import bz2
import gzip
import json
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linearized.errors import DataError
from linearized.training import corpus


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
        ({"a.txt": b""}, "holds no text"),
        ({"a.txt": b"good", "b.bin": b"\x00\xff"}, "b.bin is not UTF-8.*at byte 1.*glob"),
        ({"a.txt": b"good", "b.jsonl": b"{}"}, "holds json, text files; choose one kind"),
        ({"a.txt.gz": b"not compressed"}, "cannot read .*a.txt.gz"),
        ({"a.jsonl": b""}, "is empty"),
        ({"a.jsonl": b"\n"}, "is empty|holds no text|cannot be read"),
        ({"a.jsonl": b'{"text": "a"\n'}, "cannot be read as json: .*JSON parse error"),
        ({"a.parquet": b"not parquet"}, "cannot be read as parquet"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        corpus.read(str(tmp_path))


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
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
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
