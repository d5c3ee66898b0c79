"""The instant model of a volume: it follows the annotations, in the thread of the preview. No Qt in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import distillfss_core as core
from napari_distillfss._annotations import Annotations, to_classes
from napari_distillfss._sources import OtherSlices

_Place = tuple[str, int]
"""Name of a folder of annotations, and the plane."""


@dataclass(frozen=True, eq=False)
class Others:
    """Slices of other volumes that are used.

    Parameters
    ----------
    used : sequence of OtherSlices
    missing : sequence of str
        Names of folders that cannot be read.
    layers : sequence of layers
        That are open, in which the volumes are looked for.
    """

    used: Sequence[OtherSlices] = ()
    missing: Sequence[str] = ()
    layers: Sequence[Any] = ()


class InstantAnswers:
    """The instant model of a volume, and what it has learned from; made without loading anything.

    Parameters
    ----------
    volume : core.Volume
    annotations : Annotations
        Of this volume.
    pixel_size : (float, float), optional
        Size of a pixel (y, x) in micrometers.
    version : int
        Number of the last fit of an earlier object; those of this one follow.

    Attributes
    ----------
    others : Others
        To be learned from at the next fit.
    left_out : str
        Which of them the last fit is without, and why; "" if it has learned from all.
    model : core.InstantModel or None
        None until the first fit.
    version : int
        Grows with every fit.
    """

    def __init__(
        self, volume: Any, annotations: Annotations, pixel_size: tuple[float, float] | None = None, version: int = 0
    ) -> None:
        self.volume, self.annotations, self.pixel_size = volume, annotations, pixel_size
        self.others, self.left_out = Others(), ""
        self.model: Any = None
        self.version = self._first = version
        self._slices: dict[int, tuple[Any, core.AnnotatedSlice]] = {}
        self._of_others: dict[str, tuple[Any, dict[int, core.AnnotatedSlice]]] = {}
        self._learned: Any = None  # what the last fit is of
        self._rest: tuple[list[core.AnnotatedSlice], tuple[str, ...]] | None = None  # slices and classes

    @property
    def is_behind(self) -> bool:
        """Whether the last fit is of a few parts of each slice only, and `learn_rest` takes the others."""
        return self._rest is not None

    @property
    def is_fitted(self) -> bool:
        return self.version > self._first

    def follow(self, stop: Event) -> None:
        """Fit the model to the annotations as they are now, if they have changed. Only changed planes are read.

        Where many parts of planes have to go through the backbone, a few of each slice are learned from at first.

        It stops between parts of planes that go through the backbone, which are kept, so a newer stroke loses nothing.

        Raises
        ------
        core.SupportSetError
            If nothing can be learned from them.
        core.DistillFSSError
            If a plane cannot be read.
        """
        names = self.annotations.class_names
        stamps = {s.plane: self.annotations.stamp(s.plane) for s in self.annotations.slices() if s.enabled}
        others = self._read_others(names)
        present = (names, stamps, frozenset(others.items()))
        if present == self._learned:
            return
        if not stamps and not others:
            raise core.SupportSetError("no slice is annotated; paint background and objects in one slice at least")
        self._slices = {z: (stamp, self._read(z, stamp)) for z, stamp in stamps.items()}
        if self.model is None:
            self.model = core.InstantModel(core.sample_volume(self.volume)[0])
        if stop.is_set():
            return
        slices = [*(labeled for _, labeled in self._slices.values()), *others.values()]
        self._learned = self._rest = None  # where the fit fails, the next one tries again
        quickly = self.model.takes_long(slices, names)
        if self._fit(slices, names, stop, quickly=quickly):
            self._learned, self._rest = present, (slices, names) if quickly else None

    def learn_rest(self, stop: Event) -> None:
        """Fit the model to all parts of the slices of the last fit, where that one has taken a few; stops likewise."""
        if self._rest is not None and self._fit(*self._rest, stop):
            self._rest = None

    def _fit(
        self, slices: list[core.AnnotatedSlice], names: tuple[str, ...], stop: Event, *, quickly: bool = False
    ) -> bool:
        """Fit the model; returns whether it was not stopped."""
        for _ in self.model.iter_fit(slices, names, quickly=quickly):
            if stop.is_set():
                return False
        self.version += 1
        return True

    def _read(self, z: int, stamp: Any) -> core.AnnotatedSlice:
        earlier, labeled = self._slices.get(z, (None, None))
        if labeled is not None and earlier == stamp:
            return labeled
        image = self.volume.plane(z) if labeled is None else labeled.image
        return core.AnnotatedSlice(image, to_classes(self.annotations.plane(z)), f"plane {z}")

    def _read_others(self, names: tuple[str, ...]) -> dict[_Place, core.AnnotatedSlice]:
        """Slices of other volumes on the scale of this one; those that cannot be used are left out."""
        others, slices = self.others, dict[_Place, core.AnnotatedSlice]()
        left_out = [f"{key}, which is no longer in the folder of annotations" for key in others.missing]
        for other in others.used:
            problem = other.problem(names, others.layers)
            if problem:
                left_out.append(f"{other.name}, which {problem}")
                continue
            try:
                of_plane = self._read_other(other, names)
            except core.DistillFSSError as error:
                left_out.append(f"{other.name} ({error})")
            else:
                slices |= {(other.key, z): of_plane[z] for z in other.planes if z in of_plane}
        self.left_out = f"without {'; '.join(left_out)}" if left_out else ""
        return slices

    def _read_other(self, other: OtherSlices, names: tuple[str, ...]) -> dict[int, core.AnnotatedSlice]:
        """All enabled slices of another volume by their planes, read again where its labels have changed."""
        everything = other.without(frozenset())
        stamp = (names, other.class_names, other.replace_nan, [(z, other.labels.stamp(z)) for z in everything.planes])
        earlier, slices = self._of_others.get(other.key, (None, {}))
        if earlier != stamp:
            own = core.VolumeSlices(self.volume.name, (), self.pixel_size, core.sample_volume(self.volume)[0])
            read = everything.read(self.others.layers, names, other.name)
            slices = dict(zip(everything.planes, core.match_volumes([own, read]), strict=True))
            self._of_others[other.key] = stamp, slices
        return slices
