"""The probe: a model and texts in, tables, a picture and a line of JSON out."""

from __future__ import annotations

import json
import math

import pytest
import torch

from jobs import cli, probe, probe_report, probe_text
from linearized.errors import ConfigError, DataError, LinearizedError


@pytest.fixture
def folder(tmp_path, llama, tokenizer):
    """A softmax model with its tokenizer, and two texts."""
    model = llama(vocab=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["the quick brown fox", "jumps over", "a lazy dog", "and runs", "away"]
    for name, step in (("fit", 3), ("held", 2)):
        text = " ".join(words[(i * step + i // 7) % 5] for i in range(3000))
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


def small(folder, *assignments: str) -> probe.ProbeConfig:
    base = [
        f"model={folder / 'model'}", f"text={folder / 'fit.txt'}",
        f"held_out=[{folder / 'held.txt'}]", "candidates=[anchored, local]",
        "settings={group: 8, taps: 4}", "tokens=256", "row=32", "rows=2", "softmax=0.5",
        f"out={folder / 'out'}", "autocast=false",
    ]  # fmt: skip
    return cli.override(probe.probe(), [*base, *assignments])


def test_it_says_what_a_model_would_lose(folder, capsys):
    probe.main(small(folder, "save=true", "passkeys=2", "length=200"))
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert json.loads((folder / "out" / "probe.json").read_text()) == last
    assert (folder / "out" / "probe.png").stat().st_size > 10_000
    assert last["tokens"] == 256 and last["rows"] == {"held": [2, 200]}
    anchored, local = last["candidates"]
    assert anchored["config"]["window"] == 3 and anchored["config"]["group"] == 8
    kinds = anchored["texts"]["held"]
    assert list(kinds) == ["whole", "far part off", "convolution off", "hybrid"]
    assert list(local["texts"]["held"]) == ["whole", "convolution off", "hybrid"]
    assert len(kinds["whole"]["slots"]) == 8 and len(anchored["curve"]) == 8
    assert sorted(anchored["order"]) == [0, 1] and anchored["kept"] == anchored["order"][:1]
    for numbers in (last["passkey"], anchored["passkey"], anchored["passkey, far part off"]):
        assert numbers["nats"] > 0 and 0 <= numbers["right"] <= 1
    for words in (
        "pass keys in rows",
        "far part off",
        "softmax perplexity",
        "A hybrid keeps softmax",
    ):
        assert words in out
    probe.main(small(folder, "save=true", "passkeys=2", "length=200"))
    assert "is of the same model, texts and settings" in capsys.readouterr().out
    import linearized

    again = linearized.load(folder / "out" / "anchored")
    assert linearized.models.linear_config(again).bound == 256


def test_ratios_by_position_and_slot():
    than = torch.zeros(3, 1023)
    losses = than.clone()
    losses[:, 256:512] = math.log(2)
    losses[:, 0::8] += 0.1
    found = probe_report.compare(losses, than, 8)
    assert list(found["ranges"]) == ["0–63", "64–127", "128–255", "256–511", "512–1022"]
    low, _, _, high, rest = found["ranges"].values()
    assert low == pytest.approx(math.exp(0.1 / 8), abs=1e-3) and rest == pytest.approx(
        low, abs=1e-3
    )
    assert high == pytest.approx(2 * low, abs=2e-3)
    slots = found["slots"]
    assert slots[0] - slots[1] == pytest.approx(0.1, abs=1e-3)


def test_rows_are_of_one_document_each_and_of_the_seed(folder, tokenizer):
    (folder / "many").mkdir()
    for name in "abc":
        (folder / "many" / f"{name}.txt").write_text(f"{name} " * 400)
    read = lambda **more: probe_text.read(  # noqa: E731
        str(folder / "model"), str(folder / "many"), (str(folder / "held.txt"),),
        **{"tokens": 120, "row": 20, "rows": 3, "length": 50, "seed": 0, **more},
    )  # fmt: skip
    rows = read().fit
    assert rows.shape == (6, 20)
    for row in rows:
        text = tokenizer.decode(row.tolist())
        assert len(set(text.split())) == 1, text
    assert torch.equal(rows, read().fit) and not torch.equal(rows, read(seed=1).fit)
    assert read().held_out["held"].shape == (3, 50)


@pytest.mark.parametrize(
    "assignment,message",
    [
        ("tokens=16", "tokens=16 do not fill a row of 32"),
        ("candidates=[softmax]", "unknown attention 'softmax'; choose from anchored"),
        ("candidates=[]", "candidates must name an attention"),
        ("softmax=1.0", "softmax must be at least 0 and less than 1, got 1.0"),
        ("settings={span: 3}", "unknown setting span"),
        ("rows=0", "rows must be at least 1, got 0"),
    ],
)
def test_what_cannot_work_is_named(folder, assignment, message):
    with pytest.raises(ConfigError, match=message):
        small(folder, assignment)


def test_too_little_text_is_named(folder):
    with pytest.raises(DataError, match="has documents for .* tokens in rows of 32, not for"):
        probe.main(small(folder, "tokens=3000000"))
    with pytest.raises(DataError, match="no document of 'held' has 60000 tokens"):
        probe.main(small(folder, "length=60000"))
    with pytest.raises(LinearizedError, match=r"longer than the 65536"):
        probe.main(small(folder, "length=70000"))
