"""Augmented crops of the support slices, and a bounded store of their features.

The backbone is frozen, so a crop goes through it once; training steps then read the stored features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from distillfss_core.models.preprocess import Limits, Preprocess, resize
from distillfss_core.nn.backbones import Backbone
from distillfss_core.nn.device import Device
from distillfss_core.nn.features import EncodedSupport, FeaturePyramid, cat_pyramids
from distillfss_core.support.support_set import count_labels
from distillfss_core.types import IGNORE, AnnotatedSlice, Array, TrainStep

STEP = 32  # pixels that sides of crops are multiples of

EvidenceOf = Callable[["Crop", FeaturePyramid], Tensor]
"""From a crop and its features to margins "1 k hg wg"."""


@dataclass(frozen=True)
class Augmentation:
    """Differences between crops and their slice; zeros everywhere give plain crops.

    Parameters
    ----------
    scale : float
        Zoom is drawn log-uniformly from 1 / (1 + scale) to 1 + scale.
    gamma, contrast, brightness : float
        Largest change of each (gamma in octaves).
    noise : float
        Largest deviation of Gaussian noise, in units of the intensity range.
    polarity : float
        Probability of inverting the intensities.
    turn : bool
        Quarter turns and mirror images.
    """

    scale: float = 0.25
    gamma: float = 0.5
    contrast: float = 0.2
    brightness: float = 0.1
    noise: float = 0.03
    polarity: float = 0.0
    turn: bool = True


PLAIN = Augmentation(scale=0, gamma=0, contrast=0, brightness=0, noise=0, polarity=0, turn=False)


@dataclass(frozen=True, eq=False)
class Crop:
    """One augmented crop.

    ``image`` "3 s s" in [0, 1]; ``labels`` "s s" uint8 with IGNORE outside the slice; ``slice`` is the index in
    the support set; ``box`` is where it was cut, (y0, x0, y1, x1) in pixels of the slice; ``plain`` is the image
    before its intensities were varied, and ``inverted`` whether they were inverted.
    """

    image: Float[Tensor, "3 s s"]
    labels: UInt8[Tensor, "s s"]
    slice: int
    box: tuple[int, int, int, int]
    plain: Float[Tensor, "3 s s"]
    inverted: bool = False

    def without_pixels(self) -> Crop:
        """Only where it came from."""
        return Crop(self.image[:, :0, :0], self.labels[:0, :0], self.slice, self.box, self.plain[:, :0, :0])


@runtime_checkable
class Slices(Protocol):
    """Slices that crops can be cut from."""

    @property
    def slices(self) -> Sequence[AnnotatedSlice]:
        """Images and labels."""

    @property
    def classes(self) -> int:
        """K, without background."""


class CropSampler:
    """Cut crops from a support set, at native resolution times the model's zoom.

    Three crops out of four are centered on an annotated object (each class as often as another), the others
    lie anywhere that something is annotated: rare classes are seen in most steps.

    Parameters
    ----------
    support : SupportSet, or any other slices of so many classes
    size : int
        Side of a crop in pixels, after zooming; no more than the longest slice needs.
    limits : sequence of Limits, optional
        Intensities that become 0 and 1 in each slice; by default those of the slice, or of the support.
    """

    def __init__(
        self,
        support: Slices,
        preprocess: Preprocess,
        size: int,
        augmentation: Augmentation,
        *,
        limits: Sequence[Limits] | None = None,
    ) -> None:
        self.augmentation: Augmentation = augmentation
        self.preprocess: Preprocess = preprocess
        longest = max(max(s.labels.shape) for s in support.slices) * preprocess.zoom_factor
        self.size: int = min(size, STEP * math.ceil(longest / STEP))
        self._images = [preprocess.as_channels(s.image, s.source) for s in support.slices]
        self._labels = [s.labels for s in support.slices]
        self._limits = list(limits or map(preprocess.limits, self._images))
        self._anchors = [_anchors(labels, support.classes) for labels in self._labels]

    def with_size(self, size: int) -> CropSampler:
        """The same sampler for smaller crops, if these are larger."""
        other = copy.copy(self)
        other.size = min(size, self.size)
        return other

    def cut(self, slice_index: int, rng: np.random.Generator) -> Crop:
        """A random crop of one slice."""
        aug = self.augmentation
        scale = float(np.exp(rng.uniform(-1, 1) * np.log1p(aug.scale)))
        side = max(2, round(self.size / (float(self.preprocess.zoom_factor) * scale)))
        labels = self._labels[slice_index]
        y, x = self._center(slice_index, rng)
        y0, x0 = (
            _place(int(c + rng.integers(-side // 4, side // 4 + 1)) - side // 2, side, n)
            for c, n in zip((y, x), labels.shape, strict=True)
        )
        return self._finish(slice_index, (y0, x0, y0 + side, x0 + side), aug, rng)

    def grid(self, slice_index: int, limit: int) -> list[Crop]:
        """Plain crops that cover what is annotated of the slice, evenly thinned out to at most ``limit``."""
        side = max(2, round(self.size / float(self.preprocess.zoom_factor)))
        h, w = self._labels[slice_index].shape
        corners = [(y, x) for y in _starts(h, side) for x in _starts(w, side)]
        labels = self._labels[slice_index]
        corners = [(y, x) for y, x in corners if (labels[max(y, 0) : y + side, max(x, 0) : x + side] != IGNORE).any()]
        if len(corners) > limit:
            corners = self._spread(slice_index, corners, side, limit)
        rng = np.random.default_rng(0)
        return [self._finish(slice_index, (y, x, y + side, x + side), PLAIN, rng) for y, x in corners]

    def _spread(self, slice_index: int, corners: list[tuple[int, int]], side: int, limit: int) -> list[tuple[int, int]]:
        """``limit`` of the corners, as `spread` chooses them."""
        labels = self._labels[slice_index]
        parts = [labels[max(y, 0) : y + side, max(x, 0) : x + side] for y, x in corners]
        return [corners[i] for i in spread(parts, len(self._anchors[slice_index]), limit)]

    def _center(self, slice_index: int, rng: np.random.Generator) -> tuple[int, int]:
        anchors = self._anchors[slice_index]
        objects = [a for a in anchors[1:] if len(a)]
        if objects and (rng.random() < 0.75 or not len(anchors[0])):
            points = objects[rng.integers(len(objects))]
        else:
            points = anchors[0]
        y, x = points[rng.integers(len(points))]
        return int(y), int(x)

    def _finish(
        self, index: int, box: tuple[int, int, int, int], augmentation: Augmentation, rng: np.random.Generator
    ) -> Crop:
        """Cut a box, which may reach beyond the slice (mirrored there, and not annotated), and augment it."""
        image, labels = self._images[index], self._labels[index]
        y0, x0, y1, x1 = box
        inside = (slice(max(y0, 0), min(y1, labels.shape[0])), slice(max(x0, 0), min(x1, labels.shape[1])))
        x = self.preprocess.to_tensor(image[inside], self._limits[index])[None]
        margins = (
            (inside[0].start - y0, y1 - inside[0].stop),
            (inside[1].start - x0, x1 - inside[1].stop),
        )
        y = np.pad(labels[inside], margins, constant_values=IGNORE)
        if any(any(m) for m in margins):
            x = torch.from_numpy(np.pad(x[0].numpy(), ((0, 0), *margins), mode="symmetric"))[None]
        size = (self.size, self.size)
        x = resize(x, size)[0]
        target = torch.from_numpy(resize_labels(y, self.size))
        if augmentation.turn:
            turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
            x, target = torch.rot90(x, turns, (1, 2)), torch.rot90(target, turns, (0, 1))
            if mirror:
                x, target = x.flip(2), target.flip(1)
        plain = x.contiguous()
        inverted = bool(augmentation.polarity) and rng.random() < augmentation.polarity
        varied = recolor(1 - plain if inverted else plain, augmentation, rng)
        return Crop(varied, target.contiguous(), index, box, plain, inverted)


def spread(parts: Sequence[Array], values: int, limit: int) -> list[int]:
    """Indices of ``limit`` arrays of labels, drawn evenly, but one for each label below ``values`` first; ascending."""
    drawn = [int(i) for i in np.random.default_rng(0).permutation(len(parts))]
    held = [set(np.flatnonzero(count_labels(parts[i])).tolist()) for i in drawn]
    present = [value for value in range(values) if any(value in h for h in held)]
    first = {next(n for n, h in enumerate(held) if value in h) for value in present}
    chosen = [*sorted(first), *(n for n in range(len(drawn)) if n not in first)][:limit]
    return sorted(drawn[n] for n in chosen)


def recolor(x: Float[Tensor, "3 h w"], aug: Augmentation, rng: np.random.Generator) -> Float[Tensor, "3 h w"]:
    """Vary gamma, contrast, brightness and noise of an image in [0, 1]."""
    if aug.gamma:
        x = x.clamp_min(0) ** float(2 ** rng.uniform(-aug.gamma, aug.gamma))
    if aug.contrast or aug.brightness:
        gain = 1 + rng.uniform(-aug.contrast, aug.contrast)
        x = (x - 0.5) * gain + 0.5 + rng.uniform(-aug.brightness, aug.brightness)
    if aug.noise:
        spread = rng.uniform(0, aug.noise)
        x = x + torch.from_numpy(rng.standard_normal((1, *x.shape[1:]), dtype=np.float32)) * spread
    return x.clamp(0, 1).contiguous()


def _anchors(labels: Array, classes: int, limit: int = 4096) -> list[Array]:
    """For each class, background first, up to ``limit`` of its pixels (y, x), evenly spaced."""
    step = max(1, labels.shape[0] * labels.shape[1] >> 22)  # of a huge slice, each step-th row is looked at first
    anchors = []
    for value in range(classes + 1):
        points = np.argwhere(labels[::step] == value) * (step, 1)
        if not len(points) and step > 1:
            points = np.argwhere(labels == value)
        anchors.append(points[:: max(1, -(-len(points) // limit))])
    return anchors


def _place(start: int, side: int, length: int) -> int:
    """Keep a crop inside the slice; center it where the slice is smaller than the crop."""
    if side >= length:
        return -((side - length) // 2)
    return min(max(start, 0), length - side)


def _starts(length: int, side: int) -> list[int]:
    if side >= length:
        return [_place(0, side, length)]
    count = -(-length // side)
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def resize_labels(labels: Array, size: int) -> Array:
    """Labels "y x" brought to "size size" by the nearest pixel; where they shrink, no annotated pixel gets lost among
    unannotated ones (a scribble is often one pixel wide)."""
    rows, columns = (np.minimum(((np.arange(size) + 0.5) * n / size).astype(int), n - 1) for n in labels.shape)
    small = np.ascontiguousarray(labels[rows][:, columns])
    if size < max(labels.shape) and (labels == IGNORE).any():
        y, x = np.nonzero(labels != IGNORE)
        grid = (y * size // labels.shape[0], x * size // labels.shape[1])
        scattered = np.full_like(small, IGNORE)
        scattered[grid] = labels[y, x]
        small = np.where(small == IGNORE, scattered, small)
    return small


class FeatureCache:
    """Features and labels of many crops, in half precision and within a memory limit.

    Parameters
    ----------
    memory : int
        Bytes for stored features at most.
    limit : int
        Crops stored at most. At least two a slice are kept whatever the limit.

    Attributes
    ----------
    evidence_of : callable, optional
        Margins of a crop and its features, from elsewhere than the head, which are stored with it. Set it before the
        first crop.
    """

    def __init__(self, backbone: Backbone, device: Device, *, memory: int, limit: int) -> None:
        self.backbone: Backbone = backbone
        self.device: Device = device
        self.memory: int = memory
        self.limit: int = limit
        self.crops: list[Crop] = []
        self.features: list[FeaturePyramid] = []
        self.evidence_of: EvidenceOf | None = None
        self._labels: list[Tensor] = []
        self._evidence: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.features)

    def encode(self, crops: Sequence[Crop]) -> FeaturePyramid:
        """Features of crops, straight from the backbone, in single precision."""
        batch = self.device.upload(torch.stack([v.image for v in crops]))
        return encode_images(self.backbone, self.device, batch)

    def iter_fill(
        self, sampler: CropSampler, slices: Sequence[int], rng: np.random.Generator
    ) -> Generator[TrainStep, None, None]:
        """Cut and store crops of the slices in turn until the limits are reached; yields the steps of "encode"."""
        while True:
            for index in slices:
                self.add(sampler.cut(index, rng))
            room = min(self.limit, self.memory // self.features[0].nbytes)
            total = max(room, 2 * len(slices)) // len(slices) * len(slices)
            yield TrainStep(len(self), total, stage="encode")
            if len(self) >= total:
                return

    def add(self, crop: Crop) -> None:
        """Encode and store a crop."""
        self.replace(len(self), crop)

    def replace(self, index: int, crop: Crop) -> None:
        """Put a crop in the place of a stored one."""
        place = slice(index, index + 1)
        features = self._stored(crop)
        self.features[place] = [features]
        self._labels[place] = [crop.labels.to(self.device.torch)]
        self.crops[place] = [crop.without_pixels()]
        if self.evidence_of is not None:
            self._evidence[place] = [self.evidence_of(crop, features.map(_as_float)).half()]

    def _stored(self, crop: Crop) -> FeaturePyramid:
        return self.encode([crop]).map(lambda block: block.half())

    def pyramid(self, indices: Sequence[int]) -> FeaturePyramid:
        """Features of stored crops in single precision, as one batch."""
        return cat_pyramids([self.features[i].map(_as_float) for i in indices])

    def labels(self, indices: Sequence[int]) -> UInt8[Tensor, "b h w"]:
        """Labels of stored crops, on the device."""
        return torch.stack([self._labels[i] for i in indices])

    def evidence(self, indices: Sequence[int]) -> Float[Tensor, "b k hg wg"] | None:
        """Evidence of stored crops in single precision, if there is any."""
        return torch.cat([self._evidence[i].float() for i in indices]) if self.evidence_of is not None else None

    def support(self, indices: Sequence[int], classes: int) -> EncodedSupport:
        """Stored crops as a support of ``classes`` classes."""
        return EncodedSupport.of(self.pyramid(indices), self.labels(indices), classes)

    def slices(self) -> Array:
        """Slice index of every stored crop."""
        return np.array([v.slice for v in self.crops])


def encode_images(backbone: Backbone, device: Device, images: Float[Tensor, "b 3 h w"]) -> FeaturePyramid:
    """Features of images in [0, 1] on the device, straight from the backbone, in single precision."""
    with torch.no_grad(), device.autocast():
        features = backbone(images).lean()
    result: FeaturePyramid = features.map(Tensor.float)
    return result


def _as_float(block: Tensor) -> Tensor:
    if block.device.type == "cpu":
        return block.float().contiguous(memory_format=torch.channels_last)
    return block.float()
