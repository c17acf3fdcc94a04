"""Medusa's heads on a target: guesses for several tokens at once from one hidden state.

Head d is a residual block on the hidden state from which a token was chosen, and guesses the token
d places after that one (Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with
Multiple Decoding Heads", ICML 2024, 2.1). Unlike there, all heads end in the target's own output
matrix: a head then takes C² numbers instead of C·(C + V).

B batch, T tokens, C hidden width, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel

from linearized.errors import ModelError

FORMAT = "linearized-medusa/1"
RANKS = 8
"""Guesses of a head whose accuracies are measured."""


class MedusaHeads(nn.Module):
    """Saved as `medusa.json` and `medusa.safetensors`, in a folder beside the target or in its own.
    It keeps no copy of the target's weights."""

    def __init__(self, *, heads: int, hidden: int, vocab_size: int, target: str) -> None:
        """`target`: fingerprint of the model whose hidden states it reads."""
        super().__init__()
        self.num_heads = heads
        self.hidden = hidden
        self.vocab_size = vocab_size
        self.target = target
        blocks = [nn.Linear(hidden, hidden) for _ in range(heads)]
        for block in blocks:  # at first, all heads guess what the target's own does
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
        self.blocks = nn.ModuleList(blocks)
        self.accuracies = [[0.5**rank / 2 for rank in range(1, RANKS + 1)]] * heads
        """[head][rank], how often this guess is right on held-out text; a prior until measured."""

    @classmethod
    def on(cls, model: PreTrainedModel, heads: int, fingerprint: str) -> MedusaHeads:
        return cls(
            heads=heads,
            hidden=output_matrix(model).shape[1],
            vocab_size=model.config.vocab_size,
            target=fingerprint,
        )

    def forward(self, hidden: Tensor, matrix: Tensor) -> list[Tensor]:
        """Logits [..., V] of each head, from hidden states [..., C] and the target's output matrix
        [V, C]."""
        return list(F.linear(self.states(hidden), matrix).unbind(-2))

    def states(self, hidden: Tensor) -> Tensor:
        """What the target's output matrix is to be multiplied with, [..., heads, C]."""
        return torch.stack([hidden + F.silu(block(hidden)) for block in self.blocks], dim=-2)

    def save_pretrained(self, folder: Path | str) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "format": FORMAT,
            "heads": self.num_heads,
            "hidden": self.hidden,
            "vocab_size": self.vocab_size,
            "target": self.target,
            "accuracies": self.accuracies,
        }
        (folder / "medusa.json").write_text(json.dumps(settings, indent=2) + "\n")
        tensors = {name: tensor.float().cpu() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / "medusa.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> MedusaHeads:
        """
        Raises:
            ModelError: there are none, or not of this version.
        """
        folder = Path(folder)
        try:
            settings: dict[str, Any] = json.loads((folder / "medusa.json").read_text())
            if settings.pop("format", None) != FORMAT:
                raise ModelError(f"{folder / 'medusa.json'} is not of format {FORMAT}")
            accuracies = settings.pop("accuracies")
            heads = cls(**settings)
            heads.load_state_dict(safetensors.torch.load_file(folder / "medusa.safetensors"))
        except ModelError:
            raise
        except (
            OSError, ValueError, TypeError, KeyError, RuntimeError, safetensors.SafetensorError
        ) as error:  # fmt: skip
            reason = str(error).strip().split("\n")[0]
            raise ModelError(f"cannot load Medusa heads from {folder}: {reason}") from error
        heads.accuracies = accuracies
        return heads.eval()

    def check(self, fingerprint: str) -> None:
        """Raises ModelError unless they were trained on this target."""
        if fingerprint != self.target:
            raise ModelError(
                f"these Medusa heads were trained on model {self.target}, not on {fingerprint}; "
                "train them anew with `jobs.finetune medusa`"
            )

    @torch.no_grad()
    def right(self, target: PreTrainedModel, tokens: Tensor) -> Tensor:
        """[heads, RANKS + 1], how often each guess is what the target itself would say on tokens
        [B, T], and how many guesses of each rank there were. What the target says, not what the
        text says: that is what will be verified."""
        output = target(input_ids=tokens, use_cache=False, output_hidden_states=True)
        said = output.logits.argmax(-1)  # of the token after
        found = torch.zeros(self.num_heads, RANKS + 1, dtype=torch.float64)
        matrix = output_matrix(target)
        for head, logits in enumerate(self(output.hidden_states[-1], matrix)):
            wanted = said[:, 1 + head :]
            best = logits[:, : wanted.shape[1]].topk(RANKS, dim=-1).indices
            found[head, :RANKS] = (best == wanted[..., None]).sum((0, 1)).double().cpu()
            found[head, RANKS] = wanted.numel()
        return found


def output_matrix(model: PreTrainedModel) -> Tensor:
    """[V, C].

    Raises:
        ModelError: the model has none of its own.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ModelError(f"{type(model).__name__} has no output matrix for Medusa heads to share")
    weight: Tensor = head.weight
    return weight
