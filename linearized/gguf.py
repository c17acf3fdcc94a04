"""Models out of GGUF files, llama.cpp's format. Knows files; knows nothing of attention."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import transformers

from linearized.errors import ModelError


def convert(file: Path | str, folder: Path | str) -> None:
    """Write the model and the tokenizer that a GGUF file holds as an ordinary Hugging Face folder.
    Weights are dequantized to float32: the folder takes four bytes a parameter.

    Raises:
        ModelError: the file holds no model that transformers knows, or not all of its weights.
    """
    file = Path(file)
    with contextlib.redirect_stderr(io.StringIO()):  # transformers draws bars there
        try:
            model = _model(file)
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except ModelError:
            raise
        except Exception as error:  # of any kind: gguf's reader raises what it stumbles over
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ModelError(f"cannot read a model from {file}: {reason}") from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _model(file: Path) -> Any:
    # `from_pretrained(gguf_file=…)` gives a model that counts as quantized and cannot be saved.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.dtype = torch.float32
    with torch.device("meta"):
        outline = transformers.AutoModelForCausalLM.from_config(config)
    weights = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=outline)["tensors"]
    model = transformers.AutoModelForCausalLM.from_config(config)
    missing = set(model.load_state_dict(weights, strict=False).missing_keys)
    missing -= set(getattr(model, "all_tied_weights_keys", None) or ())
    if missing:
        raise ModelError(
            f"{file} lacks {len(missing)} of the weights its config asks for, among them "
            f"{', '.join(sorted(missing)[:3])}"
        )
    model.tie_weights()
    return model.eval()
