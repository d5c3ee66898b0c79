"""Fit the probe of a support set: logistic regression on drawn pixels, which takes seconds.

A probe is a student of its own, or evidence for one: its margins are added to those of the head. For that it is
cross-fitted, as stacking needs it [1]_: in training, the margins of a slice are those of a probe that has not seen it.

References
----------
.. [1] Wolpert, "Stacked Generalization", Neural Networks 5(2), 1992.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distillfss_core.models.batches import NEVER
from distillfss_core.models.preprocess import Preprocess
from distillfss_core.nn.device import Device
from distillfss_core.nn.features import FeaturePyramid
from distillfss_core.nn.probe import BOUND, KNOTS, Probe
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.crops import PLAIN, Crop, CropSampler, FeatureCache
from distillfss_core.training.zoom import point_features
from distillfss_core.types import Array, TrainStep

POINTS = 2_000  # pixels of each class and slice, at most
ALL_POINTS = 60_000  # pixels of all, at most
CROPS = 16  # of each slice, at most
FEATURE_PENALTY, INTENSITY_PENALTY = 50.0, 0.5  # half the inverse of scikit-learn's C, for standardized columns
FOLDS = 8  # probes that each leave some slices out, at most
WORTHLESS = 0.05  # gain below which a probe is no evidence
OFFSET_PENALTY = 1e-3
ITERATIONS = 120
_RANGE = 0.05, 0.95  # quantiles of the intensities at which the first and the last knot lie


@dataclass(frozen=True, eq=False)
class ProbePoints:
    """Drawn pixels: the features and `Probe.maps` there, their labels and slices.

    Parameters
    ----------
    shares : Tensor
        Of the annotated pixels, the share of each class (background first), which the drawn ones stand for.
    new : Probe
        One that has learned nothing, and reads what the columns hold.
    """

    columns: Float[Tensor, "n f"]
    labels: Int[Tensor, " n"]
    slices: Int[Tensor, " n"]
    shares: Float[Tensor, " k1"]
    new: Probe

    def __getitem__(self, chosen: Bool[Tensor, " n"]) -> ProbePoints:
        part = {name: getattr(self, name)[chosen] for name in ("columns", "labels", "slices")}
        return replace(self, **part)

    @property
    def weights(self) -> Float[Tensor, " n"]:
        """Of each pixel, so that those of a class sum to its share."""
        result: Tensor = (self.shares / torch.bincount(self.labels, minlength=len(self.shares)).clamp_min(1))[
            self.labels
        ]
        return result


@dataclass(frozen=True, eq=False)
class CrossFit:
    """A probe of all slices, and those that have not seen one.

    The margins of all are brought to the gain and offsets under which held-out pixels have the least cross-entropy. So
    a probe that fails on held-out slices stays quiet.

    Parameters
    ----------
    whole : Probe
    without : dict
        By the index of a slice, a probe of others. Missing are slices without which a class is not shown.
    gain : float
        0 where nothing could be held out.
    iou : float or None
        Mean IoU over the classes, estimated on held-out pixels.
    """

    whole: Probe
    without: dict[int, Probe]
    gain: float
    iou: float | None

    @torch.no_grad()
    def evidence(self, crop: Crop, features: FeaturePyramid) -> Float[Tensor, "1 k hg wg"]:
        """Margins of a crop, by a probe that has not seen its slice.

        Its features are those of the crop as the student sees it. Its intensities are those before augmentation, which
        are what a probe reads later; inverted crops have them inverted, so that the head learns of evidence that fails.
        Slices that are missing in `without` get zeros.
        """
        probe, finest = self.without.get(crop.slice), features.stages[0][-1]
        if probe is None:
            return finest.new_zeros(1, self.whole.intensities.out_channels, *finest.shape[-2:])
        image = 1 - crop.plain if crop.inverted else crop.plain
        margins: Float[Tensor, "1 k hg wg"] = probe(features, image[None].to(finest.device))
        return margins


def iter_points(
    support: SupportSet,
    slices: Sequence[int],
    preprocess: Preprocess,
    cache: FeatureCache,
    crop_size: int,
    seed: int,
) -> Generator[TrainStep, None, ProbePoints]:
    """Draw the pixels from which a probe learns; yields a step of the stage "probe" after each slice.

    From every slice, up to `POINTS` pixels of each class are drawn from plain crops.

    Parameters
    ----------
    slices : sequence of int
        Indices of the slices to learn from.
    cache : FeatureCache
        Whose backbone encodes the crops; nothing is stored in it.
    crop_size : int
        Side of a crop in pixels after zooming.
    """
    sampler = CropSampler(support, preprocess, crop_size, PLAIN)
    bound = None if support.planes_of_one_volume else BOUND  # planes of one volume show what is to come
    new = Probe(cache.backbone.spec, support.classes, preprocess.inputs, alone=False, bound=bound)
    rng = np.random.default_rng(seed)
    limit = min(POINTS, max(1, ALL_POINTS // (len(slices) * (support.classes + 1))))
    columns: list[Tensor] = []
    labels: list[Tensor] = []
    origins: list[Tensor] = []
    for number, index in enumerate(slices, 1):
        crops = sampler.grid(index, CROPS)
        drawn = _draw([crop.labels.numpy() for crop in crops], support.classes, limit, rng)
        for crop, points in zip(crops, drawn, strict=True):
            if len(points):
                features = cache.encode([crop]).map(Tensor.cpu)
                columns.append(point_features(new.inputs_of(features, crop.image[None]), points))
                labels.append(crop.labels[points[:, 0], points[:, 1]].long())
                origins.append(torch.full((len(points),), index))
        yield TrainStep(number, len(slices), stage="probe")
    shares = torch.from_numpy(support.shares()).float()
    return ProbePoints(torch.cat(columns), torch.cat(labels), torch.cat(origins), shares, new)


def fit_probe(
    points: ProbePoints, *, alone: bool = False, start: Probe | None = None, iterations: int = ITERATIONS
) -> Probe:
    """Fit a probe, on the CPU and in evaluation mode.

    The weights of the pixels give each class the share that it has among the annotated pixels. The loss is the
    cross-entropy with an L2 penalty, which is smaller for the intensities than for the features: there are many more of
    these.

    A class without a pixel is never predicted.

    Parameters
    ----------
    points : ProbePoints
        With background, and a class at least.
    alone : bool
        Whether the probe is a student of its own.
    start : Probe, optional
        One of the same classes, fitted before, from whose weights the search starts. The loss is convex, so the start
        decides only how soon it ends.
    iterations : int
        Steps of L-BFGS at most.
    """
    probe = copy.deepcopy(points.new)
    probe.alone, probe.bound = alone, None if alone else probe.bound
    end = points.columns.shape[1]
    for layer in (probe.surroundings, probe.intensities):
        end -= layer.read
        maps = points.columns[:, end : end + layer.maps]
        layer.knots.copy_(torch.quantile(maps, torch.linspace(*_RANGE, KNOTS), 0).T)
    x = probe.columns(points.columns)
    center, scale = x.mean(0), x.std(0) + 1e-5
    penalties = torch.full((x.shape[1],), INTENSITY_PENALTY)
    penalties[:end] = FEATURE_PENALTY
    present = points.labels.unique()
    rows = present[1:] - 1
    initial = None if start is None else _standardized(start, rows, center, scale)
    labels = torch.searchsorted(present, points.labels)
    fitted, offsets = _regress(
        (x - center) / scale, labels, points.weights, penalties / len(x), len(rows), initial, iterations
    )
    weights, bias = torch.zeros(len(points.shares) - 1, x.shape[1]), torch.full((len(points.shares) - 1,), NEVER)
    weights[rows] = fitted / scale
    bias[rows] = offsets - weights[rows] @ center
    probe.set_weights(weights, bias)
    return probe.eval().requires_grad_(False)


def _standardized(
    probe: Probe, rows: Int[Tensor, " c"], center: Float[Tensor, " f"], scale: Float[Tensor, " f"]
) -> tuple[Float[Tensor, "c f"], Float[Tensor, " c"]]:
    """Weights and biases of some classes for standardized columns; zero for those that had no pixel."""
    weights, bias = (part.cpu()[rows] for part in probe.weights())
    return weights * scale, torch.where(bias > NEVER, bias, 0) + weights @ center


def count_fits(points: ProbePoints) -> int:
    """Number of probes that `iter_cross_fit` fits."""
    return 1 + len(_folds(points))


def iter_cross_fit(points: ProbePoints, device: Device) -> Generator[TrainStep, None, CrossFit]:
    """Fit a probe on all slices, and on these without each of at most `FOLDS` folds; all are put on the device.

    Yields a step of the stage "fit" after each of the `count_fits` probes.
    """
    total = count_fits(points)
    whole = fit_probe(points)
    yield TrainStep(1, total, stage="fit")
    margins = torch.zeros(len(points.labels), len(points.shares) - 1)
    judged = torch.zeros(len(points.labels), dtype=torch.bool)
    without: dict[int, Probe] = {}
    for number, fold in enumerate(_folds(points), 2):
        inside = torch.isin(points.slices, fold)
        probe = fit_probe(points[~inside])
        margins[inside] = _margins(probe, points[inside].columns)
        without |= dict.fromkeys(fold.tolist(), probe)
        judged |= inside
        yield TrainStep(number, total, stage="fit")
    if not without:
        return CrossFit(whole, {}, 0.0, None)
    gain, offsets = _calibrate(margins[judged], points[judged])
    for probe in {whole, *without.values()}:
        probe.scale(gain, offsets)
        probe.to(device.torch)
    return CrossFit(whole, without, gain, _iou(gain * margins[judged] + offsets, points[judged]))


def _folds(points: ProbePoints) -> list[Int[Tensor, " s"]]:
    """Slices that are held out together; not those without which a class is not shown."""
    slices, classes = points.slices.unique(), len(points.labels.unique())
    folds = [slices[n::FOLDS] for n in range(min(FOLDS, len(slices)))]
    return [fold for fold in folds if len(points.labels[~torch.isin(points.slices, fold)].unique()) == classes]


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


def _margins(probe: Probe, columns: Float[Tensor, "n f"]) -> Float[Tensor, "n k"]:
    weights, bias = probe.weights()
    result: Tensor = probe.columns(columns) @ weights.T + bias
    return result


def _regress(
    x: Float[Tensor, "n f"],
    labels: Int[Tensor, " n"],
    rows: Float[Tensor, " n"],
    penalties: Float[Tensor, " f"],
    classes: int,
    start: tuple[Float[Tensor, "k f"], Float[Tensor, " k"]] | None = None,
    iterations: int = ITERATIONS,
) -> tuple[Float[Tensor, "k f"], Float[Tensor, " k"]]:
    """Weights and biases of the margins of a logistic regression, from zero or from those given."""
    first = start or (torch.zeros(classes, x.shape[1]), torch.zeros(classes))
    weights, bias = (part.detach().clone().requires_grad_() for part in first)

    def loss() -> Tensor:
        return _cross_entropy(x @ weights.T + bias, labels, rows) + (penalties * weights**2).sum()

    _minimize(loss, [weights, bias], iterations)
    return weights.detach(), bias.detach()


def _calibrate(margins: Float[Tensor, "n k"], points: ProbePoints) -> tuple[float, Float[Tensor, " k"]]:
    """Gain (not negative) and offsets of margins with the least cross-entropy."""
    gain = torch.ones((), requires_grad=True)
    offsets = torch.zeros(margins.shape[1], requires_grad=True)
    rows = points.weights

    def loss() -> Tensor:
        return _cross_entropy(gain * margins + offsets, points.labels, rows) + OFFSET_PENALTY * (offsets**2).sum()

    _minimize(loss, [gain, offsets])
    return max(0.0, float(gain.detach())), offsets.detach()


def _cross_entropy(
    margins: Float[Tensor, "n k"], labels: Int[Tensor, " n"], rows: Float[Tensor, " n"]
) -> Float[Tensor, ""]:
    return (rows * F.cross_entropy(F.pad(margins, (1, 0)), labels, reduction="none")).sum()


def _minimize(loss: Callable[[], Tensor], parameters: list[Tensor], iterations: int = ITERATIONS) -> None:
    optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss()
        total.backward()
        return total

    optimizer.step(closure)


def _iou(margins: Float[Tensor, "n k"], points: ProbePoints) -> float:
    """Mean over the classes, each pixel with its weight."""
    called, rows = F.pad(margins, (1, 0)).argmax(1), points.weights
    scores = []
    for value in points.labels.unique()[1:]:
        a, b = called == value, points.labels == value
        scores.append(float(rows[a & b].sum() / rows[a | b].sum()))
    return float(np.mean(scores))
