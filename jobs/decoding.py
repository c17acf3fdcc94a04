"""Decoding with each drafter against plain decoding of the same target: who takes part, case by
case. Knows engines and prompts; knows nothing of what is printed.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import linearized
from linearized.compiled import can_compile
from linearized.medusa import MedusaHeads
from linearized.models import decoder
from linearized.packing import can_pack
from linearized.speculative import (
    Ask,
    Drafter,
    Engine,
    LayersDrafter,
    MedusaDrafter,
    ModelDrafter,
    NgramDrafter,
    Sampling,
    Text,
    TokenTree,
)
from linearized.speculative.skipping import agreement

PLAIN = "plain"
BEST = 4
"""Number of a drafter's best tokens among which the target's is searched."""
Prompts = list[list[int]]
Makers = dict[str, Callable[[], list[Drafter]]]


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Loads models, moves them to a device, and packs and compiles them."""

    device: torch.device
    compile: bool

    def load(self, folder: Path) -> PreTrainedModel:
        model: Any = linearized.load(folder)
        return self.make(model.to(self.device))

    def make(self, model: PreTrainedModel) -> PreTrainedModel:
        model.requires_grad_(False)
        if can_pack(model):
            linearized.pack(model)
        if self.compile and getattr(model.config, "linearized", None) and can_compile(model):
            linearized.compile(model)
        return model


class Contestants:
    """A target and all drafters for it that have been made."""

    def __init__(self, run: Path, ready: Ready) -> None:
        """
        Raises:
            ModelError: there is no target or no draft.
        """
        self.model = ready.load(run / "target")
        self.models: dict[str, PreTrainedModel] = {"model": ready.load(run / "draft")}
        """Drafts that are models of their own."""
        self.heads: MedusaHeads | None = None
        self.layers: LayersDrafter | None = None
        self.missing: list[str] = []
        for name, folder in (("pruned", "pruned"), ("softmax model", "softmax_draft")):
            if (run / folder).exists():
                self.models[name] = ready.make(decoder(ready.load(run / folder)))
            else:
                self.missing.append(name)
        if (run / "target" / "medusa").exists():
            self.heads = MedusaHeads.from_pretrained(run / "target" / "medusa").to(ready.device)
            if can_pack(self.heads):
                linearized.pack(self.heads)
        else:
            self.missing.append("medusa")
        if (run / "target" / "layers.json").exists():
            self.layers = LayersDrafter.from_pretrained(run / "target")
        else:
            self.missing.append("layers")

    def makers(self) -> Makers:
        """Functions that make new drafters for an engine, by name."""
        found: Makers = {
            name: lambda draft=draft: [ModelDrafter(draft)]  # type: ignore[misc]
            for name, draft in self.models.items()
        }
        draft = self.models["model"]
        found["ngram"] = lambda: [NgramDrafter()]
        found["model, then ngram"] = lambda: [ModelDrafter(draft), NgramDrafter()]
        found["useless model"] = lambda: [_Useless(draft)]
        heads, layers = self.heads, self.layers
        if heads is not None:
            found["medusa"] = lambda: [MedusaDrafter(self.model, heads)]
        if layers is not None:
            found["layers"] = lambda: [LayersDrafter(layers.layers)]
        return found

    @torch.no_grad()
    def agreements(self, batches: Sequence[Tensor]) -> dict[str, tuple[float, float | None]]:
        """Under teacher forcing, on text [B, T] that neither has written: how often a drafter's
        first guess is what the target says, and one of its first four. Of Medusa that is the first
        head's; of layers, in short chains on the target's state."""
        right: dict[str, Tensor] = {}
        count = 0
        for tokens in batches:
            said = self.model(input_ids=tokens, use_cache=False).logits.argmax(-1)
            count += said.numel()
            found = {"the text itself": _next(tokens) == said[..., None]}
            for name, draft in self.models.items():
                guessed = draft(input_ids=tokens, use_cache=False).logits.topk(BEST, dim=-1)
                found[name] = guessed.indices == said[..., None]
            for name, hits in found.items():
                sums = hits.flatten(0, 1).double().sum(0).cpu()
                right[name] = right.get(name, torch.zeros_like(sums)) + sums
        shares = {name: (sums / count).tolist() for name, sums in right.items()}
        rates: dict[str, tuple[float, float | None]] = {
            name: (share[0], sum(share) if len(share) == BEST else None)
            for name, share in shares.items()
        }
        if self.heads is not None:
            sums = sum(self.heads.right(self.model, tokens) for tokens in batches)
            first = torch.as_tensor(sums)[0]
            rates["medusa"] = float(first[0] / first[-1]), float(first[:BEST].sum() / first[-1])
        if self.layers is not None:
            kept = self.layers.layers
            shares_ = [agreement(self.model, tokens, kept) for tokens in batches]
            rates["layers"] = statistics.mean(shares_), None
        return rates


def _next(tokens: Tensor) -> Tensor:
    """[B, T, 1]; -1 behind the last."""
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-1)[..., None]


class _Useless(ModelDrafter):
    """A drafter that is as confident and as slow as the draft model, and always wrong."""

    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        size = self.model.config.vocab_size
        return [
            TokenTree(tuple((t + 1) % size for t in tree.tokens), tree.parents, tree.scores)
            for tree in super().propose(asks)
        ]


@dataclass
class Contest:
    """The results of one contestant so far."""

    engine: Engine
    speeds: list[float] = field(default_factory=list)
    """Tokens per second, one entry per group of prompts."""
    ratios: list[float] = field(default_factory=list)
    """The same, divided by the speed of plain decoding just before and after. For plain decoding
    itself, this shows how much the machine varies."""
    texts: list[Text] = field(default_factory=list)

    def result(self, plain: Contest) -> dict[str, Any]:
        drafted, accepted = Counter[int](), Counter[int]()
        for text in self.texts:
            drafted.update(text.drafted)
            accepted.update(text.accepted)
        rounds = sum(text.rounds for text in self.texts)
        tokens = sum(text.num_new for text in self.texts)
        total = sum(self.engine.seconds.values())
        pairs = zip(self.texts, plain.texts, strict=True)
        return {
            "tokens_per_second": statistics.median(self.speeds),
            "over_plain": statistics.median(self.ratios),
            "ratios": self.ratios,
            "tokens_per_round": tokens / rounds,
            "drafted": dict(drafted),
            "accepted": dict(accepted),
            "shares": {what: spent / total for what, spent in self.engine.seconds.items()},
            "repeated": statistics.mean(repeated(text.new_tokens) for text in self.texts),
            "other_texts": sum(mine.new_tokens != base.new_tokens for mine, base in pairs),
        }


def repeated(tokens: list[int], size: int = 8) -> float:
    """The share of n-grams (of `size` tokens) that occur earlier in the text."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compare(
    model: PreTrainedModel,
    makers: Makers,
    groups: Sequence[Prompts],
    *,
    tokens: int,
    max_nodes: int,
    temperature: float,
) -> dict[str, dict[str, Any]]:
    """All contestants, in turns, on the same groups of prompts, with plain decoding before, after
    and between them: what else the machine does changes by the second. They keep what they have
    learnt of how well they draft, as a server would; the first group is for that, and does not
    count."""
    cases: dict[str, Contest] = {}
    costs = None
    for name, make in {PLAIN: list, **makers}.items():
        drafters = make()
        engine = Engine(model, drafters=drafters, rows=len(groups[0]), max_nodes=max_nodes)
        if costs is None or any(drafter.needs_hidden for drafter in drafters):
            costs = engine.measure()
        engine.plan(costs)
        cases[name] = Contest(engine)
    for turn, group in enumerate(groups):
        names = list(makers)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        found: list[tuple[str, float, list[Text]]] = []
        for name in _with_plain_between(names):
            found.append((name, *generate(cases[name].engine, group, tokens, temperature)))
        if not turn:
            for case in cases.values():
                case.engine.seconds.clear()
            continue
        plains = [(place, speed) for place, (name, speed, _) in enumerate(found) if name == PLAIN]
        for place, (name, speed, texts) in enumerate(found):
            case = cases[name]
            case.speeds.append(speed)
            before = [base for at, base in plains if at < place][-1:]
            after = [base for at, base in plains if at > place][:1]
            case.ratios.append(speed / statistics.mean(before + after))
            if name != PLAIN or place == 0:
                case.texts += texts
    return {name: case.result(cases[PLAIN]) for name, case in cases.items()}


def _with_plain_between(names: list[str]) -> list[str]:
    found = [PLAIN]
    for place, name in enumerate(names, start=1):
        found.append(name)
        if place % 3 == 0 or place == len(names):
            found.append(PLAIN)
    return found


def generate(
    engine: Engine, prompts: Prompts, tokens: int, temperature: float, *, reading: bool = False
) -> tuple[float, list[Text]]:
    """Tokens a second from when all prompts are read (by the target; a draft reads them when it
    is first asked), or with `reading` from when they are given, and the texts. No text ends
    early."""
    texts = [
        Text(prompt, sampling=Sampling(temperature=temperature, seed=i), max_new_tokens=tokens)
        for i, prompt in enumerate(prompts)
    ]
    before = 0
    began = time.perf_counter()
    for text in texts:
        engine.add(text)
    while engine.busy:
        reads = engine.reading
        engine.step()
        if reads and not reading:  # the round that read the last prompt does not count
            before = sum(text.num_new for text in texts)
            began = time.perf_counter()
    done = sum(text.num_new for text in texts) - before
    return done / (time.perf_counter() - began), texts
