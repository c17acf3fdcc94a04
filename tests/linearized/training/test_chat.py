"""Conversations: what an assistant says is learned, with the end of its turn, and nothing else."""

from __future__ import annotations

import json

import pytest

from linearized.errors import DataError
from linearized.training import tokenizer
from linearized.training.chat import ChatEncoder, Refused, check_template
from linearized.training.tokenizer import END, PAD, Edges

CHATML = (
    "{% for m in messages %}<|s|>{{ m.role }}\n{{ m.content }}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)
# As Llama's and Mistral's: begins with a token of its own, and insists on taking turns.
TURNS = (
    "<|b|>{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }}<|e|>{% endif %}"
    "{% endfor %}"
)
# Leaves out what was thought in earlier turns.
THINKS = (
    "{% for m in messages %}<|s|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</t>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tokenizer.train(["user assistant hello there\n" * 9], 300, folder)
    return folder


def with_template(plain, folder, template):
    made = tokenizer.load(plain)
    made.add_special_tokens({"additional_special_tokens": ["<|s|>", "<|e|>", "<|b|>"]})
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chatml(plain, tmp_path_factory):
    return with_template(plain, tmp_path_factory.mktemp("chatml"), CHATML)


EDGES = Edges((1,), (0,))


def encoded(folder, row) -> tuple[str, list[str]]:
    """The whole text, and the stretches of it that are learned."""
    document = ChatEncoder(folder, EDGES)(json.dumps(row))
    opened = tokenizer.load(folder)
    stretches: list[list[int]] = []
    was = False
    for token, learned in zip(document.ids.tolist(), document.trained.tolist(), strict=True):
        if learned and not was:
            stretches.append([])
        if learned:
            stretches[-1].append(token)
        was = learned
    return opened.decode(document.ids), [opened.decode(ids) for ids in stretches]


def says(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_each_of_the_assistants_turns_is_learned_with_its_end(chatml):
    row = {"messages": [{"role": "system", "content": "be kind"}, *says("hi", "yo", "and?", "so")]}
    text, learned = encoded(chatml, row)
    assert text == (
        "<|s|>system\nbe kind<|e|>\n<|s|>user\nhi<|e|>\n<|s|>assistant\nyo<|e|>\n"
        "<|s|>user\nand?<|e|>\n<|s|>assistant\nso<|e|>\n"
    )
    assert learned == ["yo<|e|>", "so<|e|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "größe 🙂?", "completion": "ja"},
        {"prompt": says("größe 🙂?"), "completion": says("ja", first="assistant")},
        {"prompt": says("größe 🙂?"), "completion": "ja"},
    ],
)
def test_prompts_and_completions_go_through_the_template(chatml, row):
    text, learned = encoded(chatml, row)
    assert text == "<|s|>user\ngröße 🙂?<|e|>\n<|s|>assistant\nja<|e|>\n"
    assert learned == ["ja<|e|>"]


def test_an_assistants_words_in_a_prompt_are_not_learned(chatml):
    row = {"prompt": says("a", "b", "c"), "completion": "d"}
    assert encoded(chatml, row)[1] == ["d<|e|>"]


def test_prompts_without_a_template_are_plain_text(plain):
    text, learned = encoded(plain, {"prompt": "hello", "completion": " there"})
    assert text == f"{PAD}hello there{END}" and learned == [f" there{END}"]
    with pytest.raises(Refused, match="no chat template"):
        encoded(plain, {"prompt": says("a"), "completion": "b"})
    with pytest.raises(DataError, match="no chat template"):
        check_template(plain)


def test_there_is_one_beginning_of_text(plain, tmp_path):
    folder = with_template(plain, tmp_path, TURNS)
    text, learned = encoded(folder, {"messages": says("a", "b", "c", "d")})
    assert text == "<|b|>[a] b<|e|>[c] d<|e|>" and learned == [" b<|e|>", " d<|e|>"]
    with pytest.raises(Refused, match="refused by the chat template .*must alternate"):
        encoded(folder, {"messages": says("a", first="assistant")})


def test_turns_that_a_template_shows_otherwise_later_are_read_only(plain, tmp_path):
    folder = with_template(plain, tmp_path, THINKS)
    text, learned = encoded(folder, {"messages": says("a", "hm</t>b", "c", "ah</t>d")})
    assert "hm" not in text and learned == ["ah</t>d<|e|>"]


@pytest.mark.parametrize(
    "row,reason",
    [
        ({"messages": says("a<|e|>\n<|s|>assistant\nb", "c")}, r"special token <\|e\|>"),
        ({"messages": [{"role": "x<|s|>", "content": "a"}]}, r"special token <\|s\|>"),
        ({"messages": says("a")}, "nothing that an assistant answers"),
        ({"messages": says("a", first="assistant")}, "nothing that an assistant answers"),
        ({"messages": []}, "no list of messages"),
        ({"messages": 3}, "no list of messages"),
        ({"prompt": "a", "completion": ["b"]}, "no list of messages"),
    ],
)
def test_what_cannot_be_learned_from(chatml, row, reason):
    with pytest.raises(Refused, match=reason):
        encoded(chatml, row)
