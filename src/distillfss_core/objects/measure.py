"""Measurements of objects: pieces measured block by block, joined to objects, written as a table."""

from __future__ import annotations

import csv
import filecmp
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distillfss_core.errors import OutputError, SettingsError
from distillfss_core.io.writing import atomic_path, check_output, check_replaceable
from distillfss_core.types import Array

TABLES = (".csv", ".parquet")
PIECE = np.dtype(
    [
        ("id", np.uint64),
        ("voxels", np.int64),
        ("place", np.float64, 3),  # sum of the places z, y, x
        ("low", np.int64, 3),
        ("high", np.int64, 3),
        ("intensity", np.float64),  # sum; NaN without an image
    ]
)
"""A piece of an object, or (with its label for id) an object."""

_ROWS = 10000  # of a table that are put together at a time


def measure_pieces(local: Array, ids: Array, origin: Sequence[int], image: Array | None) -> Array:
    """Measure what lies in a block.

    Parameters
    ----------
    local : integer array (z, y, x)
        0, or the number 1..n of a piece within this block.
    ids : array (n + 1)
        Of the pieces.
    origin : (z, y, x)
        Of the block.
    image : array (z, y, x), optional

    Returns
    -------
    array of PIECE
        Of those that have a voxel here.
    """
    inside = np.flatnonzero(local)
    number = local.reshape(-1)[inside]
    pieces = np.zeros(len(ids), PIECE)
    pieces["id"] = ids
    pieces["voxels"] = np.bincount(number, minlength=len(ids))
    pieces["low"] = np.iinfo(np.int64).max
    for axis, (places, start) in enumerate(zip(np.unravel_index(inside, local.shape), origin, strict=True)):
        positions = places + start
        pieces["place"][:, axis] = np.bincount(number, positions, len(ids))
        np.minimum.at(pieces["low"][:, axis], number, positions)
        np.maximum.at(pieces["high"][:, axis], number, positions + 1)
    pieces["intensity"] = np.nan if image is None else np.bincount(number, image.reshape(-1)[inside], len(ids))
    return pieces[pieces["voxels"] > 0]


def join_pieces(pieces: Array, pairs: Array, min_voxels: int) -> tuple[Array, Array, npt.NDArray[np.uint32]]:
    """Put pieces together to objects.

    Parameters
    ----------
    pieces : array of PIECE
        Pieces of one id are one object.
    pairs : array (n, 2)
        Ids that touch and so are one object, too.
    min_voxels : int
        Smaller objects have the label 0.

    Returns
    -------
    objects : array of PIECE
        Labels 1, 2, ... in the order of their smallest ids; those of label 0 are in it, too.
    ids, labels : arrays
        Every id, ascending, and the label of its object.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ids, inverse = np.unique(pieces["id"], return_inverse=True)
    if not len(ids):
        return np.zeros(0, PIECE), ids, np.zeros(0, np.uint32)
    a, b = np.searchsorted(ids, pairs.T)
    graph = coo_array((np.ones(len(a), bool), (a, b)), (len(ids), len(ids)))
    _, group = connected_components(graph, directed=False)
    _, first, group = np.unique(group, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))  # ids ascend, so that the first of a group is its smallest
    group = order[group]
    owner = group[inverse]
    objects = np.zeros(len(order), PIECE)
    objects["low"] = np.iinfo(np.int64).max
    for name in ("voxels", "place", "intensity"):
        np.add.at(objects[name], owner, pieces[name])
    np.minimum.at(objects["low"], owner, pieces["low"])
    np.maximum.at(objects["high"], owner, pieces["high"])
    kept = objects["voxels"] >= min_voxels
    objects["id"] = np.cumsum(kept) * kept
    return objects, ids, objects["id"][group].astype(np.uint32)


def check_table(path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """Find out now that a table could not be written. Of a run that goes on, it may be there.

    Raises
    ------
    SettingsError
        If it has another suffix, or a library is missing.
    OutputError
        If there is no such folder, nothing can be written there, or another table is there.
    """
    if path.suffix.lower() not in TABLES:
        raise SettingsError(f"table {path}: end its name in .csv or .parquet")
    if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        raise SettingsError("a table as Parquet needs pyarrow: pip install 'napari-distillfss[instances]'; or use .csv")
    check_output(path)
    check_replaceable([path], [], overwrite=overwrite or resume)


def write_table(
    path: Path,
    objects: Array,
    scale: Sequence[float | None],
    unit: str | None,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    *,
    measured: bool,
    overwrite: bool = False,
) -> list[str]:
    """Write measures of objects, a row each; whole or not at all.

    Parameters
    ----------
    path : path
        .csv or .parquet
    objects : array of PIECE
        Pieces with label 0 are skipped.
    scale, unit, origin
        As of a `Volume`.
    measured : bool
        Whether there was an image; where it holds NaN, the mean of that object alone is NaN.
    overwrite : bool
        Replace another table. The same table, of a run that was stopped, may be there in any case.

    Returns
    -------
    list of str
        Columns: label; voxels; volume; centroid z, y, x; box z0, z1, y0, y1, x0, x1 in voxels, half-open; mean
        intensity, where an image was measured. Volume and centroid end in _um3 and _um where the scale is known in
        micrometers, in _voxels where no scale is known. Centroids are places in the world, the origin included, but
        in voxels they count from the first voxel.

    Raises
    ------
    OutputError
        If it cannot be written, or another table is there.
    """
    objects = objects[objects["id"] > 0]
    has_scale = all(s is not None for s in scale)
    step = np.array([s or 1.0 for s in scale]) if has_scale else np.ones(3)
    place = np.array(origin, float) if has_scale else np.zeros(3)
    end, cubed = ("_voxels", "_voxels") if not has_scale else ("_um", "_um3") if unit else ("", "")
    voxels = objects["voxels"]
    columns: dict[str, Array] = {"label": objects["id"], "voxels": voxels, f"volume{cubed}": voxels * step.prod()}
    for axis, name in enumerate("zyx"):
        columns[f"centroid_{name}{end}"] = place[axis] + objects["place"][:, axis] / voxels * step[axis]
    for axis, name in enumerate("zyx"):
        columns |= {f"box_{name}0": objects["low"][:, axis], f"box_{name}1": objects["high"][:, axis]}
    if measured:
        columns["mean_intensity"] = objects["intensity"] / voxels
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet, table

            parquet.write_table(table(columns), temporary)
        else:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                for start in range(0, len(objects), _ROWS):
                    part = [column[start : start + _ROWS].tolist() for column in columns.values()]
                    writer.writerows(zip(*part, strict=True))
        if path.exists() and not overwrite and not filecmp.cmp(path, temporary, shallow=False):
            raise OutputError(
                f"{path} is already there, with other content; give --overwrite, or another name for the table"
            )
    return list(columns)
