"""File > Open Sample: the generated stack of nuclei with its truth."""

from __future__ import annotations

from typing import Any

from distillfss_core.sample import Z_STEP, generate_sample

LayerTuple = tuple[Any, dict[str, Any], str]


def make_nuclei() -> list[LayerTuple]:
    """An image layer and a labels layer, both (z, y, x) uint16; labels number the nuclei, 0 is background."""
    sample = generate_sample("nuclei")
    place = {"scale": (Z_STEP, 1.0, 1.0)}
    return [
        (sample.image, {"name": sample.name, "colormap": "gray", **place}, "image"),
        (sample.labels, {"name": f"{sample.name}, truth", **place}, "labels"),
    ]
