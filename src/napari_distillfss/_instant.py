"""The instant model of a volume: it follows the annotations, in the thread of the preview. No Qt in here."""

from __future__ import annotations

from threading import Event
from typing import Any

import distillfss_core as core
from napari_distillfss._annotations import Annotations, to_classes


class InstantAnswers:
    """The instant model of a volume, and what it has learned from; made without loading anything.

    Parameters
    ----------
    volume : core.Volume
    annotations : Annotations
        Of this volume.
    version : int
        Number of the last fit of an earlier object; those of this one follow.

    Attributes
    ----------
    model : core.InstantModel or None
        None until the first fit.
    version : int
        Grows with every fit.
    """

    def __init__(self, volume: Any, annotations: Annotations, version: int = 0) -> None:
        self.volume, self.annotations = volume, annotations
        self.model: Any = None
        self.version = self._first = version
        self._slices: dict[int, tuple[Any, core.AnnotatedSlice]] = {}
        self._learned: Any = None

    @property
    def is_fitted(self) -> bool:
        return self.version > self._first

    def follow(self, stop: Event) -> None:
        """Fit the model to the annotations as they are now, if they have changed. Only changed planes are read.

        Raises
        ------
        core.SupportSetError
            If nothing can be learned from them.
        core.DistillFSSError
            If a plane cannot be read.
        """
        names = self.annotations.class_names
        stamps = {s.plane: self.annotations.stamp(s.plane) for s in self.annotations.slices() if s.enabled}
        if (names, stamps) == self._learned:
            return
        if not stamps:
            raise core.SupportSetError("no slice is annotated; paint background and objects in one slice at least")
        self._slices = {z: (stamp, self._read(z, stamp)) for z, stamp in stamps.items()}
        if self.model is None:
            self.model = core.InstantModel(core.sample_volume(self.volume)[0])
        if stop.is_set():
            return
        self._learned = None  # where the fit fails, the next one tries again
        self.model.fit([labeled for _, labeled in self._slices.values()], names)
        self._learned = (names, stamps)
        self.version += 1

    def _read(self, z: int, stamp: Any) -> core.AnnotatedSlice:
        earlier, labeled = self._slices.get(z, (None, None))
        if labeled is not None and earlier == stamp:
            return labeled
        image = self.volume.plane(z) if labeled is None else labeled.image
        return core.AnnotatedSlice(image, to_classes(self.annotations.plane(z)), f"plane {z}")
