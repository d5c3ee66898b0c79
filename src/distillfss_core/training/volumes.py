"""Annotated planes of several volumes as one support set, on the intensity scale of the first."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distillfss_core.errors import ImageError, IntensityWarning, SupportSetError
from distillfss_core.models.intensities import CHECKED
from distillfss_core.models.preprocess import Limits, Preprocess, fit_preprocess, sample_pixels
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.crops import Augmentation
from distillfss_core.types import IGNORE, AnnotatedSlice, Array


@dataclass(frozen=True, eq=False)
class VolumeSlices:
    """Annotated planes of one volume.

    Parameters
    ----------
    name : str
        Of the volume, for messages.
    slices : sequence of AnnotatedSlice
        At least one.
    pixel_size : (float, float), optional
        Size of a pixel (y, x) in micrometers.
    sample : array, shape (n, y, x) or (n, y, x, c), optional
        Pixels of the whole volume, as `sample_volume` gives them; by default those of the slices. With those of all
        volumes, scales are compared more exactly.
    """

    name: str
    slices: Sequence[AnnotatedSlice]
    pixel_size: tuple[float, float] | None = None
    sample: Array | None = None


def join_volumes(volumes: Sequence[VolumeSlices], class_names: Sequence[str] = ("object",)) -> SupportSet:
    """Make one support set of annotated planes of several volumes of one kind, as `match_volumes` gives them.

    So the limits of the support suit all volumes.

    Parameters
    ----------
    volumes : sequence of VolumeSlices
        At least one. Sizes of pixels may differ as much as crops vary in a training, by a quarter.
    class_names : sequence of str
        Names of the classes 1..K, the same in all volumes.

    Returns
    -------
    SupportSet
        With ``planes_of_one_volume``, and the pixel size of the first volume that has one.

    Raises
    ------
    SupportSetError
        If there is no slice, the sizes of pixels differ too much, or as `SupportSet` does.
    ImageError
        If the volumes differ in channels.

    Warns
    -----
    IntensityWarning
        If the intensities of a volume cannot be brought to the scale of the first.

    Examples
    --------
    >>> plane = np.arange(64, dtype=np.uint8).reshape(8, 8)
    >>> labels = (plane > 40).astype(np.uint8)
    >>> dim = VolumeSlices("dim", [AnnotatedSlice(plane, labels, "dim, plane 0")])
    >>> bright = VolumeSlices("bright", [AnnotatedSlice(3 * plane, labels, "bright, plane 0")])
    >>> joined = join_volumes([dim, bright])
    >>> [int(s.image.max()) for s in joined.slices]
    [63, 63]
    """
    slices = match_volumes(volumes)
    if not slices:
        raise SupportSetError("the support set is empty; annotate at least one slice")
    return SupportSet(tuple(slices), class_names, _common_pixel_size(_used(volumes)), planes_of_one_volume=True)


def match_volumes(volumes: Sequence[VolumeSlices]) -> list[AnnotatedSlice]:
    """Bring annotated planes of several volumes of one kind to the intensity scale of the first.

    It is done as a student does with a volume that it segments. The planes keep the dtype of the first volume.

    Parameters
    ----------
    volumes : sequence of VolumeSlices
        The first may have a sample and no slices. Others without slices are left out. Sizes of pixels may differ by a
        quarter.

    Returns
    -------
    list of AnnotatedSlice
        Of all volumes, in their order.

    Raises
    ------
    SupportSetError
        If the sizes of pixels differ too much.
    ImageError
        If the volumes differ in channels.

    Warns
    -----
    IntensityWarning
        If the intensities of a volume cannot be brought to the scale of the first.
    """
    used = _used(volumes)
    _common_pixel_size(used)
    if not used:
        return []
    first, *others = used
    slices = list(first.slices)
    if others:
        reference = _reference(first)
        dtype = np.result_type(*([s.image.dtype for s in slices] or [np.asarray(first.sample).dtype]))
        for volume in others:
            _check_channels(volume, reference, first.name)
            limits = _limits_of(volume, reference)
            slices += [_mapped(s, limits, reference.fitted, dtype) for s in volume.slices]
    return slices


def _used(volumes: Sequence[VolumeSlices]) -> list[VolumeSlices]:
    """Volumes with slices, and the first one if it has a sample, as the scale is that of the chosen volume."""
    return [v for number, v in enumerate(volumes) if v.slices or (number == 0 and v.sample is not None)]


def _reference(volume: VolumeSlices) -> Preprocess:
    """Limits and intensities of the whole volume, if it has a sample, as those of few planes differ from them."""
    if volume.sample is not None:
        return fit_preprocess([volume.sample.reshape(-1, 1, *volume.sample.shape[3:])], scope="volume")
    objects = [(s.labels > 0) & (s.labels != IGNORE) for s in volume.slices]
    return fit_preprocess([s.image for s in volume.slices], scope="volume", objects=objects)


def _common_pixel_size(volumes: Sequence[VolumeSlices]) -> tuple[float, float] | None:
    """The pixel size of the first volume that has one."""
    known = [(volume.name, volume.pixel_size) for volume in volumes if volume.pixel_size is not None]
    for name, size in known[1:]:
        ratio = math.sqrt(math.prod(size) / math.prod(known[0][1]))
        if max(ratio, 1 / ratio) > 1 + Augmentation().scale:
            raise SupportSetError(
                f"{name}: has pixels of {_text(size)} micrometers, {known[0][0]} of {_text(known[0][1])}; leave it "
                "out, or bring both to one pixel size first"
            )
    return known[0][1] if known else None


def _check_channels(volume: VolumeSlices, reference: Preprocess, first: str) -> None:
    own = 1 if volume.slices[0].image.ndim == 2 else volume.slices[0].image.shape[-1]
    if own != reference.channels:
        raise ImageError(
            f"{volume.name}: has {own} channel(s), {first} {reference.channels}; leave it out, or choose one kind"
        )


def _limits_of(volume: VolumeSlices, reference: Preprocess) -> Limits:
    """Intensities of a volume that lie where the limits of the first volume lie."""
    sample = volume.sample
    if sample is None:
        pixels = [sample_pixels(reference.as_channels(s.image, s.source), CHECKED) for s in volume.slices]
        sample = np.concatenate(pixels)[None, :, None]
    is_plane = volume.sample is None and len(volume.slices) == 1
    matched, warning = reference.matched_to(sample, volume.name, is_plane=is_plane)
    if warning:
        warnings.warn(warning, IntensityWarning, stacklevel=4)
    return matched.fitted


def _mapped(labeled: AnnotatedSlice, own: Limits, wanted: Limits, dtype: np.dtype[Any]) -> AnnotatedSlice:
    """The slice with intensities for which ``own`` becomes ``wanted``."""
    if own == wanted and labeled.image.dtype == dtype:
        return labeled
    low, high, start, end = (np.array(v) for v in (own.low, own.high, wanted.low, wanted.high))
    gain = (end - start) / (high - low)
    pixels = labeled.image.astype(np.float64)
    pixels = pixels * gain[0] + (start - low * gain)[0] if pixels.ndim == 2 else pixels * gain + (start - low * gain)
    if dtype.kind != "f":
        limits = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        pixels = np.rint(pixels).clip(*limits)
    return replace(labeled, image=pixels.astype(dtype))


def _text(size: tuple[float, float]) -> str:
    return " x ".join(f"{side:.3g}" for side in size)
