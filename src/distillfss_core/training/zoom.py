"""Which zoom suits the objects: a linear probe on the frozen features, judged on slices it has not seen."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from distillfss_core.features import FeaturePyramid
from distillfss_core.preprocess import Preprocess
from distillfss_core.support import SupportSet
from distillfss_core.training.views import PLAIN, View, ViewBank, ViewCutter
from distillfss_core.types import IGNORE

CANDIDATES = (Fraction(1, 2), Fraction(1), Fraction(2))
WORTH = 0.02  # gain in IoU that another zoom than 1 must bring: larger is slower, smaller loses detail for good
_SIDE = 192  # pixels of the slice in a probe view
_VIEWS = 12
_POINTS = 1500
_FOLDS = 5


def choose_zoom(
    support: SupportSet, preprocess: Preprocess, bank: ViewBank, seed: int
) -> tuple[Fraction, dict[str, float]]:
    """The zoom at which a linear classifier on the features segments left-out slices best.

    Ridge regression from the features under a pixel to its class is fitted on four fifths of the slices (with a
    single slice: of its views) and judged on the rest, in turn.

    Returns
    -------
    zoom : Fraction
        1, or the best candidate if it gains at least `WORTH`.
    scores : dict
        Mean IoU of each candidate.
    """
    scores = {}
    for zoom in CANDIDATES:
        size = int(_SIDE * zoom)
        cutter = ViewCutter(support, replace(preprocess, zoom=str(zoom)), size, PLAIN)
        rng = np.random.default_rng(seed)
        order = [int(i) for i in rng.permutation(len(support))]
        views = [cutter.cut(order[i % len(order)], rng) for i in range(max(_VIEWS, min(len(order), 2 * _VIEWS)))]
        scores[str(zoom)] = _probe(views, bank, support.classes, rng)
    best = max(CANDIDATES, key=lambda zoom: scores[str(zoom)])
    return best if scores[str(best)] >= scores["1"] + WORTH else Fraction(1), scores


def _probe(views: list[View], bank: ViewBank, classes: int, rng: np.random.Generator) -> float:
    features, labels, groups = [], [], []
    several = len({v.slice for v in views}) > 1
    for number, view in enumerate(views):
        known = torch.nonzero(view.labels != IGNORE)
        if not len(known):
            continue
        points = known[torch.from_numpy(rng.integers(len(known), size=_POINTS))]
        features.append(point_features(bank.encode([view]).map(Tensor.cpu), points))
        labels.append(view.labels[points[:, 0], points[:, 1]].long())
        groups.append(torch.full((_POINTS,), (view.slice if several else number) % _FOLDS))
    x, y, g = torch.cat(features).double(), torch.cat(labels), torch.cat(groups)
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    found = torch.zeros(len(y), classes + 1, dtype=x.dtype)
    for group in g.unique():
        inside = g == group
        if bool(inside.all()):
            inside = torch.arange(len(g)) % 2 == 0
        found[inside] = _ridge(x[~inside], y[~inside], classes, x[inside])
    ious = [_best_iou(found[:, c], y == c) for c in range(1, classes + 1) if bool((y == c).any())]
    return float(np.mean(ious)) if ious else 0.0


def _best_iou(scores: Float[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """IoU at the threshold that suits best: a rare class is ranked well long before it wins an argmax."""
    hits = truth[scores.argsort(descending=True)].double().cumsum(0)
    called = torch.arange(1, len(hits) + 1)
    return float((hits / (called + hits[-1] - hits)).max())


def _ridge(x: Float[Tensor, "n f"], y: Tensor, classes: int, query: Float[Tensor, "m f"]) -> Float[Tensor, "m k1"]:
    target = F.one_hot(y, classes + 1).to(x)
    gram = x.T @ x + len(x) * 1e-2 * torch.eye(x.shape[1], dtype=x.dtype)
    return query @ torch.linalg.solve(gram, x.T @ target)


def point_features(features: FeaturePyramid, points: Tensor) -> Float[Tensor, "n f"]:
    """Features of every stage's last block under pixels (y, x) of one view, interpolated bilinearly."""
    h, w = features.size
    grid = torch.stack([(points[:, 1] + 0.5) * 2 / w - 1, (points[:, 0] + 0.5) * 2 / h - 1], 1)
    columns = []
    for stage in features.stages:
        block = stage[-1][:1]
        at = grid.to(block)[None, None]
        columns.append(F.grid_sample(block, at, mode="bilinear", align_corners=False, padding_mode="border")[0, :, 0])
    return torch.cat(columns).T
