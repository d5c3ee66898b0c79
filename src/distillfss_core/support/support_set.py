"""Sets of annotated slices, validated when they are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distillfss_core.errors import SettingsError, SupportSetError
from distillfss_core.types import IGNORE, MAX_CLASSES, AnnotatedSlice, Array

if TYPE_CHECKING:
    from distillfss_core.labelstore.layout import Part


@dataclass(frozen=True, eq=False)
class SupportSet:
    """Annotated slices of one task, validated when the set is made.

    Parameters
    ----------
    slices : sequence of AnnotatedSlice
        At least one. Labels: 0 background, 1..K classes, IGNORE not annotated.
    class_names : sequence of str
        Names of classes 1..K; they differ, and none is "background".
    pixel_size : (float, float), optional
        Size of a pixel (y, x) in micrometers, kept on the model's card.
    planes_of_one_volume : bool
        Whether the slices are planes of one acquisition: intensity limits are then shared.

    Raises
    ------
    SupportSetError
        Without slices; if a class has no pixel in any slice; if a label is beyond the classes; if a slice has
        nothing annotated; if nothing but objects is annotated anywhere; if a name or the pixel size is not possible.
    """

    slices: Sequence[AnnotatedSlice]
    class_names: Sequence[str] = ("object",)
    pixel_size: tuple[float, float] | None = None
    planes_of_one_volume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "slices", tuple(self.slices))
        object.__setattr__(self, "class_names", check_class_names(self.class_names))
        check_pixel_size(self.pixel_size)
        if not self.slices:
            raise SupportSetError("the support set is empty; annotate at least one slice")
        counts = np.stack([count_labels(s.labels) for s in self.slices])
        values = len(self.class_names) + 1
        for labeled, row in zip(self.slices, counts, strict=True):
            beyond = np.flatnonzero(row[values:IGNORE]) + values
            if len(beyond):
                raise SupportSetError(
                    f"{labeled.source}: label {beyond[0]} has no class name; there are {values - 1} classes "
                    f"({', '.join(self.class_names)})"
                )
            if not row[:values].sum():
                raise SupportSetError(f"{labeled.source}: nothing is annotated; paint something or leave it out")
        totals = counts[:, :values].sum(0)
        for name, total in zip(self.class_names, totals[1:], strict=True):
            if not total:
                raise SupportSetError(
                    f"no slice has a pixel of class {name!r}; paint some, or leave the class out "
                    f"({len(self.slices)} slices looked at)"
                )
        if not totals[0]:
            raise SupportSetError("no pixel is labeled background; paint some background too, or scribble it")

    @property
    def classes(self) -> int:
        """K, without background."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.slices)

    def shown_once(self) -> np.ndarray:
        """Whether a slice is the only one with a class (background first). Shape (n, k + 1), bool."""
        shown = np.stack([count_labels(s.labels)[: self.classes + 1] for s in self.slices]) > 0
        return np.asarray(shown & (shown.sum(0) == 1))

    def shares(self) -> np.ndarray:
        """Share of the annotated pixels that each class (background first) has, over all slices. Shape (k + 1,)."""
        counts = np.sum([count_labels(s.labels)[: self.classes + 1] for s in self.slices], axis=0)
        return np.asarray(counts / counts.sum())


def check_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of classes 1..K as a tuple.

    Raises
    ------
    SupportSetError
        If they are one text, too many, not different, or one is empty or "background".
    """
    if isinstance(names, str):
        raise SupportSetError(f"class names {names!r} are one text; give a list of names, such as [{names!r}]")
    if not 1 <= len(names) <= MAX_CLASSES:
        raise SupportSetError(f"a support set has 1 to {MAX_CLASSES} classes, this one {len(names)}")
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise SupportSetError(f"class names must differ and not be empty, got {list(names)}")
    if "background" in names:
        raise SupportSetError("a class is named 'background', which stands for label 0; give it another name")
    return tuple(names)


def check_pixel_size(size: Any) -> None:
    """Check that the size of a pixel is None, or two positive numbers (y, x) of micrometers.

    Raises
    ------
    SupportSetError
    """
    if size is None:
        return
    try:
        is_possible = len(size) == 2 and all(0 < float(side) < math.inf for side in size)
    except (TypeError, ValueError):
        is_possible = False
    if not is_possible:
        raise SupportSetError(
            f"pixel size {size!r} is not possible; give height and width in micrometers, e.g. (0.25, 0.25)"
        )


def count_labels(labels: Array) -> Array:
    """Pixels of each of the 256 labels; block by block, since bincount works on eight-byte copies."""
    flat = labels.reshape(-1)
    blocks = (flat[i : i + (1 << 20)] for i in range(0, flat.size, 1 << 20))
    result: Array = np.sum([np.bincount(block, minlength=IGNORE + 1) for block in blocks], axis=0)
    return result


def load_support(
    images: str | Path,
    labels: str | Path,
    *,
    planes: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    scribbles: bool = False,
    pixel_size: tuple[float, float] | None = None,
    same_volume: bool = False,
    binary_threshold: float | None = None,
    region: Part | None = None,
    **opening: Any,
) -> SupportSet:
    """Read annotated slices from files.

    Parameters
    ----------
    images, labels : path
        Two folders paired by file stem, two single files, two stacks (z y x), or two volumes of any kind that
        `open_volume` reads. Of volumes, only the slices are read.
    planes : sequence of int, optional
        Which planes of the stacks; by default those with any label.
    classes : sequence of str, optional
        Names of label values 1, 2, ...; by default every value but 0 is the one class "object".
    scribbles : bool
        Label values mean: 0 not annotated, 1 background, 2, 3, ... the classes.
    pixel_size : (float, float), optional
        Size of a pixel (y, x) in micrometers.
    same_volume : bool
        The files are planes of one volume, as those of one stack are anyway: they share intensity limits and get
        more steps.
    binary_threshold : float, optional
        The labels are masks of gray values, also as JPEG: from this value on a pixel is object.
    region : ((start, stop),) * 3, optional
        Part of a volume along z, y, x; ends may be None. Slices are its planes, cut to it along y and x.
    **opening
        ``axes``, ``level``, ``channel``, ``time``, ``series`` and ``replace_nan`` of the image volume, as for
        `open_volume`. Labels are taken at the level that has the size of the image.

    Raises
    ------
    InputFileError, ImageError, SupportSetError
        Each with one line that names the file and the value.
    """
    from distillfss_core.io.labels import check_threshold, load_pair
    from distillfss_core.support.label_volumes import are_images, check_no_threshold, load_volume_slices, pair_volumes

    names = check_class_names(classes or ("object",))
    check_pixel_size(pixel_size)
    mode = "scribbles" if scribbles else "classes" if classes else "binary"
    check_threshold(mode, binary_threshold)
    images, labels = Path(images), Path(labels)
    opening = {name: value for name, value in opening.items() if value is not None}
    pairs = pair_volumes(images, labels)
    if planes is not None and pairs != [(images, labels)]:
        raise SettingsError(f"planes are given, but {images} is a folder; give one stack and its labels")
    slices: list[AnnotatedSlice] = []
    of_stack = False
    for image, label in pairs:
        if are_images(image, label) and not opening and region is None:
            annotated, of_stack = load_pair(
                image, label, planes, mode, len(names), binary_threshold, in_folder=images.is_dir()
            )
        else:
            check_no_threshold(label, binary_threshold)
            annotated, of_stack = load_volume_slices(
                image, label, planes=planes, mode=mode, n_classes=len(names), region=region, opening=opening
            )
        slices += annotated
    return SupportSet(tuple(slices), names, pixel_size, same_volume or (of_stack and len(pairs) == 1))
