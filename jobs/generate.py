"""Continue prompts: JSON Lines in, JSON Lines out, or one prompt on the terminal.

    python -m jobs.generate demo 'prompt=def main():'
    python -m jobs.generate demo prompts=prompts.jsonl out=texts.jsonl drafter=[ngram]

A line holds `prompt`, a text, or `tokens`, a list of ids; whatever else it holds comes back with
its text, unless that has a field of the same name. Lines are written as texts end.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cluster.progress import Progress, note
from jobs import cli, models
from linearized.errors import ConfigError, DataError, LinearizedError, RequestError
from linearized.speculative.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearized.speculative import Drafter, Engine, Text


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    model: Path = Path("runs/demo/target")
    """A model's folder, tokenizer included; or a GGUF file, or a name on the Hub."""
    prompt: str | None = None
    """One text to go on with; it is shown as it comes."""
    prompts: Path | None = None
    """Many, as JSON Lines; "-": standard input."""
    out: Path | None = None
    """JSON Lines; null: standard output."""
    drafter: tuple[str, ...] = ()
    """In the order in which to ask them: ngram, layers, medusa, or a draft model's folder."""
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    """Texts for each prompt. All texts of a call are numbered through: text k of prompt i has the
    choice number `sampling.choice` + i·n + k. A line's `choice` is that number, and gives its text
    again."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these. They may name special tokens."""
    ignore_eos: bool = False
    """Go on after the model's end of text. (`sampling.stop_ids`, token ids that end a text, take
    its place, too.)"""
    logprobs: int | None = None
    """Alternatives to name for each token, with log-probabilities; null: none of that."""
    rows: int = 8
    """Texts at a time."""
    pack: bool = True
    """Lay weights out for the CPU once more: faster, for as much memory again."""
    compile: bool = False
    """Compile the steps: faster still, after up to a few minutes the first time."""
    threads: int = 0
    """Of torch; 0: its own choice."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise ConfigError("give either prompt=… or prompts=…")
        for name, least in (("n", 1), ("rows", 1), ("max_new_tokens", 0), ("threads", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")


def demo() -> GenerateConfig:
    """With the demo's target."""
    return GenerateConfig(prompt="def main():")


RECIPES = {"demo": demo}


def main(config: GenerateConfig) -> None:
    import torch
    import transformers

    import linearized
    from linearized.packing import can_pack
    from linearized.speculative import Engine

    if config.threads:
        torch.set_num_threads(config.threads)
    lines = list(_lines(config))
    _check_out(config)
    cache = (Path("runs") if config.out is None else config.out.parent) / models.CACHE
    config = replace(config, model=models.folder_of(config.model, cache))
    model = linearized.load(config.model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"cannot load a tokenizer from {config.model}: {reason}") from error
    drafters = _drafters(config, model)
    size = linearized.pack(model) if config.pack and can_pack(model) else 0
    if size and config.out is not None:  # else texts are what is printed
        note(f"generate: packed weights take {size / 1e6:.0f} MB more (pack=false: none)")
    if config.compile:
        linearized.compile(model)
    texts = _texts(config, lines, model, tokenizer)
    rows = min(config.rows, max(len(texts), 1))
    engine = Engine(model, drafters=drafters, rows=rows)
    if drafters:
        engine.plan(engine.measure())
    for text in texts:
        engine.add(text)
    if config.prompt is not None and config.out is None and len(texts) == 1:
        _show(engine)
        return
    with contextlib.ExitStack() as stack:
        file = sys.stdout if config.out is None else stack.enter_context(config.out.open("w"))
        _write(engine, texts, file)


def _lines(config: GenerateConfig) -> Iterator[dict[str, Any]]:
    if config.prompt is not None:
        yield {"prompt": config.prompt}
        return
    source = str(config.prompts)
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read prompts from {source}: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}, line {number} is not JSON: {error}") from error
        if not _is_request(value):
            raise DataError(
                f"{source}, line {number} needs a `prompt` (text) or `tokens` (a list of ids)"
            )
        yield value


def _check_out(config: GenerateConfig) -> None:
    if config.out is None:
        return
    if config.prompts is not None and config.out.resolve() == config.prompts.resolve():
        raise ConfigError(f"out={config.out} would replace the prompts; choose another out")
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.touch()
    except OSError as error:
        raise ConfigError(f"cannot write to out={config.out}: {error}") from error


def _is_request(line: Any) -> bool:
    if not isinstance(line, dict):
        return False
    if "tokens" not in line:
        return isinstance(line.get("prompt"), str)
    tokens = line["tokens"]
    return isinstance(tokens, list) and all(type(one) is int for one in tokens)


def _drafters(config: GenerateConfig, model: PreTrainedModel) -> list[Drafter]:
    import linearized
    from linearized.compiled import can_compile
    from linearized.packing import can_pack
    from linearized.speculative.generate import NAMED, drafters

    for name in config.drafter:
        if name not in NAMED:
            _check_tokenizer(config.model, Path(name))
    given = [one if one in NAMED else linearized.load(one) for one in config.drafter]
    for one in given:
        if isinstance(one, str):
            continue
        if config.pack and can_pack(one):
            linearized.pack(one)
        if config.compile and can_compile(one):
            linearized.compile(one)
    return drafters(given, model)


def _check_tokenizer(target: Path, draft: Path) -> None:
    """Where both folders have one."""
    from linearized.training import tokenizer

    folders = (target, draft)
    if not all((folder / "tokenizer.json").exists() for folder in folders):
        return
    mine, theirs = map(tokenizer.fingerprint, folders)
    if mine != theirs:
        raise ConfigError(
            f"drafter {draft} has another tokenizer than {target}; they must share one"
        )


def _texts(
    config: GenerateConfig,
    lines: list[dict[str, Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[Text, dict[str, Any]]:
    """Every text that is asked for, and the line that it will become."""
    from linearized.speculative import Text
    from linearized.speculative.generate import decoding, end_of_text
    from linearized.speculative.text import check_tokens

    ends = config.sampling.stop_ids or frozenset(() if config.ignore_eos else end_of_text(model))
    decode = decoding(tokenizer)
    found = {}
    for number, line in enumerate(lines, start=1):
        tokens = line["tokens"] if "tokens" in line else tokenizer(line["prompt"])["input_ids"]
        try:
            check_tokens(tokens, model.config.vocab_size)
        except RequestError as error:
            raise RequestError(f"prompt {number}: {error}", param=error.param) from error
        first = config.sampling.choice + (number - 1) * config.n
        for choice in range(first, first + config.n):
            text = Text(
                tokens,
                sampling=replace(config.sampling, choice=choice, stop_ids=ends),
                max_new_tokens=config.max_new_tokens,
                stop=config.stop,
                decode=decode,
                logprobs=config.logprobs,
            )
            text.check(model.config.vocab_size)
            new = {"index": number - 1, "choice": choice, "text": "", "logprobs": []}
            found[text] = {**line, **new}
    return found


def _show(engine: Engine) -> None:
    """On the terminal, as it comes."""
    while engine.busy:
        for text, piece in engine.step():
            print(piece.text, end="", flush=True)
            if isinstance(text.error, LinearizedError):
                raise text.error
            if text.error is not None:
                raise DataError(f"the tokenizer cannot decode the text: {text.error}")
    print()


def _write(engine: Engine, texts: dict[Text, dict[str, Any]], file: TextIO) -> None:
    began, num_tokens, total = time.perf_counter(), 0, len(texts)
    with Progress("generate", total=total, unit="texts", quiet=file is sys.stdout) as progress:
        for text in [one for one in texts if one.finished is not None]:  # nothing was asked for
            _end(text, texts.pop(text), file)
        while engine.busy:
            for text, piece in engine.step():
                line = texts[text]
                line["text"] += piece.text
                line["logprobs"] += [asdict(one) for one in piece.logprobs]
                num_tokens += len(piece.tokens)
                if text.finished is not None:
                    _end(text, texts.pop(text), file)
            speed = num_tokens / (time.perf_counter() - began)
            progress.update(total - len(texts), tokens_per_second=round(speed, 1))


def _end(text: Text, line: dict[str, Any], file: TextIO) -> None:
    if text.logprobs is None:
        del line["logprobs"]
    if text.error is not None:
        line["error"] = str(text.error)
    line |= {
        "new_tokens": text.new_tokens,
        "finish_reason": text.finished,
        "rounds": text.rounds,
        "drafted": text.drafted.total(),
        "accepted": text.accepted.total(),
    }
    print(json.dumps(line, ensure_ascii=False), file=file, flush=True)


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
