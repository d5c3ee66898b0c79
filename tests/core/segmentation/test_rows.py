"""Blocks that are read in rows are those of the volume, and no chunk of a row is read twice."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from distillfss_core.segmentation import rows as module
from distillfss_core.segmentation.rows import RowReader
from distillfss_core.volumes.volume import Volume, open_volume

SIDE, HALO = 60, 10
VOXELS = np.random.default_rng(0).integers(0, 60_000, (3, 100, 290), dtype=np.uint16)


@pytest.fixture(params=[16, 64, 70, 290], ids="chunks of {}".format)
def volume(request, tmp_path) -> Volume:
    array = zarr.create_array(tmp_path / "v.zarr", shape=VOXELS.shape, chunks=(2, 32, request.param), dtype="uint16")
    array[...] = VOXELS
    return open_volume(tmp_path / "v.zarr", axes="zyx")


def blocks() -> list[tuple[slice, slice, slice, int]]:
    """In the order of a run: along x, then y, then z; with halos, and where their inner parts end."""
    depth, height, width = VOXELS.shape
    return [
        (slice(z, z + 1), slice(max(0, y - HALO), min(height, y + SIDE + HALO)), slice(max(0, x - HALO), end), stop)
        for z in range(depth)
        for y in range(0, height, SIDE)
        for x in range(0, width, SIDE)
        for stop in [min(width, x + SIDE)]
        for end in [min(width, x + SIDE + HALO)]
    ]


@pytest.mark.parametrize("order", ["as they come", "mixed"])
def test_blocks_are_those_of_the_volume(volume, order):
    reader, planned = RowReader(volume), blocks()
    if order == "mixed":
        planned = [planned[i] for i in np.random.default_rng(1).permutation(len(planned))]
    for z, y, x, end in planned:
        np.testing.assert_array_equal(reader.read(z, y, x, end), VOXELS[z, y, x])


def test_each_chunk_of_a_row_is_decoded_once(volume, monkeypatch):
    asked = []
    read = Volume.read

    def note(self, z, y, x):
        asked.append((z.start, y.start, x))
        return read(self, z, y, x)

    monkeypatch.setattr(Volume, "read", note)
    reader, chunk = RowReader(volume), volume.chunks[2]
    for block in blocks():
        reader.read(*block)
    for row in {(z, y) for z, y, _ in asked}:
        seen = [c for z, y, x in asked if (z, y) == row for c in range(x.start // chunk, -(-x.stop // chunk))]
        assert sorted(seen) == list(range(-(-VOXELS.shape[2] // chunk)))


def test_of_long_chunks_nothing_is_kept(volume, monkeypatch):
    monkeypatch.setattr(module, "_KEPT", 100)
    reader = RowReader(volume)
    for z, y, x, end in blocks():
        np.testing.assert_array_equal(reader.read(z, y, x, end), VOXELS[z, y, x])
        assert reader._kept is None
