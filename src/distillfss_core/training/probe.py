"""Fit the probe of a support set: logistic regression on drawn pixels, which takes seconds."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from distillfss_core.models.preprocess import Preprocess
from distillfss_core.nn.features import FeaturePyramid
from distillfss_core.nn.probe import KNOTS, WINDOWS, Probe
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.crops import PLAIN, CropSampler, FeatureCache
from distillfss_core.training.zoom import point_features
from distillfss_core.types import Array, TrainStep

POINTS = 2_000  # pixels of each class and slice, at most
ALL_POINTS = 60_000  # pixels of all, at most
CROPS = 16  # of each slice, at most
FEATURE_PENALTY, INTENSITY_PENALTY = 50.0, 0.5  # half the inverse of scikit-learn's C, for standardized columns
_ITERATIONS = 120
_RANGE = 0.05, 0.95  # quantiles of the intensities at which the first and the last knot lie


def iter_probe(
    support: SupportSet, preprocess: Preprocess, cache: FeatureCache, crop_size: int, seed: int
) -> Generator[TrainStep, None, Probe]:
    """Fit a probe; yields a step of the stage "probe" after each slice.

    From every slice, up to `POINTS` pixels of each class are drawn from plain crops. Their weights give each class the
    share that it has among the annotated pixels. The loss is the cross-entropy with an L2 penalty, which is smaller for
    the intensities than for the features: there are many more of these.

    Parameters
    ----------
    cache : FeatureCache
        Whose backbone encodes the crops; nothing is stored in it.
    crop_size : int
        Side of a crop in pixels after zooming.

    Returns
    -------
    Probe
        On the cache's device, in evaluation mode.
    """
    sampler = CropSampler(support, preprocess, crop_size, PLAIN)
    probe = Probe(cache.backbone.spec, support.classes, 1 if preprocess.channels == 1 else 3)
    rng = np.random.default_rng(seed)
    limit = min(POINTS, max(1, ALL_POINTS // (len(support) * (support.classes + 1))))
    columns: list[Tensor] = []
    labels: list[Tensor] = []
    for index in range(len(support)):
        crops = sampler.grid(index, CROPS)
        drawn = _draw([crop.labels.numpy() for crop in crops], support.classes, limit, rng)
        for crop, points in zip(crops, drawn, strict=True):
            if len(points):
                features = cache.encode([crop]).map(Tensor.cpu)
                columns.append(_columns(probe, features, crop.image[None], points))
                labels.append(crop.labels[points[:, 0], points[:, 1]].long())
        yield TrainStep(index + 1, len(support), stage="probe")
    _fit(probe, torch.cat(columns), torch.cat(labels), torch.from_numpy(support.shares()).float())
    return probe.to(cache.device.torch).eval().requires_grad_(False)


def _draw(labels: Sequence[Array], classes: int, limit: int, rng: np.random.Generator) -> list[Int[Tensor, "n 2"]]:
    """Of the crops of a slice, up to ``limit`` pixels (y, x) of each class: those of every crop."""
    chosen = [np.zeros(part.shape, bool) for part in labels]
    for value in range(classes + 1):
        places = np.concatenate(
            [np.c_[np.full((part == value).sum(), n), np.argwhere(part == value)] for n, part in enumerate(labels)]
        )
        for n, y, x in places[rng.permutation(len(places))[:limit]]:
            chosen[n][y, x] = True
    return [torch.from_numpy(np.argwhere(part)) for part in chosen]


def _columns(
    probe: Probe, features: FeaturePyramid, image: Float[Tensor, "1 3 h w"], points: Int[Tensor, "n 2"]
) -> Float[Tensor, "n f"]:
    """Features, means and deviations under the points of a crop; the hinges need knots, which are not known yet."""
    maps = FeaturePyramid(tuple((part,) for part in probe.maps(image)), features.size)
    return torch.cat([point_features(features, points), point_features(maps, points)], 1)


def _fit(probe: Probe, columns: Float[Tensor, "n f"], labels: Int[Tensor, " n"], shares: Float[Tensor, " k1"]) -> None:
    """Set the knots to quantiles of the intensities, and the weights to those of the regression."""
    n_means = len(probe.knots)
    n_features = columns.shape[1] - n_means - len(WINDOWS) * probe.inputs
    features, means, deviations = columns.tensor_split([n_features, n_features + n_means], 1)
    probe.knots.copy_(torch.quantile(means, torch.linspace(*_RANGE, KNOTS), 0).T)
    hinges = probe.hinges(means.T[None, :, :, None])[0, :, :, 0].T
    x = torch.cat([features, hinges, deviations], 1)
    center, scale = x.mean(0), x.std(0) + 1e-5
    penalties = torch.full((x.shape[1],), INTENSITY_PENALTY)
    penalties[:n_features] = FEATURE_PENALTY
    weights, bias = _regress((x - center) / scale, labels, shares, penalties / len(x))
    weights = weights / scale
    sizes = [layer.weight.shape[1] for layer in (*probe.stages, probe.intensities)]
    with torch.no_grad():
        for layer, part in zip((*probe.stages, probe.intensities), weights.split(sizes, 1), strict=True):
            layer.weight.copy_(part[:, :, None, None])
        assert probe.intensities.bias is not None
        probe.intensities.bias.copy_(bias - weights @ center)


def _regress(
    x: Float[Tensor, "n f"],
    labels: Int[Tensor, " n"],
    shares: Float[Tensor, " k1"],
    penalties: Float[Tensor, " f"],
) -> tuple[Float[Tensor, "k f"], Float[Tensor, " k"]]:
    """Weights and biases of the margins of a logistic regression, by L-BFGS."""
    weights = torch.zeros(len(shares) - 1, x.shape[1], requires_grad=True)
    bias = torch.zeros(len(shares) - 1, requires_grad=True)
    rows = (shares / torch.bincount(labels, minlength=len(shares)).clamp_min(1))[labels]
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = F.pad(x @ weights.T + bias, (1, 0))
        total = (rows * F.cross_entropy(logits, labels, reduction="none")).sum() + (penalties * weights**2).sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weights.detach(), bias.detach()
