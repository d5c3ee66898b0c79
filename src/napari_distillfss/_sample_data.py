"""File > Open Sample: generated stacks with true labels."""

from __future__ import annotations

from typing import Any

from distillfss_core.samples import iter_generate_sample
from napari_distillfss._waiting import wait_for_run

LayerTuple = tuple[Any, dict[str, Any], str]

_PIXEL = 0.25  # micrometers, of a sample that has none
_LUNG_WINDOW = (-1000.0, 400.0)  # Hounsfield units in which air, vessels and soft tissue are told apart


def make_nuclei() -> list[LayerTuple]:
    """Nuclei in fluorescence, uint16; labels number the nuclei."""
    return _layers("nuclei")


def make_mitochondria() -> list[LayerTuple]:
    """Mitochondria in electron microscopy, uint8; labels number the mitochondria."""
    return _layers("mitochondria")


def make_nodules() -> list[LayerTuple]:
    """Nodules in lung CT, int16 Hounsfield units; labels number the nodules."""
    return _layers("nodules", contrast_limits=_LUNG_WINDOW)


def _layers(kind: str, **options: Any) -> list[LayerTuple]:
    """An image layer and a labels layer (uint16, 0 is background), both (z, y, x), at the same position."""
    sample = wait_for_run(iter_generate_sample(kind), f"Generation of {kind}")
    name, is_known = kind.capitalize(), sample.unit != "pixel"
    scale = sample.scale if is_known else [_PIXEL * s for s in sample.scale]
    unit = sample.unit if is_known else "micrometer"
    place = {"scale": scale, "units": (unit,) * 3, "axis_labels": ("z", "y", "x")}
    return [
        (sample.image, {"name": name, "colormap": "gray", **options, **place}, "image"),
        (sample.labels, {"name": f"{name} (ground truth)", "visible": False, **place}, "labels"),
    ]
