"""File > Open and File > Save."""

import numpy as np
import pytest
import zarr

from distillfss_core import AnnotatedSlice, DistillFSSError, StudentModel, SupportSet, distill, load_support
from distillfss_core.segmentation.to_zarr import segment_to_zarr
from distillfss_core.volumes.volume import open_volume
from napari_distillfss._painted import PaintedArray
from napari_distillfss._reader import get_reader
from napari_distillfss._writer import write_slices
from volumes import noise, write_ome_zarr


@pytest.fixture(scope="module")
def student(few, tmp_path_factory):
    image = noise((64, 64))
    path = tmp_path_factory.mktemp("s") / "student.safetensors"
    distill(SupportSet([AnnotatedSlice(image, (image > 100).astype(np.uint8))]), few).save(path)
    return path


def test_a_student_file_opens_as_the_slices_it_learned_from(student):
    (image, about, kind), (labels, _, other) = get_reader(str(student))(str(student))
    assert (kind, other) == ("image", "labels")
    assert image.shape == labels.shape
    assert about["name"] == "student: training slices"
    assert about["metadata"]["distillfss_card"]["classes"] == ["object"]


def test_ome_zarr_opens_lazily_with_its_scale(tmp_path):
    path = write_ome_zarr(tmp_path / "i.ome.zarr", noise((4, 32, 32)), scale=(2.0, 0.5, 0.5))
    ((data, about, kind),) = get_reader(str(path))(str(path))
    assert kind == "image"
    assert [tuple(level.shape) for level in data] == [(4, 32, 32), (4, 16, 16)]
    assert about["scale"] == [2.0, 0.5, 0.5]
    assert not isinstance(data[0], np.ndarray)


def test_channels_become_layers(tmp_path):
    path = write_ome_zarr(tmp_path / "i.ome.zarr", noise((2, 4, 32, 32)), axes="czyx")
    assert len(get_reader(str(path))(str(path))) == 2


def test_labels_that_were_written_open_as_labels(tmp_path, student):
    volume = open_volume(noise((3, 64, 64)))
    segment_to_zarr(volume, StudentModel.load(student), tmp_path / "l.ome.zarr")
    ((data, _, kind),) = get_reader(str(tmp_path / "l.ome.zarr"))(str(tmp_path / "l.ome.zarr"))
    assert kind == "labels"
    np.testing.assert_array_equal(data, zarr.open_array(tmp_path / "l.ome.zarr" / "0")[:])


def test_other_files_are_left_to_others():
    assert get_reader("image.tif") is None
    assert get_reader(["a.zarr", "b.zarr"]) is None


def test_saved_slices_are_read_by_the_command_line(tmp_path):
    image, labels = noise((4, 32, 32)), np.zeros((4, 32, 32), np.uint8)
    labels[2, :16], labels[2, 16:] = 1, 2
    write_slices(str(tmp_path / "x.slices"), [(image, {}, "image"), (labels, {}, "labels")])
    folder = tmp_path / "x.slices"
    support = load_support(folder / "images", folder / "labels", scribbles=True, classes=["object"])
    np.testing.assert_array_equal(support.slices[0].image, image[2])
    np.testing.assert_array_equal(support.slices[0].labels, labels[2] - 1)


@pytest.mark.parametrize("shape", [(32, 32), (4, 32, 32)])
def test_annotations_are_saved_as_the_layer_holds_them(tmp_path, shape):
    painted = PaintedArray(tmp_path / "a", shape)
    painted[..., :16] = 1
    painted[..., 16:] = 2
    write_slices(str(tmp_path / "x"), [(noise(shape), {}, "image"), (painted, {}, "labels")])
    support = load_support(tmp_path / "x" / "images", tmp_path / "x" / "labels", scribbles=True, classes=["object"])
    for slice_ in support.slices:
        np.testing.assert_array_equal(slice_.labels, np.repeat([[0, 1]], 16).reshape(1, 32).repeat(32, 0))


def test_layers_of_different_sizes_are_not_saved(tmp_path):
    layers = [(np.zeros((4, 8, 8)), {}, "image"), (np.zeros((4, 8, 9), np.uint8), {}, "labels")]
    with pytest.raises(DistillFSSError, match="one size"):
        write_slices(str(tmp_path / "x"), layers)
