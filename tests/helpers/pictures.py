"""Generated pictures that are quick to learn."""

from __future__ import annotations

import numpy as np

from distillfss_core.types import AnnotatedSlice


def blobs(seed: int, size: int = 96, classes: int = 1) -> AnnotatedSlice:
    """A noisy picture with bright discs (class 1) and, for two classes, dark ones (class 2)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    image, labels = np.full((size, size), 100.0), np.zeros((size, size), np.uint8)
    for number in range(8):
        value = 1 + number % classes
        center, radius = rng.uniform(8, size - 8, 2), rng.uniform(5, 9)
        inside = (y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2
        image[inside], labels[inside] = (180 if value == 1 else 30), value
    image += rng.normal(0, 8, image.shape)
    return AnnotatedSlice(image.clip(0, 255).astype(np.uint8), labels, f"blobs {seed}")


def soft_balls(seed: int = 0, balls: int = 18, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A uint16 stack (6, size, size) of bright balls (near 2200) on a dark ground (near 200), and its truth, uint8."""
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[:6, :size, :size]
    labels = np.zeros(z.shape, np.uint8)
    for _ in range(balls):
        center, radius = rng.uniform([0, 8, 8], [6, size - 8, size - 8]), rng.uniform(6, 11)
        labels[((z - center[0]) * 2) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2 < radius**2] = 1
    light = labels.astype(float)
    for axis in (1, 2):
        light = (np.roll(light, 1, axis) + 2 * light + np.roll(light, -1, axis)) / 4
    image = light * 2000 + 200 + rng.normal(0, 60, light.shape)
    return image.clip(0, 65535).astype(np.uint16), labels
