"""Lazy segmentation computes what is looked at, and it is what the whole would be."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest

from distillfss_core.errors import ImageError, SettingsError
from distillfss_core.models.preprocess import Limits
from distillfss_core.segmentation.lazy import VolumeSegmenter, sample_volume, segment_lazy
from distillfss_core.volumes.volume import open_volume
from pictures import blobs
from volumes import write_ome_zarr

STACK = np.stack([blobs(seed, 200).image for seed in range(4)])


def with_scope(model, scope):
    changed = pickle.loads(pickle.dumps(model))
    changed.preprocess = replace(model.preprocess, scope=scope)
    return changed


@pytest.mark.parametrize("scope", ["image", "volume"])
def test_lazy_and_eager_segmentation_agree_on_any_region(plain_student, tmp_path, scope):
    model = with_scope(plain_student, scope)
    volume = open_volume(write_ome_zarr(tmp_path / "a.zarr", STACK))
    lazy = segment_lazy(volume, model, tile=96)
    assert lazy.chunks == ((1, 1, 1, 1), (96, 96, 8), (96, 96, 8))
    whole = [model.predict(plane, tile=96) for plane in STACK]
    labels = np.stack([w.labels for w in whole])
    assert labels.any()
    assert np.array_equal(lazy[2].compute(), labels[2])
    assert np.array_equal(lazy[1:4, 50:133, 190:].compute(), labels[1:4, 50:133, 190:])
    assert np.array_equal(lazy[-1, ::3, 7].compute(), labels[-1, ::3, 7])
    chances = segment_lazy(volume, model, what="probabilities", tile=96)
    assert np.array_equal(chances[:, 3, 10:99].compute(), whole[3].probabilities[:, 10:99])
    doubts = segment_lazy(volume, model, what="uncertainty", tile=96)
    assert np.array_equal(doubts[0].compute(), whole[0].uncertainty)


def test_a_plane_is_computed_only_when_looked_at_and_graphs_stay_small(plain_student):
    class Spy:
        shape, dtype, asked = (25_000, 512, 512), np.dtype("u1"), []

        def __getitem__(self, box):
            self.asked.append(box[0])
            return np.zeros([s.stop - s.start for s in box], "u1")

    spy = Spy()
    lazy = segment_lazy(open_volume(spy), plain_student, tile=256)
    assert lazy.npartitions == 100_000
    plane = lazy[7, :64, :64]
    assert spy.asked == []
    assert not any(
        type(layer).__name__ == "MaterializedLayer" and len(layer) > 10 for layer in plane.dask.layers.values()
    )
    assert len(plane.__dask_optimize__(plane.dask, plane.__dask_keys__())) < 10
    plane.compute()
    assert all(planes == slice(7, 8) for planes in spy.asked)


def test_limits_of_a_plane_are_read_in_bands(plain_student, monkeypatch):
    model = with_scope(plain_student, "image")
    plane = np.random.default_rng(0).integers(0, 9999, (1, 1300, 1100), dtype=np.uint16)
    monkeypatch.setattr("distillfss_core.segmentation.lazy._BAND", 100_000)
    assert VolumeSegmenter(open_volume(plane), model).limits(0) == model.preprocess.limits(plane[0])


class Counted:
    """An array that knows how many of its chunks were decoded."""

    def __init__(self, array: np.ndarray, chunks: tuple[int, ...]) -> None:
        self.array, self.chunks, self.shape, self.dtype, self.decoded = array, chunks, array.shape, array.dtype, 0

    def __getitem__(self, box):
        self.decoded += math.prod(-(-s.stop // n) - s.start // n for s, n in zip(box, self.chunks, strict=False))
        return self.array[box]


@pytest.mark.parametrize("colors", [(), (3,)])
def test_a_block_takes_its_limits_from_one_look_at_every_chunk(plain_student, monkeypatch, colors):
    model = with_scope(plain_student, "image")
    if colors:
        mix, fitted = tuple(tuple(row) for row in np.eye(3)), Limits((0.0,) * 3, (1.0,) * 3)
        model.preprocess = replace(model.preprocess, channels=3, mix=mix, fitted=fitted)
    array = np.random.default_rng(0).integers(0, 9999, (8, 1030, 1100, *colors), dtype=np.uint16)
    array[2:5] //= 7
    expected = [model.preprocess.limits(plane) for plane in array]
    chunks, region = (3, 255, 301), ((0, 1030), (0, 1100))
    for band, samples, most in ((1 << 22, 1 << 24, 2), (3 * 255 * 301, 1 << 24, 2), (1, 1, 4)):
        monkeypatch.setattr("distillfss_core.segmentation.lazy._BAND", band)
        monkeypatch.setattr("distillfss_core.segmentation.lazy._SAMPLES", samples)
        counted = Counted(array, (*chunks, *colors))
        volume = open_volume(counted, axes="zyxc"[: array.ndim], channel="all" if colors else None)
        segmenter = VolumeSegmenter(volume, model)
        segmenter.read(slice(0, 3), region)
        segmenter.read(slice(3, 8), region)
        assert [segmenter.limits(z) for z in range(8)] == expected
        assert counted.decoded <= most * 3 * 5 * 4


def test_planes_that_are_seen_one_by_one_share_a_look_at_their_chunks(plain_student):
    model = with_scope(plain_student, "image")
    array = np.random.default_rng(0).integers(0, 9999, (8, 96, 100)).astype(np.float32)
    expected = [model.preprocess.limits(plane) for plane in array]
    array[5, 3, 3] = np.nan
    counted = Counted(array, (4, 96, 50))
    segmenter = VolumeSegmenter(open_volume(counted, axes="zyx"), model)
    assert [segmenter.limits(z) for z in (0, 1, 2, 3, 4, 6, 7)] == expected[:5] + expected[6:]
    assert counted.decoded == 2 * 2
    with pytest.raises(ImageError, match="plane 5: 1 of 9600 pixels are NaN"):  # only where it is asked
        segmenter.limits(5)


def test_what_cannot_be_segmented_is_said(plain_student):
    with pytest.raises(SettingsError, match="no output 'colors'"):
        segment_lazy(open_volume(STACK), plain_student, what="colors")
    with pytest.raises(ImageError, match="5 channel"):
        segment_lazy(open_volume(np.zeros((2, 9, 9, 5), "u1"), axes="zyxc", channel="all"), plain_student)
    broken = STACK.astype(np.float32)
    broken[1, 5, 5] = np.nan
    with pytest.raises(ImageError, match="plane 1: 1 of"):
        segment_lazy(open_volume(broken), plain_student)[1].compute()


def test_an_array_in_memory_is_sampled_as_it_is_now(tmp_path):
    array = np.zeros((2, 30, 40), np.uint16)
    volume = open_volume(array)
    assert not sample_volume(volume).any()
    array[:] = 7
    assert (sample_volume(volume) == 7).all()
    np.save(tmp_path / "a.npy", array)
    with open_volume(tmp_path / "a.npy") as stored:
        assert sample_volume(stored) is sample_volume(stored)
