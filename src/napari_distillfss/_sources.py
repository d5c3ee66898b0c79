"""Annotated slices of other volumes: found in their folders, and read where the volume is now. No Qt in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import distillfss_core as core
from napari_distillfss import _format as fmt
from napari_distillfss._annotations import (
    FIRST_CLASS,
    NOTES,
    PaintedLabels,
    file_of,
    is_set_aside,
    own_folder,
    read_notes,
    read_slice,
)
from napari_distillfss._layers import (
    FIRST_NAME,
    LEAD_NAMES,
    ChosenVolume,
    choose_layer,
    finest_shape,
    identity_of,
    index_of,
    is_image,
    layer_axes,
)

_CHANGED = "has changed since it was annotated"


class OtherNotFiniteError(core.NotFiniteError):
    """Slices of another volume with pixels that are not finite; ``key`` is its `OtherSlices.key`."""

    def __init__(self, text: str, key: str) -> None:
        super().__init__(text)
        self.key = key


class OtherSlices:
    """Annotated slices of a volume that is not the chosen one, as they are on disk.

    Parameters
    ----------
    folder : path
        Of its annotations.

    Attributes
    ----------
    left_out : frozenset of int
        Planes that are not used for the chosen volume.
    replace_nan : float or None
        What pixels that are not finite are read as, where the volume was annotated without a choice.

    Raises
    ------
    core.SupportSetError
        If it holds none, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left_out: frozenset[int] = frozenset()
        self.replace_nan: float | None = None
        try:
            self._version = (folder / NOTES).stat().st_mtime_ns
            notes = read_notes(folder)
            self.record: Mapping[str, Any] = notes.get("volume") or {}
            array = zarr.open_array(folder / "labels.zarr", mode="r")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise core.SupportSetError(f"{folder.name}: its annotations cannot be read ({error})") from error
        self.shape = tuple(int(n) for n in array.shape)
        axes = self.record.get("axes") or "tczyx"[-len(self.shape) :]
        self.labels = PaintedLabels(folder, array, lambda z: index_of(axes, z))

    @property
    def key(self) -> str:
        """Name of the folder, by which the slices are chosen."""
        return self.folder.name

    @property
    def name(self) -> str:
        """Of the volume, with its time point and channel: "stack.tif, time 3"."""
        lead: dict[str, int] = dict(self.record.get("lead", {}))
        channel = self.record.get("opening", {}).get("channel")
        if isinstance(channel, int):  # also of a layer that shows this channel alone
            lead.setdefault("c", channel)
        parts = [str(self.record.get("name") or self.folder.name.rpartition("-")[0])]
        return ", ".join([*parts, *(f"{LEAD_NAMES[a]} {n}" for a, n in lead.items())])

    @property
    def planes(self) -> list[int]:
        """Numbers of the annotated planes that are used, ascending."""
        return [z for z in self.labels.enabled() if z not in self.left_out]

    def without(self, planes: frozenset[int]) -> OtherSlices:
        """The same slices without those of these planes."""
        result = copy(self)
        result.left_out = planes
        return result

    @property
    def is_current(self) -> bool:
        """Whether its classes and disabled planes are still those on disk."""
        with suppress(OSError):
            return (self.folder / NOTES).stat().st_mtime_ns == self._version
        return False

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.labels.class_names

    def problem(self, class_names: Sequence[str], layers: Sequence[Any]) -> str:
        """Why the slices cannot be used with these classes and open layers; "" where nothing is known against it."""
        missing = [name for name in self.class_names if name not in class_names]
        if missing:
            return f"has the class {missing[0]!r}, which this volume has not; add it, or rename a class"
        if not self.record:
            return "was annotated by an older version; open it once"
        location = self.record["location"]
        if any(self._is_name_of(layer) for layer in layers) or (location and _is_there(str(location))):
            return ""
        return f"is no longer at {location}" if location else "is no file, and not open here"

    def open(self, layers: Sequence[Any]) -> Any:
        """The volume (core.Volume): of an open layer, or of its file.

        Raises
        ------
        core.SupportSetError
            If it is in neither, or has changed since it was annotated.
        """
        for layer in layers:
            if self._is_name_of(layer):
                for chosen in self._levels_of(layer):
                    if self._is_of(chosen.identity):
                        return chosen.volume
        has_name = any(self._is_name_of(layer) for layer in layers)
        problem = self.problem(self.class_names, ())
        if problem:
            raise core.SupportSetError(self._left_out(_CHANGED if has_name else problem))
        try:
            opening = {"replace_nan": self.replace_nan, **self.record["opening"]}
            volume = core.open_volume(self.record["location"], **opening)
        except core.DistillFSSError as error:
            raise core.SupportSetError(self._left_out(f"cannot be opened ({error})")) from error
        if not self._is_of(identity_of(volume, self.record["lead"], self.record["factors"])):
            raise core.SupportSetError(self._left_out(_CHANGED))
        return volume

    def read(self, layers: Sequence[Any], class_names: Sequence[str], name: str) -> core.VolumeSlices:
        """The slices with their images and the numbers of these classes.

        Raises
        ------
        core.DistillFSSError
            If the volume is missing, has other classes, or cannot be read; an OtherNotFiniteError where pixels are not
            finite.
        """
        problem = self.problem(class_names, layers)
        if problem:
            raise core.SupportSetError(self._left_out(problem))
        volume, numbers = self.open(layers), np.arange(256, dtype=np.uint8)
        for own, class_name in enumerate(self.class_names, FIRST_CLASS - 1):
            numbers[own] = list(class_names).index(class_name) + FIRST_CLASS - 1
        try:
            slices = [read_slice(volume, self.labels, z, f"{name}, plane {z}") for z in self.planes]
        except core.NotFiniteError as error:
            raise OtherNotFiniteError(str(error), self.key) from error
        slices = [replace(s, labels=numbers[s.labels]) for s in slices]
        size = self.record["pixel_size"]
        return core.VolumeSlices(name, slices, tuple(size) if size else None, core.sample_volume(volume)[0])

    def _left_out(self, problem: str) -> str:
        count = fmt.count(len(self.planes), "slice")
        return f"{self.name}: {problem}. Its {count} would be left out; untick it under Other volumes…, or open it"

    def _is_name_of(self, layer: Any) -> bool:
        return is_image(layer) and layer.metadata.get(FIRST_NAME, layer.name) == self.record.get("name")

    def _levels_of(self, layer: Any) -> Iterator[ChosenVolume]:
        """The layer's volumes with this time, channel and size of voxels."""
        lead = self.record["lead"]
        with suppress(core.DistillFSSError):
            sizes = dict(zip(layer_axes(layer), finest_shape(layer), strict=False))
            if {a for a in sizes if a in LEAD_NAMES} == set(lead) and all(n < sizes[a] for a, n in lead.items()):
                for level in range(len(layer.data) if layer.multiscale else 1):
                    chosen = choose_layer(layer, lead=lead, level=level, replace_nan=self.replace_nan)
                    if list(chosen.factors) == self.record["factors"]:
                        yield chosen

    def _is_of(self, identity: Mapping[str, Any]) -> bool:
        """Whether a grid of voxels with this identity is the one that was annotated."""
        own = own_folder(self.folder.parent, str(self.record["name"]), identity, self.shape).name
        number = self.folder.name.removeprefix(own)
        return number == "" or (number[0] == "-" and number[1:].isdecimal())  # of a second window


def other_slices(root: Path, own: Path) -> list[OtherSlices]:
    """Annotated slices of all volumes but the one with the folder ``own``, the latest first."""
    folders = [p.parent for p in root.glob(f"*/{NOTES}") if p.parent != own and not is_set_aside(p.parent)]
    others = []
    for folder in sorted(folders, key=lambda f: (f / NOTES).stat().st_mtime_ns, reverse=True):
        with suppress(core.SupportSetError):  # nothing was painted, or it is damaged
            others.append(OtherSlices(folder))
    return [other for other in others if other.labels.enabled()]


def support_of(
    own: Callable[[], core.VolumeSlices], others: Sequence[OtherSlices], layers: Sequence[Any], names: Sequence[str]
) -> core.SupportSet:
    """Read the annotated slices of the chosen volume and of others as one support set, in the order of their files.

    Raises
    ------
    core.DistillFSSError
        If one of them cannot be read, or they make no support set.
    """
    volumes, taken = [own()], set[str]()
    for other in (o for o in others if o.planes):
        name, number = other.name, 1
        while file_of(f"{name}, plane 0") in taken:
            number += 1
            name = f"{other.name} ({number})"
        taken.add(file_of(f"{name}, plane 0"))
        volumes.append(other.read(layers, names, name))
    support = core.join_volumes(volumes, names)
    return replace(support, slices=sorted(support.slices, key=lambda s: file_of(s.source)))


def _is_there(location: str) -> bool:
    return "://" in location or Path(location).exists()
