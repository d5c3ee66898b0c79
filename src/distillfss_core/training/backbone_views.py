"""Augmented views of unlabeled images, each a pure function of its number."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import torch
from jaxtyping import UInt8
from torch import Tensor

from distillfss_core.errors import ImageError, InputFileError
from distillfss_core.io.images import READABLE
from distillfss_core.models.preprocess import Preprocess, fit_preprocess, resize
from distillfss_core.training.crops import Augmentation, recolor
from distillfss_core.types import Array, evenly
from distillfss_core.volumes.opening import is_one_volume, volumes_in
from distillfss_core.volumes.volume import Volume, open_volume

Image = Array | Volume | Path | str

AUGMENTATION = Augmentation(polarity=0.3)
NEAREST, FARTHEST = 0.5, 2.0  # side of a view in pixels of the image, in units of its side for the backbone
OPEN = 16  # files that are open at a time
FITTED_PLANES = 8  # planes of a volume from which its intensity limits are taken
FITTED_SIDE = 1024  # pixels of their middle
HASHED = 64 << 20  # bytes up to which a file is known by its content


@dataclass(frozen=True)
class _Plane:
    """Plane ``z`` of the source with this index."""

    source: int
    z: int


class Views:
    """Square views of images, a fixed number of each image.

    View i is a random square of image i // count, turned, mirrored, and varied in intensity. Its side is 0.5 to 2
    times ``size`` in pixels of the zoomed image, as far as the image reaches. It is a pure function of ``seed`` and i.

    Parameters
    ----------
    images : sequence of array, Volume or path
        Arrays are planes "y x" or "y x c". Every plane of a volume is an image. A folder stands for the images in it,
        in its folder ``images``, or in the folders ``images`` of its folders.
    size : int
        Side of a view in pixels.
    count : int
        Views of each image.
    seed : int
    preprocess : sequence of Preprocess, optional
        Channels, intensity limits (``fitted``) and zoom of each image; by default they are fitted, and the zoom is 1.

    Raises
    ------
    InputFileError, ImageError, SettingsError
        From `scan`: if there is no image, or one cannot be read.
    """

    def __init__(
        self, images: Sequence[Image], size: int, count: int, seed: int, preprocess: Sequence[Preprocess] = ()
    ) -> None:
        self.size: int = size
        self.count: int = count
        self.seed: int = seed
        self._images = images
        self._sources: list[Array | Volume | Path] = []
        self._planes: list[_Plane] = []
        self._groups: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        self._open: OrderedDict[Path, Volume] = OrderedDict()
        self._fitted: dict[int, Preprocess] = dict(enumerate(preprocess))

    def scan(self) -> Iterator[tuple[int, int]]:
        """Note size and digest of every image; yields how many sources are done, and how many there are."""
        found = [source for image in self._images for source in _expanded(image)]
        if not found:
            raise InputFileError("there are no images; give image files, folders of images, or volumes")
        for index, source in enumerate(found):
            self._sources.append(source)
            name, planes, digest = self._describe(index)
            self._planes += [_Plane(index, z) for z in range(planes)]
            self._groups.setdefault(name, []).append(digest)
            self._counts[name] = self._counts.get(name, 0) + planes
            yield index + 1, len(found)

    @property
    def images(self) -> int:
        """Number of images (planes)."""
        return len(self._planes)

    def __len__(self) -> int:
        return len(self._planes) * self.count

    def sources(self) -> list[dict[str, str | int]]:
        """Name, number of images and SHA-256 of each folder, volume, or all arrays together."""
        digests = {name: hashlib.sha256("".join(parts).encode()).hexdigest() for name, parts in self._groups.items()}
        return [{"name": name, "images": self._counts[name], "digest": digests[name]} for name in digests]

    def view(self, index: int) -> UInt8[Tensor, "3 s s"]:
        """View ``index``, from 0."""
        plane = self._planes[index // self.count]
        rng = np.random.default_rng([self.seed, index])
        source = self._volume(plane.source)
        height, width = source.shape[1:3] if isinstance(source, Volume) else source.shape[:2]
        preprocess = self._preprocess(plane.source)
        scale = np.exp(rng.uniform(np.log(NEAREST), np.log(FARTHEST))) / float(preprocess.zoom_factor)
        side = max(1, min(round(self.size * scale), height, width))
        y, x = (int(rng.integers(n - side + 1)) for n in (height, width))
        if isinstance(source, Volume):
            pixels = source.read(slice(plane.z, plane.z + 1), slice(y, y + side), slice(x, x + side))[0]
        else:
            pixels = source[y : y + side, x : x + side]
        crop = preprocess.to_tensor(preprocess.as_channels(pixels), preprocess.fitted)
        crop = torch.rot90(resize(crop[None], (self.size, self.size))[0].clamp(0, 1), int(rng.integers(4)), (1, 2))
        crop = crop.flip(2) if rng.integers(2) else crop
        crop = recolor(1 - crop if rng.random() < AUGMENTATION.polarity else crop, AUGMENTATION, rng)
        return (crop * 255).round().to(torch.uint8)

    def close(self) -> None:
        """Close the files that were opened here."""
        while self._open:
            self._open.popitem()[1].close()

    def _volume(self, index: int) -> Array | Volume:
        """An array or a volume; files are kept open for a while."""
        source = self._sources[index]
        if not isinstance(source, Path):
            return source
        if source in self._open:
            self._open.move_to_end(source)
            return self._open[source]
        while len(self._open) >= OPEN:
            self._open.popitem(last=False)[1].close()
        self._open[source] = open_volume(source, channel="all")
        return self._open[source]

    def _describe(self, index: int) -> tuple[str, int, str]:
        """Name of the group, number of planes, and digest of a source."""
        source, volume = self._sources[index], self._volume(index)
        if not isinstance(volume, Volume):
            if volume.ndim not in (2, 3) or 0 in volume.shape or volume.dtype.kind not in "buif":
                raise ImageError(
                    f"image {index} has shape {volume.shape} and type {volume.dtype}; give planes y x or y x c of "
                    "numbers, and stacks by open_volume"
                )
            head = f"{volume.shape} {volume.dtype}".encode()
            return "arrays", 1, hashlib.sha256(head + np.ascontiguousarray(volume).tobytes()).hexdigest()
        if isinstance(source, Path) and source.is_file() and source.stat().st_size <= HASHED:
            folder = source.parent if source.parent.name != "images" else source.absolute().parents[1]
            return folder.name, volume.shape[0], hashlib.sha256(source.read_bytes()).hexdigest()
        identity = json.dumps(volume.identity, sort_keys=True, default=str)
        return volume.name, volume.shape[0], hashlib.sha256(identity.encode()).hexdigest()

    def _preprocess(self, index: int) -> Preprocess:
        """Channels and intensity limits of a source, fitted once."""
        if index not in self._fitted:
            source = self._volume(index)
            if isinstance(source, Volume):
                planes = [source.plane(z, FITTED_SIDE) for z in evenly(source.shape[0], FITTED_PLANES)]
            else:
                planes = [source]
            self._fitted[index] = fit_preprocess(planes, scope="volume")
        return self._fitted[index]


def _expanded(image: Image) -> list[Array | Volume | Path]:
    """The files and volumes that a path stands for; anything else is itself."""
    if not isinstance(image, (str, Path)):
        return [image]
    path = Path(image)
    if not path.is_dir() or is_one_volume(path):
        return [volume for volume, _ in volumes_in(path)]
    folders = [path / "images"] if (path / "images").is_dir() else [path]
    files = _files_in(folders[0])
    if not files:
        files = [file for folder in sorted(path.glob("*/images")) for file in _files_in(folder)]
    if not files:
        raise InputFileError(f"{path}: holds no images; give a folder of {', '.join(READABLE)}")
    return list(files)


def _files_in(folder: Path) -> list[Path]:
    names = [str(file) for file in folder.iterdir() if file.suffix.lower() in READABLE]
    return [Path(name) for name in tifffile.natural_sorted(names)]
