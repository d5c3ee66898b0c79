"""Lazy segmentation of a volume: any part of any plane, computed on demand."""

from __future__ import annotations

import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import product
from typing import Any

import dask.array as da
import numpy as np

from distillfss_core.errors import ImageError, InputFileError, IntensityWarning, SettingsError
from distillfss_core.models.intensities import CHECKED
from distillfss_core.models.preprocess import Limits
from distillfss_core.models.segmenter import Region, Segmenter, Window
from distillfss_core.segmentation.rows import RowReader
from distillfss_core.types import Array, GeneratorRun, Segmentation, check_image, evenly, finish, sample_step
from distillfss_core.volumes.volume import Volume, split_index

KINDS = ("labels", "probabilities", "uncertainty")
_BAND = 1 << 22  # voxels read at a time while intensities are sampled
_SAMPLES = 1 << 24  # voxels sampled of some planes at a time
_PLANES, _SPOTS, _SPOT = 8, 3, 256  # compared with the support: planes; spots along y and x; the side of a spot
_sampled_of: weakref.WeakKeyDictionary[Volume, Array] = weakref.WeakKeyDictionary()


class VolumeSegmenter:
    """A model and a volume; it stores the intensity limits of every plane that it has read.

    Its intensities are compared with those of the support before the first plane.

    Parameters
    ----------
    volume : Volume
    model : Segmenter
    tile : int, optional
        Inner side of a tile in pixels after zooming, by default `Segmenter.best_tile`. The grid of tiles is that of the
        volume, so any part has the labels of the whole.
    limits : Limits, optional
        Intensities that become 0 and 1, the same for all planes; by default those of each plane, or of the training.

    Raises
    ------
    ImageError
        If the volume has other channels than the model.
    """

    def __init__(
        self, volume: Volume, model: Segmenter, *, tile: int | None = None, limits: Limits | None = None
    ) -> None:
        channels = volume.shape[3] if volume.ndim == 4 else 1
        wanted = model.preprocess.channels
        if channels != wanted and {channels, wanted} != {1, 3}:
            raise ImageError(
                f"{volume.name}: has {channels} channel(s), the model was made for {wanted}; "
                "give the channels it was distilled from"
            )
        self.volume: Volume = volume
        self.tile: int = tile or model.best_tile(self.shape, volume.shape[0])
        self.model: Segmenter = model.repeating(self.shape, self.tile, volume.shape[0])
        self._fixed, self._warning = limits, "" if limits else None
        self._limits: dict[int, Limits] = {}
        self._rows: RowReader | None = None
        self._inference = threading.Lock()  # two inferences at a time only take each other's cores
        self._matching = threading.Lock()

    @property
    def shape(self) -> tuple[int, int]:
        """Of a plane (y, x)."""
        return self.volume.shape[1], self.volume.shape[2]

    def match(self) -> str:
        """Compare the intensities of the volume with those of the support, once.

        Returns
        -------
        str
            In one line why labels may be wrong, else "".

        Warns
        -----
        IntensityWarning
            That line, at the first call.
        """
        return self._match_by(lambda: sample_volume(self.volume))

    def _match_by(self, take: Callable[[], Array]) -> str:
        """`match` by a sample "n y x [c]", which is taken when it is needed."""
        with self._matching:
            if self._warning is not None:
                return self._warning
            preprocess, warning = self.model.preprocess, ""
            if preprocess.intensities is not None:
                with suppress(ImageError):  # other channels: the error about the first plane names it
                    is_plane = self.volume.shape[0] == 1
                    preprocess, warning = preprocess.matched_to(take(), self.volume.name, is_plane=is_plane)
            if preprocess.scope == "volume":
                self._fixed = preprocess.fitted
            self._warning = warning
        if warning:
            warnings.warn(warning, IntensityWarning, stacklevel=4)
        return warning

    def _prepare(self) -> None:
        """Planes with limits of their own are compared with the support when the first ones are looked at."""
        if self._warning is None and self.model.preprocess.scope == "volume":
            self.match()

    def limits(self, z: int) -> Limits:
        """Intensities of plane ``z`` that become 0 and 1: those that the whole plane in memory would have."""
        self._prepare()
        if self._fixed is not None:
            return self._fixed
        self._look_up(z, z + 1)
        return self._limits[z]

    def limits_of(self, planes: Sequence[int]) -> Limits:
        """Intensities that become 0 and 1, from some planes together."""
        self._prepare()
        if self._fixed is not None:
            return self._fixed
        return self._judge(planes, [self._samples(z, z + 1)[0] for z in planes])

    def read(self, z: slice, region: Region) -> Array:
        """Voxels (z, y, x[, c]) that a region of planes needs; the limits of the planes are computed first."""
        self._prepare()
        if self._fixed is None:
            self._look_up(z.start, z.stop)
        (y0, y1), (x0, x1) = self.model.reach(self.shape, region, tile=self.tile)
        if self._rows is not None:
            return self._rows.read(z, slice(y0, y1), slice(x0, x1), region[1][1])
        return self.volume.read(z, slice(y0, y1), slice(x0, x1))

    def read_in_rows(self) -> None:
        """From now on, parts are read in rows along x: what neighbors share is decoded once (`RowReader`)."""
        self._rows = RowReader(self.volume)

    def labels(self, z: int, region: Region, pixels: Array | None = None) -> Array:
        """Labels of a region of plane ``z``, shape (y, x), uint8.

        Parameters
        ----------
        pixels : array, optional
            Result of `read` for this plane; read now if not given.

        Raises
        ------
        ImageError
            If pixels are not finite.
        InputFileError
            If the volume is damaged here.
        """
        return self._output(z, region, pixels, "labels")

    def stack_labels(self, planes: range, region: Region, pixels: Array) -> Array:
        """Labels of a region of several planes, shape (z, y, x), from what `read` gave for them; as `labels` otherwise,
        but that a GPU computes many planes at once."""
        return finish(GeneratorRun(self.iter_stack_labels(planes, region, pixels)))

    def iter_stack_labels(self, planes: range, region: Region, pixels: Array) -> Generator[None, None, Array]:
        """`stack_labels`, which pauses after each plane that is computed alone."""
        if not self.model.batched:
            labels = np.empty((len(planes), *(stop - start for start, stop in region)), np.uint8)
            for i, z in enumerate(planes):
                labels[i] = self.labels(z, region, pixels[i])
                yield
            return labels
        limits = [self.limits(z) for z in planes]
        for z, plane in zip(planes, pixels, strict=True):
            with self._naming(z):
                check_image(plane)
        with self._inference:
            return self.model.stack_labels(self._within(region, pixels), self.shape, region, limits, tile=self.tile)

    def probabilities(self, z: int, region: Region, pixels: Array | None = None) -> Array:
        """Probabilities of a region of plane ``z``, shape (k + 1, y, x), float32; as `labels` otherwise."""
        return self._output(z, region, pixels, "probabilities")

    def _output(self, z: int, region: Region, pixels: Array | None, what: str) -> Array:
        limits = self.limits(z)
        if pixels is None:
            pixels = self.read(slice(z, z + 1), region)[0]
        window = self._within(region, pixels[None])
        predict = self.model.region_labels if what == "labels" else self.model.predict_region
        with self._naming(z), self._inference:
            return predict(lambda y, x: window(y, x)[0], self.shape, region, limits, tile=self.tile)

    def _within(self, region: Region, pixels: Array) -> Window:
        """Windows of planes "z y x [c]" of which `read` gave what the region needs."""
        (top, _), (left, _) = self.model.reach(self.shape, region, tile=self.tile)
        return lambda y, x: pixels[:, y.start - top : y.stop - top, x.start - left : x.stop - left]

    @contextmanager
    def _naming(self, z: int) -> Iterator[None]:
        """Errors about pixels name the volume and the plane."""
        try:
            yield
        except ImageError as error:
            text = str(error).removeprefix("image: ")
            raise type(error)(f"{self.volume.name} plane {z}: {text}") from error

    def _look_up(self, start: int, stop: int) -> None:
        """Limits of those planes that are not known yet, and of others in the same chunks, which are decoded anyway."""
        rows, columns = self._sampled()
        depth = min(self.volume.chunks[0], max(1, _SAMPLES // (rows * columns)))
        for first in range(start - start % depth, stop, depth):
            group = range(first, min(first + depth, self.volume.shape[0]))
            asked = [z for z in group if start <= z < stop and z not in self._limits]
            if not asked:
                continue
            samples = self._samples(group.start, group.stop)
            self._match_by(partial(_thinned_planes, samples[asked[0] - first : asked[-1] + 1 - first]))
            for z in (z for z in group if z not in self._limits):
                with nullcontext() if z in asked else suppress(ImageError):  # of others it is told when they are asked
                    self._limits[z] = self._judge([z], [samples[z - first]])

    def _judge(self, planes: Sequence[int], samples: Sequence[Array]) -> Limits:
        for z, sample in zip(planes, samples, strict=True):
            check_image(sample, f"{self.volume.name} plane {z}")
        return self.model.preprocess.sample_limits(np.concatenate(samples))

    def _sampled(self) -> tuple[int, int]:
        """Rows and columns that are sampled of a plane."""
        step = sample_step(self.shape)
        return -(-self.shape[0] // step), -(-self.shape[1] // step)

    def _samples(self, start: int, stop: int) -> Array:
        """Every `sample_step`-th row and column of some planes "z y x [c]", read a few whole chunks at a time."""
        rows, columns = self.shape
        step = sample_step(self.shape)
        _, high, wide = self.volume.chunks
        width = max(1, _BAND // ((stop - start) * high) // wide) * wide
        height = max(1, _BAND // ((stop - start) * min(width, columns)) // high) * high
        samples = np.empty((stop - start, *self._sampled(), *self.volume.shape[3:]), self.volume.dtype)
        for y in range(0, rows, height):
            for x in range(0, columns, width):
                box = slice(start, stop), slice(y, min(y + height, rows)), slice(x, min(x + width, columns))
                part = self.volume.read(*box)[:, -y % step :: step, -x % step :: step]
                top, left = -(-y // step), -(-x // step)
                samples[:, top : top + part.shape[1], left : left + part.shape[2]] = part
        return samples

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_inference", "_matching", "_rows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _rows=None, _inference=threading.Lock(), _matching=threading.Lock())


def compare_intensities(volume: Volume, model: Segmenter) -> str:
    """Compare the intensities of a volume with those that a model learned from, by some spots of some planes.

    Returns
    -------
    str
        In one line why labels may be wrong, and what to do; else "".

    Warns
    -----
    IntensityWarning
        That line.

    Raises
    ------
    ImageError
        If the volume has other channels than the model.
    """
    return VolumeSegmenter(volume, model).match()


def sample_volume(volume: Volume) -> Array:
    """Voxels of some spots of some planes, evenly spread; a few chunks are read, of a volume of any size.

    Returns
    -------
    array, shape (1, n, 1) or (1, n, 1, c)
        Without spots that cannot be read, which are an error only where they are segmented. It is kept, except that of
        an array in memory, which may change.
    """
    if volume in _sampled_of:
        return _sampled_of[volume]
    planes = evenly(volume.shape[0], _PLANES)
    spans = [_spots(volume.shape[k], volume.chunks[k]) for k in (1, 2)]
    step = sample_step((len(planes) * _length(spans[0]), _length(spans[1])), CHECKED)
    parts = [np.empty((0, *volume.shape[3:]), volume.dtype)]
    for z, y, x in product(planes, *spans):
        with suppress(InputFileError):
            spot = volume.read(slice(z, z + 1), y, x)[0, ::step, ::step]
            parts.append(spot.reshape(-1, *volume.shape[3:]))
    sample = np.concatenate(parts)[None, :, None]
    if not volume.is_in_memory:
        _sampled_of[volume] = sample
    return sample


def _thinned_planes(samples: Array) -> Array:
    step = sample_step((samples.shape[0] * samples.shape[1], samples.shape[2]), CHECKED)
    return samples[:, ::step, ::step]


def _spots(length: int, chunk: int) -> list[slice]:
    """Parts of an axis that are sampled: all of a short one, else a few chunks, or their beginnings."""
    if length <= _SPOTS * _SPOT:
        return [slice(0, length)]
    middles = [int((k + 0.5) * length / _SPOTS) for k in range(_SPOTS)]
    starts = [middle // chunk * chunk if chunk <= length // _SPOTS else middle - _SPOT // 2 for middle in middles]
    return [slice(start, min(start + _SPOT, length)) for start in starts]


def _length(spans: Sequence[slice]) -> int:
    return sum(span.stop - span.start for span in spans)


class _Outputs:
    """Outputs of a model for a volume, as an array that computes the part that is read."""

    def __init__(self, segmenter: VolumeSegmenter, what: str) -> None:
        self.segmenter, self.what = segmenter, what
        volume = segmenter.volume
        self.dtype = np.dtype(np.uint8 if what == "labels" else np.float32)
        head = (len(segmenter.model.class_names) + 1,) if what == "probabilities" else ()
        self.shape = (*head, *volume.shape[:3])
        self.ndim = len(self.shape)

    def __getitem__(self, key: Any) -> Array:
        box, rest = split_index(key, self.shape)
        z, y, x = box[-3:]
        size = tuple(s.stop - s.start for s in box)
        values = np.empty(size, self.dtype)
        if values.size:
            region = ((y.start, y.stop), (x.start, x.stop))
            for row, pixels in enumerate(self.segmenter.read(z, region)):
                values[..., row, :, :] = self._plane(z.start + row, region, pixels)[box[:-3]]
        return values[rest]

    def _plane(self, z: int, region: Region, pixels: Array) -> Array:
        if self.what == "labels":
            return self.segmenter.labels(z, region, pixels)
        chances = self.segmenter.probabilities(z, region, pixels)
        if self.what == "probabilities":
            return chances
        return Segmentation.of(chances).uncertainty


def segment_lazy(volume: Volume, model: Segmenter, *, what: str = "labels", tile: int | None = None) -> da.Array:
    """Segment a volume as a dask array that computes a tile of a plane on demand.

    Whatever region is taken from it has the values of the whole, bit for bit.

    Parameters
    ----------
    volume : Volume
    model : Segmenter
    what : {"labels", "probabilities", "uncertainty"}
    tile : int, optional
        Inner side of a tile in pixels after zooming, by default `Segmenter.best_tile`.

    Returns
    -------
    dask array
        labels: uint8 (z, y, x); probabilities: float32 (k + 1, z, y, x); uncertainty: float32 (z, y, x). A chunk is a
        tile of one plane. The graph is made when something is computed, and of what is computed only.

    Raises
    ------
    SettingsError
        If ``what`` is another word.
    ImageError
        If the volume has other channels than the model.
    """
    if what not in KINDS:
        raise SettingsError(f"there is no output {what!r}; choose one of: {', '.join(KINDS)}")
    segmenter = VolumeSegmenter(volume, model, tile=tile)
    outputs = _Outputs(segmenter, what)
    grid = model.tiles(segmenter.shape, tile=segmenter.tile)
    rows = tuple(t.y.inner[1] - t.y.inner[0] for t in grid if t.x.inner[0] == 0)
    columns = tuple(t.x.inner[1] - t.x.inner[0] for t in grid if t.y.inner[0] == 0)
    chunks = ((1,) * volume.shape[0], rows, columns)
    result: da.Array = da.from_array(
        outputs,
        chunks=((outputs.shape[0],), *chunks) if what == "probabilities" else chunks,
        name=f"segment-{uuid.uuid4().hex}",  # a hash of model and volume would read them
        meta=np.empty((0,) * outputs.ndim, outputs.dtype),
        asarray=False,
        fancy=False,
        lock=False,
    )
    return result
