"""Prompts in, texts out, on a tiny model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import linearized
from jobs import cli, generate
from jobs.generate import GenerateConfig
from linearized.errors import ConfigError, DataError, LinearizedError, RequestError
from linearized.speculative import Sampling


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.2, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    linearized.linearize(model, linearized.LinearConfig(attention="grouped", group=8))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(folder: Path, tmp_path: Path, lines: list, **settings) -> list[dict]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    out = tmp_path / "out.jsonl"
    config = GenerateConfig(
        model=folder, prompts=prompts, out=out, **{"max_new_tokens": 20, **settings}
    )
    generate.main(config)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    return sorted(found, key=lambda line: (line["index"], line["choice"]))


LINES = [{"prompt": "the quick", "id": 7}, {"tokens": [5, 6, 7]}, {"prompt": "def add"}]


def test_lines_come_back_with_their_texts(folder, tokenizer, tmp_path):
    found = run(folder, tmp_path, LINES)
    model = linearized.load(folder)
    assert [line["index"] for line in found] == [0, 1, 2]
    assert found[0]["id"] == 7 and found[0]["prompt"] == "the quick"
    for line, given in zip(found, LINES, strict=True):
        ids = given.get("tokens") or tokenizer(given["prompt"])["input_ids"]
        want = linearized.generate(model, ids, max_new_tokens=20)
        assert line["new_tokens"] == want
        assert line["text"] == tokenizer.decode([*ids, *want])[len(tokenizer.decode(ids)) :]
        assert (line["finish_reason"], line["rounds"], line["drafted"]) == ("length", 20, 0)
        assert "logprobs" not in line


def test_drafters_choices_and_logprobs(folder, tmp_path):
    sampling = Sampling(temperature=0.9, seed=4)
    plain = run(folder, tmp_path, LINES, n=3, sampling=sampling, logprobs=2)
    assert len(plain) == 9 and plain[0]["new_tokens"] != plain[1]["new_tokens"]
    for line in plain:
        assert len(line["logprobs"]) == 20
        for token, one in zip(line["new_tokens"], line["logprobs"], strict=True):
            assert len(one["top"]) == 2 and one["top"][0][1] >= one["top"][1][1]
            assert one["logprob"] <= one["top"][0][1]
            assert dict(one["top"]).get(token, one["logprob"]) == one["logprob"]
    drafted = run(
        folder, tmp_path, LINES, n=3, sampling=sampling, logprobs=2, rows=2,
        drafter=("ngram", str(folder)),
    )  # fmt: skip
    for one, other in zip(plain, drafted, strict=True):
        assert one["new_tokens"] == other["new_tokens"] and one["text"] == other["text"]
        for a, b in zip(one["logprobs"], other["logprobs"], strict=True):
            assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)


def test_fields_of_the_same_name_are_replaced(folder, tmp_path):
    own = {"prompt": "the quick", "logprobs": None, "text": "mine", "rounds": "many"}
    line = run(folder, tmp_path, [own])[0]
    want = run(folder, tmp_path, LINES[:1])[0]
    assert "logprobs" not in line and (line["text"], line["rounds"]) == (want["text"], 20)
    assert len(run(folder, tmp_path, [own], logprobs=1)[0]["logprobs"]) == 20


def test_a_stop_string(folder, tmp_path):
    plain = run(folder, tmp_path, LINES[:1])[0]["text"]
    found = run(folder, tmp_path, LINES[:1], stop=(plain[4:7],))[0]
    assert found["text"] == plain[: plain.index(plain[4:7])]
    assert found["finish_reason"] == "stop"


def test_one_prompt_is_shown_as_it_comes(folder, tmp_path, capsys):
    generate.main(GenerateConfig(model=folder, prompt="the quick", max_new_tokens=20))
    assert capsys.readouterr().out == run(folder, tmp_path, LINES[:1])[0]["text"] + "\n"


def test_nothing_asked_for(folder, tmp_path):
    assert run(folder, tmp_path, []) == []
    found = run(folder, tmp_path, LINES[:1], max_new_tokens=0)
    assert (found[0]["text"], found[0]["finish_reason"]) == ("", "length")


def test_errors_name_the_line(folder, tmp_path):
    for line, words in (
        ([], "line 3 needs a `prompt`"),
        ({"tokens": [1, "a"]}, "line 3 needs"),
        ({"text": "x"}, "line 3 needs"),
        ({"prompt": "x", "tokens": 12}, "line 3 needs"),
        ({"tokens": [True]}, "line 3 needs"),
    ):
        with pytest.raises(DataError, match=words):
            run(folder, tmp_path, [LINES[0], line])
    for token in (9999, -1):
        with pytest.raises(RequestError, match=f"prompt 2: token id {token} is outside"):
            run(folder, tmp_path, [LINES[0], {"tokens": [token]}])
    with pytest.raises(ConfigError, match="stop string must not be empty"):
        run(folder, tmp_path, LINES, stop=("",))
    with pytest.raises(RequestError, match="prompt 1: the prompt is empty"):
        run(folder, tmp_path, [{"prompt": ""}])
    (tmp_path / "prompts.jsonl").write_text("{")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        generate.main(GenerateConfig(model=folder, prompts=tmp_path / "prompts.jsonl"))
    with pytest.raises(DataError, match="cannot read prompts from.*nowhere"):
        generate.main(GenerateConfig(model=folder, prompts=tmp_path / "nowhere"))
    with pytest.raises(LinearizedError, match="eagle"):
        run(folder, tmp_path, LINES, drafter=("eagle",))
    with pytest.raises(ConfigError, match="either prompt"):
        GenerateConfig()
    with pytest.raises(ConfigError, match="n must be at least 1, got 0"):
        GenerateConfig(prompt="a", n=0)


def test_files_are_checked_before_anything_is_loaded(folder, tmp_path, linear):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the"}\n')
    with pytest.raises(ConfigError, match="would replace the prompts"):
        generate.main(GenerateConfig(model=tmp_path, prompts=prompts, out=prompts))
    assert prompts.read_text()
    with pytest.raises(ConfigError, match="cannot write to out="):
        generate.main(GenerateConfig(model=tmp_path, prompts=prompts, out=prompts / "out.jsonl"))
    linear(vocab=320, dtype=torch.float32).save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match=r"cannot load a tokenizer from .*bare"):
        generate.main(GenerateConfig(model=tmp_path / "bare", prompt="the"))
    out = tmp_path / "new" / "out.jsonl"
    generate.main(GenerateConfig(model=folder, prompts=prompts, out=out, max_new_tokens=3))
    assert len(out.read_text().splitlines()) == 1


def test_a_draft_with_another_tokenizer_is_refused(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("endoftext", "theend"))
    with pytest.raises(ConfigError, match=r"other has another tokenizer than"):
        generate.main(GenerateConfig(model=folder, prompt="the", drafter=(str(other),)))


def test_the_end_of_text(folder, tmp_path):
    model = linearized.load(folder)
    said = run(folder, tmp_path, LINES)[0]["new_tokens"]
    model.generation_config.eos_token_id = said[3]
    ends = tmp_path / "ends"
    model.save_pretrained(ends)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(ends)
    end = said.index(said[3]) + 1
    assert run(ends, tmp_path, LINES)[0]["new_tokens"] == said[:end]
    assert run(ends, tmp_path, LINES, ignore_eos=True)[0]["new_tokens"] == said


def test_every_text_has_a_choice_number_of_its_own(folder, tmp_path):
    """By which it can be had again, alone."""
    sampling = Sampling(temperature=0.9, seed=4, choice=3)
    lines = [LINES[0], LINES[0], LINES[1]]
    found = run(folder, tmp_path, lines, n=2, sampling=sampling)
    assert [(line["index"], line["choice"]) for line in found] == [
        (0, 3), (0, 4), (1, 5), (1, 6), (2, 7), (2, 8),
    ]  # fmt: skip
    assert len({tuple(line["new_tokens"]) for line in found}) == 6
    for line in found[2:]:
        own = replace(sampling, choice=line["choice"])
        again = run(folder, tmp_path, [lines[line["index"]]], sampling=own)[0]
        assert again == {**line, "index": 0}


def test_stop_tokens_and_stop_strings_that_name_them(folder, tokenizer, tmp_path):
    ends = tokenizer.eos_token_id
    settings = {"sampling": Sampling(temperature=1.0, logit_bias={ends: 6.0}, seed=1)}
    plain = run(folder, tmp_path, LINES[:1], ignore_eos=True, **settings)[0]
    size = plain["new_tokens"].index(ends) + 1
    assert 1 < size < 20
    by_string = run(
        folder, tmp_path, LINES[:1], ignore_eos=True, stop=("<|endoftext|>",), **settings
    )
    settings["sampling"] = replace(settings["sampling"], stop_ids={ends})
    for (line,) in (by_string, run(folder, tmp_path, LINES[:1], **settings)):
        assert (line["new_tokens"], line["finish_reason"]) == (plain["new_tokens"][:size], "stop")
        assert line["text"] == tokenizer.decode(line["new_tokens"][:-1])
    config = cli.override(GenerateConfig(prompt="the"), ["sampling.stop_ids=[5, 6]"])
    assert config.sampling.stop_ids == {5, 6}


def test_a_model_that_gives_no_numbers(folder, tmp_path):
    """A line says so; the others are written as ever."""
    model = linearized.load(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(broken)
    lines = [{"tokens": [5, 6, 7]}, LINES[0]]
    bad, good = run(broken, tmp_path, lines)
    assert (bad["finish_reason"], bad["new_tokens"]) == ("error", [])
    assert "NaN logits for position 3" in bad["error"]
    assert good["new_tokens"] == run(folder, tmp_path, LINES[:1])[0]["new_tokens"]
    with pytest.raises(LinearizedError, match="the model gave NaN logits"):
        model.model.norm.weight.data[0] = float("nan")
        model.save_pretrained(broken)
        generate.main(GenerateConfig(model=broken, prompt="the"))
