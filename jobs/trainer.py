"""The door to training, by its former name."""

from jobs.train import fit

__all__ = ["fit"]
