"""Choice of the zoom by a meta-trained teacher or a linear probe, scored on held-out slices."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distillfss_core.models.preprocess import Preprocess
from distillfss_core.nn.features import EncodedSupport, FeaturePyramid, cat_pyramids, merge_classes
from distillfss_core.nn.teachers import Teacher
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.crops import PLAIN, Crop, CropSampler, FeatureCache
from distillfss_core.types import IGNORE, TrainStep

CANDIDATES = (Fraction(1, 2), Fraction(1), Fraction(2))
WORTH = 0.02  # gain in IoU that a larger zoom must bring: each doubling makes everything four times as slow
ALIKE = 0.005  # scores closer than this say nothing of the zoom: scribbles that any zoom gets right, objects none finds
TELLS = 0.5  # IoU from which a score tells that half the pixels lose next to nothing
_SIDE = 192  # pixels of the slice in a probe crop
_CROPS = 12
_POINTS = 1500
_FOLDS = 5

Predictor = Callable[[Tensor], Tensor]
"""From which crops are asked, a bool of each, to the shares of the classes at their points: "asked points k+1"."""


def iter_zoom(
    support: SupportSet, preprocess: Preprocess, cache: FeatureCache, seed: int, teacher: Teacher | None = None
) -> Generator[TrainStep, None, tuple[Fraction, dict[str, float]]]:
    """Choose the zoom at which crops of held-out slices are segmented best; yields a step after each zoom.

    Every fifth of the slices (of a single slice: of its crops) is held out in turn. A meta-trained teacher segments it
    with the rest as support. Without a teacher, ridge regression from the features of a pixel to its class is fitted on
    the rest.

    Parameters
    ----------
    teacher : Teacher, optional
        On the cache's device.

    Returns
    -------
    zoom : Fraction
        The smallest, and so the quickest, that comes within `WORTH` of the best; 1 where all scores are alike. 1/2
        only where the best score is `TELLS` or more, or where 1/2 gains `WORTH`.
    scores : dict
        Mean IoU of each candidate.
    """
    scores = {}
    for index, zoom in enumerate(CANDIDATES, 1):
        size = int(_SIDE * zoom)
        sampler = CropSampler(support, replace(preprocess, zoom=str(zoom)), size, PLAIN)
        rng = np.random.default_rng(seed)
        order = [int(i) for i in rng.permutation(len(support))]
        crops = [sampler.cut(order[i % len(order)], rng) for i in range(max(_CROPS, min(len(order), 2 * _CROPS)))]
        crops = [crop for crop in crops if bool((crop.labels != IGNORE).any())]
        scores[str(zoom)] = _probe(crops, cache, support.classes, rng, teacher)
        yield TrainStep(index, len(CANDIDATES), stage="zoom")
    best = max(scores.values())
    if best - min(scores.values()) < ALIKE:
        return Fraction(1), scores
    coarse = best >= TELLS or scores["1/2"] >= scores["1"] + WORTH
    candidates = CANDIDATES if coarse else CANDIDATES[1:]
    return next(zoom for zoom in candidates if scores[str(zoom)] > best - WORTH), scores


@torch.no_grad()
def _probe(
    crops: list[Crop], cache: FeatureCache, classes: int, rng: np.random.Generator, teacher: Teacher | None
) -> float:
    """Mean IoU over the classes at points of the crops, each fold predicted from the others."""
    features = [cache.encode([crop]) for crop in crops]
    points = [_draw_points(crop, rng) for crop in crops]
    y = torch.stack(
        [v.labels[points_at[:, 0], points_at[:, 1]].long() for v, points_at in zip(crops, points, strict=True)]
    )
    several = len({v.slice for v in crops}) > 1
    folds = torch.tensor([(v.slice if several else number) % _FOLDS for number, v in enumerate(crops)])
    if len(folds.unique()) < 2:
        folds = torch.arange(len(crops)) % 2
    if teacher is None:
        predict = _by_ridge(features, points, y, classes)
    else:
        predict = _by_teacher(teacher, features, points, crops, cache, classes)
    confusion = torch.zeros(*y.shape, classes + 1, dtype=torch.float64)
    for fold in folds.unique():
        confusion[folds == fold] = predict(folds == fold).double()
    confusion, y = confusion.flatten(0, 1), y.flatten()
    ious = [_best_iou(confusion[:, c], y == c) for c in range(1, classes + 1) if bool((y == c).any())]
    return float(np.mean(ious)) if ious else 0.0


def _by_ridge(features: list[FeaturePyramid], points: list[Tensor], y: Int[Tensor, "v n"], classes: int) -> Predictor:
    """Ridge regression on the features under the points."""
    x = torch.stack([point_features(f.map(Tensor.cpu), place) for f, place in zip(features, points, strict=True)])
    x = (x - x.mean((0, 1))) / (x.std((0, 1)) + 1e-6)
    x = torch.cat([x, torch.ones(*x.shape[:2], 1)], 2).double()
    return lambda held_out: _ridge(x[~held_out].flatten(0, 1), y[~held_out].flatten(), classes, x[held_out])


def _by_teacher(
    teacher: Teacher,
    features: list[FeaturePyramid],
    points: list[Tensor],
    crops: list[Crop],
    cache: FeatureCache,
    classes: int,
) -> Predictor:
    """Predict crops by a teacher that has the other crops as its support."""

    def predict(held_out: Bool[Tensor, " v"]) -> Float[Tensor, "a n k1"]:
        support_rows = torch.nonzero(~held_out).flatten().tolist()
        labels = torch.stack([crops[i].labels for i in support_rows]).to(cache.device.torch)
        votes = []
        with cache.device.autocast():
            keys = teacher.encode(EncodedSupport.of(cat_pyramids([features[i] for i in support_rows]), labels, classes))
            for i in torch.nonzero(held_out).flatten().tolist():
                shares = merge_classes(teacher(features[i], keys).logits).softmax(1)[0].cpu()
                votes.append(shares[:, points[i][:, 0], points[i][:, 1]].T)
        return torch.stack(votes)

    return predict


def _draw_points(crop: Crop, rng: np.random.Generator) -> Int[Tensor, "n 2"]:
    annotated = torch.nonzero(crop.labels != IGNORE)
    return annotated[torch.from_numpy(rng.integers(len(annotated), size=_POINTS))]


def _best_iou(scores: Float[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """IoU at the threshold that suits best: a rare class is ranked well long before it wins an argmax."""
    hits = truth[scores.argsort(descending=True)].double().cumsum(0)
    called = torch.arange(1, len(hits) + 1)
    return float((hits / (called + hits[-1] - hits)).max())


def _ridge(x: Float[Tensor, "n f"], y: Tensor, classes: int, query: Float[Tensor, "v m f"]) -> Float[Tensor, "v m k1"]:
    target = F.one_hot(y, classes + 1).to(x)
    gram = x.T @ x + len(x) * 1e-2 * torch.eye(x.shape[1], dtype=x.dtype)
    result: Float[Tensor, "v m k1"] = query @ torch.linalg.solve(gram, x.T @ target)
    return result


def point_features(features: FeaturePyramid, points: Tensor) -> Float[Tensor, "n f"]:
    """Features of every stage's last block under pixels (y, x) of one crop, interpolated bilinearly."""
    h, w = features.size
    grid = torch.stack([(points[:, 1] + 0.5) * 2 / w - 1, (points[:, 0] + 0.5) * 2 / h - 1], 1)
    columns = []
    for stage in features.stages:
        block = stage[-1][:1]
        places = grid.to(block)[None, None]
        columns.append(
            F.grid_sample(block, places, mode="bilinear", align_corners=False, padding_mode="border")[0, :, 0]
        )
    return torch.cat(columns).T
