"""Training runs by name. A recipe is a function that returns a `Run`, or a list of steps that ends
with one; what it takes, and what the run holds, can be set on the command line of jobs.finetune.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.recipes.bench import (
    bench_draft,
    bench_medusa,
    bench_pruned,
    bench_softmax_draft,
    bench_target,
    bench_teacher,
)
from jobs.recipes.demo import demo, flash, pretrain
from jobs.recipes.drafts import draft, medusa, prune

RECIPES: dict[str, Callable[..., Any]] = {
    recipe.__name__: recipe
    for recipe in (
        demo,
        pretrain,
        flash,
        draft,
        medusa,
        prune,
        bench_teacher,
        bench_target,
        bench_draft,
        bench_softmax_draft,
        bench_medusa,
        bench_pruned,
    )
}
