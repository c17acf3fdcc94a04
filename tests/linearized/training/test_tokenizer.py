from __future__ import annotations

import functools
import json
import os
import random
import shutil
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
        timeout=300,
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


def changed(folder, to, change):
    """A copy of a tokenizer folder whose tokenizer.json is another."""
    shutil.copytree(folder, to)
    content = json.loads((to / "tokenizer.json").read_text())
    change(content)
    (to / "tokenizer.json").write_text(json.dumps(content))
    return to


def test_the_fingerprint_is_of_what_turns_text_into_ids(folder, tmp_path):
    def another_layout(content):
        content["truncation"] = {
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip

    def another_rule(content):
        content["model"]["merges"].pop()

    same = changed(folder, tmp_path / "same", another_layout)
    other = changed(folder, tmp_path / "other", another_rule)
    assert tokenizer.fingerprint(same) == tokenizer.fingerprint(folder)
    assert tokenizer.fingerprint(other) != tokenizer.fingerprint(folder)


def model_folder(path, tokenizer_folder, **config):
    shutil.copytree(tokenizer_folder, path) if tokenizer_folder else path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_models_own_tokenizer(folder, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copytree(folder, tmp_path / "data" / "tokenizer")
    check = functools.partial(tokenizer.check_tokenizer, tmp_path / "data")
    check(model_folder(tmp_path / "same", folder, vocab_size=VOCAB))
    check(model_folder(tmp_path / "padded", folder, vocab_size=VOCAB + 64))
    check(model_folder(tmp_path / "inner", folder, text_config={"vocab_size": VOCAB}))
    check(model_folder(tmp_path / "bare", None, vocab_size=VOCAB))
    more = tokenizer.load(folder)
    more.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    more.save_pretrained(tmp_path / "more")
    (tmp_path / "more" / "config.json").write_text(json.dumps({"vocab_size": VOCAB + 1}))
    check(tmp_path / "more")
    with pytest.raises(DataError, match=r"data has ids up to 599, .*small a vocabulary of 599"):
        check(model_folder(tmp_path / "small", None, vocab_size=VOCAB - 1))


def test_another_tokenizer_is_refused_with_the_remedy(folder, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copytree(folder, tmp_path / "data" / "tokenizer")
    tokenizer.train(TEXTS, VOCAB - 50, tmp_path / "smaller")
    with pytest.raises(
        DataError, match=r"600 entries, and the model's 550; make data with jobs.data to"
    ):
        tokenizer.check_tokenizer(tmp_path / "data", tmp_path / "smaller")
    tokenizer.train([text.upper() for text in TEXTS], VOCAB, tmp_path / "upper")
    with pytest.raises(DataError, match=r"'Hello, world!' is \[.* there, and to the model \["):
        tokenizer.check_tokenizer(tmp_path / "data", tmp_path / "upper")
    # One that only has more tokens than the data's does not know what the data's ids mean.
    more = tokenizer.load(folder)
    more.add_tokens(["xyzzy"])
    more.save_pretrained(tmp_path / "data" / "tokenizer")
    with pytest.raises(DataError, match="601 entries, and the model's 600"):
        tokenizer.check_tokenizer(tmp_path / "data", folder)


def test_what_goes_around_a_document(folder, tmp_path):
    opened = tokenizer.load(folder)
    assert tokenizer.edges(opened) == ((), (0,))
    assert tokenizer.edges(opened, PAD) == ((), (1,))
    with pytest.raises(ConfigError, match=r"end='</s>' is no token .*<\|endoftext\|>"):
        tokenizer.edges(opened, "</s>")

    def adds(*around):
        def change(content):
            pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in around]
            pieces.insert(1, {"Sequence": {"id": "A", "type_id": 0}})
            tokens = {t: {"id": t, "ids": [i], "tokens": [t]} for i, t in enumerate((END, PAD))}
            content["post_processor"] = {
                "type": "TemplateProcessing", "single": pieces, "pair": pieces,
                "special_tokens": tokens,
            }  # fmt: skip

        return change

    begins = tokenizer.load(changed(folder, tmp_path / "begins", adds(PAD)))
    assert tokenizer.edges(begins) == ((1,), (0,))
    both = tokenizer.load(changed(folder, tmp_path / "both", adds(PAD, END)))
    assert tokenizer.edges(both) == ((1,), (0,))
    assert tokenizer.edges(both, PAD) == ((1,), (1,))


@pytest.mark.parametrize("piece", ["x", "=", " ", "x=1;", "日"])
def test_training_on_one_huge_line_ends(tmp_path, piece):
    """It took hours, and the time limit of a test is minutes. (huggingface/tokenizers#86)"""
    line = (piece * 10**6)[: 10**6]
    small = tokenizer.train(["some text\n" * 9, line], 300, tmp_path)
    assert small.decode(small(line[:999]).input_ids) == line[:999]
    assert "{1,256}" not in (tmp_path / "tokenizer.json").read_text()


def test_a_file_that_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="no tokenizer that can be read"):
        Encoder(tmp_path)
