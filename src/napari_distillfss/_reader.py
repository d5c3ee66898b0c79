"""File > Open: student files as images of their support, and OME-Zarr where napari has no reader for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import distillfss_core as core
from napari_distillfss._layers import LEAD_NAMES, layer_of_file, look_of_channel
from napari_distillfss._waiting import wait_for

LayerTuple = tuple[Any, dict[str, Any], str]


def get_reader(path: str | list[str]) -> Callable[[str | list[str]], list[LayerTuple]] | None:
    """Reader function for a path, or None if this plugin does not read it."""
    if isinstance(path, list):
        return None
    if Path(path).suffix == ".safetensors":
        return read_student
    return read_ome_zarr if ".zarr" in Path(path).suffixes else None


def read_student(path: str | list[str]) -> list[LayerTuple]:
    """Images of the slices that a student was trained on, with its card as metadata."""
    card, pictures = core.read_card(str(path)), core.read_thumbnails(str(path))
    if pictures is None:
        raise core.ModelFileError(
            f"{path}: holds no pictures of its training slices; load it in the dock, section Model"
        )
    options = {"metadata": {"distillfss_card": card, "path": str(path)}}
    name = Path(str(path)).stem
    labels = pictures.labels.copy()
    labels[labels == core.IGNORE] = 0
    return [
        (pictures.images, {"name": f"{name}: training slices", "colormap": "gray", **options}, "image"),
        (labels, {"name": f"{name}: labels", **options}, "labels"),
    ]


def read_ome_zarr(path: str | list[str]) -> list[LayerTuple]:
    """Open an OME-Zarr image lazily, one layer for each channel, or its labels."""
    return wait_for(lambda: _open_ome_zarr(str(path)), f"Opening of {Path(str(path)).name}")


def _open_ome_zarr(path: str) -> list[LayerTuple]:
    counts = core.count_choices(path)
    first: dict[str, Any] = {LEAD_NAMES[letter]: 0 for letter in counts}
    if core.open_volume(path, **first).is_label_image:
        levels, options = layer_of_file(path)
        options.pop("rgb")
        return [(levels if options["multiscale"] else levels[0], options, "labels")]
    channels = core.read_channels(path)
    made = []
    for number in range(len(channels)) or (None,):
        levels, options = layer_of_file(path, channel=number)
        if number is not None:
            options |= look_of_channel(channels, number, options["name"])
        made.append((levels if options["multiscale"] else levels[0], options, "image"))
    return made
