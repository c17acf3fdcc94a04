"""Cutting a draft out of its target, before it is distilled: one step of a recipe. The cut model is
a folder beside the draft, which all workers read and which goes when the draft is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster.progress import note
from jobs.run import stamp
from linearized.errors import ConfigError
from linearized.training.pruning import Cut

STEP = "pruning"
"""Marks, in a folder's run.json, what this step has made."""


@dataclass(frozen=True, kw_only=True)
class Pruning:
    target: Path
    """Folder of the linearized model that is cut."""
    data: Path
    """Folder that jobs.data wrote, with the target's tokenizer."""
    out: Path
    """Folder for the cut model."""
    cut: Cut
    blocks: int = 64
    """Number of blocks on which importance is measured."""

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ConfigError(f"blocks must be at least 1, got {self.blocks}")


def prune(step: Pruning) -> None:
    """Write the cut model. It is made anew each time: that takes seconds.

    Raises:
        ConfigError: `out` holds what this step has not made.
    """
    import linearized
    from linearized.training import pruning
    from linearized.training.blocks import Blocks

    clear(step)
    key = hashlib.blake2b(repr((step.cut, step.blocks)).encode(), digest_size=8)
    key.update(stamp(step.target) + stamp(step.data))
    step.out.mkdir(parents=True)
    made = {"name": step.out.name, "step": STEP, "key": key.hexdigest()}
    (step.out / "run.json").write_text(json.dumps(made))
    model = linearized.load(step.target)
    blocks = Blocks(step.data / "train")
    count = min(step.blocks, len(blocks))
    rows = [i * len(blocks) // count for i in range(count)]
    batches = (blocks.rows(rows[i : i + 8]) for i in range(0, count, 8))
    smaller = pruning.prune(model, batches, step.cut)
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, smaller))
    note(f"pruned: {after / 1e6:.2f}M of {before / 1e6:.2f}M parameters are left")
    smaller.save_pretrained(step.out)


def clear(step: Pruning) -> None:
    """Remove what `prune` has made.

    Raises:
        ConfigError: somebody else has.
    """
    if not step.out.exists():
        return
    try:
        ours = json.loads((step.out / "run.json").read_text()).get("step") == STEP
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise ConfigError(f"{step.out} exists and is not this job's; choose another out")
    shutil.rmtree(step.out)
