"""Training on a support set: refine a teacher (TransferFSS), distill a student (DistillFSS)."""

from distillfss_core.training.distillation import (
    DistillRun,
    distill,
    iter_distill,
    iter_refine,
    refine,
    unrefined_teacher,
)

__all__ = ["DistillRun", "distill", "iter_distill", "iter_refine", "refine", "unrefined_teacher"]
