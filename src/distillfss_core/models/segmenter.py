"""Tiled prediction, the same for every kind of model."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from distillfss_core.errors import IntensityWarning, OutOfMemoryError
from distillfss_core.models.batches import NEVER, PIXELS, PlaneBatches
from distillfss_core.models.intensities import CHECKED
from distillfss_core.models.preprocess import Limits, Preprocess, resize
from distillfss_core.models.tiling import Span, Tile, largest_window, split_axis, split_plane
from distillfss_core.nn.backbones import Backbone
from distillfss_core.nn.device import Device, out_of_memory, release_memory
from distillfss_core.types import Array, Segmentation, check_image, likeliest, sample_step

log: logging.Logger = logging.getLogger(__name__)
TILE = 1024  # inner side of a tile, pixels after zooming
_INT8 = 2  # windows may have so many times the pixels in int8, where each needs less than half of the memory
_MANY = 8  # windows of one size, from which on it is worth while to make an engine ready for it
_MORE = 1.2  # times as many pixels may be computed for it
_GAIN = 0.95  # part of the time that it then takes for each
HALO = 256  # pixels after zooming; a student has its own, measured
HALOS = (64, 96, 128, 160, 192, 256)
_HALO_TILE = 192
SEAMLESS = 0.9995  # labels that tiles and the whole must have in common


Window = Callable[[slice, slice], Array]
"""Reads a window (y, x) of a plane."""

Region = tuple[tuple[int, int], tuple[int, int]]
"""Part of a plane: (y0, y1), (x0, x1)."""


class Segmenter:
    """Tiled prediction, the same for every kind of model.

    Subclasses compute the margins of a window.
    """

    def __init__(
        self, backbone: Backbone, preprocess: Preprocess, class_names: Sequence[str], *, device: Device, halo: int
    ) -> None:
        self.backbone: Backbone = backbone
        self.preprocess: Preprocess = preprocess
        self.class_names: tuple[str, ...] = tuple(class_names)
        self.device: Device = device
        self.halo: int = halo
        self._room: Fraction | float = math.inf  # side of the tiles that the device has memory for, zoomed pixels
        self._batch = PIXELS  # zoomed pixels that the device has memory for at a time
        self._is_matched = False  # whether the limits are already those of the input
        self._repeats = False  # whether windows of one size follow one another

    def _margins(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hg wg"]:
        """Of an image in [0, 1], zoomed, whose sides are multiples of the backbone's: `margins`, on a grid of any size
        that covers it."""
        raise NotImplementedError

    @property
    def local(self) -> bool:
        """Whether tiles agree with one another as they are; otherwise they overlap and are blended."""
        raise NotImplementedError

    @property
    def repeated_pixels(self) -> float:
        """So many times the pixels of a window need the same memory where windows of one size follow one another."""
        return 1

    @property
    def halo_side(self) -> int:
        """Side in pixels of the part of an image on which `fit_halo` measures."""
        return round(3 * _HALO_TILE / self.preprocess.zoom_factor)

    def fit_halo(self, image: Array) -> None:
        """Set ``halo`` to the smallest of `HALOS` whose tiles give the labels of the whole.

        It is measured on the upper left of ``image``, `halo_side` pixels, in small tiles (mirrored where the image is
        smaller), so the larger tiles of a real prediction do better. Where nothing can be seen (one label everywhere)
        it stays wide.
        """
        if not self.local:
            return
        side = self.halo_side
        plane = self.preprocess.as_channels(image)[:side, :side]
        plane = np.pad(plane, ((0, side - plane.shape[0]), (0, side - plane.shape[1]), (0, 0)), mode="symmetric")
        whole = self.region_labels(*_window_of(plane), self.preprocess.limits(plane), tile=10**6)
        for self.halo in HALOS:
            tiled = self.region_labels(*_window_of(plane), self.preprocess.limits(plane), tile=_HALO_TILE)
            seamless = (tiled == whole).mean() >= SEAMLESS
            if seamless and whole.min() < whole.max():
                return

    def matched_to(self, sample: Array, source: str = "image") -> Segmenter:
        """The same model for the planes of one input, whose intensities are compared with those of the support once.

        `predict` compares each plane on its own. Planes of a stack may be empty, so they are compared together.

        Parameters
        ----------
        sample : array, shape (n, y, x) or (n, y, x, c)
            Some planes of the input, or all.
        source : str
            Name of the input for the warning.

        Warns
        -----
        IntensityWarning
            If its labels may be wrong.

        Raises
        ------
        ImageError
            If the input has other channels than the model.
        """
        planes, rows, columns = sample.shape[:3]
        step = sample_step((planes * rows, columns), CHECKED)
        matched = copy.copy(self)
        is_plane = planes == 1 < columns
        matched.preprocess, warning = self.preprocess.matched_to(sample[:, ::step, ::step], source, is_plane=is_plane)
        matched._is_matched = True
        if warning:
            warnings.warn(warning, IntensityWarning, stacklevel=2)
        return matched

    @property
    def step(self) -> int:
        """Pixels of the image that tiles must start at multiples of."""
        return self.backbone.spec.multiple * self.preprocess.zoom_factor.denominator

    def predict(self, image: Array, *, tile: int | None = None) -> Segmentation:
        """Segment one plane.

        Parameters
        ----------
        image : array, shape (y, x) or (y, x, c)
            Any integer, bool or floating dtype; finite.
        tile : int, optional
            Inner side of a tile in pixels after zooming, by default `best_tile`; memory grows with its square, the
            result stays the same but for single labels where tiles meet.

        Returns
        -------
        Segmentation
            Labels, probabilities and uncertainty at the image's size.

        Raises
        ------
        ImageError
            If the image cannot be used or has other channels than the model.
        OutOfMemoryError
            If even the smallest tile does not fit into the device's memory.
        """
        check_image(image)
        return Segmentation.of(self.predict_region(*self._whole(image), tile=tile))

    def predict_labels(self, image: Array, *, tile: int | None = None) -> npt.NDArray[np.uint8]:
        """Labels alone, shape (y, x), uint8: probabilities of the whole plane are held only where they are blended."""
        check_image(image)
        return self.region_labels(*self._whole(image), tile=tile)

    def predict_region(
        self, read: Window, shape: tuple[int, int], region: Region, limits: Limits, *, tile: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Probabilities of a part of a plane: bit for bit those that the whole plane would have there.

        The tiles are those of the whole plane; the ones that touch the region are computed, on the windows that the
        whole would have given them::

            +-------+-------+-------+
            |       |  :    |       |      four tiles touch the region ":"; each is computed with its halo,
            +-------+::+----+-------+      so regions that are made of whole tiles waste nothing
            |       |  :    |       |
            +-------+-------+-------+

        (Where a device runs out of memory, smaller tiles are taken, which may change single labels.)

        Parameters
        ----------
        read : function of two slices (y, x)
            Gives that window of the plane, "y x" or "y x c".
        shape : (y, x)
            Of the whole plane.
        region : ((y0, y1), (x0, x1))
            Within the plane.
        limits : Limits
            Intensities that become 0 and 1, of the whole plane: see `Preprocess.limits`.
        tile : int, optional
            As for `predict`.

        Returns
        -------
        float32 array, shape (k + 1, y1 - y0, x1 - x0)
        """
        (y0, y1), (x0, x1) = region
        if not self.local:
            return self._blended(read, shape, region, limits, tile)
        probabilities = np.empty((len(self.class_names) + 1, y1 - y0, x1 - x0), np.float32)
        for where, values in self._windows(read, shape, region, limits, tile):
            to, source = _overlap(where.inner, where.outer, region)
            probabilities[:, to[0], to[1]] = _probabilities(values)[:, source[0], source[1]]
        return probabilities

    def region_labels(
        self, read: Window, shape: tuple[int, int], region: Region, limits: Limits, *, tile: int | None = None
    ) -> npt.NDArray[np.uint8]:
        """Labels of a part of a plane, shape (y1 - y0, x1 - x0); as `predict_region` otherwise."""
        if not self.local:
            return likeliest(self._blended(read, shape, region, limits, tile))
        (y0, y1), (x0, x1) = region
        labels = np.empty((y1 - y0, x1 - x0), np.uint8)
        for where, values in self._windows(read, shape, region, limits, tile):
            to, source = _overlap(where.inner, where.outer, region)
            labels[to] = _labels(values[:, source[0], source[1]])
        return labels

    @property
    def batched(self) -> bool:
        """Whether the device computes many planes at once, see `stack_labels`."""
        return self.device.kind == "cuda" and self.local and self._room == math.inf

    def stack_labels(
        self, read: Window, shape: tuple[int, int], region: Region, limits: Sequence[Limits], *, tile: int | None = None
    ) -> npt.NDArray[np.uint8]:
        """Labels of a part of several planes, shape (n, y1 - y0, x1 - x0), many planes at once (`PlaneBatches`).

        They are those of `region_labels` but for rounding, and do not depend on the number of planes.

        Parameters
        ----------
        read : function of two slices (y, x)
            Gives that window of all planes, "n y x" or "n y x c"; finite.
        shape, region, tile
            As for `predict_region`.
        limits : sequence of Limits
            Intensities of each plane that become 0 and 1.
        """
        (y0, y1), (x0, x1) = region
        labels = np.empty((len(limits), y1 - y0, x1 - x0), np.uint8)
        batches = PlaneBatches(self._margins, self.preprocess, self.device, step=self.step, pixels=self._batch)
        for where in self.tiles(shape, tile=tile, region=region):
            to, source = _overlap(where.inner, where.outer, region)
            windows = self.preprocess.stack_channels(read(*where.outer))
            if not batches.label(windows, source, limits, labels[:, to[0], to[1]]):
                for i, own in enumerate(limits):  # in smaller tiles
                    labels[i] = self.region_labels(partial(_one_plane, read, i), shape, region, own, tile=tile)
                return labels
        batches.finish()
        self._batch = batches.pixels
        return labels

    def iter_tiles(self, image: Array, *, tile: int | None = None) -> Iterator[tuple[Tile, npt.NDArray[np.float32]]]:
        """Tiles and the probabilities "k+1 y x" of their inner parts, row by row."""
        check_image(image)
        for where, values in self._windows(*self._whole(image), tile):
            yield where, _probabilities(values)[:, where.crop[0], where.crop[1]]

    def tiles(self, shape: tuple[int, int], *, tile: int | None = None, region: Region | None = None) -> list[Tile]:
        """The tiles of a plane of ``shape`` (y, x), row by row; with a region, those that `predict_region` computes."""
        axes = self._axes(shape, tile or self.best_tile(shape), alike=self._repeats)
        if region is not None:
            axes = [
                [s for s in spans if s.touches(*part, beyond=not self.local)]
                for spans, part in zip(axes, region, strict=True)
            ]
        return [Tile(y, x) for y, x in product(*axes)]

    def best_tile(self, shape: tuple[int, int], planes: int = 1) -> int:
        """Inner side in zoomed pixels of the tiles of some planes (y, x), by which the fewest pixels are computed.

        Windows, halo included, need no more memory than those of `TILE` with the default backbone in float32. They may
        be larger where many of one size follow one another and the engine is made ready for it (`repeats`). At the
        border of the plane there is no halo, so a plane that is a little larger than `TILE` is one tile, not four::

            +-------+-------+      +---------------+
            |       |       |      |               |      both planes have TILE + 2 halo pixels a side
            +-------+-------+  ->  |               |
            |       |       |      |               |
            +-------+-------+      +---------------+

        It is `TILE` where tiles are blended, and on a GPU, which computes many windows at once (`PlaneBatches`).
        """
        if not self.local or self.device.kind != "cpu":
            return TILE
        zoom = self.preprocess.zoom_factor
        halo = round(self.halo / zoom)
        window = largest_window(round(TILE / zoom), halo, self.step) ** 2
        fits = max(self.backbone.spec.windows, _INT8 if self.device.precision == "int8" else 1)
        most = max(fits, self.repeated_pixels)
        sides = [TILE, *(int((math.isqrt(int(window * times)) - 2 * halo) * zoom) for times in (fits, most))]
        sides += [math.ceil(length * zoom / pieces) for length in shape for pieces in (1, 2)]
        costs = {}
        for side in sorted(side for side in sides if side >= TILE):
            repeats = self.repeats(shape, side, planes)
            areas = [y.length * x.length for y, x in product(*self._axes(shape, side, alike=repeats))]
            if side == TILE or max(areas) <= int(window * (most if repeats else fits)):
                costs[side] = sum(areas) * (_GAIN if repeats else 1)
        return min(costs, key=lambda side: costs[side])

    def repeats(self, shape: tuple[int, int], tile: int, planes: int) -> bool:
        """Whether tiles of this side of so many planes (y, x) have many large windows, which can be of one size.

        They are not where this takes many pixels more, or where the engine gains nothing from it.
        """
        if self.repeated_pixels == 1 or not self.local:
            return False
        axes = self._axes(shape, tile, alike=True)
        many = planes * math.prod(map(len, axes)) >= _MANY
        large = math.prod(axis[0].length for axis in axes) * self.preprocess.zoom_factor**2 > TILE**2
        alike, plain = (
            math.prod(sum(span.length for span in axis) for axis in of_kind)
            for of_kind in (axes, self._axes(shape, tile, alike=False))
        )
        return many and large and alike <= _MORE * plain

    def repeating(self, shape: tuple[int, int], tile: int, planes: int) -> Segmenter:
        """The same model for so many planes in tiles of this side; if one size `repeats`, with an engine for it."""
        if self._repeats == self.repeats(shape, tile, planes):
            return self
        model = copy.copy(self)
        model._repeats = not self._repeats
        return model

    def _axes(self, shape: tuple[int, int], tile: int, *, alike: bool) -> list[list[Span]]:
        """Both axes of a plane cut into tiles of this side in zoomed pixels."""
        zoom = self.preprocess.zoom_factor
        side, halo = max(1, round(tile / zoom)), round(self.halo / zoom)
        return [split_axis(length, side, halo, self.step, alike=alike) for length in shape]

    def reach(self, shape: tuple[int, int], region: Region, *, tile: int | None = None) -> Region:
        """The part of a plane that `predict_region` reads for a region."""
        seen = self.tiles(shape, tile=tile, region=region)
        (y0, y1), (x0, x1) = zip(*(t.y.outer for t in seen), strict=True), zip(*(t.x.outer for t in seen), strict=True)
        return (min(y0), max(y1)), (min(x0), max(x1))

    def digest(self) -> str:
        """SHA-256 (hex) of all that predictions depend on: weights, classes, preprocessing and halo."""
        sha = hashlib.sha256(self.backbone.digest().encode())
        description = [self.class_names, self.preprocess.to_json(), self.halo, self.backbone.spec.name]
        sha.update(json.dumps(description, sort_keys=True).encode())
        for name, tensor in self._own_tensors():
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def __dask_tokenize__(self) -> tuple[str, ...]:
        return self.digest(), self.device.precision

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What it holds beside the backbone, by name."""
        raise NotImplementedError

    def _whole(self, image: Array) -> tuple[Window, tuple[int, int], Region, Limits]:
        plane = self.preprocess.as_channels(image)
        model = self if self._is_matched else self.matched_to(plane[None])
        return *_window_of(plane), model.preprocess.limits(plane)

    def _blended(
        self, read: Window, shape: tuple[int, int], region: Region, limits: Limits, tile: int | None
    ) -> npt.NDArray[np.float32]:
        """Probabilities in which neighboring windows fade into one another across their halos."""
        (y0, y1), (x0, x1) = region
        total = np.zeros((len(self.class_names) + 1, y1 - y0, x1 - x0), np.float32)
        weight = np.zeros((y1 - y0, x1 - x0), np.float32)
        for where, values in self._windows(read, shape, region, limits, tile):
            fade = where.y.fade()[:, None] * where.x.fade()
            to, source = _overlap(where.outer, where.outer, region)
            total[:, to[0], to[1]] += (_probabilities(values) * fade)[:, source[0], source[1]]
            weight[to] += fade[source]
        total /= weight
        return total

    def _windows(
        self, read: Window, shape: tuple[int, int], region: Region, limits: Limits, tile: int | None
    ) -> Iterator[tuple[Tile, npt.NDArray[np.float32]]]:
        """The tiles that contribute to a region, and the margins "k y x" of their whole windows.

        Where the device runs out of memory, the rest and all that comes later goes on in smaller tiles (with a
        warning).
        """
        zoom = self.preprocess.zoom_factor
        side, halo = min(max(1, round((tile or self.best_tile(shape)) / zoom)), max(shape)), round(self.halo / zoom)
        todo = self.tiles(shape, tile=tile, region=region)

        def split(todo: list[Tile], side: int) -> list[Tile]:
            return [part for old in todo for part in _split_tile(old, shape, side, halo, self.step)]

        while side * zoom > self._room:  # halved as it was then, so that the tiles are the same
            side //= 2
            todo = split(todo, side)
        short = False
        while todo:
            where = todo[0]
            shortage: Exception | None = None
            try:
                pixels = self.preprocess.as_channels(read(*where.outer))
                check_image(pixels)
                values = self._window(self.preprocess.to_tensor(pixels, limits)).cpu().numpy()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                shortage = error.with_traceback(None)  # a traceback would keep the failed tensors alive
            if shortage is None:
                if short:
                    self._room = side * zoom
                todo.pop(0)
                yield where, values
                continue
            side, short = side // 2, True
            if side < self.step:
                raise OutOfMemoryError(
                    f"{self.device.name} has no memory left even for a tile of {2 * side} pixels; "
                    "use --device cpu, or free the device"
                ) from shortage
            log.warning("%s is out of memory; going on with tiles of %d pixels", self.device.name, side)
            release_memory(self.device)
            todo = split(todo, side)

    @torch.inference_mode()
    def _window(self, window: Float[Tensor, "3 h w"]) -> Float[Tensor, "k h w"]:
        """Margins of a window whose start lies on the grid; its far ends are padded to the grid."""
        h, w = window.shape[-2:]
        x, padded = self._network_input(window)
        margins = self._margins(x).float().clamp_min_(NEVER)
        return resize(margins, padded)[0, :, :h, :w]

    def _network_input(self, window: Float[Tensor, "3 h w"]) -> tuple[Float[Tensor, "1 3 hz wz"], tuple[int, int]]:
        """A window on the device, padded and zoomed, and its size before the zoom; gray is held once."""
        window = window[: self.preprocess.inputs]
        pad = [-n % self.step for n in window.shape[-2:]]
        if any(pad):
            window = torch.from_numpy(np.pad(window.numpy(), ((0, 0), (0, pad[0]), (0, pad[1])), mode="symmetric"))
        h, w = window.shape[-2:]
        zoom = self.preprocess.zoom_factor
        x = resize(window[None].to(self.device.torch), (int(h * zoom), int(w * zoom)))
        return x.clamp_(0, 1).expand(-1, 3, -1, -1), (h, w)


def _probabilities(margins: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Of "k y x" margins, "k+1 y x", background first. Of whole windows: at the end of a row another kind of
    instruction may round a pixel otherwise."""
    with_background = torch.from_numpy(np.concatenate([np.zeros_like(margins[:1]), margins]))
    return with_background.softmax(0).numpy()


def _labels(margins: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Of "k y x" margins, the likeliest class of each pixel; `likeliest` of their probabilities, but for rounding."""
    if len(margins) == 1:
        result: npt.NDArray[np.uint8] = (margins[0] > 0).astype(np.uint8)
        return result
    return likeliest(np.concatenate([np.zeros_like(margins[:1]), margins]))


def _window_of(plane: Array) -> tuple[Window, tuple[int, int], Region]:
    """A whole plane in memory: how it is read, its shape, and all of it as a region."""
    shape = (plane.shape[0], plane.shape[1])
    return lambda y, x: plane[y, x], shape, ((0, shape[0]), (0, shape[1]))


def _one_plane(read: Window, i: int, y: slice, x: slice) -> Array:
    plane: Array = read(y, x)[i]
    return plane


def _overlap(
    part: tuple[slice, slice], window: tuple[slice, slice], region: Region
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where ``part`` of a plane lies within the region, and within its window."""
    to, source = [], []
    for p, w, (start, stop) in zip(part, window, region, strict=True):
        a, b = max(p.start, start), min(p.stop, stop)
        to.append(slice(a - start, b - start))
        source.append(slice(a - w.start, b - w.start))
    return (to[0], to[1]), (source[0], source[1])


def _split_tile(old: Tile, shape: tuple[int, ...], side: int, halo: int, step: int) -> list[Tile]:
    """The smaller tiles that lie within a larger one."""
    (y0, y1), (x0, x1) = old.y.inner, old.x.inner
    parts = []
    for part in split_plane((y1 - y0, x1 - x0), side, 0, step):
        spans = []
        for axis, start, length in ((part.y, y0, shape[0]), (part.x, x0, shape[1])):
            a, b = axis.inner[0] + start, axis.inner[1] + start
            grown = -(-halo // step) * step
            spans.append(replace(axis, inner=(a, b), outer=(max(0, a - grown), min(length, b + grown))))
        parts.append(Tile(*spans))
    return parts
