"""Whether two tokenizers are the same."""

from __future__ import annotations

import json
import shutil

from serve_apps.tokenizers import hash_in, tokenizer_hash


def test_a_tokenizer_is_told_from_another_by_its_hash(folders, tokenizer, tmp_path):
    folder = tmp_path / "draft"
    shutil.copytree(folders["draft"], folder)
    known = tokenizer_hash(tokenizer)
    assert hash_in(folder) == known
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "padding_side": "left"}))
    assert hash_in(folder) == known
    file = folder / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    new = {**vocabulary["added_tokens"][0], "id": 320, "content": "<new>"}
    vocabulary["added_tokens"].append(new)
    file.write_text(json.dumps(vocabulary))
    assert hash_in(folder) != known
    for one in folder.glob("tokenizer*"):
        one.unlink()
    assert hash_in(folder) == hash_in(tmp_path / "a name of the hub") == ""
