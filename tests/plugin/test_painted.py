"""Painted labels in memory and on disk."""

import numpy as np
import pytest
import zarr
from napari.layers._layer_actions import _duplicate_layer

from distillfss_core import OutputError
from napari_distillfss._painted import PaintedArray

SHAPE = (2, 1, 3, 6, 7)
KEYS = [
    (1, 0, 2),
    (0, slice(0, 1), slice(2, 3), slice(1, 4), slice(2, 6)),
    (np.int64(1), -1, 0, 3, slice(5, None)),
    (1, 0, -1, 5, 6),
    (slice(None), 0, 1),
    (slice(0, 1), slice(None), slice(0, 2), slice(0, 3)),
    (0, 0, 1, slice(4, 4)),
    (0, 0, 1, slice(None, None, 2), slice(6, 1, -2)),
    (np.array([0, 1]), np.array([0, 0]), np.array([2, 1]), np.array([3, 3]), np.array([0, 6])),
    (Ellipsis,),
]


def on_disk(path):
    return np.asarray(zarr.open_array(path, mode="r")[...])


@pytest.mark.parametrize("is_written_later", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_read_and_written_as_an_array_of_numpy(tmp_path, seed, is_written_later):
    rng = np.random.default_rng(seed)
    array, expected = PaintedArray(tmp_path / "a", SHAPE), np.zeros(SHAPE, np.uint8)
    array.is_written_later = is_written_later
    for _ in range(40):
        key = KEYS[rng.integers(len(KEYS) - 1)]
        value = rng.integers(0, 200, expected[key].shape, np.uint8) if rng.random() < 0.7 else rng.integers(200)
        array[key] = value
        expected[key] = value
        read = KEYS[rng.integers(len(KEYS))]
        np.testing.assert_array_equal(array[read], expected[read])
        if not is_written_later:
            np.testing.assert_array_equal(on_disk(tmp_path / "a"), expected)
    array.write()
    np.testing.assert_array_equal(on_disk(tmp_path / "a"), expected)
    np.testing.assert_array_equal(PaintedArray(tmp_path / "a", SHAPE), expected)


@pytest.mark.parametrize("seed", range(4))
def test_on_a_full_disk_planes_boxes_and_points_are_kept_in_memory_and_written_later(tmp_path, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    array, expected = PaintedArray(tmp_path / "a", SHAPE), np.zeros(SHAPE, np.uint8)
    array.is_written_later = True

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("zarr.Array.__setitem__", fail)
        full.setattr("zarr.create_array", fail)
        for _ in range(40):
            key = KEYS[rng.integers(len(KEYS) - 1)]
            value = rng.integers(0, 200, expected[key].shape, np.uint8) if rng.random() < 0.7 else rng.integers(200)
            array[key] = value
            expected[key] = value
            np.testing.assert_array_equal(array, expected)
        with pytest.raises(OutputError, match="No space left on device"):
            array.write()
    array.write()
    np.testing.assert_array_equal(on_disk(tmp_path / "a"), expected)


def test_what_was_read_is_a_copy(tmp_path):
    array = PaintedArray(tmp_path / "a", (4, 6, 7))
    array[1] = 3
    for key in [(1,), (slice(1, 2), slice(0, 2), slice(0, 2)), (1, 0)]:
        array[key][...] = 9
    assert not (np.asarray(array) == 9).any()


def test_nothing_is_on_disk_until_something_is_painted(tmp_path):
    array = PaintedArray(tmp_path / "a", (4, 6, 7))
    array.is_written_later = True
    assert not array[1].__array__().any()
    assert not np.asarray(array).any()
    assert not (tmp_path / "a").exists()
    array[1, 2:4] = 1
    assert not (tmp_path / "a").exists()
    array.write()
    assert on_disk(tmp_path / "a").sum() == 14


def test_the_data_type_of_an_index_is_known_without_a_look_at_the_disk(tmp_path):
    PaintedArray(tmp_path / "a", SHAPE)[1, 0, 2] = 1
    array = PaintedArray(tmp_path / "a", SHAPE)
    array._array = object()  # cannot be read
    part = array[1]
    assert (part.dtype, part.shape, part.ndim, len(part)) == (np.uint8, SHAPE[1:], 4, 1)
    again = PaintedArray(tmp_path / "a", SHAPE)[1]
    assert np.asarray(again).sum() == np.asarray(again[0, 2]).sum() == 42
    with pytest.raises(IndexError):
        array[2]


def test_a_key_outside_is_refused_and_writes_nothing(tmp_path):
    array = PaintedArray(tmp_path / "a", (4, 6, 7))
    for key in [(4, 0), (0, 6), (1, 2, 7)]:
        with pytest.raises(IndexError):
            array[key] = 1
    assert not (tmp_path / "a").exists()


def test_labels_that_cannot_be_written_are_one_sentence_and_are_written_later(tmp_path):
    folder = tmp_path / "folder"
    folder.write_text("")
    array = PaintedArray(folder / "a", (4, 6, 7))
    array.is_written_later = True
    array[1] = 1
    with pytest.raises(OutputError, match="annotations cannot be kept in"):
        array.write()
    folder.unlink()
    array.write()
    assert on_disk(folder / "a").sum() == 42


@pytest.mark.parametrize("is_there", [False, True], ids=["never on disk", "on disk"])
def test_planes_that_cannot_be_written_are_all_kept_and_written_later(tmp_path, monkeypatch, is_there):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    array, expected = PaintedArray(tmp_path / "a", (4, 6, 7)), np.zeros((4, 6, 7), np.uint8)
    array.is_written_later = True
    if is_there:
        array[0, 1] = expected[0, 1] = 9
        array.write()
    with monkeypatch.context() as full:
        full.setattr("zarr.create_array", fail)
        full.setattr("zarr.Array.__setitem__", fail)
        for z in (1, 3, 2):
            array[z, 2:4, z:6] = expected[z, 2:4, z:6] = z
        points = (np.array([3, 1, 3]), np.array([2, 3, 5]), np.array([4, 4, 0]))
        array[points] = expected[points] = (0, 5, 7)  # as napari undoes a stroke
        with pytest.raises(OutputError, match=r"No space left on device; .* in memory only"):
            array.write()
        for z in (0, 1, 2, 3):
            np.testing.assert_array_equal(array[z, :, :], expected[z])
        np.testing.assert_array_equal(array, expected)
        assert sorted(array.in_memory_only) == [(1,), (2,), (3,)]
    array.write()
    assert not array.in_memory_only
    np.testing.assert_array_equal(on_disk(tmp_path / "a"), expected)


def test_a_folder_that_a_full_disk_has_left_is_taken_up(tmp_path):
    (tmp_path / "a").mkdir()
    array = PaintedArray(tmp_path / "a", (4, 6, 7))
    array[1] = 1
    assert on_disk(tmp_path / "a").sum() == 42


@pytest.mark.parametrize("shape", [SHAPE, (6, 7)])
def test_a_duplicate_of_the_layer_has_labels_of_its_own(viewer, tmp_path, shape):
    array = PaintedArray(tmp_path / "a", shape)
    array[..., 2] = 3
    layer = viewer.add_labels(array)
    viewer.layers.selection = {layer}
    _duplicate_layer(viewer.layers)
    copied = viewer.layers[1]
    np.testing.assert_array_equal(copied.data, array)
    copied.paint((1, 0, 2, 4, 5)[-len(shape) :], 9)
    assert 9 in copied.data
    assert 9 not in on_disk(tmp_path / "a")
