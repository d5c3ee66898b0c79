"""Images without labels: an ensemble segments them, and the student learns the labels of which it is sure [1]_.

The ensemble is the student and, where there is one, a probe on a foundation model. Such a model is too slow to be a
student, and its features are too coarse for fine structures. But it knows shapes that a light backbone does not.

References
----------
.. [1] Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", ICML 2013
   workshop on challenges in representation learning.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from distillfss_core.errors import IntensityWarning
from distillfss_core.models.intensities import CHECKED
from distillfss_core.models.preprocess import Limits, Preprocess, sample_pixels
from distillfss_core.models.segmenter import HALO, Segmenter
from distillfss_core.nn.backbones import Backbone
from distillfss_core.nn.device import Device
from distillfss_core.nn.probe import Probe
from distillfss_core.settings import ZOOMS, DistillSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.crops import Augmentation, CropSampler, FeatureCache
from distillfss_core.training.loop import UnlabeledCrops
from distillfss_core.training.probe import CrossFit, fit_probe, iter_points
from distillfss_core.types import (
    IGNORE,
    AnnotatedSlice,
    Array,
    TrainStep,
    UnlabeledImage,
    check_image,
    evenly,
    sample_step,
)

IMAGES = 12
"""Images without labels that are used at most."""

CROPS = 64  # of all of them, stored at a time
SURE = 0.65  # probability from which on a pixel is labeled
WINDOW = 2  # crops along a side of the part of an image that is used
Made = TypeVar("Made")

TILE = 512  # pixels of the foundation model's input: it learned on images of this size


class FoundationProbe(Segmenter):
    """A probe on a foundation model; it exists in memory only."""

    def __init__(
        self, backbone: Backbone, probe: Probe, preprocess: Preprocess, class_names: Sequence[str], *, device: Device
    ) -> None:
        super().__init__(backbone, preprocess, class_names, device=device, halo=HALO)
        self.probe: Probe = probe

    @property
    def local(self) -> bool:
        """Whether tiles agree: the backbone of a foundation model attends to all of a tile."""
        return self.backbone.spec.local

    def _margins(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hg wg"]:
        with self.device.autocast():
            margins: Float[Tensor, "b k hg wg"] = self.probe(self.backbone(image), image).float()
        return margins


@dataclass(frozen=True, eq=False)
class SegmentedImages:
    """Images without labels, with the labels that an ensemble gives them; IGNORE where it is not sure.

    Parameters
    ----------
    slices : list of AnnotatedSlice
    classes : int
        K, without background.
    limits : list of Limits
        Intensities that become 0 and 1 in each, as for the annotated slices: of the whole image, or of the volume.
    """

    slices: list[AnnotatedSlice]
    classes: int
    limits: list[Limits]


def check_unlabeled(images: Sequence[Array | UnlabeledImage], preprocess: Preprocess) -> list[UnlabeledImage]:
    """The images, each with a sample for its limits.

    Raises
    ------
    ImageError
        If an image has other channels than the support, or values that are not finite.
    """
    checked = []
    for index, given in enumerate(images):
        source = f"image {index} without labels"
        for part in (given.pixels, given.sample) if isinstance(given, UnlabeledImage) else (given,):
            check_image(part, source)
            preprocess.as_channels(part, source)
        checked.append(given if isinstance(given, UnlabeledImage) else _of_array(given))
    return checked


def _of_array(image: Array) -> UnlabeledImage:
    step = sample_step((image.shape[0], image.shape[1]))
    return UnlabeledImage(image, image[::step, ::step])


def iter_foundation(
    backbone: Backbone,
    support: SupportSet,
    slices: Sequence[int],
    preprocess: Preprocess,
    settings: DistillSettings,
    device: Device,
) -> Generator[TrainStep, None, FoundationProbe]:
    """Fit a probe on a foundation model; yields steps of the stage "foundation".

    Images are twice as large as for the student, since cells of foundation models are large.
    """
    backbone.to(device.torch)
    finer = max(zoom for zoom in ZOOMS if zoom <= max(ZOOMS[0], 2 * preprocess.zoom_factor))
    enlarged = replace(preprocess, zoom=str(finer))
    cache = FeatureCache(backbone, device, memory=1, limit=1)
    points = yield from iter_as("foundation", iter_points(support, slices, enlarged, cache, TILE, settings.seed))
    probe = fit_probe(points, alone=True).to(device.torch)
    return FoundationProbe(backbone, probe, enlarged, support.class_names, device=device)


def iter_segment_images(
    images: Sequence[UnlabeledImage], models: Sequence[Segmenter], crop_size: int, seed: int
) -> Generator[TrainStep, None, SegmentedImages]:
    """Segment a window of each of up to `IMAGES` images by the mean of some models; yields steps of the stage "label".

    Parameters
    ----------
    images : sequence of UnlabeledImage
        Of larger ones a window of `WINDOW` crops a side is used, which is drawn at random.
    models : sequence of Segmenter
        The first is the student.
    crop_size : int
        Side of a crop in pixels after the student's zoom.

    Warns
    -----
    IntensityWarning
        If the images are unlike the annotated slices, so that their labels may be wrong.
    """
    rng = np.random.default_rng(seed)
    preprocess = _matched(models[0].preprocess, images)
    side = int(WINDOW * crop_size / models[0].preprocess.zoom_factor)
    chosen = evenly(len(images), IMAGES)
    slices, limits = [], []
    for number, index in enumerate(chosen, 1):
        image = images[index].pixels
        limits.append(preprocess.sample_limits(images[index].sample))
        y, x = (int(rng.integers(max(0, n - side) + 1)) for n in image.shape[:2])
        window = image[y : y + side, x : x + side]
        mean = np.mean([_probabilities(model, window, limits[-1]) for model in models], axis=0)
        labels = np.where(mean.max(0) < SURE, IGNORE, mean.argmax(0)).astype(np.uint8)
        slices.append(AnnotatedSlice(window, labels, f"image {index} without labels"))
        yield TrainStep(number, len(chosen), stage="label")
    return SegmentedImages(slices, len(models[0].class_names), limits)


def _matched(preprocess: Preprocess, images: Sequence[UnlabeledImage]) -> Preprocess:
    """That of the annotated slices, or where these images are on another intensity scale, its limits on theirs."""
    pixels = [sample_pixels(preprocess.as_channels(image.sample), CHECKED // len(images)) for image in images]
    sample = np.concatenate(pixels)[None, :, None]
    matched, warning = preprocess.matched_to(sample, "images without labels", is_plane=len(images) == 1)
    if warning:
        warnings.warn(warning, IntensityWarning, stacklevel=2)
    return matched


def _probabilities(model: Segmenter, image: Array, limits: Limits) -> Float[Array, "k1 y x"]:
    shape = (image.shape[0], image.shape[1])
    return model.predict_region(lambda y, x: image[y, x], shape, ((0, shape[0]), (0, shape[1])), limits, tile=TILE)


def iter_unlabeled_crops(
    images: SegmentedImages,
    preprocess: Preprocess,
    cache: FeatureCache,
    fit: CrossFit | None,
    augmentation: Augmentation,
    settings: DistillSettings,
) -> Generator[TrainStep, None, UnlabeledCrops]:
    """Cut and encode crops of segmented images; yields steps of the stage "label".

    Parameters
    ----------
    cache : FeatureCache
        Empty.
    fit : CrossFit, optional
        Its probe, which has seen none of the images, gives the evidence.
    """
    sampler = CropSampler(images, preprocess, settings.crop_size, augmentation, limits=images.limits)
    if fit is not None:
        cache.evidence_of = replace(fit, without=dict.fromkeys(range(len(images.slices)), fit.whole)).evidence
    rng = np.random.default_rng(settings.seed)
    yield from iter_as("label", cache.iter_fill(sampler, range(len(images.slices)), rng))
    return UnlabeledCrops(cache, sampler)


def iter_as(stage: str, steps: Generator[TrainStep, None, Made]) -> Generator[TrainStep, None, Made]:
    """Steps under another name: they are no preparation, since a student is there."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            made: Made = end.value
            return made
        yield replace(step, stage=stage)
