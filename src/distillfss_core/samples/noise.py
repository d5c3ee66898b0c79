"""Building blocks of the generated stacks: smooth noise, blur, and numbers of objects."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint16]


def texture(rng: np.random.Generator, shape: tuple[int, int, int], sigma: float) -> F32:
    """Smooth noise (z y x) of mean 0 and deviation 1 with grains of ``sigma`` pixels, alike in neighboring planes."""
    noise = along_z(blur(rng.standard_normal(shape, np.float32), sigma), (0.25, 0.5, 0.25))
    noise -= noise.mean()
    return (noise / max(float(noise.std()), 1e-6)).astype(np.float32)


def blur(stack: F32, sigma: float) -> F32:
    """Gaussian blur of each plane, by FFT with mirrored edges."""
    pad = min(int(3 * sigma) + 1, stack.shape[-1] - 1)
    padded = np.pad(stack, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
    height, width = padded.shape[1:]
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    transfer = np.exp(-2 * (np.pi * sigma) ** 2 * (fy * fy + fx * fx)).astype(np.float32)
    out = np.empty_like(stack)
    for i, plane in enumerate(padded):  # plane by plane: little memory at any depth
        out[i] = np.fft.irfft2(np.fft.rfft2(plane) * transfer, s=(height, width))[pad:-pad, pad:-pad]
    return out


def along_z(stack: F32, kernel: tuple[float, ...]) -> F32:
    """Weighted mean over neighboring planes; beyond the ends the last plane repeats."""
    half = len(kernel) // 2
    padded = np.pad(stack, ((half, half), (0, 0), (0, 0)), mode="edge")
    out = np.zeros_like(stack)
    for i, weight in enumerate(kernel):
        out += np.float32(weight) * padded[i : i + len(stack)]
    return out


def without_slivers(labels: Labels, smallest: int) -> Labels:
    """Labels without the cuts of fewer than ``smallest`` pixels: a person would not outline the pole of an object."""
    out = np.empty_like(labels)
    for i, plane in enumerate(labels):
        out[i] = np.where(np.bincount(plane.ravel())[plane] < smallest, 0, plane)
    return out


def renumber(labels: Labels) -> Labels:
    """Instance numbers without gaps: objects that others covered wholly drop out."""
    _, index = np.unique(labels, return_inverse=True)
    index = index.reshape(labels.shape)
    return (index if (labels == 0).any() else index + 1).astype(np.uint16)


def drifting(rng: np.random.Generator, shape: tuple[int, int, int], sigma: float, pace: float) -> F32:
    """Smooth noise (z y x) of mean 0 and deviation 1 that changes a little from plane to plane.

    Parameters
    ----------
    pace : float
        Radians a plane: after a quarter turn nothing is left of a plane's own noise.
    """
    first, second = texture(rng, (1, *shape[1:]), sigma)[0], texture(rng, (1, *shape[1:]), sigma)[0]
    turn = (pace * np.arange(shape[0], dtype=np.float32))[:, None, None]
    result: F32 = (np.cos(turn) * first + np.sin(turn) * second).astype(np.float32)
    return result
