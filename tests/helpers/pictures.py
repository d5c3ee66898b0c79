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
