"""Modes of labeling a box: plane by plane, smoothed along z, or by consensus of three directions."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator

import numpy as np
import numpy.typing as npt

from distillfss_core.errors import SettingsError
from distillfss_core.labelstore.layout import Box, Layout, plan_blocks, plan_layout
from distillfss_core.models.preprocess import Limits
from distillfss_core.models.segmenter import TILE, Segmenter
from distillfss_core.segmentation.directions import CUBIC, compare_directions
from distillfss_core.segmentation.lazy import VolumeSegmenter
from distillfss_core.types import Array, GeneratorRun, evenly, finish, likeliest
from distillfss_core.volumes.volume import Volume

log: logging.Logger = logging.getLogger(__name__)

_SIDE = 256  # of a block of consensus, voxels
_CHUNK = 128
_GROWTH = 2.5  # of shards of large tiles: a chunk of the image may hold many planes, and is decoded for each shard
_SAMPLED = 16  # planes that say what is dark and bright in other directions


class PlanewiseLabels:
    """Mode planewise: each plane separately, with the labels of `StudentModel.predict_labels`.

    Parameters
    ----------
    volume : Volume
    model : Segmenter
    tile : int, optional
        Inner side of a tile in pixels after zooming.
    """

    mode = "planewise"

    def __init__(self, volume: Volume, model: Segmenter, *, tile: int | None = None) -> None:
        self.volume: Volume = volume
        self.model: Segmenter = model
        self.segmenter: VolumeSegmenter = VolumeSegmenter(volume, model, tile=tile)
        self.tile: int = self.segmenter.tile

    def layout(self, levels: int | None) -> Layout:
        """Shards that this way of labeling fills without waste; ``levels`` as for `plan_layout`."""
        side = _side(self.model, self.segmenter.shape, self.tile)
        growth = min(max(1.0, (self.tile / TILE) ** 2), _GROWTH)
        return plan_layout(self.volume.shape, side, self.volume.scale, levels=levels, growth=growth)

    def compare(self, region: Box) -> str:
        """Compare a region with what this mode requires: in one line why labels may be wrong; "" by default."""
        return ""

    def read(self, box: Box) -> Array:
        """What has to be read for the labels of a box; the limits of its planes are looked up on the way."""
        return self.segmenter.read(slice(*box[0]), box[1:])

    def labels(self, box: Box, pixels: Array) -> npt.NDArray[np.uint8]:
        """Labels of a box, shape (z, y, x), from what `read` gave."""
        return finish(GeneratorRun(self.iter_labels(box, pixels)))

    def iter_labels(self, box: Box, pixels: Array) -> Generator[None, None, npt.NDArray[np.uint8]]:
        """`labels`, which pauses after each plane."""
        return self.segmenter.iter_stack_labels(range(*box[0]), box[1:], pixels)


class SmoothedLabels(PlanewiseLabels):
    """Mode smoothed: weighted mean of the probabilities of a plane (two parts) and its neighbors (one part each).

    What flickers from plane to plane goes, and so do objects of a single plane.
    """

    mode = "smoothed"

    def __init__(self, volume: Volume, model: Segmenter, *, tile: int | None = None) -> None:
        super().__init__(volume, model, tile=tile or TILE)  # larger ones make shards of fewer planes

    def read(self, box: Box) -> Array:
        """Voxels of a box and of its neighboring planes."""
        return super().read(self._with_neighbors(box))

    def iter_labels(self, box: Box, pixels: Array) -> Generator[None, None, npt.NDArray[np.uint8]]:
        """Labels of a box, shape (z, y, x), from the result of `read`; it pauses after each plane."""
        labels = np.empty([b - a for a, b in box], np.uint8)
        first, last = self._with_neighbors(box)[0]
        planes: dict[int, npt.NDArray[np.float32]] = {}
        for row, z in enumerate(range(*box[0])):
            near = range(max(first, z - 1), min(last, z + 2))
            planes = {
                n: planes[n] if n in planes else self.segmenter.probabilities(n, box[1:], pixels[n - first])
                for n in near
            }
            total = 2 * planes[z]
            for n in near:
                if n != z:
                    total += planes[n]
            labels[row] = likeliest(total)
            yield
        return labels

    def _with_neighbors(self, box: Box) -> Box:
        (z0, z1), y, x = box
        return (max(0, z0 - 1), min(self.volume.shape[0], z1 + 1)), y, x


class ConsensusLabels(PlanewiseLabels):
    """Mode consensus: mean of the probabilities that planes along z, y and x give a voxel, for nearly cubic voxels.

    A block is a cube, since planes in three directions go through it::

        +-----+-----+      each direction looks at the block with its halo in the two axes of its planes; blocks are
        |    /|    /|      made of whole tiles in all three directions
        +-----+-----+

    Along y and x a whole plane cannot be read to see what is dark and bright: the limits there are those of some planes
    along z, evenly chosen, together.

    Raises
    ------
    SettingsError
        If voxels are longer than wide, or there is only one plane.
    """

    mode = "consensus"

    def __init__(self, volume: Volume, model: Segmenter, *, tile: int | None = None) -> None:
        _check_cubic(volume)
        super().__init__(volume, model, tile=tile or max(1, round(_SIDE * model.preprocess.zoom_factor)))
        limits = _limits_of_some(self.segmenter)
        self._others = [VolumeSegmenter(volume.along(a), model, tile=self.tile, limits=limits) for a in "yx"]

    def layout(self, levels: int | None) -> Layout:
        """Shards made of whole tiles in all three directions; ``levels`` as for `plan_layout`."""
        depth, _ = _side(self.model, (self.volume.shape[0], 1), self.tile)
        shard = (depth, *_side(self.model, self.segmenter.shape, self.tile))
        chunk = tuple(math.gcd(n, _CHUNK) for n in shard)
        return plan_blocks(
            self.volume.shape,
            shard,
            (chunk[0], chunk[1], chunk[2]),
            self.volume.scale,
            dtype="uint8",
            levels=levels,
        )

    def compare(self, region: Box) -> str:
        """Compare planes of the three directions by `compare_directions`."""
        return compare_directions([self.segmenter, *self._others], region, self.layout(None).shard)

    def read(self, box: Box) -> Array:
        """Nothing: each direction reads its planes when it comes to them, so that only one has to be held."""
        return np.empty(0)

    def iter_labels(self, box: Box, pixels: Array) -> Generator[None, None, npt.NDArray[np.uint8]]:
        """Labels of a box, shape (z, y, x), from planes read in three directions; ``pixels`` is not used."""
        z, y, x = box
        total = yield from _iter_chances(self.segmenter, z, (y, x))
        total += (yield from _iter_chances(self._others[0], y, (z, x))).transpose(0, 2, 1, 3)
        total += (yield from _iter_chances(self._others[1], x, (z, y))).transpose(0, 2, 3, 1)
        return likeliest(total)


MODES = {kind.mode: kind for kind in (PlanewiseLabels, SmoothedLabels, ConsensusLabels)}


def make_mode(mode: str, volume: Volume, model: Segmenter, tile: int | None = None) -> PlanewiseLabels:
    """The way of labeling that goes by this name.

    Raises
    ------
    SettingsError
        If there is none, or it does not go with the volume.
    ImageError
        If the volume has other channels than the model.
    """
    if mode not in MODES:
        raise SettingsError(f"there is no mode {mode!r}; choose one of: {', '.join(MODES)}")
    return MODES[mode](volume, model, tile=tile)


def _side(model: Segmenter, shape: tuple[int, int], tile: int) -> tuple[int, int]:
    """Inner size of the tiles of a plane, a multiple of the model's step."""
    first = model.tiles(shape, tile=tile)[0]
    rows, columns = (-(-span.inner[1] // model.step) * model.step for span in (first.y, first.x))
    return rows, columns


def _check_cubic(volume: Volume) -> None:
    if volume.shape[0] == 1:
        raise SettingsError(f"{volume.name}: has one plane, so there is no consensus of directions; use mode planewise")
    sides = [s for s in volume.scale if s is not None]
    if len(sides) < 3:
        log.warning("%s: its scale is not known; for the consensus voxels are taken to be cubes", volume.name)
    elif max(sides) > CUBIC * min(sides):
        size = " x ".join(f"{s:g}" for s in sides)
        raise SettingsError(
            f"{volume.name}: a voxel is {size} (z y x), too far from a cube for a consensus of directions; "
            "use mode smoothed, or a level at which y and x are as coarse as z"
        )


def _limits_of_some(segmenter: VolumeSegmenter) -> Limits:
    """Intensities that become 0 and 1 of some planes together."""
    return segmenter.limits_of(evenly(segmenter.volume.shape[0], _SAMPLED))


def _iter_chances(
    segmenter: VolumeSegmenter, planes: tuple[int, int], region: tuple[tuple[int, int], ...]
) -> Generator[None, None, Array]:
    """Probabilities "k+1 plane row column" of a region of some planes, read a few at a time; pauses after each."""
    (y0, y1), (x0, x1) = region
    count = len(segmenter.model.class_names) + 1
    blended = np.empty((count, planes[1] - planes[0], y1 - y0, x1 - x0), np.float32)
    step = max(1, segmenter.volume.chunks[0])
    for start in range(*planes, step):
        stop = min(start + step, planes[1])
        pixels = segmenter.read(slice(start, stop), ((y0, y1), (x0, x1)))
        for z in range(start, stop):
            blended[:, z - planes[0]] = segmenter.probabilities(z, ((y0, y1), (x0, x1)), pixels[z - start])
            yield
    return blended
