"""Images without labels from files and volumes, of which parts are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distillfss_core.errors import InputFileError
from distillfss_core.labelstore.layout import Part, box_within
from distillfss_core.support.support_set import SupportSet
from distillfss_core.types import Array, UnlabeledImage, evenly, sample_step
from distillfss_core.volumes.opening import is_one_volume, is_volume
from distillfss_core.volumes.volume import Volume, open_volume

LIMIT = 12
"""Planes that are read at most."""

_SIDE = 2048  # pixels of the window that is read of a larger plane
_READ = 1 << 26  # pixels that are read for them at most, in bands
_BAND = 256  # rows of a band


def load_unlabeled(
    source: str | Path | Volume,
    support: SupportSet,
    *,
    limit: int = LIMIT,
    leave_out: Collection[Path] = (),
    region: Part | None = None,
    **opening: Any,
) -> list[UnlabeledImage]:
    """Read planes that are like those of a support set, and not among them.

    Parameters
    ----------
    source : path or Volume
        An image, a stack, a volume, or a folder of these. Of several planes, evenly spread ones are read.
    support : SupportSet
        Its planes are left out, and so are planes of another number of channels.
    limit : int
        Planes that are read at most.
    leave_out : collection of Path
        Files of the folder that are not read, such as labels.
    region : ((start, stop),) * 3, optional
        Part of each volume along z, y, x; ends may be None.
    **opening
        Options of `open_volume`.

    Returns
    -------
    list of UnlabeledImage
        Of planes larger than 2048 pixels a window, drawn at random from a fixed seed, with a sample of the plane.

    Raises
    ------
    InputFileError
        If a file is missing, damaged or of an unknown kind.
    SettingsError
        If the region is empty or not within a volume.
    """
    if isinstance(source, Volume):
        return list(_iter_new(source, support, limit, region))
    path = Path(source)
    paths = [path] if is_one_volume(path) else _volumes_in(path, leave_out)
    chosen = [paths[i] for i in evenly(len(paths), limit)]
    images: list[UnlabeledImage] = []
    for one in chosen:
        with open_volume(one, **opening) as volume:
            images += _iter_new(volume, support, max(1, limit // len(chosen)), region)
    return images


def _volumes_in(folder: Path, leave_out: Collection[Path]) -> list[Path]:
    if not folder.is_dir():
        raise InputFileError(f"{folder}: no such file or folder; check the name")
    unread = {path.resolve() for path in leave_out}
    inside = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return [p for p in inside if p.resolve() not in unread and is_one_volume(p) and is_volume(p)]


def _iter_new(volume: Volume, support: SupportSet, limit: int, region: Part | None) -> Iterator[UnlabeledImage]:
    """Planes, or windows of large ones, that no slice of the support shows."""
    rng = np.random.default_rng(0)
    (z0, z1), *sides = box_within(volume.shape[:3], region, volume.name)
    shown = [s.image for s in support.slices]
    # as many more as may turn out to be annotated
    for z in (z0 + i for i in evenly(z1 - z0, limit + len(shown))):
        if limit <= 0:
            return
        starts = [start + int(rng.integers(max(0, stop - start - _SIDE) + 1)) for start, stop in sides]
        part = tuple(slice(a, min(a + _SIDE, stop)) for a, (_, stop) in zip(starts, sides, strict=True))
        image = volume.read(slice(z, z + 1), *part)[0]
        inside = tuple(slice(p.start - a, p.stop - a) for p, (a, _) in zip(part, sides, strict=True))
        is_alike = image.ndim == shown[0].ndim and image.shape[2:] == shown[0].shape[2:]
        if is_alike and not any(np.array_equal(image, known[inside]) for known in shown):
            limit -= 1
            step = sample_step((image.shape[0], image.shape[1]))
            is_window = any(p.stop - p.start < stop - start for p, (start, stop) in zip(part, sides, strict=True))
            yield UnlabeledImage(image, _sampled(volume, z, sides) if is_window else image[::step, ::step])


def _sampled(volume: Volume, z: int, sides: Sequence[tuple[int, int]]) -> Array:
    """Every `sample_step`-th row and column of a plane; of the largest ones, of some bands of rows."""
    (y0, y1), (x0, x1) = sides
    step = sample_step((y1 - y0, x1 - x0))
    height = step * max(1, _BAND // step)
    starts = range(y0, y1, height)
    chosen = [starts[i] for i in evenly(len(starts), max(1, _READ // (height * (x1 - x0))))]
    bands = [volume.read(slice(z, z + 1), slice(y, min(y + height, y1)), slice(x0, x1))[0] for y in chosen]
    return np.concatenate([band[::step, ::step] for band in bands])
