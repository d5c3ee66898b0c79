"""Losses as plain functions, with the symbols of the equations of DistillFSS [1]_.

References
----------
.. [1] De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano, "DistillFSS: Synthesizing Few-Shot Knowledge into a
   Lightweight Segmentation Model", arXiv:2512.05613, 2025.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distillfss_core.nn.features import CoarseMaps, class_masks, strongest
from distillfss_core.types import IGNORE


def focal_loss(
    logits: Float[Tensor, "b k1 h w"], target: Int[Tensor, "b h w"], gamma: float = 2.0
) -> Float[Tensor, ""]:
    """Focal loss [1]_: mean over annotated pixels of (1 - exp(-CE))^gamma CE.

    References
    ----------
    .. [1] Lin, Goyal, Girshick, He, Dollar, "Focal Loss for Dense Object Detection", ICCV 2017.
    """
    ce = F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORE)
    annotated = target != IGNORE
    return ((1 - torch.exp(-ce)) ** gamma * ce).sum() / annotated.sum().clamp_min(1)


def coarse_loss(student: CoarseMaps, teacher: CoarseMaps) -> Float[Tensor, ""]:
    """Mean over the three stages of the mean squared difference of maps."""
    losses = [F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(losses).mean()


def joint_loss(
    teacher_logits: Float[Tensor, "b k1 h w"],
    student_logits: Float[Tensor, "b k1 h w"],
    coarse: Float[Tensor, ""],
    target: Int[Tensor, "b h w"],
) -> Float[Tensor, ""]:
    """Refine and distill at once: (focal(z_T, y) + focal(z_S, y) + coarse) / 3."""
    return (focal_loss(teacher_logits, target) + focal_loss(student_logits, target) + coarse) / 3


def distillation_loss(
    teacher_logits: Float[Tensor, "b k1 h w"],
    student_logits: Float[Tensor, "b k1 h w"],
    coarse: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Distill a fixed teacher without truth: (focal(z_S, argmax z_T) + coarse) / 2."""
    return (focal_loss(student_logits, strongest(teacher_logits)) + coarse) / 2


def dice_loss(
    logits: Float[Tensor, "b k1 h w"], target: Int[Tensor, "b h w"], classes: Sequence[int] | None = None
) -> Float[Tensor, ""]:
    """One minus the soft Dice [1]_ of each class, pooled over the batch; averaged over the classes present.

    Pooling over the batch keeps it defined where a crop holds no object, and it does not shrink with the
    share of the object in the image: rare classes count as much as common ones.

    Parameters
    ----------
    classes : sequence of int, optional
        Classes to average over; by default all foreground classes that the target holds.

    References
    ----------
    .. [1] Milletari, Navab, Ahmadi, "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
       Segmentation", 3DV 2016.
    """
    annotated = (target != IGNORE)[:, None].float()
    probabilities = logits.softmax(1) * annotated
    truth = (target[:, None] == torch.arange(logits.shape[1], device=target.device)[:, None, None]).float()
    overlap = (probabilities * truth).sum((0, 2, 3))
    total = (probabilities + truth).sum((0, 2, 3))
    dice = (2 * overlap + 1.0) / (total + 1.0)
    chosen = torch.zeros_like(dice, dtype=torch.bool)
    if classes is None:
        chosen[1:] = truth.sum((0, 2, 3))[1:] > 0
    else:
        chosen[list(classes)] = True
    if not bool(chosen.any()):
        return probabilities[:, 1:].mean()
    return 1 - dice[chosen].mean()


def segmentation_loss(logits: Float[Tensor, "b k1 h w"], target: Int[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Cross-entropy over the annotated pixels plus Dice of the classes present."""
    annotated = (target != IGNORE).sum().clamp_min(1)
    ce = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum") / annotated
    return ce + dice_loss(logits, target)


def map_loss(maps: CoarseMaps, target: Int[Tensor, "b h w"], present: Bool[Tensor, " k"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of each stage's mean map against the share of the class in its cells.

    It keeps attention meaningful while the decoder is still learning to read it.
    """
    if not bool(present.any()):
        return maps.deep.new_zeros(())
    masks = class_masks(target.to(torch.uint8), maps.deep.shape[1])[:, present]
    annotated = (target != IGNORE).float()[:, None]
    losses = []
    for stage in maps:
        mean = stage.mean(2)[:, present].float().clamp(1e-4, 1 - 1e-4)
        grid = (mean.shape[-2], mean.shape[-1])
        share = F.adaptive_avg_pool2d(annotated, grid)
        truth = F.adaptive_avg_pool2d(masks * annotated, grid) / share.clamp_min(1e-6)
        bce = -(truth * mean.log() + (1 - truth) * (1 - mean).log())
        losses.append((bce * share).sum() / (share.sum() * bce.shape[1]).clamp_min(1e-6))
    return torch.stack(losses).mean()
