"""Choice of the zoom by meta-trained teachers or a linear probe, scored on held-out slices."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
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
from distillfss_core.types import IGNORE, GeneratorRun, TrainStep, finish

CANDIDATES = (Fraction(1, 2), Fraction(1), Fraction(2))
SMALL = 96  # pixels of the longest side up to which zoom 4 is tried as well: such slices cost little at any zoom
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
    support: SupportSet, preprocess: Preprocess, cache: FeatureCache, seed: int, teachers: Sequence[Teacher] = ()
) -> Generator[TrainStep, None, tuple[Fraction, dict[str, float]]]:
    """Choose the zoom at which crops of held-out slices are segmented best; yields steps of the stage "zoom".

    The candidates are 1/2, 1 and 2, and 4 for slices of up to `SMALL` pixels. There is a step for the features of the
    crops of each zoom, and one for each fold that is predicted.

    Every fifth of the slices (of a single slice: of its crops) is held out in turn. Meta-trained teachers segment it
    with the rest as support. Without a teacher, ridge regression from the features of a pixel to its class is fitted on
    the rest.

    Parameters
    ----------
    teachers : sequence of Teacher, optional
        On the cache's device. The mean of their probabilities is scored.

    Returns
    -------
    zoom : Fraction
        The smallest, and so the quickest, that comes within `WORTH` of the best; 1 where all scores are alike. 1/2
        only where the best score is `TELLS` or more, or where 1/2 gains `WORTH`.
    scores : dict
        Mean IoU of each candidate.
    """
    is_small = max(side for s in support.slices for side in s.labels.shape) <= SMALL
    candidates = (*CANDIDATES, Fraction(4)) if is_small else CANDIDATES
    rngs = {zoom: np.random.default_rng(seed) for zoom in candidates}
    crops = {}
    for zoom, rng in rngs.items():
        sampler = CropSampler(support, replace(preprocess, zoom=str(zoom)), int(_SIDE * zoom), PLAIN)
        crops[zoom] = draw_crops(sampler, len(support), rng)
    scores: dict[str, float] = {}

    def iter_scores() -> Generator[None, None, None]:
        for zoom, rng in rngs.items():
            scores[str(zoom)] = yield from _iter_probe(crops[zoom], cache, support.classes, rng, teachers)

    total = sum(1 + len(_folds([crop.slice for crop in part]).unique()) for part in crops.values())
    for index, _ in enumerate(iter_scores(), 1):
        yield TrainStep(index, total, stage="zoom")
    best = max(scores.values())
    if best - min(scores.values()) < ALIKE:
        return Fraction(1), scores
    coarse = best >= TELLS or scores["1/2"] >= scores["1"] + WORTH
    return next(zoom for zoom in candidates[0 if coarse else 1 :] if scores[str(zoom)] > best - WORTH), scores


def iter_score(
    support: SupportSet, preprocess: Preprocess, cache: FeatureCache, seed: int, teachers: Sequence[Teacher] = ()
) -> Generator[None, None, float]:
    """Mean IoU on held-out slices at the zoom of the preprocessing, as `iter_zoom` finds it.

    Yields once the features are there, and after each fold.
    """
    rng = np.random.default_rng(seed)
    sampler = CropSampler(support, preprocess, int(_SIDE * preprocess.zoom_factor), PLAIN)
    crops = draw_crops(sampler, len(support), rng)
    return (yield from _iter_probe(crops, cache, support.classes, rng, teachers))


def draw_crops(sampler: CropSampler, slices: int, rng: np.random.Generator) -> list[Crop]:
    """A dozen crops, or up to twice as many for many slices, of the slices in turn; each holds an annotated pixel."""
    order = [int(i) for i in rng.permutation(slices)]
    crops = [sampler.cut(order[i % slices], rng) for i in range(max(_CROPS, min(slices, 2 * _CROPS)))]
    return [crop for crop in crops if bool((crop.labels != IGNORE).any())]


@torch.no_grad()
def _iter_probe(
    crops: list[Crop], cache: FeatureCache, classes: int, rng: np.random.Generator, teachers: Sequence[Teacher]
) -> Generator[None, None, float]:
    """Mean IoU over the classes at points of the crops, each fold predicted from the others.

    Yields once the features are there, and after each fold.
    """
    if not teachers:
        seen = see_points(crops, cache, rng)
        y, predict = seen.y, HeldOutRegression(seen, classes).predictor(seen)
    else:
        features = [cache.encode([crop]) for crop in crops]
        points = [_draw_points(crop, rng) for crop in crops]
        y, predict = _labels_at(crops, points), _by_teachers(teachers, features, points, crops, cache, classes)
    yield
    return (yield from _iter_fold_iou(_folds([crop.slice for crop in crops]), y, classes, predict))


@dataclass(frozen=True, eq=False)
class SeenPoints:
    """Points of crops: the features under them, their labels, and the slice of each crop."""

    x: Float[Tensor, "v n f"]
    y: Int[Tensor, "v n"]
    slices: list[int]


@torch.no_grad()
def see_points(crops: list[Crop], cache: FeatureCache, rng: np.random.Generator) -> SeenPoints:
    """Draw annotated points of crops, and look at the features there."""
    points = [_draw_points(crop, rng) for crop in crops]
    x = [point_features(cache.encode([v]).map(Tensor.cpu), places) for v, places in zip(crops, points, strict=True)]
    return SeenPoints(torch.stack(x), _labels_at(crops, points), [crop.slice for crop in crops])


class HeldOutRegression:
    """Ridge regression from the features of a pixel to its class, on all crops but those that are held out.

    It is fitted once for each fold, whatever it is asked of.
    """

    def __init__(self, seen: SeenPoints, classes: int) -> None:
        self._seen, self._classes = seen, classes
        self._center, self._scale = seen.x.mean((0, 1)), seen.x.std((0, 1)) + 1e-6
        self._x = self._columns(seen)
        self._fitted: dict[tuple[bool, ...], Tensor] = {}

    def iou(self, asked: SeenPoints) -> float:
        """Mean IoU over the classes; ``asked`` is of the same crops, which may look different there."""
        predict = self.predictor(asked)
        return finish(GeneratorRun(_iter_fold_iou(_folds(asked.slices), asked.y, self._classes, predict)))

    def predictor(self, asked: SeenPoints) -> Predictor:
        """Predicts the crops of a fold from the others."""
        query = self._columns(asked)

        def predict(held_out: Bool[Tensor, " v"]) -> Float[Tensor, "a n k1"]:
            fold = tuple(held_out.tolist())
            if fold not in self._fitted:
                x, y = self._x[~held_out].flatten(0, 1), self._seen.y[~held_out].flatten()
                self._fitted[fold] = _ridge(x, y, self._classes)
            return query[held_out] @ self._fitted[fold]

        return predict

    def _columns(self, points: SeenPoints) -> Float[Tensor, "v n f1"]:
        x = (points.x - self._center) / self._scale
        return torch.cat([x, torch.ones(*x.shape[:2], 1)], 2).double()


def _folds(slices: list[int]) -> Int[Tensor, " v"]:
    """The fold of each crop: a fifth of the slices, or of the crops of a single slice; two folds at least."""
    several = len(set(slices)) > 1
    folds = torch.tensor([(index if several else number) % _FOLDS for number, index in enumerate(slices)])
    return folds if len(folds.unique()) > 1 else torch.arange(len(slices)) % 2


def _iter_fold_iou(
    folds: Int[Tensor, " v"], y: Int[Tensor, "v n"], classes: int, predict: Predictor
) -> Generator[None, None, float]:
    shares = torch.zeros(*y.shape, classes + 1, dtype=torch.float64)
    for fold in folds.unique():
        shares[folds == fold] = predict(folds == fold).double()
        yield
    shares, y = shares.flatten(0, 1), y.flatten()
    ious = [_best_iou(shares[:, c], y == c) for c in range(1, classes + 1) if bool((y == c).any())]
    return float(np.mean(ious)) if ious else 0.0


def _labels_at(crops: list[Crop], points: list[Tensor]) -> Int[Tensor, "v n"]:
    return torch.stack([v.labels[place[:, 0], place[:, 1]].long() for v, place in zip(crops, points, strict=True)])


def _by_teachers(
    teachers: Sequence[Teacher],
    features: list[FeaturePyramid],
    points: list[Tensor],
    crops: list[Crop],
    cache: FeatureCache,
    classes: int,
) -> Predictor:
    """Predict crops by the mean of teachers that have the other crops as their support."""

    def predict(held_out: Bool[Tensor, " v"]) -> Float[Tensor, "a n k1"]:
        support_rows = torch.nonzero(~held_out).flatten().tolist()
        labels = torch.stack([crops[i].labels for i in support_rows]).to(cache.device.torch)
        votes = []
        with cache.device.autocast():
            support = EncodedSupport.of(cat_pyramids([features[i] for i in support_rows]), labels, classes)
            keys = [teacher.encode(support) for teacher in teachers]
            for i in torch.nonzero(held_out).flatten().tolist():
                answers = zip(teachers, keys, strict=True)
                shares = torch.stack([merge_classes(t(features[i], k).logits).softmax(1)[0] for t, k in answers])
                votes.append(shares.mean(0).cpu()[:, points[i][:, 0], points[i][:, 1]].T)
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


def _ridge(x: Float[Tensor, "n f"], y: Tensor, classes: int) -> Float[Tensor, "f k1"]:
    target = F.one_hot(y, classes + 1).to(x)
    gram = x.T @ x + len(x) * 1e-2 * torch.eye(x.shape[1], dtype=x.dtype)
    weights: Float[Tensor, "f k1"] = torch.linalg.solve(gram, x.T @ target)
    return weights


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
