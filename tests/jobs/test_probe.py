"""The probe: a model and texts in, tables, a picture and a line of JSON out."""

from __future__ import annotations

import json
import math

import pytest
import torch

import linearized
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
    again = linearized.load(folder / "out" / "anchored")
    assert linearized.models.linear_config(again).bound == 256


def test_a_linear_model_is_measured_as_it_is(folder, capsys):
    probe.main(small(folder, "candidates=[anchored]", "save=true"))
    fitted = json.loads(capsys.readouterr().out.splitlines()[-1])
    saved = folder / "out" / "anchored"
    probe.main(small(folder, f"candidates=[{saved}]", "settings={}", f"out={folder / 'again'}"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (first,), (second,) = fitted["candidates"], found["candidates"]
    assert second["name"] == str(saved) and second["curve"] == []
    for kind in ("config", "errors", "texts", "order"):
        assert first[kind] == second[kind]


def test_what_is_saved_is_what_was_measured_under_autocast(folder, capsys):
    """Autocast keeps copies of weights until its outermost block ends; all of a probe is in one."""
    probe.main(small(folder, "candidates=[anchored]", "save=true", "autocast=true", "lr=0.01"))
    fitted = json.loads(capsys.readouterr().out.splitlines()[-1])
    saved = folder / "out" / "anchored"
    settings = "settings={}", "autocast=true", f"out={folder / 'again'}"
    probe.main(small(folder, f"candidates=[{saved}]", *settings))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (first,), (second,) = fitted["candidates"], found["candidates"]
    assert first["errors"] == pytest.approx(second["errors"], rel=1e-3)
    ratios = [one["texts"]["held"]["whole"]["ratio"] for one in (first, second)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)


def test_a_candidate_is_distilled_and_watched(folder, capsys):
    config = small(
        folder, "candidates=[anchored]", "save=true", "distil=256", "distil_lr=0.003", "keep=[1]"
    )
    probe.main(config)
    said = capsys.readouterr().out
    last = json.loads(said.splitlines()[-1])
    (found,) = last["candidates"]
    distilled = found["distilled"]
    assert last["distil"] == 256 and len(distilled["losses"]) == 8
    assert [tokens for tokens, _ in distilled["ratios"]["held"]] == [0, 32, 64, 128, 256]
    assert found["kept"] == [1] and "worth" not in found and "distilled in" in said
    whole = found["texts"]["held"]["whole"]["ratio"]
    assert distilled["ratios"]["held"][-1][1] == pytest.approx(whole, abs=1e-4)
    probe.main(small(folder, f"candidates=[{folder / 'out' / 'anchored'}]", "keep=[1]"))
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["candidates"][0]["texts"]["held"]["whole"]["ratio"] == pytest.approx(whole)


def test_too_few_tokens_to_distil_on_are_refused(folder):
    with pytest.raises(ConfigError, match="distil=31 tokens do not fill a row of 32"):
        small(folder, "distil=31")


def test_folders_are_told_from_names(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "local").mkdir()
    assert not probe.ProbeConfig.is_folder("local") and probe.ProbeConfig.is_folder("./local")
    with pytest.raises(ConfigError, match="there is no folder runs/gone; name an attention, or"):
        small(folder, "candidates=[runs/gone]")


def test_new_weights_of_a_candidate_are_measured_anew(folder):
    fitted = folder / "fitted"
    fitted.mkdir()
    config = small(folder, f"candidates=[{fitted}]")
    before = probe._asked(config)
    assert probe._asked(config) == before
    (fitted / "model.safetensors").write_bytes(b"0")
    assert probe._asked(config) != before


def test_a_model_of_another_shape_is_refused(folder, llama, tokenizer):
    other = llama(vocab=len(tokenizer), layers=3)
    linearized.linearize(other, linearized.LinearConfig(attention="grouped"))
    other.save_pretrained(folder / "other")
    with pytest.raises(ConfigError, match="other was not linearized.*num_hidden_layers is 3, the"):
        probe.main(small(folder, f"candidates=[{folder / 'other'}]"))
    with pytest.raises(LinearizedError, match="model is not linearized|is not linearized"):
        probe.main(small(folder, f"candidates=[{folder / 'model'}]"))


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
        (folder / "many" / f"{name}.txt").write_text(" ".join(f"{name}{i}" for i in range(400)))
    read = lambda **more: probe_text.read(  # noqa: E731
        str(folder / "model"), str(folder / "many"), (str(folder / "held.txt"),),
        **{"tokens": 120, "row": 20, "rows": 3, "length": 50, "seed": 0, **more},
    )  # fmt: skip
    rows, aside = read().fit, read().aside
    assert rows.shape == (6, 20) and aside.shape == (4, 20)
    assert not {tuple(x) for x in rows.tolist()} & {tuple(x) for x in aside.tolist()}
    for row in rows:
        text = tokenizer.decode(row.tolist())
        assert len(set(text) & set("abc")) == 1, text
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
        ("passkeys=-1", "passkeys must be at least 0, got -1"),
        ("threads=-1", "threads must be at least 0, got -1"),
        ("rows=0", "rows must be at least 1, got 0"),
    ],
)
def test_what_cannot_work_is_named(folder, assignment, message):
    with pytest.raises(ConfigError, match=message):
        small(folder, assignment)


def test_too_little_text_is_named(folder):
    with pytest.raises(DataError, match=r"fills \d+ rows of 32 tokens, not 93754"):
        probe.main(small(folder, "tokens=3000000"))
    with pytest.raises(DataError, match="'held' has less than 60000 tokens"):
        probe.main(small(folder, "length=60000"))
    with pytest.raises(LinearizedError, match=r"longer than the 65536"):
        probe.main(small(folder, "length=70000"))


def test_documents_shorter_than_a_row_are_joined(folder, tokenizer):
    lines = [json.dumps({"text": f"add {i} to the quick fox"}) for i in range(400)]
    (folder / "short.jsonl").write_text("\n".join(lines))
    found = probe_text.read(
        str(folder / "model"), str(folder / "short.jsonl"), tokens=200, row=50, rows=2, length=60,
        seed=0,
    )  # fmt: skip
    assert found.fit.shape == (4, 50) and found.held_out["held out"].shape == (2, 60)
    assert tokenizer.eos_token in tokenizer.decode(found.fit[0].tolist())


def test_texts_of_one_name_are_told_apart(folder):
    (folder / "other").mkdir()
    (folder / "other" / "held.txt").write_text((folder / "fit.txt").read_text())
    sources = (str(folder / "held.txt"), str(folder / "other" / "held.txt"))
    read = lambda held: probe_text.read(  # noqa: E731
        str(folder / "model"), str(folder / "fit.txt"), held, tokens=64, row=32, rows=1, length=64,
        seed=0,
    )  # fmt: skip
    assert list(read(sources).held_out) == list(sources)
    with pytest.raises(ConfigError, match="must name every text once"):
        read(sources[:1] * 2)


def test_a_row_is_no_longer_than_the_model_was_made_for():
    config = cli.override(probe.probe(), ["row=256"])
    assert [probe._length(config, limit) for limit in (None, 4096, 600)] == [1024, 1024, 600]
    with pytest.raises(ConfigError, match="rows of 256 tokens are longer than the 200"):
        probe._length(config, 200)
