"""Tasks from real images, with labels or with superpixels as objects.

A *set* is a folder of pictures of one kind. A task draws its set first, so that a set of thousands weighs no more than
one of six, then what its object is, then where to look.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from skimage.segmentation import felzenszwalb, slic

from distillfss_core.errors import ImageError, InputFileError, SettingsError
from distillfss_core.io.images import READABLE, TIFF_SUFFIXES, read_image, read_stack
from distillfss_core.io.labels import pair_files, read_label_stack
from distillfss_core.metatraining import optics
from distillfss_core.metatraining.task import F32, U8, Task
from distillfss_core.types import IGNORE, Array, check_image

log: logging.Logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
Bool = npt.NDArray[np.bool_]
Degrade = Callable[..., F32]

SUPERPIXEL_TASKS = 0.15
COMPLEMENT_TASKS = 0.15
ON_OBJECT = 0.8
SMALLEST_SIDE = 16
SHRUNK = 192
"""Longest side of the picture that superpixels are found on."""


@dataclass(frozen=True)
class _Set:
    name: str
    files: tuple[tuple[Path, Path | None], ...]
    """Image and label files; either all have labels or none has."""
    description: dict[str, Any]

    @property
    def labeled(self) -> bool:
        return self.files[0][1] is not None


@dataclass(frozen=True, eq=False)
class _Pixels:
    """A decoded file: images (z y x c), c 1 or 3, and labels (z y x) where there are any."""

    images: U8
    labels: U8 | None

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + (0 if self.labels is None else self.labels.nbytes)


@dataclass(frozen=True, eq=False)
class _Index:
    """Images of a set: the file and plane of each (n 2), and the number of pixels of each label (n 256).

    ``masks``: the set's labels hold 0 and 255 alone, so 255 is the object; ``counts`` has it as class 1.
    """

    where: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    masks: bool = False

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.counts[:, 1:IGNORE].any(0)) + 1


@dataclass(frozen=True)
class _Variation:
    """Properties that all images of a task share."""

    gray: bool
    inverted: bool
    stretched: bool
    strength: float


@dataclass(frozen=True)
class _Box:
    """A square of an image; it may reach over the border."""

    y: int
    x: int
    side: int

    def overlap(self, other: _Box) -> float:
        """Shared area over the area of the smaller."""
        dy = min(self.y + self.side, other.y + other.side) - max(self.y, other.y)
        dx = min(self.x + self.side, other.x + other.side) - max(self.x, other.x)
        return max(dy, 0) * max(dx, 0) / min(self.side, other.side) ** 2


class RealSource:
    """Few-shot tasks cut from folders of real images.

    Parameters
    ----------
    folders : sequence of path, or of (images path, labels path)
        Each a set (holds ``images/`` and, if there are labels, ``labels/``), a folder of sets, a folder of pictures
        without labels, or a pair of folders. Files belong together as `distillfss_core.io.labels.pair_files` says.
        Labels are 0 for the rest, 1.. for classes, 255 where nothing is known; but in a set whose labels hold 0 and
        255 alone (masks), 255 is the object. A stack counts as many pictures.
    holdout : sequence of str
        Names of sets to leave out, e.g. to validate on.
    memory : int
        Bytes of decoded pictures to keep; those used longest ago are dropped first.
    degrade : callable, optional
        As `distillfss_core.metatraining.optics.degrade`.

    Raises
    ------
    InputFileError
        If a folder is missing or holds no picture.
    SettingsError
        If a name of ``holdout`` is unknown, no set is left, or two sets have one name.
    """

    def __init__(
        self,
        folders: Sequence[PathLike | tuple[PathLike, PathLike]],
        *,
        holdout: Sequence[str] = (),
        memory: int = 2 * 2**30,
        degrade: Degrade = optics.degrade,
    ) -> None:
        sets = [dataset for folder in folders for dataset in _sets_in(folder)]
        if not sets:
            raise SettingsError("no folder of pictures is given; give at least one")
        names = [dataset.name for dataset in sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SettingsError(f"two sets have the name {twice[0]!r}; rename one of the folders")
        unknown = [name for name in holdout if name not in names]
        if unknown:
            raise SettingsError(f"there is no set {unknown[0]!r} to keep out; there are: {', '.join(names)}")
        self._sets = [dataset for dataset in sets if dataset.name not in holdout]
        if not self._sets:
            raise SettingsError(f"all sets are kept out ({', '.join(names)}); leave one in")
        self._degrade = degrade
        self._memory = memory
        self._kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._bytes = 0
        self._indices: dict[int, _Index] = {}

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the sets that tasks are drawn from."""
        return tuple(dataset.name for dataset in self._sets)

    def licenses(self) -> list[dict[str, str | int]]:
        """What a model card has to say of each set: name, what, license, repo, citation, pictures.

        Texts are those of the set's ``SOURCE.json``, empty where there is none.
        """
        rows = []
        for i, dataset in enumerate(self._sets):
            row: dict[str, str | int] = {"name": dataset.name}
            for key, other in (("what", ""), ("license", "licence"), ("repo", ""), ("citation", "cite")):
                row[key] = str(dataset.description.get(key, dataset.description.get(other, "")))
            row["pictures"] = sum(self._planes(i, k) for k in range(len(dataset.files)))
            rows.append(row)
        return rows

    def task(self, seed: int | Sequence[int], *, n_images: int = 4, size: int = 256) -> Task:
        """Draw a task; the same seed and files give the same task.

        Parameters
        ----------
        seed : int or sequence of int
            As `numpy.random.default_rng` takes it.
        n_images : int
            At least 2. Two of them at least show the object.
        size : int
            Height and width of an image in pixels, at least 32.

        Returns
        -------
        Task
            Its ``source`` is "real/<set>", or "real/<set>/superpixel" where the object is a pseudo-class [1]_
            (section 3.2).

        Raises
        ------
        SettingsError
            If ``n_images`` or ``size`` is too small.

        References
        ----------
        .. [1] Ouyang, Biffi, Chen, Kart, Qiu, Rueckert, "Self-Supervision with Superpixels: Training Few-shot Medical
           Image Segmentation without Annotation", ECCV 2020.
        InputFileError, ImageError
            If a file that is drawn cannot be read, or its labels do not fit.
        """
        if n_images < 2 or size < 32:
            raise SettingsError(
                f"n_images is {n_images} and size is {size}; give at least 2 images of at least 32 pixels"
            )
        rng = np.random.default_rng(seed)
        i = int(rng.integers(len(self._sets)))
        index = self._index(i)
        superpixels = rng.random() < SUPERPIXEL_TASKS or not len(index.classes)
        variation = _Variation(
            gray=rng.random() < 0.3,
            inverted=rng.random() < 0.1,
            stretched=rng.random() < 0.5,
            strength=float(rng.uniform(0.25, 0.75)),
        )
        draw = self._superpixel_crops if superpixels else self._class_crops
        images, labels = draw(rng, i, index, variation, n_images, size)
        return Task(images, labels, f"real/{self._sets[i].name}" + ("/superpixel" if superpixels else ""))

    # Tasks of classes

    def _class_crops(
        self, rng: np.random.Generator, i: int, index: _Index, variation: _Variation, n_images: int, size: int
    ) -> tuple[U8, U8]:
        table = _draw_object(rng, index.counts)
        if index.masks:
            table[IGNORE] = table[1]
        where, counts = index.where, index.counts
        amount = counts[:, table == 1].sum(1)
        volumes, planes = np.unique(where[amount > 0, 0], return_counts=True)
        if (planes > 1).any() and rng.random() < 0.7:  # the slices of a support set are mostly of one volume
            inside = where[:, 0] == rng.choice(volumes[planes > 1])
            where, counts, amount = where[inside], counts[inside], amount[inside]
        holding = np.flatnonzero(amount > min(16, amount.max() - 1))
        empty = _truly_empty(counts, table == 1)
        on = rng.random(n_images) < ON_OBJECT
        on[rng.permutation(np.flatnonzero(~on))[: max(0, 2 - on.sum())]] = True
        pictures = np.resize(rng.permutation(holding), n_images)
        shape = self._pixels(i, int(where[pictures[0], 0])).images.shape[1:3]
        side = _base_side(rng, shape, int(amount[pictures[0]]), size)
        turns = rng.integers(0, 8, n_images)
        if rng.random() < 0.5:  # which way is up may matter to what the object is
            turns[:] = turns[0]
        images = np.empty((n_images, size, size, 3), np.uint8)
        labels = np.empty((n_images, size, size), np.uint8)
        used: list[tuple[int, _Box]] = []
        for v in range(n_images):
            picture = int(pictures[v])
            if not on[v] and len(empty) and rng.random() < 0.4:
                picture = int(rng.choice(empty))
            file, plane = (int(n) for n in where[picture])
            pixels = self._pixels(i, file)
            assert pixels.labels is not None
            image, mask = pixels.images[plane], table[pixels.labels[plane]]
            box = _draw_box(rng, image, mask, side, bool(on[v]), [b for p, b in used if p == picture])
            used.append((picture, box))
            images[v] = self._finish(
                _turn(_resized(_cut(image, box), size), int(turns[v])),
                image,
                variation,
                self._spread(i, file, plane),
                rng,
            )
            labels[v] = _turn(_resized_labels(_cut(mask, box), size), int(turns[v]))
        return images, labels

    # Tasks of superpixels

    def _superpixel_crops(
        self, rng: np.random.Generator, i: int, index: _Index, variation: _Variation, n_images: int, size: int
    ) -> tuple[U8, U8]:
        file, plane = (int(n) for n in index.where[rng.integers(len(index.where))])
        image = self._pixels(i, file).images[plane]
        kind = int(rng.choice(4, p=(0.3, 0.3, 0.2, 0.2)))
        regions, means = self._superpixels(i, file, plane, kind)
        smallest, largest = _side_limits(image.shape[:2], size)
        side = float(np.exp(rng.uniform(np.log(smallest * 1.2), np.log(max(largest * 0.8, smallest * 1.25)))))
        crop = side * max(regions.shape) / max(image.shape[:2])
        mask = _scaled_up(_grow_object(rng, regions, means, crop**2), image.shape[:2])
        images = np.empty((n_images, size, size, 3), np.uint8)
        labels = np.empty((n_images, size, size), np.uint8)
        ys, xs = np.nonzero(mask)
        middle = int(np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2))
        center = np.array([ys[middle], xs[middle]])  # in the object even if that is a ring
        wide = round(size * 1.4)
        for v in range(n_images):
            reach = side * rng.uniform(0.8, 1.25)
            y, x = center + rng.uniform(-0.2, 0.2, 2) * reach - reach / 2
            over = int(0.15 * reach)  # so that an object at the border is not always at that of the image
            y, x = (
                _placed(int(start) + over, int(reach), length + 2 * over) - over
                for start, length in zip((y, x), image.shape[:2], strict=True)
            )
            # A margin for turns and warps.
            box = _Box(y - int(0.2 * reach), x - int(0.2 * reach), int(1.4 * reach))
            turn = int(rng.integers(0, 8))
            mesh = _draw_mesh(rng, wide, size)
            cutout = _turn(_warped(_resized(_cut(image, box), wide), mesh, size), turn)
            inside = _warped(_resized(_cut(mask * np.uint8(255), box)[..., None], wide), mesh, size)[..., 0]
            light = (cutout.astype(np.float32) / 255) ** np.float32(np.exp(rng.uniform(-0.35, 0.35)))
            cutout = np.rint(np.clip(light * rng.uniform(0.8, 1.15) + rng.uniform(-0.06, 0.06), 0, 1) * 255)
            images[v] = self._finish(cutout.astype(np.uint8), image, variation, self._spread(i, file, plane), rng)
            labels[v] = _turn(_above(inside), turn)
        return images, labels

    def _superpixels(self, i: int, file: int, plane: int, kind: int) -> tuple[npt.NDArray[np.int64], F32]:
        """Superpixels of a shrunk picture (y x), and the mean color of each (n 3)."""
        key = (i, file, plane, "superpixels", kind)
        if (kept := self._recall(key)) is None:
            image = self._pixels(i, file).images[plane]
            scale = SHRUNK / max(image.shape[:2])
            shape = (max(8, round(image.shape[0] * scale)), max(8, round(image.shape[1] * scale)))
            small = np.repeat(_scaled(image, shape), 4 - image.shape[-1], -1)[..., :3]
            regions = np.zeros(shape, np.int64)
            if kind < 3:
                regions = felzenszwalb(small, scale=(50, 150, 400)[kind], sigma=0.8, min_size=40)
            if regions.max() == 0:  # also where all is one: its pieces are as good a pseudo-class
                regions = slic(small, n_segments=60, compactness=8, start_label=0)
            kept = regions.astype(np.int16), _region_means(regions, small)
            self._keep(key, kept, kept[0].nbytes + kept[1].nbytes)
        return kept[0].astype(np.int64), kept[1]

    # Light

    def _finish(
        self, crop: U8, picture: U8, variation: _Variation, spread: tuple[float, float], rng: np.random.Generator
    ) -> U8:
        """The image (y x c) as a camera might have seen it, (y x 3)."""
        light: F32 = crop.astype(np.float32) / np.float32(255)
        low, high = spread
        if variation.stretched and high - low > 0.03:
            light = np.clip((light - np.float32(low)) / np.float32(high - low), 0, 1)
        if variation.gray and light.shape[-1] == 3:
            light = light @ np.array([[0.299], [0.587], [0.114]], np.float32)
        if variation.inverted:
            light = np.float32(1) - light
        if light.shape[-1] == 1:
            light = np.repeat(light, 3, -1)
        light = self._degrade(np.ascontiguousarray(light, np.float32), rng, strength=variation.strength)
        return np.rint(np.clip(light, 0, 1) * 255).astype(np.uint8)

    def _spread(self, i: int, file: int, plane: int) -> tuple[float, float]:
        """Percentiles 0.5 and 99.5 of a picture, 0..1."""
        key = (i, file, plane, "spread")
        if (kept := self._recall(key)) is None:
            image = self._pixels(i, file).images[plane]
            share = np.cumsum(np.bincount(image[::2, ::2].ravel(), minlength=256)) / image[::2, ::2].size
            kept = tuple(float(np.searchsorted(share, q)) / 255 for q in (0.005, 0.995))
            self._keep(key, kept, 100)
        result: tuple[float, float] = kept
        return result

    # Files

    def _index(self, i: int) -> _Index:
        if i not in self._indices:
            where, counts = [], []
            for k, (_, labels) in enumerate(self._sets[i].files):
                if labels is None:
                    planes = [np.zeros(256, np.int64)] * self._planes(i, k)
                else:
                    planes = [np.bincount(plane.ravel(), minlength=256) for plane in _read_classes(labels)]
                where += [(k, z) for z in range(len(planes))]
                counts += planes
            index = _index_of(np.array(where, np.int64), np.array(counts, np.int64))
            if self._sets[i].labeled and not len(index.classes):
                log.warning("%s: its labels hold no class; only superpixels are drawn from it", self._sets[i].name)
            self._indices[i] = index
        return self._indices[i]

    def _planes(self, i: int, file: int) -> int:
        stacked = (*TIFF_SUFFIXES, ".npy")
        return len(self._pixels(i, file).images) if self._sets[i].files[file][0].suffix.lower() in stacked else 1

    def _pixels(self, i: int, file: int) -> _Pixels:
        if (kept := self._recall((i, file))) is None:
            kept = _read_pixels(*self._sets[i].files[file])
            self._keep((i, file), kept, kept.nbytes)
        result: _Pixels = kept
        return result

    def _recall(self, key: tuple[Any, ...]) -> Any:
        entry = self._kept.pop(key, None)
        if entry is None:
            return None
        self._kept[key] = entry  # now the one used last
        return entry[0]

    def _keep(self, key: tuple[Any, ...], value: Any, nbytes: int) -> None:
        if nbytes > self._memory:
            return
        self._kept[key] = (value, nbytes)
        self._bytes += nbytes
        while self._bytes > self._memory and self._kept:
            self._bytes -= self._kept.popitem(last=False)[1][1]


# What there is


def _sets_in(folder: PathLike | tuple[PathLike, PathLike]) -> list[_Set]:
    if isinstance(folder, tuple):
        images, labels = Path(folder[0]), Path(folder[1])
        name = images.resolve().parent.name if images.name == "images" else images.resolve().name
        return [_Set(name, tuple(pair_files(images, labels)), _description(images.parent))]
    folder = Path(folder)
    if not folder.exists():
        raise InputFileError(f"{folder}: no such folder; check the name")
    if not folder.is_dir():
        raise InputFileError(f"{folder}: is a file; give a folder of images and labels")
    if (folder / "images").is_dir():
        return [_set_of(folder)]
    inner = sorted(f for f in folder.iterdir() if (f / "images").is_dir())
    if inner:
        return [_set_of(f) for f in inner]
    return [_Set(folder.resolve().name, _unlabeled(folder), _description(folder))]


def _set_of(folder: Path) -> _Set:
    images, labels = folder / "images", folder / "labels"
    files = tuple(pair_files(images, labels)) if labels.is_dir() else _unlabeled(images)
    return _Set(folder.resolve().name, files, _description(folder))


def _unlabeled(folder: Path) -> tuple[tuple[Path, None], ...]:
    files = [f for f in sorted(folder.iterdir()) if f.suffix.lower() in READABLE and not f.name.startswith(".")]
    if not files:
        raise InputFileError(f"{folder}: no picture in this folder; put images/ and labels/ there, or pictures")
    return tuple((file, None) for file in files)


def _description(folder: Path) -> dict[str, Any]:
    path = folder / "SOURCE.json"
    if not path.is_file():
        return {}
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputFileError(f"{path}: is no JSON ({' '.join(str(error).split())}); mend or remove it") from error
    return description if isinstance(description, dict) else {}


def _read_classes(path: Path) -> U8:
    """Labels (z y x)."""
    numbers = read_label_stack(path)
    if int(numbers.max()) > IGNORE:
        raise ImageError(
            f"{path}: holds the label {int(numbers.max())}, classes are 1..254 and {IGNORE} is not annotated; "
            "if the numbers count objects, write 1 for all of a class"
        )
    return numbers.astype(np.uint8)


def _read_pixels(image: Path, labels: Path | None) -> _Pixels:
    classes = None if labels is None else _read_classes(labels)
    # A .npy file of three axes is a stack only if its labels are.
    planes = read_image(image)[None] if classes is not None and len(classes) == 1 else read_stack(image)
    if labels is not None and classes is not None:
        if len(classes) != len(planes):
            raise ImageError(f"{labels}: has {len(classes)} planes, {image.name} has {len(planes)}; give one for each")
        if classes.shape[1:] != planes.shape[1:3]:
            sizes = [" x ".join(map(str, shape)) for shape in (classes.shape[1:], planes.shape[1:3])]
            raise ImageError(f"{labels}: is {sizes[0]} but {image.name} is {sizes[1]} (y x x); give labels of its size")
    if min(planes.shape[1:3]) < SMALLEST_SIDE:
        shape = " x ".join(map(str, planes.shape[1:3]))
        raise ImageError(
            f"{image}: is {shape} pixels; pictures of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} can be used"
        )
    for plane in planes:
        check_image(plane, str(image))
    return _Pixels(_as_bytes(planes), classes)


def _as_bytes(planes: Array) -> U8:
    """Planes (z y x) or (z y x c) of any dtype as uint8 (z y x 1) or (z y x 3)."""
    if planes.ndim == 3:
        planes = planes[..., None]
    planes = planes[..., :3]
    if planes.dtype == bool:
        planes = planes.astype(np.uint8) * np.uint8(255)
    elif planes.dtype != np.uint8:
        sample = planes[:: max(1, len(planes) // 16), ::2, ::2]
        low, high = np.percentile(sample, (0.5, 99.5))
        span = max(float(high - low), 1e-12)
        out = np.empty(planes.shape, np.uint8)
        for plane, target in zip(planes, out, strict=True):  # plane by plane: little memory at any depth
            target[...] = np.rint(np.clip((plane.astype(np.float32) - low) / span, 0, 1) * 255)
        planes = out
    if planes.shape[-1] == 2:
        planes = np.concatenate([planes, np.zeros_like(planes[..., :1])], -1)
    if planes.shape[-1] == 3 and all((p[..., 1:] == p[..., :1]).all() for p in planes):
        planes = planes[..., :1]
    return np.ascontiguousarray(planes)


# What the object is


def _index_of(where: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> _Index:
    """The index, with 255 counted as class 1 where it cannot but be the object."""
    index = _Index(where, counts)
    # Labels of 255 alone are no masks: there nothing is known.
    if len(index.classes) or not counts[:, 0].any() or not counts[:, IGNORE].any():
        return index
    counts = counts.copy()
    counts[:, 1], counts[:, IGNORE] = counts[:, IGNORE], 0
    return _Index(where, counts, masks=True)


def _draw_object(rng: np.random.Generator, counts: npt.NDArray[np.int64]) -> U8:
    """Table (256,) from the set's labels to 1 object, 0 rest, IGNORE; ``counts`` is (n 256)."""
    holds = counts > 0
    classes = np.flatnonzero(holds[:, 1:IGNORE].any(0)) + 1
    first = int(rng.choice(classes))
    # Classes that never meet may be those of two annotations, each silent on the other's class.
    others = [int(c) for c in classes if c != first and (holds[:, c] & holds[:, first]).any()]
    chosen = [first]
    if others and rng.random() < 0.4:
        chosen += rng.permutation(others)[: rng.integers(1, len(others) + 1)].tolist()
    table = np.zeros(256, np.uint8)
    table[chosen] = 1
    near = counts[holds[:, chosen].any(1)]
    annotated = near[:, :IGNORE].sum()
    share = near[:, chosen].sum() / annotated
    if (rng.random() < COMPLEMENT_TASKS and 0.05 <= 1 - share <= 0.7) or share > 0.8:
        table = 1 - table
    table[IGNORE] = IGNORE
    return table


def _truly_empty(counts: npt.NDArray[np.int64], inside: Bool) -> npt.NDArray[np.int64]:
    """Pictures without the object whose annotation would have shown it: they share a label with one that has it."""
    holds = counts > 0
    has = holds[:, inside].any(1)
    classes = holds & ~inside
    classes[:, [0, IGNORE]] = False
    met = classes[has].any(0)
    fits = (classes & met).any(1) | ~classes.any(1)
    return np.flatnonzero(~has & fits & (counts[:, :IGNORE].sum(1) > 0))


def _grow_object(rng: np.random.Generator, regions: npt.NDArray[np.int64], means: F32, area: float) -> Bool:
    """A superpixel, or some that touch, of 1 to 40 % of ``area`` pixels: of five, the one most like a thing.

    That is one whose color stands out from what is round it, and no thin rim. ``regions`` (y x), ``means`` (n 3).
    """
    count = len(means)
    sizes = np.bincount(regions.ravel(), minlength=count)
    pairs = np.concatenate(
        [
            np.stack([regions[:, 1:].ravel(), regions[:, :-1].ravel()], 1),
            np.stack([regions[1:].ravel(), regions[:-1].ravel()], 1),
        ]
    )
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    touch = np.zeros((count, count), bool)
    touch[pairs[:, 0], pairs[:, 1]] = True
    touch |= touch.T
    allowed = sizes <= 0.4 * area
    dull = (means.max(1) < 8) | (means.min(1) > 247)  # the black frame of a scan, the glass beside the tissue
    for choice in (allowed & ~dull, allowed, sizes == sizes.min()):
        if choice.any():
            allowed = np.asarray(choice)
            break
    best, best_merit = np.zeros(count, bool), -1.0
    for _ in range(5):
        # By the root of the area: neither specks nor the background alone.
        weight = np.sqrt(sizes) * allowed
        chosen = np.zeros(count, bool)
        chosen[rng.choice(count, p=weight / weight.sum())] = True
        target = area * np.exp(rng.uniform(np.log(0.015), np.log(0.35)))
        while sizes[chosen].sum() < target:
            color = np.average(means[chosen], axis=0, weights=sizes[chosen])
            room = 0.4 * area - sizes[chosen].sum()
            near = np.flatnonzero(touch[chosen].any(0) & ~chosen & (sizes <= room))
            if not len(near):
                break
            chosen[near[np.abs(means[near] - color).sum(1).argmin()]] = True
        rim = touch[chosen].any(0) & ~chosen
        if not rim.any():
            continue
        color = np.average(means[chosen], axis=0, weights=sizes[chosen])
        contrast = float(np.average(np.abs(means[rim] - color).sum(1), weights=sizes[rim]))
        outline = np.count_nonzero(chosen[pairs[:, 0]] != chosen[pairs[:, 1]])
        merit = contrast * min(1.0, 2 * sizes[chosen].sum() / outline / 8)  # full marks from 8 pixels of width
        if merit > best_merit:
            best, best_merit = chosen, merit
    if not best.any():
        best = sizes == sizes.min()
    return best[regions]


def _region_means(regions: npt.NDArray[np.int64], image: U8) -> F32:
    """Mean color (n 3) of each region."""
    sizes = np.bincount(regions.ravel())
    sums = [np.bincount(regions.ravel(), image[..., c].ravel().astype(np.float64)) for c in range(3)]
    return (np.stack(sums, 1) / np.maximum(sizes, 1)[:, None]).astype(np.float32)


# Where to look


def _side_limits(shape: tuple[int, ...], size: int) -> tuple[float, float]:
    """Smallest and largest side of a crop, in pixels of the picture."""
    short, long = min(shape), max(shape)
    largest = min(1.1 * long, 1.3 * short)
    return min(size / 2, largest / 3), largest


def _base_side(rng: np.random.Generator, shape: tuple[int, ...], amount: int, size: int) -> float:
    """Side of a task's crops for a picture with ``amount`` pixels of object: mostly so that it is no mere speck."""
    smallest, largest = _side_limits(shape, size)
    if rng.random() < 0.25:
        side = largest * rng.uniform(0.8, 1.0)
    else:
        side = float(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
    if rng.random() < 0.8:
        side = min(side, max(10 * amount**0.5, smallest))  # 1 % of the crop if the object is in one piece
    return float(side)


def _draw_box(rng: np.random.Generator, image: U8, mask: U8, base: float, on: bool, used: Sequence[_Box]) -> _Box:
    """The first of some crops that shows object and rest and is no crop seen before, else the best of them."""
    height, width = mask.shape
    inside = mask == 1
    spots = np.flatnonzero(inside) if on else np.empty(0, np.int64)
    best, least = _Box(0, 0, min(mask.shape)), np.inf
    for _ in range(6):
        side = round(min(base * rng.uniform(0.75, 1.25), _side_limits(mask.shape, 2)[1]))
        if len(spots):
            y, x = divmod(int(spots[rng.integers(len(spots))]), width)
            y, x = (int(n + rng.uniform(-0.35, 0.35) * side) for n in (y, x))
        else:
            y, x = int(rng.integers(height)), int(rng.integers(width))
        box = _Box(_placed(y - side // 2, side, height), _placed(x - side // 2, side, width), side)
        seen = (slice(max(box.y, 0), box.y + side), slice(max(box.x, 0), box.x + side))
        share = np.count_nonzero(inside[seen]) / inside[seen].size
        penalty = max((box.overlap(other) for other in used), default=0.0)
        if on:
            penalty += 0.6 * (share < 0.005) + 0.6 * (share > 0.85) + 2 * (share == 0)
        elif np.ptp(image[seen][::4, ::4]) < 16 or (mask[seen] == IGNORE).all():  # the black round a scan
            penalty += 0.6
        if penalty < least:
            best, least = box, penalty
        if penalty < 0.3:
            break
    return best


def _placed(start: int, side: int, length: int) -> int:
    """The start moved so that the crop lies inside; in the middle if it is longer than the picture."""
    return (length - side) // 2 if side >= length else min(max(start, 0), length - side)


def _cut(image: U8, box: _Box) -> U8:
    """The box of an image (y x) or (y x c), mirrored beyond the border."""
    height, width = image.shape[:2]
    if box.y >= 0 and box.x >= 0 and box.y + box.side <= height and box.x + box.side <= width:
        return image[box.y : box.y + box.side, box.x : box.x + box.side]
    return image[np.ix_(_mirrored(box.y, box.side, height), _mirrored(box.x, box.side, width))]


def _mirrored(start: int, count: int, length: int) -> npt.NDArray[np.int64]:
    positions = np.arange(start, start + count) % (2 * length)
    return np.minimum(positions, 2 * length - 1 - positions)


# Pixels


def _picture(image: U8) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)


def _array(picture: Image.Image) -> U8:
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array


def _scaled(image: U8, shape: tuple[int, int]) -> U8:
    """Image (y x c) at another shape, without aliasing."""
    return _array(_picture(image).resize(shape[::-1], Image.Resampling.BILINEAR))


def _resized(image: U8, size: int) -> U8:
    return _scaled(image, (size, size))


def _resized_labels(labels: U8, size: int) -> U8:
    """Labels 0, 1, IGNORE (y x) at another size, with smooth outlines."""
    out = _above(_resized((labels == 1).astype(np.uint8)[..., None] * np.uint8(255), size)[..., 0])
    if (labels == IGNORE).any():
        out[np.asarray(_picture(labels).resize((size, size), Image.Resampling.NEAREST)) == IGNORE] = IGNORE
    return out


def _above(soft: U8) -> U8:
    """1 where more than 40 % of the pixel is object; less if nothing would be left: threads stay."""
    return (soft > min(102, 0.6 * int(soft.max()))).astype(np.uint8)


def _scaled_up(mask: Bool, shape: tuple[int, ...]) -> U8:
    """A mask at the full size of its picture, 0 or 1."""
    return (_scaled(mask[..., None] * np.uint8(255), (shape[0], shape[1]))[..., 0] > 127).astype(np.uint8)


def _turn(image: U8, turn: int) -> U8:
    """One of the eight ways to lay a square: 0..3 quarter turns, 4..7 mirrored too."""
    turned = np.rot90(image, turn % 4)
    return np.ascontiguousarray(turned[:, ::-1] if turn >= 4 else turned)


Mesh = list[tuple[tuple[int, int, int, int], tuple[float, ...]]]


def _draw_mesh(rng: np.random.Generator, wide: int, size: int, pieces: int = 6) -> Mesh:
    """A turn of up to 20 degrees with a mild smooth warp, from the middle of a square of ``wide`` pixels."""
    edges = np.linspace(0, size, pieces + 1)
    y, x = np.meshgrid(np.rint(edges), np.rint(edges), indexing="ij")
    angle = np.deg2rad(rng.uniform(-20, 20))
    cos, sin = np.cos(angle), np.sin(angle)
    dy, dx = y - size / 2, x - size / 2
    shift = rng.normal(0, 0.012 * size, (2, pieces + 1, pieces + 1))
    v = wide / 2 + cos * dy - sin * dx + shift[0]
    u = wide / 2 + sin * dy + cos * dx + shift[1]
    mesh: Mesh = []
    for r in range(pieces):
        for c in range(pieces):
            corners = ((r, c), (r + 1, c), (r + 1, c + 1), (r, c + 1))
            target = (int(x[r, c]), int(y[r, c]), int(x[r, c + 1]), int(y[r + 1, c]))
            mesh.append((target, tuple(float(n) for a in corners for n in (u[a], v[a]))))
    return mesh


def _warped(image: U8, mesh: Mesh, size: int) -> U8:
    return _array(_picture(image).transform((size, size), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR))
