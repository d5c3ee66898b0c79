"""Preprocessing of images for the backbone: intensity, channels and zoom, fitted once and stored with the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from distillfss_core.errors import ImageError, SettingsError
from distillfss_core.models.intensities import (
    PERCENTILES,
    Intensities,
    intensities_of,
    kept_range,
    match_intensities,
)
from distillfss_core.settings import parse_zoom
from distillfss_core.types import SAMPLE, Array, sample_step


@dataclass(frozen=True)
class Limits:
    """Intensities that become 0 and 1, one pair a channel."""

    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Preprocess:
    """Map an image "y x [c]" of any dtype to "3 h w" in [0, 1].

    Parameters
    ----------
    channels : int
        Channels the model was made for.
    mix : 3 rows of ``channels`` numbers
        The backbone's three inputs as weighted sums of the normalized channels.
    scope : {"image", "volume"}
        Whether the percentiles are those of each image ("image"), or were fitted on the support set and are
        kept ("volume": planes of one acquisition, where an empty plane must stay dark).
    fitted : Limits
        Percentiles over the support set.
    together : bool
        One pair of limits for all channels (color photographs keep their hue).
    zoom : str
        A fraction; 2 means that images are enlarged twofold before the backbone.
    intensities : Intensities, optional
        Of the support set; None for students that were made before cards kept them.
    """

    channels: int
    mix: tuple[tuple[float, ...], ...]
    scope: str
    fitted: Limits
    together: bool
    zoom: str = "1"
    intensities: Intensities | None = None

    @property
    def zoom_factor(self) -> Fraction:
        """``zoom`` as a number."""
        return Fraction(self.zoom)

    @property
    def inputs(self) -> int:
        """Channels of the backbone's input that differ: 1 or 3."""
        return 1 if self.channels == 1 else 3

    def limits(self, image: Array) -> Limits:
        """Intensities of this image (or of the support set) that become 0 and 1."""
        if self.scope == "volume":
            return self.fitted
        return percentile_limits(self.as_channels(image), together=self.together, support=self.intensities)

    def sample_limits(self, sample: Array) -> Limits:
        """`limits` of a plane of which only every `sample_step`-th row and column, "y x" or "y x c", was read."""
        if self.scope == "volume":
            return self.fitted
        sample = self.as_channels(sample)
        sample = sample.reshape(-1, sample.shape[-1])
        return percentile_limits(sample, together=self.together, support=self.intensities)

    def matched_to(self, sample: Array, source: str, *, is_plane: bool = False) -> tuple[Preprocess, str]:
        """The same for an input on another intensity scale, and a warning where labels may be wrong, else "".

        Hounsfield units keep their limits, and so does what lies in the range of the support. A linear map of the
        support's intensities moves the limits. Without one, the range of the sample takes their place, with a warning.

        Parameters
        ----------
        sample : array, shape (n, y, x) or (n, y, x, c)
            Some pixels of the input.
        is_plane : bool
            Whether the input is a single plane, which may differ more from the support than a volume does.
        source : str
            Name of the input for the warning.
        """
        if self.intensities is None:
            return self, ""
        pixels = self.stack_channels(sample).reshape(-1, self.channels)
        if pixels.dtype.kind == "f":
            pixels = pixels[np.isfinite(pixels).all(axis=1)]
        if not len(pixels):
            return self, ""
        match = match_intensities(
            self.intensities, pixels, scope=self.scope, together=self.together, is_plane=is_plane, source=source
        )
        if self.scope == "image" or match.is_identity:
            return self, match.warning
        if match.gain is None or match.offset is None:
            fitted = percentile_limits(pixels, together=self.together, support=self.intensities)
            intensities = intensities_of(pixels, pixels.dtype)
        else:
            gain, offset = np.array(match.gain), np.array(match.offset)
            fitted = _as_limits(gain * self.fitted.low + offset, gain * self.fitted.high + offset)
            intensities = self.intensities.mapped(match.gain, match.offset, pixels.dtype)
        return replace(self, fitted=fitted, intensities=intensities), match.warning

    def as_channels(self, image: Array, source: str = "image") -> Array:
        """The image as "y x c" with the model's number of channels; gray and RGB are turned into one another.

        Raises
        ------
        ImageError
            If the number of channels is not the model's.
        """
        image = image[..., None] if image.ndim == 2 else image
        c = image.shape[-1]
        if c == self.channels:
            return image
        if c == 1 and self.channels == 3:
            return np.broadcast_to(image, (*image.shape[:2], 3))
        if c == 3 and self.channels == 1 and _is_gray(image):
            return image[..., :1]
        raise ImageError(
            f"{source}: the image has {c} channel(s), the model was made for {self.channels}; "
            "give the channels it was distilled from"
        )

    def stack_channels(self, planes: Array) -> Array:
        """Planes "n y x" or "n y x c" as `as_channels` gives each of them, "n y x c"."""
        if planes.ndim == 3 and self.channels == 1:
            return planes[..., None]
        return np.stack([self.as_channels(plane) for plane in planes])

    def to_tensor(self, crop: Array, limits: Limits) -> Float[Tensor, "3 h w"]:
        """Normalize a crop "y x c" (from `as_channels`) to three channels in [0, 1]; no zoom yet.

        Those of a gray image are one in memory.
        """
        exact = np.float32 if crop.dtype.itemsize <= 2 else np.float64  # small changes on a large offset survive
        scaled: Array = crop.astype(exact)
        low: Array = np.array(limits.low, exact)
        scaled -= low
        scaled /= np.array(limits.high, exact) - low
        scaled = np.clip(scaled, 0, 1, out=scaled).astype(np.float32, copy=False)
        return self._mixed(torch.from_numpy(scaled).movedim(-1, 0).contiguous())

    def to_tensors(self, crops: Shaped[Tensor, "n h w c"], limits: Sequence[Limits]) -> Float[Tensor, "n 3 h w"]:
        """`to_tensor` of several crops on the device where they are; equal to it but for rounding."""
        exact = torch.float32 if crops.dtype.itemsize <= 2 else torch.float64
        low = torch.tensor([pair.low for pair in limits], dtype=exact, device=crops.device)[:, None, None]
        high = torch.tensor([pair.high for pair in limits], dtype=exact, device=crops.device)[:, None, None]
        scaled = ((crops.to(exact) - low) / (high - low)).clamp_(0, 1).float()
        return self._mixed(scaled.movedim(-1, -3)).contiguous()

    def _mixed(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n 3 h w"]:
        """The channels of the image as those of the network."""
        if self.channels == 1:
            return x.expand(*x.shape[:-3], 3, -1, -1)
        mix = torch.tensor(self.mix, dtype=torch.float32, device=x.device)
        lowest = mix.clamp_max(0).sum(1)[:, None, None]  # of a component with negative weights
        return (torch.einsum("oc,...chw->...ohw", mix, x) - lowest).clamp_(0, 1)

    def to_json(self) -> dict[str, Any]:
        """Fields by name, as the card of a model stores them; those of an older student are as they were."""
        values = asdict(self)
        if self.intensities is None:
            del values["intensities"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Preprocess:
        """Restore the preprocessing from `to_json`.

        Raises
        ------
        KeyError, TypeError, ValueError
            If a field is missing or cannot be converted.
        """
        fitted = Limits(tuple(values["fitted"]["low"]), tuple(values["fitted"]["high"]))
        mix = tuple(tuple(float(w) for w in row) for row in values["mix"])
        return cls(
            int(values["channels"]),
            mix,
            str(values["scope"]),
            fitted,
            bool(values["together"]),
            str(values["zoom"]),
            Intensities.from_json(values["intensities"]) if "intensities" in values else None,
        )


def fit_preprocess(
    images: Sequence[Array],
    *,
    scope: str = "image",
    zoom: Fraction | str | float = 1,
    objects: Sequence[npt.NDArray[np.bool_]] | None = None,
) -> Preprocess:
    """Fit channels and intensity on the support images.

    One channel is repeated, two become (first, second, mean), three are taken as they are, more are reduced
    to their three principal components over the support set.

    Parameters
    ----------
    images : sequence of array, shape (y, x) or (y, x, c)
    scope : {"image", "volume"}
        As for `Preprocess`.
    zoom : Fraction, str or float
        One of `ZOOMS`.
    objects : sequence of bool array, shape (y, x), optional
        Pixels that are annotated as objects: however rare and bright, they are no dust.

    Raises
    ------
    ImageError
        If the images differ in channels (gray and RGB may be mixed).
    SettingsError
        If the scope or the zoom is not on offer.
    """
    if scope not in ("image", "volume"):
        raise SettingsError(f"intensity scope {scope!r} is unknown; choose image or volume")
    counts = {1 if image.ndim == 2 else image.shape[-1] for image in images}
    if len(counts - {1, 3}) > 1 or (counts - {1, 3} and len(counts) > 1):
        raise ImageError(f"support images have different numbers of channels ({sorted(counts)}); give one kind")
    channels = max(counts)
    together = channels == 3
    probe = Preprocess(channels, _mix(channels, None), "image", Limits((), ()), together, str(parse_zoom(zoom)))
    prepared = [probe.as_channels(image) for image in images]
    count = SAMPLE // len(images)
    pixels = [sample_pixels(image, count) for image in prepared]
    if objects is None:
        masks = [np.zeros(len(part), bool) for part in pixels]
    else:
        masks = [sample_pixels(mask[..., None], count)[:, 0] for mask in objects]
    samples = np.concatenate([_without_artifacts(*part, together) for part in zip(pixels, masks, strict=True)])
    fitted = percentile_limits(samples, together=together)
    intensities = intensities_of(samples, np.result_type(*{image.dtype for image in images}))
    return Preprocess(channels, _mix(channels, (samples, fitted)), scope, fitted, together, probe.zoom, intensities)


def resize(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
    """Bilinear with half-pixel centers; smoothed first where it shrinks."""
    if tuple(x.shape[-2:]) == size:
        return x
    shrinks = size[0] < x.shape[-2] or size[1] < x.shape[-1]
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=shrinks)


def percentile_limits(image: Array, *, together: bool, support: Intensities | None = None) -> Limits:
    """Percentiles 0.5 and 99.5 of each channel ("... c"), or of all at once; never equal.

    With the intensities of the support, artifacts are left out (`kept_range`).

    Examples
    --------
    >>> percentile_limits(np.arange(1001)[:, None], together=True)
    Limits(low=(5.0,), high=(995.0,))
    """
    pixels = sample_pixels(image, SAMPLE)
    if together:
        low, high = _low_and_high(pixels.reshape(-1), None if support is None else support.pooled())
        return _as_limits(*np.full((2, pixels.shape[-1]), [[low], [high]]))
    learned = [None] * pixels.shape[-1] if support is None else support.quantiles
    # a gray image may have three channels, of which the first is read
    parts = [_low_and_high(pixels[:, c], quantiles) for c, quantiles in enumerate(learned)]
    return _as_limits(*np.transpose(parts))


def _low_and_high(values: Shaped[Array, " n"], learned: Sequence[float] | None) -> tuple[float, float]:
    """`percentile_limits` of one channel, whose quantiles in the support are ``learned``."""
    lowest, highest = (-np.inf, np.inf) if learned is None else kept_range(values, learned, None)
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:
        levels, counts = _histogram(values)
        is_kept = (levels >= lowest) & (levels <= highest)
        levels, counts = levels[is_kept], counts[is_kept]
        low, high = (_percentile_of(levels, counts, percent) for percent in PERCENTILES)
        floor, peak = levels[0], levels[-1]
    else:
        pixels = values.astype(np.float64)
        if learned is not None:
            pixels = pixels[(pixels >= lowest) & (pixels <= highest)]
        low, high = np.percentile(pixels, PERCENTILES)
        floor, peak = pixels.min(), pixels.max()
    if high - low <= 1e-3 * (peak - floor):
        # sparse bright objects can be rarer than the percentile leaves room for: fall back to the extremes
        low, high = floor, peak
    return float(low), float(high if high > low else low + max(1.0, abs(low)))


def _histogram(values: Shaped[Array, " n"]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The values that occur, ascending, and how often each does; of integers that span little."""
    least = int(values.min())
    counts = np.bincount(np.subtract(values, least, dtype=np.intp))
    occur = np.flatnonzero(counts)
    return (occur + least).astype(np.float64), counts[occur]


def _percentile_of(levels: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], percent: float) -> float:
    """`numpy.percentile` of a histogram, to the last bit; ten times as fast as of the pixels."""
    ends = counts.cumsum()
    place = (ends[-1] - 1) * (percent / 100)
    before = int(place)
    a, b = levels[np.searchsorted(ends, [before, min(before + 1, ends[-1] - 1)], side="right")]
    part = place - before
    return float(a + (b - a) * part if part < 0.5 else b - (b - a) * (1 - part))


def _as_limits(low: Array, high: Array) -> Limits:
    return Limits(tuple(float(v) for v in low), tuple(float(v) for v in high))


def _without_artifacts(pixels: Array, objects: npt.NDArray[np.bool_], together: bool) -> Array:
    """Pixels "n c" without those that `kept_range` leaves out; all of them where that would leave none."""
    values = pixels.astype(np.float64)
    if together:
        ranges = [kept_range(values.ravel(), None, np.repeat(objects, values.shape[1]))] * values.shape[1]
    else:
        ranges = [kept_range(channel, None, objects) for channel in values.T]
    low, high = np.array(ranges).T
    is_kept = np.logical_and(values >= low, values <= high).all(axis=1)
    return pixels[is_kept] if is_kept.any() else pixels


def sample_pixels(image: Array, count: int) -> Array:
    """Pixels "n c" on a regular grid, at most about ``count``."""
    if image.ndim == 3:
        step = sample_step((image.shape[0], image.shape[1]), count)
        image = image[::step, ::step].reshape(-1, image.shape[-1])
    return image


def _is_gray(image: Array) -> bool:
    return image.ndim == 3 and image.shape[-1] == 3 and bool((image[..., :1] == image).all())


def _mix(channels: int, data: tuple[Array, Limits] | None) -> tuple[tuple[float, ...], ...]:
    if channels == 1:
        return ((1.0,),) * 3
    if channels == 2:
        return ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
    if channels == 3 or data is None:
        return tuple(tuple(float(i == j) for j in range(channels)) for i in range(3))
    samples, limits = data
    x = np.clip((samples - np.array(limits.low)) / (np.array(limits.high) - np.array(limits.low)), 0, 1)
    _, vectors = np.linalg.eigh(np.cov(x.T))
    rows = []
    for vector in vectors.T[::-1][:3]:
        vector = vector * np.sign(vector.sum() or 1.0)
        rows.append(tuple(float(v) for v in vector / np.abs(vector).sum()))
    return tuple(rows)
