"""Simulated optics: the light and the dyes of a task, and the errors of one exposure."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy import ndimage

from distillfss_core.metatraining.task import F32

CB = np.array([0.0, -0.344, 1.772], np.float32)
CR = np.array([1.402, -0.714, 0.0], np.float32)

MODES = ("gray", "histology", "fluorescence", "color")


@dataclass(frozen=True)
class Light:
    """Polarity and colors of a task: all its images share them, up to small changes.

    Parameters
    ----------
    inverted : bool
        Whether dark and bright are exchanged.
    gamma : float
        Exponent on gray values.
    low, high : float
        What black and white are shown as, 0..1.
    dyes : tuple of two (float, float)
        Chroma (Cb, Cr) of hue 0 and of hue 1; all zero gives a gray picture. Chroma carries no luma, so objects that
        differ by hue alone have the same gray.
    glows : bool
        Whether color grows with brightness (fluorescence on black) instead of fading towards black and white.
    """

    inverted: bool = False
    gamma: float = 1.0
    low: float = 0.0
    high: float = 1.0
    dyes: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0))
    glows: bool = False

    def varied(self, rng: np.random.Generator, *, flip: bool = False) -> Light:
        """This light as it is at another exposure; ``flip`` exchanges dark and bright."""
        low = float(np.clip(self.low + rng.normal(0, 0.03), 0, 0.3))
        high = float(np.clip(self.high + rng.normal(0, 0.06), low + 0.45, 1.1))
        tone = rng.normal(1, 0.12), rng.normal(0, 0.015)
        first, second = ((cb * tone[0] + tone[1], cr * tone[0] - tone[1]) for cb, cr in self.dyes)
        return replace(
            self,
            inverted=self.inverted != flip,
            gamma=self.gamma * float(np.exp(rng.normal(0, 0.12))),
            low=low,
            high=high,
            dyes=(first, second) if any(map(any, self.dyes)) else self.dyes,
        )

    def expose(self, value: F32, hue: F32) -> F32:
        """The picture (y x 3) in [0, 1] of gray values (y x) in [0, 1] and hues (y x) in [0, 1]."""
        gray = np.clip(value, 0, 1)
        if self.inverted:
            gray = 1 - gray
        gray = np.float32(self.low) + np.float32(self.high - self.low) * gray ** np.float32(self.gamma)
        np.clip(gray, 0, 1, out=gray)
        if not any(map(any, self.dyes)):
            return np.repeat(gray[..., None], 3, axis=-1)
        first, second = (cb * CB + cr * CR for cb, cr in self.dyes)
        depth = gray if self.glows else 4 * gray * (1 - gray)
        picture = np.empty((*gray.shape, 3), np.float32)
        for c in range(3):
            picture[..., c] = gray + depth * (first[c] + hue * (second[c] - first[c]))
        return np.clip(picture, 0, 1, out=picture)


def draw_light(rng: np.random.Generator, mode: str = "any") -> Light:
    """Draw the light of a task.

    Parameters
    ----------
    rng : numpy.random.Generator
        Where every choice comes from.
    mode : str
        "gray", "histology" (dyes on a bright field), "fluorescence" (bright on dark, gray or glowing), "color"
        (two dyes whose hues differ clearly), or "any" of them.

    Returns
    -------
    Light
        Polarity and colors.
    """
    if mode == "any":
        mode = str(rng.choice(MODES, p=(0.55, 0.15, 0.1, 0.2)))
    gamma = float(np.exp(rng.normal(0, 0.2)))
    low, high = rng.uniform(0, 0.15), rng.uniform(0.8, 1.05)
    if mode == "gray":
        return Light(bool(rng.random() < 0.4), gamma, low, high)
    if mode == "histology":
        purple = 0.17 * rng.uniform(0.7, 1.3), 0.08 * rng.uniform(0.4, 1.6)
        other = rng.random()
        if other < 0.65:  # eosin
            second = 0.02 * rng.normal(), 0.17 * rng.uniform(0.7, 1.3)
        elif other < 0.85:  # DAB brown
            second = -0.16 * rng.uniform(0.7, 1.2), 0.1 * rng.uniform(0.6, 1.4)
        else:  # fast green
            second = -0.02 * rng.uniform(0, 1), -0.14 * rng.uniform(0.7, 1.2)
        return Light(False, gamma, low, min(high, 1.0), (purple, second))
    angle = rng.uniform(0, 2 * np.pi)
    other = angle + rng.choice((-1, 1)) * rng.uniform(0.6, 1.0) * np.pi
    if mode == "fluorescence":
        if rng.random() < 0.6:
            return Light(bool(rng.random() < 0.08), gamma, rng.uniform(0, 0.06), high)
        deep = rng.uniform(0.3, 0.55)
        dyes = _chroma(angle, deep), _chroma(other, deep)
        return Light(False, gamma, rng.uniform(0, 0.04), high, dyes, glows=True)
    deep = rng.uniform(0.09, 0.2)
    return Light(bool(rng.random() < 0.3), gamma, low, high, (_chroma(angle, deep), _chroma(other, deep)))


def _chroma(angle: float, depth: float) -> tuple[float, float]:
    return float(depth * np.cos(angle)), float(depth * np.sin(angle))


def degrade(image: F32, rng: np.random.Generator, *, strength: float = 1.0) -> F32:
    """Take a picture through a random choice of the errors that microscopes, cameras and files have.

    A gray picture (three equal channels) stays gray.

    Parameters
    ----------
    image : float32 array, shape (y, x, 3)
        Values in [0, 1].
    rng : numpy.random.Generator
        Where every choice comes from.
    strength : float
        0 changes nothing, 1 is usual; how strong the errors are and how often they occur.

    Returns
    -------
    float32 array, shape (y, x, 3)
        Values in [0, 1].
    """
    if strength <= 0:
        return image.copy()
    gray = bool((image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all())
    out = image[..., :1].copy() if gray else image.copy()
    for error, often in READ_ERRORS:
        if rng.random() < often * min(1.0, strength**0.5):
            out = error(out, rng, strength)
            np.clip(out, 0, 1, out=out)
    return np.repeat(out, 3, axis=-1) if gray else out


def _blur(image: F32, rng: np.random.Generator, strength: float) -> F32:
    sigma = strength * rng.uniform(0.4, 1.3) * image.shape[0] / 256
    result: F32 = ndimage.gaussian_filter(image, (sigma, sigma, 0), truncate=3.0)
    return result


def _uneven(image: F32, rng: np.random.Generator, strength: float) -> F32:
    """Light that changes slowly over the field."""
    few = rng.normal(1, 0.14 * strength, (4, 4)).astype(np.float32)
    return image * _enlarged(few, image.shape[:2])[..., None]


def _vignette(image: F32, rng: np.random.Generator, strength: float) -> F32:
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in image.shape[:2])
    cy, cx = rng.uniform(-0.3, 0.3, 2).astype(np.float32)
    falloff = np.float32(strength * rng.uniform(0.1, 0.35))
    result: F32 = image * np.exp(-falloff * ((y[:, None] - cy) ** 2 + (x[None] - cx) ** 2))[..., None]
    return result


def _gamma(image: F32, rng: np.random.Generator, strength: float) -> F32:
    return image ** np.float32(np.exp(rng.normal(0, 0.25 * strength)))


def _contrast(image: F32, rng: np.random.Generator, strength: float) -> F32:
    """Less range, or a little clipping at one end."""
    gain = np.float32(np.exp(rng.normal(-0.1, 0.2) * strength))
    middle = np.float32(image.mean())
    return (image - middle) * gain + middle + np.float32(rng.normal(0, 0.05) * strength)


def _cast(image: F32, rng: np.random.Generator, strength: float) -> F32:
    if image.shape[-1] == 1:
        return image
    return image * (1 + np.float32(0.07 * strength) * rng.standard_normal(3, np.float32))


def _stripes(image: F32, rng: np.random.Generator, strength: float) -> F32:
    """Rows or columns read out a little apart (sCMOS, scanning), or the curtains of ion milling."""
    along = int(rng.integers(2))
    lines = np.float32(0.025 * strength) * rng.standard_normal((image.shape[along],), np.float32)
    if rng.random() < 0.5:
        lines = np.float32(1.8) * ndimage.uniform_filter1d(lines, 3)
    return image + (lines[:, None, None] if along == 0 else lines[None, :, None])


def _noise(image: F32, rng: np.random.Generator, strength: float) -> F32:
    """Shot noise, which grows with the square root of light, and read noise; sometimes coarser than a pixel."""
    shot, read = (np.float32(strength * s * abs(rng.normal())) for s in (0.07, 0.02))
    height, width, channels = image.shape
    channels = channels if rng.random() < 0.4 else 1  # most cameras and files hold less noise in color than in gray
    if rng.random() < 0.25:
        half = rng.standard_normal(((height + 1) // 2, (width + 1) // 2, channels), np.float32)
        noise = np.stack([_enlarged(half[..., c], (height, width)) for c in range(channels)], -1)
    else:
        noise = rng.standard_normal((height, width, channels), np.float32)
    result: F32 = image + noise * np.sqrt(shot * shot * image + read * read)
    return result


def _jpeg(image: F32, rng: np.random.Generator, strength: float) -> F32:
    quality = int(np.clip(rng.uniform(45, 95) - 15 * (strength - 1), 20, 95))
    pixels = np.rint(image * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "JPEG", quality=quality)
    decoded = np.asarray(Image.open(buffer), np.float32) / np.float32(255)
    return decoded.reshape(image.shape)


def _enlarged(few: F32, shape: tuple[int, int]) -> F32:
    return np.asarray(Image.fromarray(few).resize(shape[::-1], Image.Resampling.BICUBIC), np.float32)


READ_ERRORS: tuple[tuple[Callable[[F32, np.random.Generator, float], F32], float], ...] = (
    (_uneven, 0.35),
    (_vignette, 0.2),
    (_cast, 0.3),
    (_blur, 0.5),
    (_gamma, 0.3),
    (_contrast, 0.4),
    (_noise, 0.75),
    (_stripes, 0.07),
    (_jpeg, 0.2),
)
"""Each error and how often it occurs, in the order in which light meets them."""
