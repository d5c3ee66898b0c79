"""File > Save: an image and its painted labels as two folders of planes, for `distillfss distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import distillfss_core as core
from napari_distillfss._annotations import write_planes


def write_slices(path: str, layers: list[tuple[Any, dict[str, Any], str]]) -> list[str]:
    """Write images/plane_0012.tif and labels/plane_0012.tif of every labeled plane.

    Raises
    ------
    core.DistillFSSError
        If the layers are of different sizes, or nothing is labeled.
    """
    image, labels = (next(data for data, _, kind in layers if kind == wanted) for wanted in ("image", "labels"))
    if tuple(image.shape[: labels.ndim]) != tuple(labels.shape) or labels.ndim not in (2, 3):
        raise core.ImageError(
            f"the image is {image.shape}, its labels {labels.shape}; save layers of one size, 2-D or 3-D"
        )
    if labels.ndim == 2:
        image, labels = image[None], np.asarray(labels)[None]
    painted = {z: np.asarray(labels[z]) for z in range(len(labels)) if np.asarray(labels[z]).any()}
    if not painted:
        raise core.SupportSetError("nothing is labeled; paint at least one plane before saving")
    return write_planes(Path(path), {f"plane {z}": (np.asarray(image[z]), plane) for z, plane in painted.items()})
