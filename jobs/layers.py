"""Search for the layers with which a target drafts for itself, and save their numbers beside it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.progress import Progress, note
from jobs import cli
from linearized.errors import ConfigError
from linearized.speculative.drafters.layers import FILE, FORMAT


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    target: Path = Path("runs/demo/target")
    """Folder of the linearized model."""
    data: Path = Path("runs/demo/data")
    """Folder that jobs.data wrote, from text like the one that will be generated."""
    blocks: int = 16
    """Number of blocks on which models with fewer layers are compared."""
    threads: int = 0
    """Number of torch's threads; 0 leaves the choice to torch."""

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ConfigError(f"blocks must be at least 1, got {self.blocks}")


def demo() -> LayersConfig:
    """Layers for the demo's target."""
    return LayersConfig()


def bench() -> LayersConfig:
    """Layers for the target of jobs.bench_decode."""
    return LayersConfig(target=Path("runs/bench/target"), data=Path("runs/bench/data"))


RECIPES = {"demo": demo, "bench": bench}


def main(config: LayersConfig) -> None:
    import torch

    import linearized
    from linearized.speculative.skipping import Found, search
    from linearized.training.blocks import Blocks
    from linearized.training.tokenizer import check_tokenizer

    if config.threads:
        torch.set_num_threads(config.threads)
    began = time.perf_counter()
    check_tokenizer(config.data, config.target)
    model = linearized.load(config.target)
    linearized.pack(model)
    blocks = Blocks(config.data / "train")
    count = min(config.blocks, len(blocks))
    tokens = blocks.rows([i * len(blocks) // count for i in range(count)])
    total = model.config.num_hidden_layers
    with Progress("layers", total=total - 1, unit="layers left out") as progress:

        def show(found: Found) -> None:
            left_out = total - len(found.layers)
            progress.update(left_out, agreement=round(found.agreement, 3))

        best = search(model, tokens, progress=show)
    found = {
        "format": FORMAT,
        "layers": list(best.layers),
        "agreement": round(best.agreement, 4),
        "speed": round(best.speed, 3),
        "seconds": round(time.perf_counter() - began, 1),
    }
    (config.target / FILE).write_text(json.dumps(found, indent=2) + "\n")
    note(
        f"layers: keep {len(best.layers)} of {total} ({', '.join(map(str, best.layers))}), "
        f"agreement {best.agreement:.3f}"
    )


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
