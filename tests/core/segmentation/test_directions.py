"""Planes of three directions are compared where they cross; what they read is little."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest

from distillfss_core.errors import ConsensusWarning, InputFileError
from distillfss_core.labelstore.layout import Box
from distillfss_core.segmentation.directions import compare_directions
from distillfss_core.segmentation.lazy import VolumeSegmenter
from distillfss_core.volumes.volume import open_volume

BLOCK = (64, 64, 64)


def balls(shape: tuple[int, int, int], count: int = 30, seed: int = 0) -> np.ndarray:
    """Balls of radius 5 to 9 with the value 200, on 0."""
    rng = np.random.default_rng(seed)
    places = np.indices(shape)
    image = np.zeros(shape, np.uint8)
    for _ in range(count):
        center, radius = rng.uniform(0, shape), rng.uniform(5, 9)
        image[sum((axis - c) ** 2 for axis, c in zip(places, center, strict=True)) < radius**2] = 200
    return image


class Bright(VolumeSegmenter):
    """In place of a model and a volume: bright voxels are objects, unless ``seen`` changes the labels of a plane."""

    def __init__(self, volume, seen: Callable[[np.ndarray], np.ndarray] = lambda labels: labels) -> None:
        self.volume, self.seen = volume, seen

    def read(self, z, region):
        return self.volume.read(z, *(slice(*span) for span in region))

    def labels(self, z, region, pixels):
        return self.seen((pixels > 100).astype(np.uint8))


def compared(image: np.ndarray, region: Box | None = None, **seen: Callable[[np.ndarray], np.ndarray]) -> str:
    """The line about a stack; by direction what its planes show in place of bright voxels."""
    volume = open_volume(image)
    along = {"z": volume, "y": volume.along("y"), "x": volume.along("x")}
    segmenters = [Bright(along[axis], **({"seen": seen[axis]} if axis in seen else {})) for axis in "zyx"]
    whole = tuple((0, n) for n in image.shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = compare_directions(segmenters, region or whole, BLOCK)
    assert [str(w.message) for w in caught if w.category is ConsensusWarning] == ([line] if line else [])
    assert "\n" not in line
    return line


def test_directions_that_show_the_same_balls_agree():
    for seed in range(3):
        assert compared(balls((70, 80, 90), seed=seed)) == ""


def test_a_direction_that_misses_a_part_of_each_object_is_no_contradiction():
    def without_some(labels):
        return labels * (np.random.default_rng(labels.size).random(labels.shape) < 0.8)

    assert compared(balls((70, 80, 90)), y=without_some, x=without_some) == ""


@pytest.mark.parametrize("blind", ["y", "x"])
def test_a_direction_that_shows_nothing_is_named_with_both_figures(blind):
    line = compared(balls((70, 80, 90)), **{blind: np.zeros_like})
    assert line.startswith(f"array: planes along {blind} contradict those of the other directions")
    assert "by an IoU of 0.00, those of neighboring planes by 0.8" in line
    assert "use mode planewise or smoothed" in line


def test_directions_of_other_objects_contradict_one_another():
    """Planes along x show the background."""
    assert "planes along x contradict" in compared(balls((70, 80, 90)), x=lambda labels: 1 - labels)


def test_the_class_counts():
    assert "planes along y contradict" in compared(balls((70, 80, 90)), y=lambda labels: 2 * labels)


@pytest.mark.parametrize("factor", [1, 4])
def test_balls_that_are_flat_along_z_are_named(factor):
    """Every fourth plane of a volume of unknown scale has voxels four times as long as wide."""
    line = compared(balls((160, 80, 80), count=60)[::factor])
    assert ("as where voxels are no cubes" in line) == (factor == 4)


def test_shifted_planes_are_named():
    """Planes along z, each of which is shifted at random."""
    image, rng = balls((70, 80, 90)), np.random.default_rng(0)
    shifted = np.stack([np.roll(plane, tuple(rng.integers(-12, 12, 2)), (0, 1)) for plane in image])
    assert "labels change more along z" in compared(shifted)


def test_no_objects_give_no_verdict():
    assert compared(np.zeros((70, 80, 90), np.uint8)) == ""
    assert compared(np.zeros((70, 80, 90), np.uint8), y=np.ones_like) == ""
    speck = np.zeros((70, 80, 90), np.uint8)
    speck[40, 40:43, 40:43] = 200
    assert compared(speck, x=np.zeros_like) == ""


@pytest.mark.parametrize("shape", [(2, 60, 60), (60, 1, 60), (60, 60, 1), (2, 2, 2)])
def test_thin_volumes_are_compared_or_left(shape):
    compared(np.full(shape, 200, np.uint8))


class Watched:
    """A volume of balls on a grid, of any size; it notes what is read."""

    name, chunks = "watched", (64, 64, 64)

    def __init__(self, shape, read, order=(0, 1, 2), fails=False) -> None:
        self.shape, self.boxes, self.order, self.fails = tuple(shape[k] for k in order), read, order, fails

    def read(self, *box):
        if self.fails:
            raise InputFileError("watched: is damaged")
        spans = [box[self.order.index(k)] for k in range(3)]
        self.boxes.append(spans)
        axes = np.meshgrid(*(np.arange(s.start, s.stop) % 40 - 20 for s in spans), indexing="ij", sparse=True)
        inside = sum(axis**2 for axis in axes) < 100
        return (inside * np.uint8(200)).transpose(self.order)


def watched(shape, region, *, fails=False, block=BLOCK):
    boxes: list[list[slice]] = []
    orders = ((0, 1, 2), (1, 0, 2), (2, 0, 1))
    line = compare_directions([Bright(Watched(shape, boxes, order, fails)) for order in orders], region, block)
    return line, boxes


def test_of_a_large_volume_some_windows_are_read():
    shape = (3000, 20_000, 20_000)
    for block in (BLOCK, (48, 256, 256), (1024, 1024, 1024)):
        line, boxes = watched(shape, tuple((0, n) for n in shape), block=block)
        assert line == ""
        assert 0 < len(boxes) < 100
        assert all(s.stop - s.start <= 256 for spans in boxes for s in spans)
        assert sum(np.prod([s.stop - s.start for s in spans]) for spans in boxes) < 2e8


def test_what_is_read_lies_in_the_region_or_beside_it():
    region = ((100, 180), (1000, 1100), (50, 300))
    _, boxes = watched((300, 2000, 2000), region)
    assert boxes
    assert all(a - 1 <= s.start and s.stop <= b + 1 for spans in boxes for s, (a, b) in zip(spans, region, strict=True))


def test_a_damaged_volume_gives_no_verdict():
    assert watched((100, 100, 100), ((0, 100),) * 3, fails=True) == ("", [])
