"""Labels of a volume on disk: an OME-Zarr 0.5 pyramid, written shard by shard beside a record of what is finished.

A shard is one file of many chunks. A task writes one whole shard, and no other task writes there::

    level 0   +--------+--------+--------+      level 1   +--------+----+
              | shard  |        |        |                |        |    |   made of up to eight shards of level 0,
              +--------+--------+--------+      <-        +--------+----+   by the label that most of 2 x 2 (x 2)
              |        |        |        |                                  voxels have
              +--------+--------+--------+
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs
import zarr.errors

from distillfss_core.errors import InputFileError, OutputError, SettingsError
from distillfss_core.io import DECODER_FAULTS, fault_reason
from distillfss_core.record import Record
from distillfss_core.types import Array

log = logging.getLogger(__name__)

OME_VERSION = "0.5"
RECORD = Path("0", ".distillfss", "record")  # in the finest array: a group that held it would be no clean zarr
_TELLING = ("device", "mode", "tile")  # settings that are short enough to be told
_SHARD = 1 << 23  # voxels of a shard, about
_SIDE = 1024  # of a shard in y and x, about; a larger tile makes a larger shard
_CHUNK = 512  # side of a chunk at most
_DEEPEST = 8  # levels at most
_SMALLEST = 512  # the coarsest level fits into such a square

Index = tuple[int, int, int]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""A part of a volume: (z0, z1), (y0, y1), (x0, x1)."""

Part = Sequence[tuple[int | None, int | None]]
"""A box as it is asked for, along z, y and x; None is where the volume begins or ends."""

_COLOURS = ((230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 127), (132, 145, 180), (145, 209, 194))


@dataclass(frozen=True)
class Layout:
    """How labels are laid out; depends on nothing but the volume's size and scale and the model's grid of tiles.

    Parameters
    ----------
    shapes : of every level, (z, y, x)
    factors : of every level, how many voxels of the finest one of its voxels covers along z, y, x
    shard, chunk : (z, y, x), of every level
    dtype : str
    """

    shapes: tuple[Index, ...]
    factors: tuple[Index, ...]
    shard: Index
    chunk: Index
    dtype: str = "uint8"

    def whole(self, level: int) -> Box:
        """All of a level."""
        return _box((0, n) for n in self.shapes[level])

    def shards(self, level: int, region: Box) -> Iterator[Index]:
        """Shards of a level that touch a region (in voxels of that level), plane by plane."""
        yield from product(*(range(a // n, -(-b // n)) for (a, b), n in zip(region, self.shard, strict=True)))

    def box(self, level: int, at: Index) -> Box:
        """The voxels that a shard holds."""
        spans = zip(at, self.shard, self.shapes[level], strict=True)
        return _box((i * n, min((i + 1) * n, length)) for i, n, length in spans)

    def coarser(self, level: int, region: Box) -> Box:
        """A region of the finest level in voxels of another."""
        return _box((a // f, -(-b // f)) for (a, b), f in zip(region, self.factors[level], strict=True))

    def step(self, level: int) -> Index:
        """How many voxels of the level before one voxel of this covers, along z, y, x."""
        fine = self.factors[level - 1]
        return tuple(a // b for a, b in zip(self.factors[level], fine, strict=True))  # type: ignore[return-value]

    def sources(self, level: int, at: Index) -> list[Index]:
        """The shards of the level before that a shard is made of."""
        step = self.step(level)
        finer = _box(
            (a * f, min(b * f, n))
            for (a, b), f, n in zip(self.box(level, at), step, self.shapes[level - 1], strict=True)
        )
        return list(self.shards(level - 1, finer))

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": self.shapes[0],
            "levels": len(self.shapes),
            "shard": self.shard,
            "chunk": self.chunk,
            "dtype": self.dtype,
        }


def plan_layout(
    shape: Sequence[int],
    tile: tuple[int, int],
    scale: Sequence[float | None] = (None, None, None),
    *,
    dtype: str = "uint8",
    levels: int | None = None,
) -> Layout:
    """Shards of whole tiles, of about 8 million voxels; each level halves y and x, and z where it is as fine.

    Parameters
    ----------
    shape : (z, y, x)
    tile : (y, x)
        Inner size of the tiles, a multiple of the model's step.
    scale : (z, y, x)
        Size of a voxel; where it is not known z is not halved.
    levels : int, optional
        How many; by default as many as bring a plane into 512 x 512. (Labels inside an image have as many as it.)
    """
    depth, height, width = (int(n) for n in shape[:3])
    rows, columns = (min(-(-n // t), max(1, _SIDE // t)) * t for n, t in zip((height, width), tile, strict=True))
    planes = 1 << max(0, int(math.log2(max(1, _SHARD // (rows * columns)))))
    planes = min(planes, 64, 1 << max(0, (depth - 1).bit_length()))
    chunk = (min(planes, 4), _divisor(rows), _divisor(columns))
    return plan_blocks(shape, (planes, rows, columns), chunk, scale, dtype=dtype, levels=levels)


def plan_blocks(
    shape: Sequence[int],
    shard: Index,
    chunk: Index,
    scale: Sequence[float | None] = (None, None, None),
    *,
    dtype: str,
    levels: int | None = None,
) -> Layout:
    """Shards and chunks (z, y, x) as given; the rest as for `plan_layout`."""
    depth, height, width = (int(n) for n in shape[:3])
    shapes, factors = [(depth, height, width)], [(1, 1, 1)]
    while len(shapes) < (levels or (_DEEPEST if max(shapes[-1][1:]) > _SMALLEST else 0)):
        f = factors[-1]
        z, y, x = scale
        halve = z is not None and y is not None and x is not None and z * f[0] <= 1.5 * math.sqrt(y * x) * f[1]
        factors.append((f[0] * 2 if halve and shapes[-1][0] > 1 else f[0], f[1] * 2, f[2] * 2))
        shapes.append(tuple(-(-n // g) for n, g in zip(shapes[0], factors[-1], strict=True)))  # type: ignore[arg-type]
    return Layout(tuple(shapes), tuple(factors), shard, chunk, dtype)


def _divisor(n: int) -> int:
    """The largest divisor that is not larger than a chunk."""
    return n // next(k for k in range(1, n + 1) if n % k == 0 and n // k <= _CHUNK)


def _box(spans: Iterator[tuple[int, int]] | Any) -> Box:
    z, y, x = spans
    return z, y, x


def parse_region(text: str) -> Part:
    """Read "z0:z1,y0:y1,x0:x1"; ends may be left out (":50", "10:"), and so may the last axes.

    Raises
    ------
    SettingsError
        If it is no such text.
    """
    spans = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split(":")]
        if not all(end.isdecimal() or not end for end in ends) or (len(ends) != 2 and part.strip()):
            raise SettingsError(f"region {text!r} is not possible; give z0:z1,y0:y1,x0:x1, e.g. 0:100,:,512:1024")
        spans.append((int(ends[0]) if ends[0] else None, int(ends[-1]) if ends[-1] else None))
    if len(spans) > 3:
        raise SettingsError(f"region {text!r} has {len(spans)} axes; give z, y and x")
    return [*spans, *[(None, None)] * (3 - len(spans))]


def slices(box: Box) -> tuple[slice, slice, slice]:
    """A box for numpy."""
    return slice(*box[0]), slice(*box[1]), slice(*box[2])


def overlap(a: Box, b: Box) -> Box:
    """What two boxes have in common; empty spans where nothing."""
    return _box((max(p[0], q[0]), max(max(p[0], q[0]), min(p[1], q[1]))) for p, q in zip(a, b, strict=True))


def _within(a: Box, b: Sequence[Sequence[int]]) -> bool:
    return all(q[0] <= p[0] and p[1] <= q[1] for p, q in zip(a, b, strict=True))


@dataclass(frozen=True)
class About:
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


class LabelStore:
    """Labels that are being written, or were.

    Parameters
    ----------
    path : path
        Folder of the labels: a name of its own, or IMAGE.zarr/labels/NAME inside an OME-Zarr 0.5 image.
    layout : Layout
    about : About
    settings : mapping
        JSON-able; what has to be the same for a run to go on.
    resume : bool
        Whether to go on where another run stopped; otherwise there must not be one.
    notes : mapping
        JSON-able; kept with a new run, given back as ``notes`` when going on. An "engine" is written beside the labels.

    Raises
    ------
    OutputError
        If it cannot be written, is another's, or another run writes there now.
    SettingsError
        If what is there was begun with other settings.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        about: About,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.layout, self._majority = path, layout, bool(about.classes)
        settings = json.loads(json.dumps({**settings, "layout": layout.to_json()}))
        _check_place(path)
        mine = (path / RECORD).is_file()
        if mine and not resume:
            raise OutputError(f"{path}: is there already; resume it, overwrite it, or give another name")
        if not mine and any(f.is_file() and f.parent != (path / RECORD).parent for f in path.rglob("*")):
            raise OutputError(f"{path}: is there already and not from here; give another name")
        with _told(path):
            (path / RECORD).parent.mkdir(parents=True, exist_ok=True)
        self.record = Record(path / RECORD, {"settings": settings, "notes": dict(notes or {})})
        try:
            self._check_settings(settings)
            self.notes: dict[str, Any] = self.record.header["notes"]
            with _told(path):
                for left in path.rglob("*.partial"):
                    left.unlink(missing_ok=True)  # of writes that were killed
                _remove_rest(path)
                self._arrays = _write_metadata(path, layout, about, self.notes)
        except BaseException:
            self.record.close()
            raise
        self._done: dict[tuple[int, Index], dict[str, Any]] = {}
        for entry in self.record.entries:
            self._remember(entry)
        self._trusted: set[tuple[int, Index]] = set()

    @property
    def arrays(self) -> Sequence[Any]:
        """The zarr array of every level."""
        return self._arrays

    def missing(self, level: int, at: Index, box: Box) -> list[Box]:
        """What has to be computed before this part of a shard is finished: nothing if it is on disk as it was written.

        A file that the record does not know, or knows otherwise, may be half-written: it is removed, and whatever
        else was finished in it has to be computed again as well.
        """
        entry = self._done.get((level, at))
        if entry is not None and (level, at) not in self._trusted:
            if entry["file"] == _file_digest(self.file(level, at)):
                self._trusted.add((level, at))
            else:
                log.warning("%s: shard %s of level %d is not as it was written; it is done again", self.path, at, level)
                lost = [_box(map(tuple, b)) for b in entry["boxes"]]
                self._forget(level, at)
                if any(_within(box, b) for b in lost):
                    return lost
                return [*(b for b in lost if not _within(b, box)), box]
        if entry is None:
            self._forget(level, at)
            return [box]
        return [] if any(_within(box, b) for b in entry["boxes"]) else [box]

    def write(self, level: int, box: Box, labels: Array) -> str:
        """Put labels into (a part of) one shard and force it to disk; returns the digest of its file.

        Raises
        ------
        OutputError
            If the disk is full, and so on.
        """
        return write_shard(self.path, self._arrays[level], self.layout, level, box, labels)

    def note(self, level: int, at: Index, boxes: Sequence[Box], digest: str, made_from: str = "") -> None:
        """Put into the record that these parts of a shard are finished."""
        known = self._done.get((level, at))
        before = [_box(map(tuple, b)) for b in (known["boxes"] if known else [])]
        kept = [b for b in before if not any(_within(b, new) for new in boxes)]
        entry = {"level": level, "at": at, "boxes": [*kept, *boxes], "file": digest, "from": made_from}
        self.record.add(json.loads(json.dumps(entry)))
        self._remember(self.record.entries[-1])
        self._trusted.add((level, at))

    def file(self, level: int, at: Index) -> Path:
        """The file of a shard."""
        return shard_file(self.path, self._arrays[level], level, at)

    def made_from(self, level: int, at: Index) -> str:
        """A digest over the shards that a shard of a coarser level is made of."""
        known = [self._done.get((level - 1, source), {}).get("file", "") for source in self.layout.sources(level, at)]
        return hashlib.sha256("\n".join(known).encode()).hexdigest()[:32]

    def coarsen(self, level: int, at: Index) -> bool:
        """Make a shard of a coarser level and note it; False if that was done already.

        A voxel has the label that most of its finer ones have; of instances, that of the first.
        """
        origin = self.made_from(level, at)
        box = self.layout.box(level, at)
        if not self.missing(level, at, box) and self._done[level, at]["from"] == origin:
            return False
        step = self.layout.step(level)
        labels = np.zeros([b - a for a, b in box], self.layout.dtype)
        for source in self.layout.sources(level, at):
            if (level - 1, source) not in self._done or not self._done[level - 1, source]["file"]:
                continue  # nothing was written there
            fine = self.layout.box(level - 1, source)
            part = coarsen_labels(np.asarray(self._arrays[level - 1][slices(fine)]), step, majority=self._majority)
            to = tuple(a // f - start for (a, _), f, (start, _) in zip(fine, step, box, strict=True))
            labels[tuple(slice(t, t + n) for t, n in zip(to, part.shape, strict=True))] = part
        self._forget(level, at)
        self.note(level, at, [box], self.write(level, box, labels), origin)
        return True

    def finish(self, region: Box) -> None:
        """Note in the metadata that a region is complete."""
        with _told(self.path):
            group: Any = zarr.open_group(self.path, mode="r+")
            about = dict(group.attrs["distillfss"])
            regions = [r for r in about.get("finished", []) if not _within(_box(map(tuple, r)), region)]
            if not any(_within(region, r) for r in regions):
                about["finished"] = [*regions, [list(span) for span in region]]
                group.attrs["distillfss"] = about

    def close(self) -> None:
        self.record.close()

    def _remember(self, entry: dict[str, Any]) -> None:
        z, y, x = entry["at"]
        self._done[entry["level"], (z, y, x)] = entry

    def _forget(self, level: int, at: Index) -> None:
        self._done.pop((level, at), None)
        self._trusted.discard((level, at))
        with _told(self.path):
            self.file(level, at).unlink(missing_ok=True)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        before = self.record.header.get("settings", {})
        differing = [k for k in sorted({*before, *settings}) if before.get(k) != settings.get(k)]
        if differing:
            told = [f"{k} ({before.get(k)}, not {settings.get(k)})" if k in _TELLING else k for k in differing]
            raise SettingsError(
                f"{self.path}: was begun with another {', '.join(told)}; give what it was begun with, or another name"
            )


def write_shard(path: Path, array: Any, layout: Layout, level: int, box: Box, labels: Array) -> str:
    """Put labels into one shard, force it to disk, and give the digest of its file ("" where nothing is in it).

    It needs no record, so that workers elsewhere can do it; nobody else may write into this shard meanwhile.
    """
    z, y, x = (a // n for (a, _), n in zip(box, layout.shard, strict=True))
    at = (z, y, x)
    with _told(path):
        array[slices(box)] = labels
        file = shard_file(path, array, level, at)
        if file.exists():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        return _file_digest(file)


def shard_file(path: Path, array: Any, level: int, at: Index) -> Path:
    return path / str(level) / str(array.metadata.encode_chunk_key(at))


def check_apart(path: Path, *inputs: Path | None) -> None:
    """Labels are put nowhere where something is read, except among the labels of an image.

    Raises
    ------
    OutputError
    """
    out, image = path.resolve(), image_of(path)
    for given in inputs:
        if given is None:
            continue
        read = given.resolve()
        among = image is not None and image.resolve() == read
        if out == read or out in read.parents or (read in out.parents and not among):
            raise OutputError(f"cannot write {path}: {given} is read, and would be lost or changed; give another name")


def remove_labels(path: Path) -> None:
    """Delete labels that were written from here, for another run in their place.

    They are renamed first, so that they are never half there; killed meanwhile, the next run deletes the rest.

    Raises
    ------
    OutputError
        If they are not from here, or are being written.
    """
    if not path.exists():
        return
    if not (path / RECORD).is_file():
        raise OutputError(f"{path}: is there already and not from here; it is not overwritten, give another name")
    Record(path / RECORD, {}).close()  # nobody else has it open
    with _told(path):
        _remove_rest(path)
        path.rename(_renamed(path))
        _remove_rest(path)


def _renamed(path: Path) -> Path:
    """What labels are called while they are deleted."""
    return path.with_name(f".{path.name}.deleted")


def _remove_rest(path: Path) -> None:
    if (rest := _renamed(path)).exists():
        shutil.rmtree(rest)


def finished_regions(path: Path) -> list[Box] | None:
    """The regions that are complete, of labels that were written from here; None of others."""
    if not (path / "zarr.json").is_file():
        return None
    about = zarr.open(path, mode="r").attrs.get("distillfss")
    return [_box(map(tuple, r)) for r in about.get("finished", [])] if isinstance(about, dict) else None


def count_voxels(path: Path, region: Box, classes: int) -> list[int]:
    """How many voxels of a region of finished labels have each label 0..classes."""
    array: Any = zarr.open_array(path / "0", mode="r")
    counts = np.zeros(classes + 1, np.int64)
    for z, y, x in product(*(range(a, b, n) for (a, b), n in zip(region, array.shards, strict=True))):
        size = zip((z, y, x), array.shards, region, strict=True)
        part = np.asarray(array[tuple(slice(start, min(start + n, stop)) for start, n, (_, stop) in size)])
        counts += np.bincount(part.reshape(-1), minlength=classes + 1)[: classes + 1]
    return counts.tolist()


def coarsen_labels(labels: Array, step: Index, *, majority: bool = True) -> Array:
    """Every ``step`` voxels (z, y, x) become one: the label that most of them have (the larger of two that are even),
    or that of the first voxel. The far ends are filled by their last voxel."""
    if not majority:
        return labels[:: step[0], :: step[1], :: step[2]]
    pad = [(0, -n % s) for n, s in zip(labels.shape, step, strict=True)]
    if any(p for _, p in pad):
        labels = np.pad(labels, pad, mode="edge")
    parts = [labels[tuple(slice(o, None, s) for o, s in zip(at, step, strict=True))] for at in np.ndindex(*step)]
    if labels.max(initial=0) <= 1:  # a single class: ten times as fast
        return (2 * sum(parts[1:], parts[0].copy()) >= len(parts)).astype(labels.dtype)
    best, most = np.zeros_like(parts[0]), np.zeros(parts[0].shape, np.uint8)
    for value in np.unique(labels):
        count = np.zeros_like(most)
        for part in parts:
            count += part == value
        wins = count >= np.maximum(most, 1)
        best[wins], most[wins] = value, count[wins]
    return best


def _file_digest(file: Path) -> str:
    try:
        with open(file, "rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()[:32]
    except FileNotFoundError:
        return ""


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the file system refuses, in a line."""
    try:
        yield
    except OSError as fault:
        if isinstance(fault, (OutputError, InputFileError)):
            raise
        raise OutputError(
            f"cannot write {path}: {fault_reason(fault)}; what is finished is kept, and can be resumed"
        ) from fault
    except (ValueError, RuntimeError) as fault:
        raise OutputError(
            f"{path}: cannot be written, as what is there is damaged ({' '.join(str(fault).split())[:120]})"
        ) from fault


def _check_place(path: Path) -> None:
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


def _write_metadata(path: Path, layout: Layout, about: About, notes: Mapping[str, Any]) -> list[Any]:
    """Groups and arrays as they must be; those that are there already stay."""
    arrays = []
    for level, shape in enumerate(layout.shapes):
        with suppress(*DECODER_FAULTS):
            arrays.append(zarr.open_array(path / str(level), mode="r+"))
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
            )
        )
    attributes = _attributes(layout, about)
    if "engine" in notes:
        attributes["distillfss"]["engine"] = notes["engine"]
    group: Any = _open_group(path)
    present = group.attrs.asdict()
    attributes["distillfss"] = present.get("distillfss", attributes["distillfss"])  # how it was begun, what is finished
    if present != attributes:
        group.attrs.put(attributes)
    if image_of(path):
        labels: Any = _open_group(path.parent)
        names = list(labels.attrs.asdict().get("ome", {}).get("labels", []))
        if path.name not in names:
            labels.attrs["ome"] = {"version": OME_VERSION, "labels": [*names, path.name]}
    return arrays


def _open_group(path: Path) -> Any:
    """The group in a folder, made if it is not there or was not written to its end."""
    with suppress(*DECODER_FAULTS):
        return zarr.open_group(path, mode="r+", zarr_format=3)
    (path / "zarr.json").unlink(missing_ok=True)
    return zarr.open_group(path, mode="a", zarr_format=3)


def _attributes(layout: Layout, about: About) -> dict[str, Any]:
    """OME-Zarr 0.5 metadata of a label image, and ours beside it."""
    unit = {"unit": about.unit} if about.unit else {}
    scale = [s or 1.0 for s in about.scale]
    datasets = []
    for level, factors in enumerate(layout.factors):
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": [s * f for s, f in zip(scale, factors, strict=True)]}]
        # the centre of the first voxel of this level, seen from that of the finest
        shift = [o + s * (f - 1) / 2 for o, s, f in zip(about.origin, scale, factors, strict=True)]
        if any(shift):
            steps.append({"type": "translation", "translation": shift})
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    image: dict[str, Any] = {"version": OME_VERSION}
    if about.classes:
        colours = [
            {"label-value": k, "rgba": [*_COLOURS[(k - 1) % len(_COLOURS)], 255]}
            for k in range(1, len(about.classes) + 1)
        ]
        image["colors"] = [{"label-value": 0, "rgba": [0, 0, 0, 0]}, *colours]
        names = ("background", *about.classes)
        image["properties"] = [{"label-value": k, "class": name} for k, name in enumerate(names)]
    if about.image:
        image["source"] = {"image": about.image}
    multiscale = {
        "name": about.name,
        "axes": [{"name": a, "type": "space", **unit} for a in "zyx"],
        "datasets": datasets,
        "type": "mode" if about.classes else "nearest",
    }
    return {
        "ome": {"version": OME_VERSION, "multiscales": [multiscale], "image-label": image},
        "distillfss": dict(about.provenance),
    }
