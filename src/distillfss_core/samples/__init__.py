"""Generated stacks with their truth: nuclei in fluorescence, mitochondria in electron microscopy, nodules in lung CT.

Nothing is read from disk, and no image of anybody is in them.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distillfss_core.errors import SettingsError
from distillfss_core.samples.mitochondria import PIXEL_NM, PLANE_NM, draw_mitochondria
from distillfss_core.samples.nodules import PLANE_MM, draw_nodules, pixel_size
from distillfss_core.samples.nuclei import Z_STEP, draw_nuclei
from distillfss_core.settings import SAMPLES
from distillfss_core.types import Run, as_run, finish

__all__ = ["Sample", "SampleStep", "generate_sample", "iter_generate_sample"]


@dataclass(frozen=True, eq=False)
class Sample:
    """A generated stack and its truth.

    Parameters
    ----------
    image : array, shape (z, y, x)
        Nuclei: uint16, camera counts. Mitochondria: uint8, gray values. Nodules: int16, Hounsfield units.
    labels : uint16 array, shape (z, y, x)
        0 background, otherwise the number of the object (nucleus, mitochondrion, nodule) the voxel belongs to.
    name : str
        Kind and seed, for messages and layer names.
    scale : (z, y, x)
        Size of a voxel, in ``unit``.
    unit : str
        "pixel", "nanometer" or "millimeter".
    object_name : str
        What is numbered: "nucleus", "mitochondrion" or "nodule".
    """

    image: npt.NDArray[Any]
    labels: npt.NDArray[np.uint16]
    name: str
    scale: tuple[float, float, float]
    unit: str
    object_name: str


@dataclass(frozen=True)
class SampleStep:
    """A step of the generation: ``index`` percent (0..100) of ``total`` (100) are done."""

    index: int
    total: int = 100


def generate_sample(kind: str = "nuclei", planes: int = 12, size: int = 384, seed: int = 0) -> Sample:
    """Generate a stack with instance labels; the same arguments give the same bytes.

    (On one machine with one numpy; elsewhere the last bit of a float may turn a photon here and there.)

    Parameters
    ----------
    kind : str
        What is in it: "nuclei" (fluorescence), "mitochondria" (serial sections in the electron microscope) or
        "nodules" (lung CT).
    planes : int
        Number of planes, 1..64.
    size : int
        Height and width of a plane in pixels, 64..2048.
    seed : int
        Which of the many, not negative.

    Returns
    -------
    Sample
        ``image`` and ``labels`` of shape (planes, size, size).

    Raises
    ------
    SettingsError
        If the kind is unknown or a number is outside its limits.

    Examples
    --------
    >>> sample = generate_sample("nuclei", planes=2, size=64)
    >>> sample.image.shape, sample.labels.dtype
    ((2, 64, 64), dtype('uint16'))
    """
    return finish(iter_generate_sample(kind, planes, size, seed))


def iter_generate_sample(
    kind: str = "nuclei", planes: int = 12, size: int = 384, seed: int = 0
) -> Run[SampleStep, Sample]:
    """`generate_sample` as a `Run`: a step for each object or field that was drawn, in all planes at once.

    Parameters
    ----------
    kind, planes, size, seed
        As for `generate_sample`.

    Returns
    -------
    Run of SampleStep
        Its result is the `Sample`, at the end.

    Raises
    ------
    SettingsError
        If the kind is unknown or a number is outside its limits.

    Examples
    --------
    >>> run = iter_generate_sample("nuclei", planes=2, size=64)
    >>> [step.index for step in run][-1]
    100
    >>> run.result().object_name
    'nucleus'
    """
    if kind not in SAMPLES:
        raise SettingsError(f"there is no sample {kind!r}; choose one of: {', '.join(SAMPLES)}")
    for name, value, low, high in (("planes", planes, 1, 64), ("size", size, 64, 2048), ("seed", seed, 0, 2**32 - 1)):
        if not low <= value <= high:
            raise SettingsError(f"{name} is {value}; give a number from {low} to {high}")
    return _generate(kind, planes, size, seed)


@as_run
def _generate(kind: str, planes: int, size: int, seed: int) -> Generator[SampleStep, None, Sample]:
    shape, name = (planes, size, size), f"generated {kind} {seed}"
    if kind == "nuclei":
        image, labels = yield from _in_percent(draw_nuclei(np.random.default_rng([seed, planes, size]), shape))
        return Sample(image, labels, name, (Z_STEP, 1.0, 1.0), "pixel", "nucleus")
    rng = np.random.default_rng([seed, planes, size, SAMPLES.index(kind)])
    if kind == "mitochondria":
        image, labels = yield from _in_percent(draw_mitochondria(rng, shape))
        return Sample(image, labels, name, (PLANE_NM, PIXEL_NM, PIXEL_NM), "nanometer", "mitochondrion")
    image, labels = yield from _in_percent(draw_nodules(rng, shape))
    pixel = pixel_size(size)
    return Sample(image, labels, name, (PLANE_MM, pixel, pixel), "millimeter", "nodule")


def _in_percent(
    drawing: Generator[float, None, tuple[npt.NDArray[Any], npt.NDArray[np.uint16]]],
) -> Generator[SampleStep, None, tuple[npt.NDArray[Any], npt.NDArray[np.uint16]]]:
    """Steps of a drawing that yields which share of it is done."""
    while True:
        try:
            yield SampleStep(round(100 * next(drawing)))
        except StopIteration as end:
            drawn: tuple[npt.NDArray[Any], npt.NDArray[np.uint16]] = end.value
            yield SampleStep(100)
            return drawn
