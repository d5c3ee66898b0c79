"""Labels of a volume on disk: an OME-Zarr 0.5 pyramid, written shard by shard beside a journal of what is finished.

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
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs
import zarr.errors

from distillfss_core.errors import InputFileError, OutputError, SettingsError
from distillfss_core.io.writing import error_reason
from distillfss_core.labelstore.journal import Journal
from distillfss_core.labelstore.layout import Box, Index, Layout, as_box, overlap, slices
from distillfss_core.labelstore.metadata import Description, check_place, image_of, list_in_image, write_metadata
from distillfss_core.labelstore.pyramid import coarsen_labels
from distillfss_core.types import Array

log: logging.Logger = logging.getLogger(__name__)
JOURNAL = Path("0", ".distillfss", "record")  # in the finest array: a group that held it would be no clean zarr
_OLDER_MODES = {"planes": "planewise", "smooth": "smoothed"}
"""Names of modes in journals that were begun before the modes had their names of now."""
_REPLACED = "replace_nan"  # of a volume
_TELLING = ("device", "mode", "tile", _REPLACED)  # settings that are short enough to be told


def _within(a: Box, b: Sequence[Sequence[int]]) -> bool:
    return all(q[0] <= p[0] and p[1] <= q[1] for p, q in zip(a, b, strict=True))


class LabelStore:
    """Labels that are being written, or were.

    Parameters
    ----------
    path : path
        Folder of the labels: a name of its own, or IMAGE.zarr/labels/NAME inside an OME-Zarr 0.5 image.
    layout : Layout
    description : Description
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
        description: Description,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.path: Path = path
        self.layout: Layout = layout
        self._majority = bool(description.classes)
        settings = json.loads(json.dumps({**settings, "layout": layout.to_json()}))
        check_place(path)
        mine = (path / JOURNAL).is_file()
        if mine and not resume:
            raise OutputError(
                f"{path}: is there already; --resume (in Python resume=True) goes on with it, --overwrite begins anew; "
                "or give another name"
            )
        if not mine and any(f.is_file() and f.parent != (path / JOURNAL).parent for f in path.rglob("*")):
            raise OutputError(f"{path}: is there already and not from here; give another name")
        with _named_errors(path):
            (path / JOURNAL).parent.mkdir(parents=True, exist_ok=True)
        self.journal: Journal = Journal(path / JOURNAL, {"settings": settings, "notes": dict(notes or {})})
        try:
            self._check_settings(settings)
            self.notes: dict[str, Any] = self.journal.header["notes"]
            with _named_errors(path):
                for left in path.rglob("*.partial"):
                    left.unlink(missing_ok=True)  # of writes that were killed
                _remove_rest(path)
                self._arrays = write_metadata(path, layout, description, self.notes)
        except BaseException:
            self.journal.close()
            if not mine:
                with suppress(OutputError):
                    remove_labels(path)
            raise
        self._done: dict[tuple[int, Index], dict[str, Any]] = {}
        for entry in self.journal.entries:
            self._remember(entry)
        self._trusted: set[tuple[int, Index]] = set()

    @property
    def arrays(self) -> Sequence[Any]:
        """The zarr array of every level."""
        return self._arrays

    def missing(self, level: int, index: Index, box: Box) -> list[Box]:
        """What has to be computed before this part of a shard is finished: nothing if it is on disk as it was written.

        A file that the journal does not know, or knows otherwise, may be half-written: it is removed, and whatever
        else was finished in it has to be computed again as well.
        """
        entry = self._done.get((level, index))
        if entry is not None and (level, index) not in self._trusted:
            if entry["file"] == _file_digest(self.file(level, index)):
                self._trusted.add((level, index))
            else:
                log.warning(
                    "%s: shard %s of level %d is not as it was written; it is done again", self.path, index, level
                )
                lost = [as_box(map(tuple, b)) for b in entry["boxes"]]
                self._forget(level, index)
                if any(_within(box, b) for b in lost):
                    return lost
                return [*(b for b in lost if not _within(b, box)), box]
        if entry is None:
            self._forget(level, index)
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

    def note(self, level: int, index: Index, boxes: Sequence[Box], digest: str, made_from: str = "") -> None:
        """Put into the journal that these parts of a shard are finished."""
        previous = self._done.get((level, index))
        before = [as_box(map(tuple, b)) for b in (previous["boxes"] if previous else [])]
        kept = [b for b in before if not any(_within(b, new) for new in boxes)]
        entry = {"level": level, "at": index, "boxes": [*kept, *boxes], "file": digest, "from": made_from}
        self.journal.add(json.loads(json.dumps(entry)))
        self._remember(self.journal.entries[-1])
        self._trusted.add((level, index))

    def file(self, level: int, index: Index) -> Path:
        """The file of a shard."""
        return shard_file(self.path, self._arrays[level], level, index)

    def made_from(self, level: int, index: Index) -> str:
        """A digest over the shards that a shard of a coarser level is made of."""
        digests = [
            self._done.get((level - 1, source), {}).get("file", "") for source in self.layout.sources(level, index)
        ]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:32]

    def coarsen(self, level: int, index: Index) -> bool:
        """Make a shard of a coarser level and note it; False if that was done already.

        A voxel has the label that most of its finer ones have; of instances, that of the first.
        """
        origin = self.made_from(level, index)
        box = self.layout.box(level, index)
        if not self.missing(level, index, box) and self._done[level, index]["from"] == origin:
            return False
        step = self.layout.step(level)
        labels = np.zeros([b - a for a, b in box], self.layout.dtype)
        for source in self.layout.sources(level, index):
            if (level - 1, source) not in self._done or not self._done[level - 1, source]["file"]:
                continue  # nothing was written there
            fine = self.layout.box(level - 1, source)
            part = coarsen_labels(np.asarray(self._arrays[level - 1][slices(fine)]), step, majority=self._majority)
            to = tuple(a // f - start for (a, _), f, (start, _) in zip(fine, step, box, strict=True))
            labels[tuple(slice(t, t + n) for t, n in zip(to, part.shape, strict=True))] = part
        self._forget(level, index)
        self.note(level, index, [box], self.write(level, box, labels), origin)
        return True

    def finish(self, region: Box) -> None:
        """Note in the metadata that a region is complete."""
        with _named_errors(self.path):
            group: Any = zarr.open_group(self.path, mode="r+")
            attributes = dict(group.attrs["distillfss"])
            regions = [r for r in attributes.get("finished", []) if not _within(as_box(map(tuple, r)), region)]
            if not any(_within(region, r) for r in regions):
                attributes["finished"] = [*regions, [list(span) for span in region]]
                group.attrs["distillfss"] = attributes

    def close(self) -> None:
        """Close the journal, and let other runs write there. What was noted is finished."""
        self.journal.close()

    def leave(self) -> None:
        """`close`; where nothing is finished, the labels are removed, as they would look like empty ones."""
        self.close()
        if not self.journal.entries and not sys.is_finalizing():
            with suppress(OutputError):
                remove_labels(self.path)
                list_in_image(self.path, is_there=False)

    def _remember(self, entry: dict[str, Any]) -> None:
        z, y, x = entry["at"]
        self._done[entry["level"], (z, y, x)] = entry

    def _forget(self, level: int, index: Index) -> None:
        self._done.pop((level, index), None)
        self._trusted.discard((level, index))
        with _named_errors(self.path):
            self.file(level, index).unlink(missing_ok=True)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        before = dict(self.journal.header.get("settings", {}))
        if "mode" in before:
            before["mode"] = _OLDER_MODES.get(before["mode"], before["mode"])
        present = dict(settings)
        old, new = before.get("volume"), present.get("volume")
        if isinstance(old, Mapping) and isinstance(new, Mapping) and {**old, _REPLACED: 0} == {**new, _REPLACED: 0}:
            before |= {"volume": new, _REPLACED: old.get(_REPLACED)}  # the same, but for pixels that are not finite
            present[_REPLACED] = new.get(_REPLACED)
        differing = [k for k in sorted({*before, *present}) if before.get(k) != present.get(k)]
        if differing:
            changes = [f"{k} ({before.get(k)}, not {present.get(k)})" if k in _TELLING else k for k in differing]
            raise SettingsError(
                f"{self.path}: was begun with another {', '.join(changes)}; "
                "give what it was begun with, or another name"
            )


def write_shard(path: Path, array: Any, layout: Layout, level: int, box: Box, labels: Array) -> str:
    """Put labels into one shard, force it to disk, and give the digest of its file ("" where nothing is in it).

    It needs no journal, so that workers elsewhere can do it; nobody else may write into this shard meanwhile.
    """
    z, y, x = (a // n for (a, _), n in zip(box, layout.shard, strict=True))
    corner = (z, y, x)
    with _named_errors(path):
        file = shard_file(path, array, level, corner)
        if not file.exists() and not labels.any():
            return ""
        array[slices(box)] = labels
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        return _file_digest(file)


def shard_file(path: Path, array: Any, level: int, index: Index) -> Path:
    """Path of the file of a shard. ``array`` is the zarr array of the level; a shard without labels has no file."""
    return path / str(level) / str(array.metadata.encode_chunk_key(index))


def check_apart(path: Path, *inputs: Path | None) -> None:
    """Labels are put nowhere where something is read, except among the labels of an image.

    Raises
    ------
    OutputError
    """
    out, image = path.resolve(), image_of(path)
    for source in inputs:
        if source is None:
            continue
        read = source.resolve()
        among = image is not None and image.resolve() == read
        if out == read or out in read.parents or (read in out.parents and not among):
            raise OutputError(f"cannot write {path}: {source} is read, and would be lost or changed; give another name")


def check_choice(*, resume: bool, overwrite: bool) -> None:
    """Refuse to go on with labels and to begin them anew at once: what is finished would be deleted.

    Raises
    ------
    SettingsError
    """
    if resume and overwrite:
        raise SettingsError(
            "resume and overwrite contradict one another: one goes on with the labels that are there, the other "
            "deletes them; give one of them"
        )


def remove_labels(path: Path) -> None:
    """Delete labels that were written from here, for another run in their place.

    They are renamed first, so that they are never half there; killed meanwhile, the next run deletes the rest.

    Raises
    ------
    OutputError
        If they are not from here, hold something else, or are being written.
    """
    if not path.exists():
        return
    if not (path / JOURNAL).is_file():
        raise OutputError(f"{path}: is there already and not from here; it is not overwritten, give another name")
    if foreign := sorted(e.name for e in path.iterdir() if not _is_of_labels(e.name)):
        raise OutputError(f"{path}: holds {foreign[0]}, which is not of these labels and would be lost; move it first")
    Journal(path / JOURNAL, {}).close()  # nobody else has it open
    with _named_errors(path):
        _remove_rest(path)
        path.rename(_renamed(path))
        _remove_rest(path)


def _is_of_labels(name: str) -> bool:
    """Whether labels have an entry of this name; what file browsers leave behind does not count."""
    return name == "zarr.json" or name.isdigit() or name.startswith(".") or name in ("Thumbs.db", "desktop.ini")


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
    attributes = zarr.open(path, mode="r", use_consolidated=False).attrs.get("distillfss")
    return [as_box(map(tuple, r)) for r in attributes.get("finished", [])] if isinstance(attributes, dict) else None


def check_finished(path: Path | None, name: str, shape: Sequence[int], region: Box | None = None) -> None:
    """Warn if a region (by default all) of labels that were written from here is not finished.

    Parameters
    ----------
    path : path or None
        Of the labels; others than those written from here are passed over.
    name : str
        For messages.
    shape : (z, y, x)
        Of level 0, in voxels.
    region : (start, stop) along z, y, x, optional

    Raises
    ------
    InputFileError
        If nothing of the labels is finished.
    """
    regions = finished_regions(path) if path else None
    if regions is None:
        return
    if not regions:
        raise InputFileError(f"{name}: nothing of it is finished; resume its segmentation first")
    box = region or as_box((0, n) for n in shape)
    inside = [overlap(box, r) for r in regions]
    ends = [sorted({*span, *(e for r in inside for e in r[k])}) for k, span in enumerate(box)]
    done = np.zeros([len(e) - 1 for e in ends], bool)
    for part in inside:
        if all(start < stop for start, stop in part):
            done[tuple(slice(e.index(a), e.index(b)) for e, (a, b) in zip(ends, part, strict=True))] = True
    if not done.all():
        z, y, x = (np.diff(e) for e in ends)
        share = (z[:, None, None] * y[:, None] * x)[done].sum() / math.prod(b - a for a, b in box)
        listed = "; ".join(
            ", ".join(f"{a} {start}:{stop}" for a, (start, stop) in zip("zyx", r, strict=True)) for r in regions
        )
        log.warning(
            "%s: only %s is finished (%.0f%% of the voxels); the rest is counted as background, resume the "
            "segmentation first to have all",
            name,
            listed,
            100 * share,
        )


def count_voxels(path: Path, region: Box, classes: int) -> list[int]:
    """How many voxels of a region of finished labels have each label 0..classes."""
    array: Any = zarr.open_array(path / "0", mode="r")
    counts = np.zeros(classes + 1, np.int64)
    for z, y, x in product(*(range(a, b, n) for (a, b), n in zip(region, array.shards, strict=True))):
        size = zip((z, y, x), array.shards, region, strict=True)
        part = np.asarray(array[tuple(slice(start, min(start + n, stop)) for start, n, (_, stop) in size)])
        counts += np.bincount(part.reshape(-1), minlength=classes + 1)[: classes + 1]
    return counts.tolist()


def _file_digest(file: Path) -> str:
    try:
        with open(file, "rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()[:32]
    except FileNotFoundError:
        return ""


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """What the file system refuses, in a line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (OutputError, InputFileError)):
            raise
        raise OutputError(
            f"cannot write {path}: {error_reason(error)}; what is finished is kept, and can be resumed"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise OutputError(
            f"{path}: cannot be written, as what is there is damaged ({' '.join(str(error).split())[:120]})"
        ) from error
