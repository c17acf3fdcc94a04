"""What is refused before a replica starts."""

from __future__ import annotations

import json
import shutil

import pytest
import tokenizers
import torch
from click import ClickException

from linearized.errors import ConfigError
from serve_apps import memory
from serve_apps.app import AppArgs, build
from serve_apps.checks import check_app, check_device, check_draft, check_folders


@pytest.fixture
def pair(folders, tmp_path):
    """Copies of a target and a draft that belong together."""
    for name in ("target", "draft"):
        shutil.copytree(folders[name], tmp_path / name)
    return tmp_path


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_pair_that_belongs_together(pair):
    check_folders({"target": pair / "target"}, pair / "draft")
    check_folders({"target": pair / "target"}, None)


def test_a_draft_needs_no_tokenizer_of_its_own(pair):
    for file in (pair / "draft").glob("tokenizer*"):
        file.unlink()
    check_folders({"target": pair / "target"}, pair / "draft")


def test_names_of_the_hub_are_left_to_the_replicas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_folders({"target": tmp_path.relative_to(tmp_path) / "some" / "model"}, None)


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
        check_folders({"target": pair / "target"}, None)


def test_folders_that_hold_no_model_or_tokenizer(pair):
    with pytest.raises(ConfigError, match="no such folder"):
        check_folders({"target": pair / "nowhere"}, None)
    (pair / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check_folders({"target": pair / "empty"}, None)
    (pair / "draft" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"draft=.*config\.json is of no use"):
        check_folders({"target": pair / "target"}, pair / "draft")
    for file in (pair / "target").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        check_folders({"target": pair / "target"}, None)


def test_a_draft_with_another_vocabulary(pair):
    size = json.loads((pair / "target" / "config.json").read_text())["vocab_size"]
    edit(pair / "draft" / "config.json", vocab_size=size + 20)  # padded, the tokenizer is the same
    check_folders({"target": pair / "target"}, pair / "draft")
    for file in (pair / "draft").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=f"vocabulary of {size + 20}, .* one of {size}; save"):
        check_folders({"target": pair / "target"}, pair / "draft")


def test_a_draft_with_another_tokenizer(pair):
    file = pair / "draft" / "tokenizer.json"
    other = tokenizers.Tokenizer.from_file(str(file))
    vocabulary = json.loads(other.to_str())
    names = vocabulary["model"]["vocab"]
    names["a"], names["b"] = names["b"], names["a"]
    file.write_text(json.dumps(vocabulary))
    with pytest.raises(ConfigError, match="another tokenizer"):
        check_folders({"target": pair / "target"}, pair / "draft")


def test_a_draft_must_go_with_each_of_several_targets(pair, folders):
    both = {"targets.a": pair / "target", "targets.b": folders["other"]}
    with pytest.raises(ConfigError, match="targets.b=.* vocabulary of 100|holds no tokenizer"):
        check_folders(both, pair / "draft")


def test_more_memory_than_there_is(pair, monkeypatch):
    args = AppArgs(target=pair / "target", draft=pair / "draft", max_sessions=1000)
    check_app(args)
    monkeypatch.setattr(memory, "available", lambda device: 10**5)
    with pytest.raises(ConfigError, match=r"target=.* needs .* GB, .* this machine has 0.0; lower"):
        check_app(args)
    with pytest.raises(ConfigError, match=r"draft=.* set draft_dtype=bfloat16"):
        check_draft(pair / "draft", args.draft_config())


def test_a_device_that_is_not_there(pair, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for kind in ("target", "draft"):
        args = AppArgs(target=pair / "target", draft=pair / "draft", **{f"{kind}_device": "cuda"})
        with pytest.raises(ConfigError, match=f"{kind}_device=cuda: torch finds no GPU"):
            check_app(args)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of machines that are not looked at here
    check_device("target", "cuda")


def test_the_app_says_so_in_one_line(pair):
    edit(pair / "target" / "config.json", eos_token_id=50256)
    with pytest.raises(ClickException) as refused:
        build(AppArgs(target=pair / "target"))
    assert "50256" in refused.value.message and "\n" not in refused.value.message
