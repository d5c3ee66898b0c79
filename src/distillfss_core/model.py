"""Models that segment: the student (a file of its own, no support needed) and a teacher with its support."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from distillfss_core.backbones import Backbone, backbone_from_state
from distillfss_core.batches import NEVER, PIXELS, PlaneBatches
from distillfss_core.cardfile import FileKind, read_card_file, write_card_file
from distillfss_core.device import Device, choose_device, out_of_memory, release_memory
from distillfss_core.errors import ModelFileError, OutOfMemoryError, SettingsError
from distillfss_core.features import margins
from distillfss_core.head import FewShotHead, HeadForm
from distillfss_core.headfile import can_be_found_again, find_backbone
from distillfss_core.inference import Runner, StudentNetwork, choose_engine, choose_precision
from distillfss_core.preprocess import ZOOMS, Limits, Preprocess, resize
from distillfss_core.support import SupportSet
from distillfss_core.teachers import SupportKeys, Teacher
from distillfss_core.tiles import Tile, split_plane
from distillfss_core.types import Array, Segmentation, check_image, evenly, likeliest

log = logging.getLogger(__name__)

STUDENT_FILE = FileKind("distillfss-student", "DistillFSS student", 1)
TILE = 1024  # inner side of a tile, pixels after zooming
HALO = 256  # pixels after zooming; a student has its own, measured
HALOS = (64, 96, 128, 160, 192, 256)
_HALO_TILE = 192
SEAMLESS = 0.9995  # labels that tiles and the whole must have in common
THUMBNAIL = 96
KEEP_BACKBONE = (
    "the backbone's weights were trained with a head of your own and are in no package; keep them in the student's file"
)


Window = Callable[[slice, slice], Array]
"""Reads a window (y, x) of a plane."""

Region = tuple[tuple[int, int], tuple[int, int]]
"""Part of a plane: (y0, y1), (x0, x1)."""


class Segmenter:
    """Tiled prediction, the same for every kind of model.

    Subclasses say what the logits of a window are.
    """

    def __init__(
        self, backbone: Backbone, preprocess: Preprocess, class_names: Sequence[str], *, device: Device, halo: int
    ) -> None:
        self.backbone, self.preprocess, self.class_names = backbone, preprocess, tuple(class_names)
        self.device, self.halo = device, halo
        self._room: Fraction | float = math.inf  # side of the tiles that the device has memory for, zoomed pixels
        self._batch = PIXELS  # zoomed pixels that the device has memory for at a time

    def _margins(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hg wg"]:
        """Of an image in [0, 1], zoomed, whose sides are multiples of the backbone's: `margins`, on a grid of any size
        that covers it."""
        raise NotImplementedError

    @property
    def local(self) -> bool:
        """Whether tiles agree with one another as they are; otherwise they overlap and are blended."""
        raise NotImplementedError

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
        whole = self.predict_labels(plane, tile=10**6)
        for self.halo in HALOS:
            seamless = (self.predict_labels(plane, tile=_HALO_TILE) == whole).mean() >= SEAMLESS
            if seamless and whole.min() < whole.max():
                return

    @property
    def step(self) -> int:
        """Pixels of the image that tiles must start at multiples of."""
        return self.backbone.spec.multiple * self.preprocess.zoom_factor.denominator

    def predict(self, image: Array, *, tile: int = TILE) -> Segmentation:
        """Segment one plane.

        Parameters
        ----------
        image : array, shape (y, x) or (y, x, c)
            Any integer, bool or floating dtype; finite.
        tile : int
            Inner side of a tile in pixels after zooming; memory grows with its square, the answer stays the same.

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

    def predict_labels(self, image: Array, *, tile: int = TILE) -> npt.NDArray[np.uint8]:
        """Labels alone, shape (y, x), uint8: probabilities of the whole plane are held only where they are blended."""
        check_image(image)
        return self.region_labels(*self._whole(image), tile=tile)

    def predict_region(
        self, read: Window, shape: tuple[int, int], region: Region, limits: Limits, *, tile: int = TILE
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
        tile : int
            As for `predict`.

        Returns
        -------
        float32 array, shape (k + 1, y1 - y0, x1 - x0)
        """
        (y0, y1), (x0, x1) = region
        if not self.local:
            return self._blended(read, shape, region, limits, tile)
        probabilities = np.empty((len(self.class_names) + 1, y1 - y0, x1 - x0), np.float32)
        for where, found in self._windows(read, shape, region, limits, tile):
            to, frm = _overlap(where.inner, where.outer, region)
            probabilities[:, to[0], to[1]] = _probabilities(found)[:, frm[0], frm[1]]
        return probabilities

    def region_labels(
        self, read: Window, shape: tuple[int, int], region: Region, limits: Limits, *, tile: int = TILE
    ) -> npt.NDArray[np.uint8]:
        """Labels of a part of a plane, shape (y1 - y0, x1 - x0); as `predict_region` otherwise."""
        if not self.local:
            return likeliest(self._blended(read, shape, region, limits, tile))
        (y0, y1), (x0, x1) = region
        labels = np.empty((y1 - y0, x1 - x0), np.uint8)
        for where, found in self._windows(read, shape, region, limits, tile):
            to, frm = _overlap(where.inner, where.outer, region)
            labels[to] = _labels(found[:, frm[0], frm[1]])
        return labels

    @property
    def batched(self) -> bool:
        """Whether the device computes many planes at once, see `stack_labels`."""
        return self.device.kind == "cuda" and self.local and self._room == math.inf

    def stack_labels(
        self, read: Window, shape: tuple[int, int], region: Region, limits: Sequence[Limits], *, tile: int = TILE
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
        for where in self.tiles(shape, tile=tile):
            if not _touches(where.inner, region):
                continue
            to, frm = _overlap(where.inner, where.outer, region)
            windows = self.preprocess.stack_channels(read(*where.outer))
            if not batches.label(windows, frm, limits, labels[:, to[0], to[1]]):
                for i, own in enumerate(limits):  # in smaller tiles
                    labels[i] = self.region_labels(partial(_one_plane, read, i), shape, region, own, tile=tile)
                return labels
        batches.finish()
        self._batch = batches.pixels
        return labels

    def iter_tiles(self, image: Array, *, tile: int = TILE) -> Iterator[tuple[Tile, npt.NDArray[np.float32]]]:
        """Tiles and the probabilities "k+1 y x" of their inner parts, row by row."""
        check_image(image)
        for where, found in self._windows(*self._whole(image), tile):
            yield where, _probabilities(found)[:, where.crop[0], where.crop[1]]

    def tiles(self, shape: tuple[int, int], *, tile: int = TILE) -> list[Tile]:
        """The tiles of a plane of ``shape`` (y, x), row by row."""
        zoom = self.preprocess.zoom_factor
        return list(split_plane(shape, max(1, round(tile / zoom)), round(self.halo / zoom), self.step))

    def reach(self, shape: tuple[int, int], region: Region, *, tile: int = TILE) -> Region:
        """The part of a plane that `predict_region` reads to answer for a region."""
        seen = [t for t in self.tiles(shape, tile=tile) if _touches(t.inner if self.local else t.outer, region)]
        (y0, y1), (x0, x1) = zip(*(t.y.outer for t in seen), strict=True), zip(*(t.x.outer for t in seen), strict=True)
        return (min(y0), max(y1)), (min(x0), max(x1))

    def digest(self) -> str:
        """What the answers depend on, as a hexadecimal number: weights, classes, preprocessing and halo."""
        found = hashlib.sha256(self.backbone.digest().encode())
        about = [self.class_names, self.preprocess.to_json(), self.halo, self.backbone.spec.name]
        found.update(json.dumps(about, sort_keys=True).encode())
        for name, tensor in self._own_tensors():
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def __dask_tokenize__(self) -> tuple[str, ...]:
        return self.digest(), self.device.precision

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What it holds beside the backbone, by name."""
        raise NotImplementedError

    def _whole(self, image: Array) -> tuple[Window, tuple[int, int], Region, Limits]:
        plane = self.preprocess.as_channels(image)
        shape = (plane.shape[0], plane.shape[1])
        return lambda y, x: plane[y, x], shape, ((0, shape[0]), (0, shape[1])), self.preprocess.limits(plane)

    def _blended(
        self, read: Window, shape: tuple[int, int], region: Region, limits: Limits, tile: int
    ) -> npt.NDArray[np.float32]:
        """Probabilities in which neighbouring windows fade into one another across their halos."""
        (y0, y1), (x0, x1) = region
        total = np.zeros((len(self.class_names) + 1, y1 - y0, x1 - x0), np.float32)
        weight = np.zeros((y1 - y0, x1 - x0), np.float32)
        for where, found in self._windows(read, shape, region, limits, tile):
            fade = where.y.fade()[:, None] * where.x.fade()
            to, frm = _overlap(where.outer, where.outer, region)
            total[:, to[0], to[1]] += (_probabilities(found) * fade)[:, frm[0], frm[1]]
            weight[to] += fade[frm]
        total /= weight
        return total

    def _windows(
        self, read: Window, shape: tuple[int, int], region: Region, limits: Limits, tile: int
    ) -> Iterator[tuple[Tile, npt.NDArray[np.float32]]]:
        """The tiles that have a say in a region, and the margins "k y x" of their whole windows.

        Where the device runs out of memory, the rest and all that comes later goes on in smaller tiles (a warning says
        so).
        """
        zoom = self.preprocess.zoom_factor
        side, halo = min(max(1, round(tile / zoom)), max(shape)), round(self.halo / zoom)
        todo = [t for t in self.tiles(shape, tile=tile) if _touches(t.inner if self.local else t.outer, region)]

        def split(todo: list[Tile], side: int) -> list[Tile]:
            return [part for old in todo for part in _split_tile(old, shape, side, halo, self.step)]

        while side * zoom > self._room:  # halved as it was then, so that the tiles are the same
            side //= 2
            todo = split(todo, side)
        short = False
        while todo:
            where = todo[0]
            fault: Exception | None = None
            try:
                pixels = self.preprocess.as_channels(read(*where.outer))
                check_image(pixels)
                found = self._window(self.preprocess.to_tensor(pixels, limits)).cpu().numpy()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                fault = error.with_traceback(None)  # a traceback would keep the failed tensors alive
            if fault is None:
                if short:
                    self._room = side * zoom
                todo.pop(0)
                yield where, found
                continue
            side, short = side // 2, True
            if side < self.step:
                raise OutOfMemoryError(
                    f"{self.device.name} has no memory left even for a tile of {2 * side} pixels; "
                    "use --device cpu, or free the device"
                ) from fault
            log.warning("%s is out of memory; going on with tiles of %d pixels", self.device.name, side)
            release_memory(self.device)
            todo = split(todo, side)

    @torch.inference_mode()
    def _window(self, window: Float[Tensor, "3 h w"]) -> Float[Tensor, "k h w"]:
        """Margins of a window whose start lies on the grid; its far ends are padded to the grid."""
        h, w = window.shape[-2:]
        pad = (-h % self.step, -w % self.step)
        if any(pad):
            window = torch.from_numpy(np.pad(window.numpy(), ((0, 0), (0, pad[0]), (0, pad[1])), mode="symmetric"))
        zoom = self.preprocess.zoom_factor
        x = window[None].to(self.device.torch)
        x = resize(x, (int(x.shape[-2] * zoom), int(x.shape[-1] * zoom))).clamp_(0, 1)
        found = self._margins(x).float().clamp_min_(NEVER)
        return resize(found, (h + pad[0], w + pad[1]))[0, :, :h, :w]


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


def _one_plane(read: Window, i: int, y: slice, x: slice) -> Array:
    plane: Array = read(y, x)[i]
    return plane


def _touches(part: tuple[slice, slice], region: Region) -> bool:
    return all(s.start < stop and start < s.stop for s, (start, stop) in zip(part, region, strict=True))


def _overlap(
    part: tuple[slice, slice], window: tuple[slice, slice], region: Region
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where ``part`` of a plane lies within the region, and within its window."""
    to, frm = [], []
    for p, w, (start, stop) in zip(part, window, region, strict=True):
        a, b = max(p.start, start), min(p.stop, stop)
        to.append(slice(a - start, b - start))
        frm.append(slice(a - w.start, b - w.start))
    return (to[0], to[1]), (frm[0], frm[1])


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


class FewShotModel(Segmenter):
    """A teacher and the support it was told; lives in memory only."""

    def __init__(
        self,
        backbone: Backbone,
        teacher: Teacher,
        keys: SupportKeys,
        preprocess: Preprocess,
        class_names: Sequence[str],
        *,
        device: Device,
        halo: int = HALO,
    ) -> None:
        super().__init__(backbone, preprocess, class_names, device=device, halo=halo)
        self.teacher, self.keys = teacher, keys

    @property
    def local(self) -> bool:
        return self.teacher.local and self.backbone.spec.local

    def _margins(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hg wg"]:
        with self.device.autocast():
            return margins(self.teacher(self.backbone(image), self.keys).logits)

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        raise SettingsError("a teacher with its support has no digest; distil a student from it")


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """Small pictures of the support: ``images`` "n t t" uint8 and ``labels`` "n t t" uint8."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]


class StudentModel(Segmenter):
    """A light segmenter of its own: backbone, ConvDist, decoder, preprocessing and a card, in one file.

    It is made by `distillfss_core.distill` or `StudentModel.load`. ``engine`` runs its network, as for `load`.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: FewShotHead,
        preprocess: Preprocess,
        class_names: Sequence[str],
        *,
        device: Device,
        engine: str = "auto",
        halo: int = HALO,
        pixel_size: tuple[float, float] | None = None,
        training: dict[str, Any] | None = None,
        thumbnails: Thumbnails | None = None,
        samples: UInt8[Array, "n 3 s s"] | None = None,
        created: str | None = None,
    ) -> None:
        super().__init__(backbone, preprocess, class_names, device=device, halo=halo)
        self.head = head.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # as the features are
        self.pixel_size = pixel_size
        self.training = training or {}
        self.thumbnails, self.samples = thumbnails, samples
        self.created = created or datetime.now(UTC).isoformat(timespec="seconds")
        self.network = StudentNetwork(self.backbone, self.head)
        self._run = self._runner(engine, device)

    @property
    def local(self) -> bool:
        return self.network.local

    def __dask_tokenize__(self) -> tuple[str, ...]:
        return *super().__dask_tokenize__(), self.engine

    @property
    def engine(self) -> str:
        """What runs the network: "torch", "torch-compiled", "onnxruntime" or "openvino"."""
        return self._run.engine

    def _runner(self, engine: str, device: Device) -> Runner:
        if device.precision == "int8" and self.samples is None:
            raise SettingsError(
                "this student was made before students kept samples of their support, which precision int8 needs; "
                "distil it again, or use precision float32"
            )
        return Runner(self.network, choose_engine(engine, device, self.network), device, self.samples)

    def _margins(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hg wg"]:
        return self._run(image)

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(sorted(self.head.state_dict().items()))

    def to(self, device: str, precision: str = "auto", engine: str = "auto") -> StudentModel:
        """Move to another device, precision or engine, as for `load`; returns self."""
        chosen = choose_device(device, precision)
        if precision == "auto":
            chosen = replace(chosen, precision=choose_precision(chosen, engine, self.network))
        self._run = self._runner(engine, chosen)
        self.device, self._room, self._batch = chosen, math.inf, PIXELS
        self.backbone.to(chosen.torch)
        self.head.to(chosen.torch)
        return self

    def with_engine(self, engine: str) -> StudentModel:
        """The same student, run by another engine (as for `load`) in the same precision; this one stays as it is."""
        other = copy.copy(self)
        other._run = other._runner(engine, other.device)
        return other

    def at_pixel_size(self, pixel_size: tuple[float, float]) -> StudentModel:
        """The same student for images of another pixel size: objects come to the size it was trained on.

        Parameters
        ----------
        pixel_size : (float, float)
            Micrometres (y, x) of the images to come; their geometric mean counts, and the nearest zoom on offer is
            taken.

        Raises
        ------
        SettingsError
            If the student does not know its own pixel size, or one is not positive.
        """
        if self.pixel_size is None:
            raise SettingsError(
                "this student was made without a pixel size, so it cannot be scaled; give --pixel-size when distilling"
            )
        if not all(0 < p < math.inf for p in pixel_size):
            raise SettingsError(f"pixel size {pixel_size} is not possible; give two positive numbers in micrometres")
        wanted = float(self.preprocess.zoom_factor) * math.sqrt(math.prod(pixel_size) / math.prod(self.pixel_size))
        zoom = min(ZOOMS, key=lambda z: abs(math.log(float(z) / wanted)))
        scaled = copy.copy(self)
        scaled.preprocess = replace(self.preprocess, zoom=str(zoom))
        scaled.pixel_size = pixel_size  # zoom and pixel size belong together
        return scaled

    @property
    def card(self) -> dict[str, Any]:
        """What the model is: JSON-able, the same before saving and after loading."""
        return {
            "format": STUDENT_FILE.name,
            "format_version": STUDENT_FILE.version,
            "created": self.created,
            "classes": list(self.class_names),
            "pixel_size_um": list(self.pixel_size) if self.pixel_size else None,
            "backbone": {
                "name": self.backbone.spec.name,
                "weights": self.backbone.weights,
                "license": self.backbone.spec.license,
                "digest": self.backbone.digest(),
            },
            "head": self.head.form.to_json(),
            "preprocess": self.preprocess.to_json(),
            "halo": self.halo,
            "training": self.training,
        }

    def save(self, path: str | Path, *, with_backbone: bool = True) -> None:
        """Write one safetensors file, whole or not at all.

        Parameters
        ----------
        with_backbone : bool
            False leaves the backbone's weights out; loading then needs them packaged, on the hub or in a file, and
            checks their digest.

        Raises
        ------
        SettingsError
            If weights are to be left out that could not be found again: they were trained with a head of one's own.
        OutputError
            If it cannot be written; a file that was there before stays as it was.
        """
        tensors = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        if not with_backbone and not can_be_found_again(self.backbone):
            raise SettingsError(KEEP_BACKBONE)
        if with_backbone:
            tensors |= {f"backbone.{name}": value for name, value in self.backbone.state().items()}
        if self.thumbnails is not None:
            tensors["thumbnails.images"] = torch.from_numpy(self.thumbnails.images)
            tensors["thumbnails.labels"] = torch.from_numpy(self.thumbnails.labels)
        if self.samples is not None:
            tensors["samples"] = torch.from_numpy(self.samples)
        write_card_file(path, STUDENT_FILE, self.card, tensors, backbone=str(with_backbone).lower())

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        precision: str = "auto",
        weights: str = "auto",
        engine: str = "auto",
    ) -> StudentModel:
        """Read a student.

        Parameters
        ----------
        path : path
        device : str
            Any device, whatever the model was made on.
        precision : str
            "float32", "bfloat16", "float16" (GPUs only), "int8" (the fastest on a CPU; from one label in a thousand to
            one in a hundred differs), or "auto": bfloat16 on CUDA devices that have it, and by OpenVINO on processors
            that have it (two labels in ten thousand to two in a thousand differ); float32 elsewhere.
        weights : str
            Where the backbone's weights are, for a file that was saved without them.
        engine : {"auto", "torch", "torch-compiled", "onnxruntime", "openvino"}
            What runs the network; "auto" is the fastest that is installed, see `inference.choose_engine`. In float32
            their logits differ by rounding alone, and labels where two classes are equally likely to within that.

        Raises
        ------
        SettingsError
            If the device, the precision or the engine is not to be had.
        ModelFileError
            If the file is missing, damaged, truncated, newer than this program or of another kind.
        """
        path = Path(path)
        card, tensors, _ = read_card_file(path, STUDENT_FILE)
        try:
            chosen = choose_device(device, precision)
            own = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
            about = card["backbone"]
            backbone = (
                backbone_from_state(about["name"], own, about["weights"])
                if own
                else find_backbone(about["name"], about["digest"], weights, str(path))
            )
            head = FewShotHead(backbone.spec, len(card["classes"]), HeadForm(**card["head"]))
            head.load_state_dict({n.removeprefix("head."): t for n, t in tensors.items() if n.startswith("head.")})
            thumbs = (
                Thumbnails(tensors["thumbnails.images"].numpy(), tensors["thumbnails.labels"].numpy())
                if "thumbnails.images" in tensors
                else None
            )
            pixel = card["pixel_size_um"]
            model = cls(
                backbone,
                head,
                Preprocess.from_json(card["preprocess"]),
                tuple(card["classes"]),
                device=chosen,
                halo=int(card["halo"]),
                pixel_size=(float(pixel[0]), float(pixel[1])) if pixel else None,
                training=card["training"],
                thumbnails=thumbs,
                samples=tensors["samples"].numpy() if "samples" in tensors else None,
                created=card["created"],
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, SettingsError):
                raise
            reason = str(error).splitlines()[0]
            raise ModelFileError(f"{path}: its card and its tensors do not fit together ({reason})") from error
        return model.to(chosen.name, precision, engine)


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of a student file, without loading the model (its tensors are not checked).

    Raises
    ------
    ModelFileError
        As `StudentModel.load` does.
    """
    card, _, header = read_card_file(path, STUDENT_FILE, tensors=False)
    return card | {"backbone_inside": header.get("backbone") == "true", "bytes": Path(path).stat().st_size}


def read_thumbnails(path: str | Path) -> Thumbnails | None:
    """The support thumbnails of a student file, if it has any."""
    _, tensors, _ = read_card_file(path, STUDENT_FILE)
    if "thumbnails.images" not in tensors:
        return None
    return Thumbnails(tensors["thumbnails.images"].numpy(), tensors["thumbnails.labels"].numpy())


def thumbnails(support: SupportSet, most: int = 16) -> Thumbnails:
    """Small pictures of up to ``most`` slices, evenly chosen: image stretched to its own range, labels by nearest."""
    chosen = [support.slices[i] for i in evenly(len(support), most)]
    images, labels = [], []
    for labelled in chosen:
        h, w = labelled.labels.shape
        rows = ((np.arange(THUMBNAIL) + 0.5) * h / THUMBNAIL).astype(int)
        columns = ((np.arange(THUMBNAIL) + 0.5) * w / THUMBNAIL).astype(int)
        small = labelled.image[rows][:, columns].astype(np.float32)
        small = small.mean(-1) if small.ndim == 3 else small
        low, high = np.percentile(small, (1, 99))
        images.append((np.clip((small - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8))
        labels.append(labelled.labels[rows][:, columns])
    return Thumbnails(np.stack(images), np.stack(labels))
