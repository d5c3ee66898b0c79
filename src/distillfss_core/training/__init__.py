"""Training on a support set: refinement of a teacher (TransferFSS), distillation of a student (DistillFSS)."""

from distillfss_core.training.distillation import (
    DistillRun,
    distill,
    iter_distill,
    iter_refine,
    iter_unrefined_teacher,
    refine,
    unrefined_teacher,
)

__all__ = [
    "DistillRun",
    "distill",
    "iter_distill",
    "iter_refine",
    "iter_unrefined_teacher",
    "refine",
    "unrefined_teacher",
]
