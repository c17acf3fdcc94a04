from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from linearized.errors import ConfigError, DataError
from linearized.training import tokenizer
from linearized.training.tokenizer import END, PAD, SMALLEST, Encoder

TEXTS = [path.read_text() for path in sorted(Path(tokenizer.__file__).parent.glob("*.py"))]
VOCAB = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train(TEXTS, VOCAB, folder)
    return folder


@pytest.fixture(scope="module")
def opened(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_what_generation_and_serving_need(opened):
    assert len(opened) == opened.vocab_size == VOCAB
    assert opened.is_fast
    assert (opened.eos_token, opened.bos_token, opened.pad_token) == (END, END, PAD)
    assert (opened.eos_token_id, opened.pad_token_id) == (0, 1)
    assert opened.model_max_length > 10**9
    assert opened("x", add_special_tokens=True).input_ids == opened("x").input_ids
    batch = opened(["a", "a longer one"], padding=True)
    assert batch.input_ids[0][-1] == 1 and batch.attention_mask[0][-1] == 0


@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("")
@example("  leading, trailing  ")
@example("\tdef f(x):\r\n\t\treturn x\r\n\r\n")
@example("    if x:\n        y = 'don''t , . !'\n\n\n")
@example("👩‍👩‍👧 e\u0301 \u202e \x00 \ufeff \U0010ffff")
@example(f"{END}{PAD}")
@example(" n't 's , .")
def test_every_text_comes_back(opened, folder, text):
    ids = opened(text).input_ids
    assert opened.decode(ids) == text
    if END not in text and PAD not in text:
        assert Encoder(folder)([text]) == [ids]


def test_code_is_packed_well(opened):
    """Line end, indentation and the colon before are one token."""
    assert any(":\n    " in opened.decode(i) for i in range(VOCAB))
    text = TEXTS[-1]
    assert len(opened(text).input_ids) < len(text.encode()) / 2


def test_text_cannot_end_a_document(folder, opened):
    [ids] = Encoder(folder)([f"a{END}b"])
    assert opened.eos_token_id not in ids
    assert opened.decode(ids) == f"a{END}b"


def test_training_is_deterministic(folder, tmp_path):
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    tokenizer.train(iter(shuffled), VOCAB, tmp_path / "shuffled")
    assert tokenizer.fingerprint(tmp_path / "shuffled") == tokenizer.fingerprint(folder)
    code = (
        "import sys; from pathlib import Path; from linearized.training import tokenizer;"
        "files = sorted(Path(tokenizer.__file__).parent.glob('*.py'));"
        f"tokenizer.train((f.read_text() for f in files), {VOCAB}, sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "other")],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        check=True,
        timeout=60,
    )
    assert tokenizer.fingerprint(tmp_path / "other") == tokenizer.fingerprint(folder)
    tokenizer.train(TEXTS[1:], VOCAB, tmp_path / "less")
    assert tokenizer.fingerprint(tmp_path / "less") != tokenizer.fingerprint(folder)


def test_a_small_corpus_makes_a_small_vocabulary(tmp_path):
    small = tokenizer.train(["abab"], 1000, tmp_path)
    assert SMALLEST <= len(small) < SMALLEST + 5
    assert small.decode(small("hé\n").input_ids) == "hé\n"


def test_what_cannot_be_trained(tmp_path):
    with pytest.raises(ConfigError, match="at least 258.*got 257"):
        tokenizer.train(["a"], SMALLEST - 1, tmp_path)
    for texts in ([], [""]):
        with pytest.raises(DataError, match="no text"):
            tokenizer.train(texts, SMALLEST, tmp_path)


def test_open_an_existing_tokenizer(folder):
    assert tokenizer.load(folder).eos_token_id == 0


def test_an_encoder_neither_cuts_nor_pads(folder, opened, tmp_path):
    other = tokenizer.load(folder)
    other.backend_tokenizer.enable_truncation(3)
    other.backend_tokenizer.enable_padding()
    other.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["a", "a longer text"]
    assert Encoder(tmp_path)(texts) == opened(texts).input_ids


def test_what_cannot_be_opened(folder, tmp_path):
    with pytest.raises(DataError, match="no tokenizer in"):
        Encoder(tmp_path)
    with pytest.raises(DataError, match="cannot be opened.*leave it out to train one"):
        tokenizer.load(tmp_path)
    endless = tokenizer.load(folder)
    endless.eos_token = None
    endless.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no eos_token"):
        tokenizer.load(tmp_path)
