"""What jobs.probe says: ratios from losses, tables, a picture. Knows numbers; knows no model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

PARTS = 8
"""Of a group, by which extra nats are told apart."""
SHORTEST = 64
"""Positions of the first range."""


def perplexity(losses: Tensor) -> float:
    return round(math.exp(float(losses.double().mean())), 3)


def compare(losses: Tensor, than: Tensor, group: int) -> dict[str, Any]:
    """Losses [R, T-1] of tokens 1, 2, … beside others' of the same tokens: the ratio of
    perplexities of all, by ranges of positions that double, and the extra nats by the place in a
    group of the token that predicts."""
    extra = (losses - than).double()
    ranges = {}
    first = 0
    while first < extra.shape[1]:
        last = max(2 * first, SHORTEST)
        part = extra[:, first:last]
        ranges[f"{first}–{first + part.shape[1] - 1}"] = round(math.exp(float(part.mean())), 4)
        first = last
    places = [[] for _ in range(PARTS)]  # type: list[list[Any]]
    by_position = extra.mean(0)
    for position, nats in enumerate(by_position.tolist()):
        places[position % group * PARTS // group].append(nats)
    slots = [round(sum(x) / len(x), 4) if x else None for x in places]
    return {"ratio": round(math.exp(float(extra.mean())), 4), "ranges": ranges, "slots": slots}


def show(result: dict[str, Any], console: Console) -> None:
    for text, value in result["perplexity"].items():
        rows, length = result["rows"][text]
        console.print(f"\n{text}: {rows} rows of {length} tokens, softmax perplexity {value}")
        console.print(_ratios(result, text))
    if result["passkey"] is not None:
        console.print(_passkeys(result))
    for found in result["candidates"]:
        if found.get("distilled"):
            console.print(_distilled(found))
        console.print(_layers(found))
        if "kept" in found:
            console.print(f"A hybrid keeps softmax in layers {', '.join(map(str, found['kept']))}")


def _ratios(result: dict[str, Any], text: str) -> Table:
    """Perplexity over the softmax model's."""
    table = Table(title="perplexity / softmax model's, by position; extra nats by place in a group")
    ranges = list(result["candidates"][0]["texts"][text]["whole"]["ranges"])
    for name in ("", "all", *ranges, "first slots", "last slots"):
        table.add_column(name, justify="left" if not name else "right")
    for found in result["candidates"]:
        for kind, numbers in found["texts"][text].items():
            label = found["name"] if kind == "whole" else f"  {kind}"
            slots = numbers["slots"]
            table.add_row(
                label,
                f"{numbers['ratio']:.3f}",
                *(f"{x:.3f}" for x in numbers["ranges"].values()),
                *("–" if x is None else f"{x:+.3f}" for x in (slots[0], slots[-1])),
            )
    return table


def _passkeys(result: dict[str, Any]) -> Table:
    table = Table(title="pass keys in rows as long as those of held-out text")
    for name in ("", "said", "nats a token"):
        table.add_column(name, justify="left" if not name else "right")
    rows = [("softmax model", result["passkey"])]
    for found in result["candidates"]:
        for kind in ("passkey", "passkey, far part off"):
            if kind in found:
                rows.append((found["name"] + kind.removeprefix("passkey"), found[kind]))
    for name, numbers in rows:
        table.add_row(name, f"{numbers['right']:.0%}", f"{numbers['nats']:.2f}")
    return table


def _distilled(found: dict[str, Any]) -> Table:
    """Perplexity over the softmax model's, on a few rows, on the way."""
    ratios = found["distilled"]["ratios"]
    table = Table(title=f"{found['name']}: distilled in {found['distilled']['seconds']:.0f} s")
    table.add_column("tokens", justify="right")
    for text in ratios:
        table.add_column(text, justify="right")
    for points in zip(*ratios.values(), strict=True):
        table.add_row(f"{points[0][0]:,}", *(f"{ratio:.3f}" for _, ratio in points))
    return table


def _layers(found: dict[str, Any]) -> Table:
    table = Table(
        title=f"{found['name']}: {found['state_bytes']:,} bytes of state"
        + (f", fitted in {found['fit_seconds']:.0f} s" if found["curve"] else "")
    )
    for name in ("layer", "error", "worth in nats if it keeps softmax"):
        table.add_column(name, justify="right")
    worth = found.get("worth", {})
    for layer in found.get("order", found["errors"]):
        gain = f"{worth[layer]:+.4f}" if worth else "–"
        table.add_row(str(layer), f"{found['errors'][layer]:.4f}", gain)
    return table


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    by_position, by_slot, by_layer, curve = axes.flat
    for found in result["candidates"]:
        for text, kinds in found["texts"].items():
            for kind, style in (("whole", "-"), ("far part off", ":"), ("hybrid", "--")):
                if kind in kinds:
                    ranges = kinds[kind]["ranges"]
                    label = f"{found['name']}, {text}" + ("" if kind == "whole" else f", {kind}")
                    by_position.plot(range(len(ranges)), list(ranges.values()), style, label=label)
                    by_position.set_xticks(range(len(ranges)), list(ranges), rotation=20)
            slots = kinds["whole"]["slots"]
            by_slot.plot(range(len(slots)), slots, label=f"{found['name']}, {text}")
        layers = list(found["errors"])
        by_layer.plot(layers, [found["errors"][x] for x in layers], label=f"{found['name']}: error")
        if "worth" in found:
            by_layer.plot(layers, [found["worth"][x] for x in layers], ":", label="worth in nats")
        curve.plot([result["row"] * (i + 1) for i in range(len(found["curve"]))], found["curve"],
                   label=found["name"])  # fmt: skip
    by_position.set(title="Perplexity over the softmax model's", xlabel="position")
    by_slot.set(title="Extra nats by place in a group", xlabel="eighth of a group")
    by_layer.set(title="Error of a layer, and what its softmax is worth", xlabel="layer")
    curve.set(title="Error while fitting", xlabel="tokens", yscale="log")
    for axis in axes.flat:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
