"""Labels of planes along z, y and x, compared on the lines where they cross, before a consensus of the three begins."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby, product

import numpy as np
import numpy.typing as npt

from distillfss_core.errors import ConsensusWarning, ImageError, InputFileError
from distillfss_core.labelstore.layout import Box, Index, as_box
from distillfss_core.models.segmenter import Region
from distillfss_core.segmentation.lazy import VolumeSegmenter
from distillfss_core.types import evenly

CUBIC = 1.5  # the longest side of a voxel over the shortest, at most, for a consensus
_SIDE = 256  # of a cube in which planes are compared, voxels
_PLANES = 6  # compared in a cube, of each direction
_CUBES, _CANDIDATES = 2, 8  # compared, and looked at for objects
_ENOUGH = 1000  # labeled voxels on the lines of a cube, so that no other one is needed
_FEW = 30  # fewer labeled voxels give no verdict
_CONTRADICTION = 1 / 3  # agreement of directions, in parts of that of neighboring planes

Labels = npt.NDArray[np.uint8]


@dataclass
class _Tally:
    """Voxels that either of two labelings takes for objects, and those to which both give the same class."""

    either: int = 0
    same: int = 0

    def add(self, first: Labels, second: Labels) -> None:
        is_object = (first > 0) | (second > 0)
        self.either += int(is_object.sum())
        self.same += int((is_object & (first == second)).sum())

    def __add__(self, other: _Tally) -> _Tally:
        return _Tally(self.either + other.either, self.same + other.same)

    @property
    def iou(self) -> float:
        return self.same / max(1, self.either)


@dataclass
class _Comparison:
    """Agreement of two directions on the lines where their planes cross, and of neighboring planes of a direction."""

    crossing: dict[str, _Tally] = field(default_factory=lambda: {pair: _Tally() for pair in ("zy", "zx", "yx")})
    neighbors: dict[str, _Tally] = field(default_factory=lambda: {axis: _Tally() for axis in "zyx"})

    def of_direction(self, axis: str) -> _Tally:
        """Agreement of a direction with the two others."""
        first, second = (tally for pair, tally in self.crossing.items() if axis in pair)
        return first + second


def compare_directions(segmenters: Sequence[VolumeSegmenter], region: Box, block: Index) -> str:
    """Label some planes along z, y and x, and compare them where they cross.

    ::

        +---+---+---+      planes along z and y cross on lines along x; a line has the labels of both, which should be
        |   |   |   |      the same, whatever the objects are
        +---+---+---+

    The yardstick is the IoU of neighboring planes: how much objects change in one voxel. Two things are found: a
    direction that agrees with the others less than a third as well, and labels that change along z more than `CUBIC`
    times as much as along y and x, as where voxels are longer than wide.

    Parameters
    ----------
    segmenters : of planes along z, y and x
    region : Box
        Voxels that the run segments.
    block : (z, y, x)
        Size of the blocks of the run: planes are compared in whole blocks, or in parts of 256 voxels.

    Returns
    -------
    str
        In one line which direction differs, by which figures, and what to do; "" where none does, where hardly any
        object is found, and where the volume cannot be read.

    Warns
    -----
    ConsensusWarning
        That line.
    """
    comparison, count = _Comparison(), 0
    volume = segmenters[0].volume
    if min(volume.shape[:3]) < 2:
        return ""
    for cube in _cubes(region, block):
        with suppress(ImageError, InputFileError):  # an error where it is segmented
            if any(_labels_of(segmenters[0], [z], cube[1:]).any() for z in _planes(cube[0])[1::2]):
                _compare(segmenters, cube, comparison)
                count += 1
        if count == _CUBES or sum(tally.either for tally in comparison.crossing.values()) > _ENOUGH:
            break
    verdict = _verdict(comparison)
    if not verdict:
        return ""
    warning = f"{volume.name}: {verdict}; use mode planewise or smoothed, or check the labels"
    warnings.warn(warning, ConsensusWarning, stacklevel=3)
    return warning


def _verdict(comparison: _Comparison) -> str:
    along_z, across_z = comparison.neighbors["z"], comparison.neighbors["y"] + comparison.neighbors["x"]
    worst = min("zyx", key=lambda axis: comparison.of_direction(axis).iou)
    agreement = comparison.of_direction(worst)
    if min(agreement.either, along_z.either) < _FEW:
        return ""
    if agreement.iou < _CONTRADICTION * along_z.iou:
        return (
            f"planes along {worst} contradict those of the other directions: where they cross, labels agree by an IoU "
            f"of {agreement.iou:.2f}, those of neighboring planes by {along_z.iou:.2f}"
        )
    if across_z.either >= _FEW and 1 - along_z.iou > CUBIC * (1 - across_z.iou):
        return (
            f"labels change more along z than along y and x, as where voxels are no cubes: neighboring planes agree by "
            f"an IoU of {along_z.iou:.2f} along z, of {across_z.iou:.2f} along y and x"
        )
    return ""


def _cubes(region: Box, block: Index) -> Iterator[Box]:
    """Cubes of whole blocks, or parts of blocks, evenly spread in a region, the middle ones first."""
    axes = []
    for (start, stop), side in zip(region, block, strict=True):
        length = side * max(1, _SIDE // side)
        cells = range(start // length, -(-stop // length))
        begins = [cells[i] * length for i in evenly(len(cells), 3)]
        spans = [(max(start, begin), min(stop, begin + min(length, _SIDE))) for begin in begins]
        middle = start + stop
        axes.append(sorted((s for s in spans if s[0] < s[1]), key=lambda s: abs(sum(s) - middle)))
    ranked = sorted(product(*(enumerate(spans) for spans in axes)), key=lambda cube: sum(rank for rank, _ in cube))
    for cube in ranked[:_CANDIDATES]:
        yield as_box(span for _, span in cube)


def _planes(span: tuple[int, int]) -> list[int]:
    """Some planes of a cube, evenly spread."""
    count = min(_PLANES, span[1] - span[0])
    return [span[0] + int((k + 0.5) * (span[1] - span[0]) / count) for k in range(count)]


def _compare(segmenters: Sequence[VolumeSegmenter], cube: Box, comparison: _Comparison) -> None:
    """Add the agreement of the planes of a cube."""
    regions: list[Region] = [(cube[1], cube[2]), (cube[0], cube[2]), (cube[0], cube[1])]
    chosen = [_planes(span) for span in cube]
    labels = []
    for axis, segmenter, planes, region in zip("zyx", segmenters, chosen, regions, strict=True):
        last = segmenter.volume.shape[0] - 1
        labels.append(_labels_of(segmenter, planes, region))
        beside = _labels_of(segmenter, [p + 1 if p < last else p - 1 for p in planes], region)
        comparison.neighbors[axis].add(labels[-1], beside)
    z, y, x = labels
    rows, lines, columns = ([p - span[0] for p in planes] for planes, span in zip(chosen, cube, strict=True))
    comparison.crossing["zy"].add(z[:, lines], y[:, rows].transpose(1, 0, 2))
    comparison.crossing["zx"].add(z[:, :, columns], x[:, rows].transpose(1, 2, 0))
    comparison.crossing["yx"].add(y[:, :, columns], x[:, :, lines].transpose(2, 1, 0))


def _labels_of(segmenter: VolumeSegmenter, planes: Sequence[int], region: Region) -> Labels:
    """Labels of a region of some planes, shape (n, rows, columns); planes of one chunk are read together."""
    labels = []
    for _, group in groupby(planes, key=lambda plane: plane // segmenter.volume.chunks[0]):
        near = list(group)
        first = min(near)
        pixels = segmenter.read(slice(first, max(near) + 1), region)
        labels += [segmenter.labels(plane, region, pixels[plane - first]) for plane in near]
    return np.stack(labels)
