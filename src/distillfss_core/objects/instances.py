"""Numbers of objects that hold over a whole labeled volume, computed block by block.

::

    labels --> pieces of objects, with ids  --> which ids are one object --> numbers
               a block at a time                faces between blocks         a block at a time

The id of a piece is the place, counted over the volume, of its first voxel (components) or of its seed (watershed). So
no two objects meet in an id, numbers follow the order of the volume, and a block can be done again at any time.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distillfss_core import __version__
from distillfss_core.errors import ImageError, SettingsError, printable
from distillfss_core.io.label_checks import check_lossless
from distillfss_core.io.writing import atomic_path
from distillfss_core.labelstore.layout import (
    Box,
    Index,
    Layout,
    box_within,
    check_shards,
    check_size,
    plan_blocks,
    slices,
)
from distillfss_core.labelstore.metadata import Description, image_of
from distillfss_core.labelstore.store import (
    JOURNAL,
    LabelStore,
    check_apart,
    check_choice,
    check_finished,
    remove_labels,
)
from distillfss_core.objects.measure import PIECE, check_table, join_pieces, measure_pieces, write_table
from distillfss_core.types import Array, as_run, finish
from distillfss_core.volumes.volume import Volume

log: logging.Logger = logging.getLogger(__name__)

METHODS = ("components", "watershed", "numbered")
CONNECTIVITIES = (6, 18, 26)
BLOCK = (64, 256, 256)
_CHUNK = (32, 128, 128)
_WIDEST = 64  # voxels of surroundings at most: what does not fit into memory is refused


@dataclass(frozen=True)
class InstanceStep:
    """A step of the work: ``stage`` is "pieces", "joining", "numbers" or "pyramid"; ``index`` of ``total`` in it."""

    stage: str
    index: int
    total: int


@dataclass(frozen=True)
class InstanceReport:
    """Result of a run: folder of the labels, number of objects, objects too small to count, seconds."""

    path: Path
    objects: int
    too_small: int
    seconds: float


def label_instances(
    labels: Volume,
    out: str | Path,
    *,
    table: str | Path | None = None,
    image: Volume | None = None,
    class_id: int | None = None,
    method: str = "components",
    connectivity: int = 6,
    radius: float | None = None,
    min_voxels: int = 1,
    binary_threshold: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    block: Index = BLOCK,
) -> InstanceReport:
    """Give every object a number; `iter_instances` without the steps between.

    Parameters, result and errors are those of `iter_instances`.
    """
    run = iter_instances(
        labels,
        out,
        table=table,
        image=image,
        class_id=class_id,
        method=method,
        connectivity=connectivity,
        radius=radius,
        min_voxels=min_voxels,
        binary_threshold=binary_threshold,
        resume=resume,
        overwrite=overwrite,
        block=block,
    )
    return finish(run)


@as_run
def iter_instances(
    labels: Volume,
    out: str | Path,
    *,
    table: str | Path | None = None,
    image: Volume | None = None,
    class_id: int | None = None,
    method: str = "components",
    connectivity: int = 6,
    radius: float | None = None,
    min_voxels: int = 1,
    binary_threshold: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    block: Index = BLOCK,
) -> Generator[InstanceStep, None, InstanceReport]:
    """Number the objects of a labeled volume, block by block; it can be stopped and resumed as `iter_segment` can.

    Parameters
    ----------
    labels : Volume
        Integers (z, y, x); 0 is background.
    out : path
        As for `iter_segment`: OME-Zarr 0.5 labels, uint32, objects being 1, 2, ... in the order of their first voxels
        (components) or seeds (watershed).
    table : path, optional
        Where to write the measures of the objects, .csv or .parquet; the columns are those of `write_table`. A table
        that is there is replaced with ``overwrite`` only; one that a run wrote before it was stopped is kept.
    image : Volume, optional
        Of the same size, one channel: its mean over each object is measured, too.
    class_id : int, optional
        The class whose objects are wanted; by default whatever is not 0 is one class.
    method : {"components", "watershed", "numbered"}
        Whatever is connected is one object; or objects that touch are cut apart where they are narrow (Euclidean
        distance, smoothed, its maxima as seeds); or every number in the labels is an object already, and only gaps
        between the numbers are closed.
    connectivity : {6, 18, 26}
        With how many neighbors a voxel is connected (components only).
    radius : float
        Of a typical object, in the unit of ``labels.scale`` (voxels where that is not known); for the watershed. A
        block is read with four radii of its surroundings: objects up to about this size are cut alike wherever blocks
        begin, much larger ones may be cut at the borders of blocks.
    min_voxels : int
        Smaller objects become background.
    binary_threshold : float, optional
        The labels are a mask of gray values, also as JPEG: from this value on a voxel is object.
    resume, overwrite : bool
        As for `iter_segment`; not both.
    block : (z, y, x)
        Voxels worked on at a time; even numbers where the labels get coarser levels.

    Yields
    ------
    InstanceStep

    Returns
    -------
    InstanceReport

    Raises
    ------
    SettingsError
        If a setting is not possible, a library is missing, or the output was begun with other settings.
    ImageError
        If labels are no integers, or the image has another size.
    OutputError
        If it cannot be written (disk full, ...): what is finished is kept. If it would lie where labels or image do.
    InputFileError
        If a volume is damaged, or labels were written from here and nothing of them is finished. (Where a part of them
        is, a warning is logged.)
    """
    start = time.monotonic()
    check_choice(resume=resume, overwrite=overwrite)
    out, table = Path(out), None if table is None else Path(table)
    splitter = _Splitter(labels, image, class_id, method, connectivity, radius, binary_threshold)
    splitter.check()
    if min_voxels < 1:
        raise SettingsError(f"min_voxels {min_voxels} is not possible; give 1 or more")
    _check_places(labels, image, out, table, overwrite=overwrite, resume=resume)
    settings = {**splitter.settings(), "min_voxels": min_voxels}
    description, layout = _plan(labels, image, out, block, settings)
    check_shards(layout, layout.whole(0), labels.name)
    if overwrite:
        remove_labels(out)
        if table is not None:  # stopped and resumed, the run writes it anew
            table.unlink(missing_ok=True)
    with closing(LabelStore(out, layout, description, settings, resume=resume)) as store:
        measures = (out / JOURNAL).with_name("objects.npy")
        pieces = (out / JOURNAL).with_name("pieces")
        blocks = list(layout.shards(0, layout.whole(0)))
        todo = [index for index in blocks if store.missing(0, index, layout.box(0, index))]
        if todo or not measures.is_file():
            once = replace(layout, shapes=layout.shapes[:1], factors=layout.factors[:1], dtype="uint64")
            with closing(LabelStore(pieces, once, description, settings, resume=True)) as work:
                yield from _find_pieces(work, splitter, blocks)
                pairs = yield from _find_pairs(work, splitter, blocks)
                objects, ids, numbers = join_pieces(_all_pieces(work, blocks), pairs, min_voxels)
                with atomic_path(measures) as temporary:
                    _save(temporary, objects)
                yield from _write_numbers(store, work, todo, ids, numbers)
        yield from _write_pyramid(store)
        objects = np.load(measures, allow_pickle=False)
        if table is not None:
            voxel = (labels.scale, labels.unit, labels.origin)
            write_table(table, objects, *voxel, measured=image is not None, overwrite=overwrite)
        store.finish(layout.whole(0))
        shutil.rmtree(pieces, ignore_errors=True)
    small = int((objects["id"] == 0).sum())
    return InstanceReport(out, len(objects) - small, small, time.monotonic() - start)


def _check_places(
    labels: Volume, image: Volume | None, out: Path, table: Path | None, *, overwrite: bool, resume: bool
) -> None:
    """Find out before the work that results cannot be written, or labels cannot be taken."""
    inputs = (labels.path, image.path if image else None)
    if table is not None:
        check_table(table, overwrite=overwrite, resume=resume and (out / JOURNAL).is_file())
        check_apart(table, out, *inputs)
    check_size(box_within(labels.shape[:3], None, labels.name), labels.shape, labels.name)
    check_finished(labels.path, labels.name, labels.levels[0])
    check_apart(out, *inputs)


def _plan(
    labels: Volume, image: Volume | None, out: Path, block: Index, settings: Mapping[str, Any]
) -> tuple[Description, Layout]:
    """Metadata and shards of the numbered objects."""
    inside = image_of(out)
    description = Description(
        name=printable(out.name.partition(".")[0]),
        scale=labels.scale,
        origin=labels.origin,
        unit=labels.unit,
        classes=(),
        provenance={"program": f"napari-distillfss {__version__}", "instances": settings},
        image="../.." if inside else None,
    )
    chunk = tuple(math.gcd(b, c) for b, c in zip(block, _CHUNK, strict=True))
    levels = len((image or labels).levels) if inside else None  # as many as the image: OME-Zarr asks so
    layout = plan_blocks(
        labels.shape, block, (chunk[0], chunk[1], chunk[2]), labels.scale, dtype="uint32", levels=levels
    )
    return description, layout


@dataclass(frozen=True)
class _Splitter:
    """Split a block into pieces of objects."""

    labels: Volume
    image: Volume | None
    class_id: int | None
    method: str
    connectivity: int
    radius: float | None
    binary_threshold: float | None = None

    def check(self) -> None:
        labels, image = self.labels, self.image
        for module in ("cc3d", "scipy", "skimage"):
            if find_spec(module) is None:
                raise SettingsError(f"instances need {module}: pip install 'napari-distillfss[instances]'")
        if labels.dtype.kind not in "bui" or labels.ndim != 3:
            raise ImageError(f"{labels.name}: is {labels.dtype} with axes {labels.axes}; labels are integers (z, y, x)")
        if self.binary_threshold is None and labels.path is not None:
            check_lossless(labels.path)
        if image is not None and image.shape != labels.shape:
            raise ImageError(
                f"{image.name}: is {image.shape} but the labels are {labels.shape}; give the level and the channel "
                "that they were made from"
            )
        self._check_options()

    def _check_options(self) -> None:
        """Find out that options cannot be, or that the method has no such option."""
        labels = self.labels
        if self.method not in METHODS:
            raise SettingsError(f"there is no method {self.method!r}; choose one of: {', '.join(METHODS)}")
        if self.connectivity not in CONNECTIVITIES:
            raise SettingsError(f"connectivity {self.connectivity} is not possible; give 6, 18 or 26")
        most = 1 if labels.dtype.kind == "b" else np.iinfo(labels.dtype).max
        if self.class_id is not None and not 1 <= self.class_id <= most:
            raise SettingsError(f"class_id {self.class_id} is not possible in {labels.dtype} labels; give 1 to {most}")
        if self.method != "watershed" and self.radius is not None:
            raise SettingsError(f"method {self.method} has no radius; leave it out, or choose method watershed")
        if self.method != "components" and self.connectivity != CONNECTIVITIES[0]:
            raise SettingsError(f"method {self.method} has no connectivity; leave it out, or choose method components")
        if self.binary_threshold is not None and self.class_id is not None:
            raise SettingsError("a binary threshold makes one class; leave the number of the class out")
        if self.method == "numbered" and (self.class_id is not None or self.binary_threshold is not None):
            raise SettingsError("numbered labels have no classes; leave the number of the class and the threshold out")
        if self.method == "watershed":
            if self.radius is None or not 0 < self.radius < math.inf:
                raise SettingsError(f"radius {self.radius} is not possible; give that of a typical object")
            if max(self.halo) > _WIDEST:
                raise SettingsError(
                    f"radius {self.radius:g} is {max(self.halo) // 4} voxels, at most {_WIDEST // 4} can be had; "
                    "segment a coarser level"
                )

    def settings(self) -> dict[str, Any]:
        threshold = {} if self.binary_threshold is None else {"binary_threshold": self.binary_threshold}
        return threshold | {
            "labels": _fingerprint(self.labels),
            "image": _fingerprint(self.image) if self.image else None,
            "value": self.class_id,
            "method": self.method,
            "connectivity": self.connectivity,
            "radius": self.radius,
        }

    @property
    def step(self) -> tuple[float, ...]:
        """Size of a voxel, 1 where it is not known."""
        has_scale = all(s is not None for s in self.labels.scale)
        return tuple(float(s) if has_scale and s is not None else 1.0 for s in self.labels.scale)

    @property
    def halo(self) -> tuple[int, ...]:
        """Voxels around a block that are looked at, too."""
        if self.method != "watershed":
            return (0, 0, 0)
        return tuple(math.ceil(4 * (self.radius or 0) / s) for s in self.step)

    @property
    def reach(self) -> int:
        """In how many axes connected voxels may differ; 0 where pieces of one object have one id anyway."""
        return CONNECTIVITIES.index(self.connectivity) + 1 if self.method == "components" else 0

    def cut(self, box: Box) -> tuple[npt.NDArray[np.uint64], Array]:
        """Ids of the voxels of a box, and its pieces."""
        shape = self.labels.shape
        looked = [(max(0, a - h), min(n, b + h)) for (a, b), h, n in zip(box, self.halo, shape, strict=True)]
        part = self.labels.read(*(slice(*span) for span in looked))
        if self.method == "numbered":
            return self._numbered(part, box)
        if self.binary_threshold is not None:
            mask = part >= self.binary_threshold
        else:
            mask = part == self.class_id if self.class_id is not None else part != 0
        local, seeds = self._components(mask) if self.method == "components" else self._watershed(mask)
        origin = [a for a, _ in looked]
        ids = _ids(seeds, origin, shape)
        local = np.ascontiguousarray(local[tuple(slice(a - o, b - o) for (a, b), o in zip(box, origin, strict=True))])
        image = self.image.read(*slices(box)) if self.image else None
        return ids[local], measure_pieces(local, ids, [a for a, _ in box], image)

    def _numbered(self, part: Array, box: Box) -> tuple[npt.NDArray[np.uint64], Array]:
        """Each number is the id of its object."""
        if part.min() < 0:
            raise ImageError(f"{self.labels.name}: holds the label {part.min()}; numbers of objects are 0 or more")
        ids, local = np.unique(np.append(part.reshape(-1), part.dtype.type(0)), return_inverse=True)
        local, ids = local[:-1].reshape(part.shape), ids.astype(np.uint64)
        image = self.image.read(*slices(box)) if self.image else None
        return part.astype(np.uint64), measure_pieces(local, ids, [a for a, _ in box], image)

    def _components(self, mask: Array) -> tuple[Array, Array]:
        import cc3d

        connectivity: Any = self.connectivity
        local = cc3d.connected_components(mask, connectivity=connectivity, binary_image=True)
        return local, local

    def _watershed(self, mask: Array) -> tuple[Array, Array]:
        """Objects and their seeds: maxima of the distance to the background, smoothed; at least one an object."""
        import cc3d
        from scipy import ndimage
        from skimage.segmentation import watershed

        radius = float(self.radius or 0)
        distance = (
            np.ones(mask.shape, np.float32)
            if mask.all()
            else ndimage.distance_transform_edt(mask, sampling=self.step).astype(np.float32)
        )
        smooth = ndimage.gaussian_filter(distance, [radius / 4 / s for s in self.step], truncate=2)
        window = [2 * int(radius / 2 / s) + 1 for s in self.step]
        peaks = mask & (ndimage.maximum_filter(smooth, window) == smooth)
        whole, count = cc3d.connected_components(mask, connectivity=26, binary_image=True, return_N=True)
        seen = np.zeros(count + 1, bool)
        seen[whole[peaks]] = True
        peaks |= mask & ~seen[whole]  # what lies beside something larger is an object all the same
        seeds = cc3d.connected_components(peaks, connectivity=26, binary_image=True, out_dtype=np.uint32)
        # flooded by what joins voxels of `whole`, so that none stays without an object
        return watershed(-smooth, seeds.astype(np.int32), connectivity=3, mask=mask), seeds


def _fingerprint(volume: Volume) -> dict[str, Any]:
    """What tells a volume from another; of labels that were written from here also what they were made with."""
    metadata_file = volume.path / "zarr.json" if volume.path else None
    digest = (
        hashlib.sha256(metadata_file.read_bytes()).hexdigest()[:16]
        if metadata_file and metadata_file.is_file()
        else None
    )
    order = {} if volume.order == "zyx" else {"order": volume.order}
    return {**volume.identity, "metadata_file": digest, **order}


def _ids(seeds: Array, origin: Sequence[int], shape: Sequence[int]) -> npt.NDArray[np.uint64]:
    """For 0 and each number in ``seeds``: 0, or 1 + the place of its first voxel in the volume."""
    inside = np.flatnonzero(seeds)[::-1]
    numbers = seeds.reshape(-1)[inside]
    first = np.zeros(int(numbers.max(initial=0)) + 1, np.int64)
    first[numbers] = inside  # of several the last is kept, that is the first in the volume
    place = [axis + start for axis, start in zip(np.unravel_index(first, seeds.shape), origin, strict=True)]
    ids = np.ravel_multi_index(place, tuple(shape)).astype(np.uint64) + np.uint64(1)
    ids[0] = 0
    return ids


def _piece_file(work: LabelStore, index: Index) -> Path:
    return (work.path / JOURNAL).with_name(f"{'.'.join(map(str, index))}.npy")


def _save(path: Path, array: Array) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def _find_pieces(work: LabelStore, splitter: _Splitter, blocks: Sequence[Index]) -> Generator[InstanceStep, None, None]:
    for index, block_index in enumerate(blocks, 1):
        box = work.layout.box(0, block_index)
        if work.missing(0, block_index, box):
            ids, pieces = splitter.cut(box)
            with atomic_path(_piece_file(work, block_index)) as temporary:
                _save(temporary, pieces)
            work.note(0, block_index, [box], work.write(0, box, ids))
        yield InstanceStep("pieces", index, len(blocks))


def _all_pieces(work: LabelStore, blocks: Sequence[Index]) -> Array:
    files = [_piece_file(work, index) for index in blocks]
    return np.concatenate([np.zeros(0, PIECE), *(np.load(file, allow_pickle=False) for file in files)])


def _find_pairs(
    work: LabelStore, splitter: _Splitter, blocks: Sequence[Index]
) -> Generator[InstanceStep, None, npt.NDArray[np.uint64]]:
    """Ids that touch one another across the faces between blocks."""
    pairs = [np.zeros((0, 2), np.uint64)]
    for index, index_at in enumerate(blocks if splitter.reach else (), 1):
        box = work.layout.box(0, index_at)
        pairs += [
            _touching(work, box, axis, splitter.reach)
            for axis in range(3)
            if box[axis][1] < splitter.labels.shape[axis]
        ]
        yield InstanceStep("joining", index, len(blocks))
    return np.concatenate(pairs)


def _touching(work: LabelStore, box: Box, axis: int, reach: int) -> npt.NDArray[np.uint64]:
    """Pairs of ids on both sides of the far face of a box along an axis.

    The far side is looked at with one voxel more all around, for neighbors across edges and corners.
    """
    array, shape, stop = work.arrays[0], work.layout.shapes[0], box[axis][1]
    near = list(slices(box))
    near[axis] = slice(stop - 1, stop)
    far = [slice(max(0, a - 1), min(n, b + 1)) for (a, b), n in zip(box, shape, strict=True)]
    far[axis] = slice(stop, stop + 1)
    here = np.asarray(array[tuple(near)]).squeeze(axis)
    if not here.any():
        return np.zeros((0, 2), np.uint64)
    there = np.asarray(array[tuple(far)]).squeeze(axis)
    others = [k for k in range(3) if k != axis]
    missing = [(int(box[k][0] == 0), int(box[k][1] == shape[k])) for k in others]
    there = np.pad(there, missing)  # outside the volume is background
    rows, columns = here.shape
    pairs = []
    for dy, dx in product((-1, 0, 1), repeat=2):
        if abs(dy) + abs(dx) < reach:
            shifted = there[1 + dy : 1 + dy + rows, 1 + dx : 1 + dx + columns]
            both = (here > 0) & (shifted > 0)
            pairs.append(np.stack([here[both], shifted[both]], 1))
    return np.unique(np.concatenate(pairs), axis=0)


def _write_numbers(
    store: LabelStore, work: LabelStore, todo: Sequence[Index], ids: Array, numbers: Array
) -> Generator[InstanceStep, None, None]:
    for index, block_index in enumerate(todo, 1):
        box = store.layout.box(0, block_index)
        pieces = np.asarray(work.arrays[0][slices(box)])
        labels = np.zeros(pieces.shape, np.uint32)
        inside = pieces > 0
        labels[inside] = numbers[np.searchsorted(ids, pieces[inside])]
        store.note(0, block_index, [box], store.write(0, box, labels))
        yield InstanceStep("numbers", index, len(todo))


def _write_pyramid(store: LabelStore) -> Generator[InstanceStep, None, None]:
    layout = store.layout
    coarser = [
        (k, block_index) for k in range(1, len(layout.shapes)) for block_index in layout.shards(k, layout.whole(k))
    ]
    for index, (level, block_index) in enumerate(coarser, 1):
        store.coarsen(level, block_index)
        yield InstanceStep("pyramid", index, len(coarser))
