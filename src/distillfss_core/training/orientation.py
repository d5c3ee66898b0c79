"""Choice of the orientation: whether training crops may be turned and mirrored."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from distillfss_core.models.preprocess import Preprocess
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.crops import PLAIN, CropSampler, FeatureCache
from distillfss_core.training.zoom import HeldOutRegression, draw_crops, see_points
from distillfss_core.types import TrainStep

LOST = 0.7  # of its IoU: below, a classifier is lost in turned crops (0.5 where classes differ by side, else 0.96 to 1)
_SIDE = 192  # pixels of a crop after zooming

TURNS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: torch.rot90(x, 1, (-2, -1)),
    lambda x: torch.rot90(x, 2, (-2, -1)),
    lambda x: x.flip(-1),
    lambda x: x.flip(-2),
)


def iter_orientation(
    support: SupportSet, preprocess: Preprocess, cache: FeatureCache, seed: int
) -> Generator[TrainStep, None, tuple[str, dict[str, float]]]:
    """Choose the orientation; yields a step of the stage "orientation" after each look.

    Ridge regression from the features of a pixel to its class is fitted on crops as they are. It predicts crops of
    held-out slices as they are, and turned. Classes that differ by direction are confused in turned crops.

    Returns
    -------
    orientation : {"any", "fixed"}
        "fixed" where the IoU in turned crops is below `LOST` of that in upright ones. One class is "any", unseen: it
        differs from the background by more than a direction.
    scores : dict
        Mean IoU in "upright" and "turned" crops; empty for one class.
    """
    if support.classes == 1:
        return "any", {}
    rng = np.random.default_rng(seed)
    crops = draw_crops(CropSampler(support, preprocess, _SIDE, PLAIN), len(support), rng)
    total = 1 + len(TURNS)
    upright = see_points(crops, cache, rng)
    regression = HeldOutRegression(upright, support.classes)
    scores = {"upright": regression.iou(upright)}
    yield TrainStep(1, total, stage="orientation")
    turned = []
    for index, turn in enumerate(TURNS, 2):
        asked = [replace(v, image=turn(v.image).contiguous(), labels=turn(v.labels).contiguous()) for v in crops]
        turned.append(regression.iou(see_points(asked, cache, rng)))
        yield TrainStep(index, total, stage="orientation")
    scores["turned"] = float(np.mean(turned))
    return ("fixed" if scores["turned"] < LOST * scores["upright"] else "any"), scores
