"""A model, linearized or not, as lm-evaluation-harness asks it. Imported only where `lm_eval` is
there.

Texts are scored together, as many as `batch_tokens` allow, and logits are made for what is asked
about only; the harness's own adapter makes them for whole padded batches. Continuations are written
by `linearized.generate`, several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel

import linearized
from linearized.evaluation.continuations import scores, split

LENGTH = 2048
"""Tokens of a window, where the model does not say how many it was made for."""
WRITTEN = 256
"""Tokens that are written at most, where a task does not say so."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, batch_tokens: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self._device = model.device
        config = model.config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", None) or LENGTH)
        self._writer: PreTrainedModel | None = None

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.tokenizer.chat_template or "" if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        ids: list[int] = self.tokenizer(
            string, add_special_tokens=bool(add_special_tokens), verbose=False
        )["input_ids"]
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = split(self.tok_encode, context, continuation)
        return self._begun(before), after

    def _begun(self, ids: list[int]) -> list[int]:
        """With what the tokenizer puts before a text, which is never empty then."""
        alone = self.tokenizer("", verbose=False)["input_ids"]
        begin = alone[:1] if alone[:1] != [self.tokenizer.eos_token_id] else []
        begun = ids if ids[: len(begin)] == begin else [*begin, *ids]
        return begun or [self.prefix_token_id]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = scores(self.model, pairs, batch_tokens=self.batch_tokens, longest=self.max_length)
        return [(one.nats, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        pairs, counts = [], []
        for request in requests:
            windows = list(map(make_disjoint_window, get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )))  # fmt: skip
            pairs += windows
            counts.append(len(windows))
        found = iter(
            scores(self.model, pairs, batch_tokens=self.batch_tokens, longest=self.max_length)
        )
        return [sum(next(found).nats for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        if self._writer is None:  # a softmax model writes as a twin that has its weights
            self._writer = linearized.models.decoder(self.model)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            wanted = self._write(
                [requests[i].args[0] for i in indices], requests[indices[0]].args[1]
            )
            for index, text in zip(indices, wanted, strict=True):
                texts[index] = text
        return texts

    def _write(self, contexts: list[str], how: dict[str, Any]) -> list[str]:
        until = how.get("until") or []
        until = [until] if isinstance(until, str) else [one for one in until if one]
        size = int(how.get("max_gen_toks") or how.get("max_new_tokens") or WRITTEN)
        sampled = bool(how.get("do_sample", float(how.get("temperature") or 0.0) > 0))
        room = max(self.max_length - size, 1)
        prompts = [self._begun(self.tok_encode(context))[-room:] for context in contexts]
        assert self._writer is not None
        written = linearized.generate(
            self._writer, prompts, max_new_tokens=size, stop=until, tokenizer=self.tokenizer,
            temperature=float(how.get("temperature") or 1.0) if sampled else 0.0,
            top_p=float(how.get("top_p") or 1.0), top_k=int(how.get("top_k") or 0),
        )  # fmt: skip
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
        return [_cut(text, until) for text in texts]


def _cut(text: str, until: Sequence[str]) -> str:
    """Up to the first of these strings."""
    for stop in until:
        text = text.partition(stop)[0]
    return text
