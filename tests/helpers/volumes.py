"""Volumes on disk, written without any code of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

UNIT = {"type": "space", "unit": "micrometer"}


def noise(shape: tuple[int, ...], dtype: str = "u2", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


def write_ome_zarr(
    path: Path,
    array: np.ndarray,
    *,
    axes: str = "zyx",
    version: str = "0.5",
    shards: tuple[int, ...] | None = None,
    chunks: tuple[int, ...] | None = None,
    scale: tuple[float, ...] | None = None,
    levels: int = 2,
    unit: str | None = "micrometer",
    channels: tuple[str, ...] = (),
) -> Path:
    """A small OME-Zarr; each further level takes every second pixel of y and x."""
    v3 = version == "0.5"
    group = zarr.open_group(path, mode="w", zarr_format=3 if v3 else 2)
    chunks = chunks or tuple(min(16, n) for n in array.shape)
    scale = scale or tuple(1.0 for _ in axes)
    datasets = []
    for level in range(levels):
        step = tuple(2**level if a in "yx" else 1 for a in axes)
        data = array[tuple(slice(None, None, s) for s in step)]
        sharding: dict[str, Any] = {"shards": shards} if shards and v3 else {}
        names = {"dimension_names": list(axes)} if v3 else {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
        made = group.create_array(str(level), shape=data.shape, chunks=chunks, dtype=data.dtype, **names, **sharding)
        made[...] = data
        vector = [float(a * b) for a, b in zip(scale, step, strict=True)]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": vector}]})
    kinds = {"t": {"type": "time"}, "c": {"type": "channel"}}
    space = {"type": "space"} | ({"unit": unit} if unit else {})
    about: dict[str, Any] = {
        "multiscales": [{"name": "image", "axes": [{"name": a, **kinds.get(a, space)} for a in axes]}]
    }
    about["multiscales"][0]["datasets"] = datasets
    if channels:
        about["omero"] = {"channels": [{"label": c, "color": "FFFFFF"} for c in channels]}
    if v3:
        group.attrs["ome"] = {"version": "0.5", **about}
    else:
        about["multiscales"][0]["version"] = "0.4"
        group.attrs.update(about)
    return path
