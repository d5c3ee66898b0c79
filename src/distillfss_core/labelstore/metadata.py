"""The OME-Zarr 0.5 metadata of labels."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr
import zarr.codecs
import zarr.errors

from distillfss_core.errors import OutputError
from distillfss_core.io.images import DECODER_ERRORS
from distillfss_core.labelstore.layout import Layout
from distillfss_core.types import CLASS_COLORS

OME_VERSION = "0.5"
_CONFIG: Any = {"write_empty_chunks": True}
"""To find an empty chunk takes zarr longer than to write it: 6 ms for a plane of 2048 x 2048."""


@dataclass(frozen=True)
class Description:
    """What is written beside the labels for others to read.

    Parameters
    ----------
    name : str
    scale, origin : (z, y, x)
        As of a `Volume`.
    unit : str or None
    classes : names of the labels 1, 2, ...; none for instances
    provenance : mapping
        JSON-able: the model, the volume, the program.
    image : str or None
        Path from the labels to their image.
    """

    name: str
    scale: tuple[float | None, float | None, float | None]
    origin: tuple[float, float, float]
    unit: str | None
    classes: tuple[str, ...]
    provenance: Mapping[str, Any]
    image: str | None = None


def check_place(path: Path) -> None:
    """Labels are put beside an image, or under its labels; never onto it."""
    if path.is_file():
        raise OutputError(f"{path}: is a file; labels are a folder, give another name")
    inside = image_of(path)
    if not path.parent.is_dir() and not (inside and inside.is_dir()):
        raise OutputError(f"cannot make {path}: there is no folder {path.parent}; make it first")
    if inside and not (inside / "zarr.json").is_file():
        raise OutputError(
            f"{path}: {inside} is no OME-Zarr 0.5 image, so labels of 0.5 cannot lie in it; give a name beside it"
        )


def image_of(path: Path) -> Path | None:
    """The image in which labels called IMAGE/labels/NAME lie."""
    return path.parent.parent if path.parent.name == "labels" and ".zarr" in path.parent.parent.suffixes else None


def open_level(path: Path, level: int) -> Any:
    """The zarr array of a level, for `write_shard`."""
    return zarr.open_array(path / str(level), mode="r+", config=_CONFIG)


def write_metadata(path: Path, layout: Layout, description: Description, notes: Mapping[str, Any]) -> list[Any]:
    """Groups and arrays as they must be; those that are there already stay."""
    arrays = []
    for level, shape in enumerate(layout.shapes):
        with suppress(*DECODER_ERRORS):
            arrays.append(open_level(path, level))
            continue
        (path / str(level) / "zarr.json").unlink(missing_ok=True)
        arrays.append(
            zarr.create_array(
                path / str(level),
                shape=shape,
                chunks=layout.chunk,
                shards=layout.shard,
                dtype=layout.dtype,
                compressors=zarr.codecs.ZstdCodec(level=3),
                fill_value=0,
                dimension_names=("z", "y", "x"),
                zarr_format=3,
                config=_CONFIG,
            )
        )
    attributes = _attributes(layout, description)
    if "engine" in notes:
        attributes["distillfss"]["engine"] = notes["engine"]
    group: Any = _open_group(path)
    present = group.attrs.asdict()
    attributes["distillfss"] = present.get("distillfss", attributes["distillfss"])  # how it was begun, what is finished
    if present != attributes:
        group.attrs.put(attributes)
    list_in_image(path, is_there=True)
    return arrays


def list_in_image(path: Path, *, is_there: bool) -> None:
    """Add labels to those that their image lists, or take them off, one run at a time; what else is stated stays."""
    from filelock import FileLock

    if not image_of(path):
        return
    with FileLock(path.parent / ".distillfss.lock", timeout=60):
        labels: Any = _open_group(path.parent)
        stated = labels.attrs.asdict().get("ome", {})
        names = stated.get("labels", [])
        if (path.name in names) != is_there:
            listed = [*names, path.name] if is_there else [name for name in names if name != path.name]
            labels.attrs["ome"] = {"version": OME_VERSION, **stated, "labels": listed}


def _open_group(path: Path) -> Any:
    """The group in a folder, made if it is not there or was not written to its end."""
    with suppress(*DECODER_ERRORS):
        return zarr.open_group(path, mode="r+", zarr_format=3)
    (path / "zarr.json").unlink(missing_ok=True)
    return zarr.open_group(path, mode="a", zarr_format=3)


def _attributes(layout: Layout, description: Description) -> dict[str, Any]:
    """OME-Zarr 0.5 metadata of a label image, and ours beside it."""
    unit = {"unit": description.unit} if description.unit else {}
    scale = [s or 1.0 for s in description.scale]  # what is not known has to be a number, but gets no unit
    datasets = []
    for level, factors in enumerate(layout.factors):
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": [s * f for s, f in zip(scale, factors, strict=True)]}]
        # the center of the first voxel of this level, seen from that of the finest
        shift = [o + s * (f - 1) / 2 for o, s, f in zip(description.origin, scale, factors, strict=True)]
        if any(shift):
            steps.append({"type": "translation", "translation": shift})
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    image: dict[str, Any] = {"version": OME_VERSION}
    if description.classes:
        colors = [
            {"label-value": k, "rgba": [*CLASS_COLORS[(k - 1) % len(CLASS_COLORS)], 255]}
            for k in range(1, len(description.classes) + 1)
        ]
        image["colors"] = [{"label-value": 0, "rgba": [0, 0, 0, 0]}, *colors]
        names = ("background", *description.classes)
        image["properties"] = [{"label-value": k, "class": name} for k, name in enumerate(names)]
    if description.image:
        image["source"] = {"image": description.image}
    multiscale = {
        "name": description.name,
        "axes": [
            {"name": a, "type": "space", **(unit if s else {})} for a, s in zip("zyx", description.scale, strict=True)
        ],
        "datasets": datasets,
        "type": "mode" if description.classes else "nearest",
    }
    return {
        "ome": {"version": OME_VERSION, "multiscales": [multiscale], "image-label": image},
        "distillfss": dict(description.provenance),
    }
