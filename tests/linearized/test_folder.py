"""What is wrong with a model's folder is said in one line."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

import linearized
from linearized.errors import ConfigError, ModelError


@pytest.fixture
def folder(llama, tmp_path):
    llama().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def refusal(folder) -> str:
    with pytest.raises(ModelError) as caught:
        linearized.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def test_weights_that_are_cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "damaged or cut short" in refusal(folder)


def test_weights_that_git_has_not_fetched(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
    (folder / "model.safetensors").write_text(pointer)
    assert "model.safetensors is a Git LFS pointer" in refusal(folder)
    assert "git lfs pull" in refusal(folder)


def test_a_quantizer_that_is_not_installed(folder):
    rewrite(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert "cannot load a model" in refusal(folder)


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["with its head", "without"])
def test_more_layers_than_the_config_says(folder, prefix):
    weights = folder / "model.safetensors"
    tensors = {name.removeprefix("model.") if not prefix else name: tensor
               for name, tensor in load_file(weights).items()}  # fmt: skip
    save_file(tensors, weights, metadata={"format": "pt"})
    linearized.load(folder)
    rewrite(folder, num_hidden_layers=1)
    assert "weights of layers that its config does not have" in refusal(folder)
    assert "layers.1." in refusal(folder)


def test_a_setting_of_a_newer_version(folder):
    rewrite(folder, linearized={"attention": "grouped", "colour": 1})
    with pytest.raises(ConfigError, match="colour"):
        linearized.load(folder)


def test_no_json_and_no_folder(folder):
    (folder / "config.json").write_text("{")
    refusal(folder)
    refusal(folder / "nowhere")
