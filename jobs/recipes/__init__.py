"""Training runs by name. A recipe is a function that returns a `Run`, or a list of steps that ends
with one; what it takes, and what the run holds, can be set on the command line of jobs.finetune.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.recipes.adapt import (
    adapt,
    flash_110m,
    llama2_7b,
    llama2_7b_paper,
    llama2_13b,
    llama2_13b_paper,
    qwen3_8b,
    qwen3_8b_paper,
)
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
from jobs.recipes.smollm2 import smollm2, smollm2_hybrid

RECIPES: dict[str, Callable[..., Any]] = {
    recipe.__name__: recipe
    for recipe in (
        demo,
        adapt,
        smollm2,
        smollm2_hybrid,
        pretrain,
        flash,
        draft,
        medusa,
        prune,
        llama2_7b,
        llama2_13b,
        qwen3_8b,
        llama2_7b_paper,
        llama2_13b_paper,
        qwen3_8b_paper,
        flash_110m,
        bench_teacher,
        bench_target,
        bench_draft,
        bench_softmax_draft,
        bench_medusa,
        bench_pruned,
    )
}
