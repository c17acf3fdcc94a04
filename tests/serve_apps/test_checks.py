"""What is refused before a replica starts."""

from __future__ import annotations

import json
import shutil

import pytest
import tokenizers
from click import ClickException

from linearized.errors import ConfigError
from serve_apps.app import AppArgs, build
from serve_apps.checks import check_folders, hash_in, tokenizer_hash


@pytest.fixture
def pair(folders, tmp_path):
    """Copies of a target and a draft that belong together."""
    for name in ("target", "draft"):
        shutil.copytree(folders[name], tmp_path / name)
    return tmp_path


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_pair_that_belongs_together(pair):
    check_folders(pair / "target", pair / "draft")
    check_folders(pair / "target", None)


def test_a_draft_needs_no_tokenizer_of_its_own(pair):
    for file in (pair / "draft").glob("tokenizer*"):
        file.unlink()
    check_folders(pair / "target", pair / "draft")


def test_names_of_the_hub_are_left_to_the_replicas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_folders(tmp_path.relative_to(tmp_path) / "some" / "model", None)


@pytest.mark.parametrize(
    "file, values, says",
    [
        ("config.json", {"eos_token_id": 50256}, "end-of-text id 50256, outside .* 3.."),
        ("generation_config.json", {"eos_token_id": [0, 999]}, "end-of-text id 999"),
        ("config.json", {"vocab_size": 300}, "tokenizer has the id .*, outside"),
    ],
)
def test_ids_beyond_the_vocabulary(pair, file, values, says):
    edit(pair / "target" / file, **values)
    with pytest.raises(ConfigError, match=says):
        check_folders(pair / "target", None)


def test_folders_that_hold_no_model_or_tokenizer(pair):
    with pytest.raises(ConfigError, match="no such folder"):
        check_folders(pair / "nowhere", None)
    (pair / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check_folders(pair / "empty", None)
    (pair / "draft" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"draft=.*config\.json is of no use"):
        check_folders(pair / "target", pair / "draft")
    for file in (pair / "target").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        check_folders(pair / "target", None)


def test_a_draft_with_another_vocabulary(pair):
    size = json.loads((pair / "target" / "config.json").read_text())["vocab_size"]
    edit(pair / "draft" / "config.json", vocab_size=size + 20)  # padded, the tokenizer is the same
    check_folders(pair / "target", pair / "draft")
    for file in (pair / "draft").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=f"vocabulary of {size + 20}, .* one of {size}; save"):
        check_folders(pair / "target", pair / "draft")


def test_a_tokenizer_is_told_from_another_by_its_hash(pair, tokenizer, tmp_path):
    known = tokenizer_hash(tokenizer)
    assert hash_in(pair / "draft") == known
    edit(pair / "draft" / "tokenizer_config.json", padding_side="left")  # it is the same
    assert hash_in(pair / "draft") == known
    file = pair / "draft" / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    vocabulary["added_tokens"].append(
        {**vocabulary["added_tokens"][0], "id": 320, "content": "<new>"}
    )
    file.write_text(json.dumps(vocabulary))
    assert hash_in(pair / "draft") != known
    for one in (pair / "draft").glob("tokenizer*"):
        one.unlink()
    assert hash_in(pair / "draft") == hash_in(tmp_path / "a name of the hub") == ""


def test_a_draft_with_another_tokenizer(pair):
    file = pair / "draft" / "tokenizer.json"
    other = tokenizers.Tokenizer.from_file(str(file))
    vocabulary = json.loads(other.to_str())
    names = vocabulary["model"]["vocab"]
    names["a"], names["b"] = names["b"], names["a"]
    file.write_text(json.dumps(vocabulary))
    with pytest.raises(ConfigError, match="another tokenizer"):
        check_folders(pair / "target", pair / "draft")


def test_the_app_says_so_in_one_line(pair):
    edit(pair / "target" / "config.json", eos_token_id=50256)
    with pytest.raises(ClickException) as refused:
        build(AppArgs(target=pair / "target"))
    assert "50256" in refused.value.message and "\n" not in refused.value.message
