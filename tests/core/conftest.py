"""Small real trainings that several tests look at."""

from __future__ import annotations

import numpy as np
import pytest

from distillfss_core.config import DistillSettings
from distillfss_core.sample import generate_sample
from distillfss_core.support import SupportSet
from distillfss_core.types import LabelledSlice

TINY = DistillSettings(steps=4, zoom="1", crop=64, queries=2, shots=2, views=8, device="cpu")


def blobs(seed: int, size: int = 96, classes: int = 1) -> LabelledSlice:
    """A noisy picture with bright discs (class 1) and, for two classes, dark ones (class 2)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    image, labels = np.full((size, size), 100.0), np.zeros((size, size), np.uint8)
    for number in range(8):
        value = 1 + number % classes
        centre, radius = rng.uniform(8, size - 8, 2), rng.uniform(5, 9)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        image[inside], labels[inside] = (180 if value == 1 else 30), value
    image += rng.normal(0, 8, image.shape)
    return LabelledSlice(image.clip(0, 255).astype(np.uint8), labels, f"blobs {seed}")


@pytest.fixture(scope="session")
def tiny() -> DistillSettings:
    """Settings of a training that takes a second."""
    return TINY


@pytest.fixture(scope="session")
def support() -> SupportSet:
    """Three slices of blobs, one class."""
    return SupportSet(tuple(blobs(i) for i in range(3)), ("blob",))


@pytest.fixture(scope="session")
def student(support: SupportSet, tiny: DistillSettings):
    """A student after four steps."""
    from distillfss_core.training import distill

    return distill(support, tiny)


@pytest.fixture(scope="session")
def nuclei():
    """The generated nuclei stack, small."""
    return generate_sample(planes=6, size=448)
