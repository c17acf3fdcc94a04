"""Training under Ray Train with DeepSpeed ZeRO: `fit(run)`.

driver       one run from its key to its result; starts workers, and again where one has died
worker       what each of them does: models, stages, evaluation, result
engine       the one door to DeepSpeed: a student and its optimizer, shared out by ZeRO
checkpoints  where a run is, in files that depend neither on the number of workers nor on ZeRO
models       students and teachers
lora         the one door to PEFT
guard        which steps are left out
log          what a person sees: progress, TensorBoard
export       the result's folder
"""

from jobs.train.driver import fit

__all__ = ["fit"]
