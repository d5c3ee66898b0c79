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


def test_channels_have_the_names_colors_and_contrast_of_their_file(tmp_path, viewer):
    path = write_ome_zarr(tmp_path / "i.ome.zarr", noise((3, 4, 32, 32)), axes="czyx", channels=("DAPI", "", "GFP"))
    group = zarr.open_group(path, mode="a")
    about = group.attrs["ome"]
    dapi, _, gfp = about["omero"]["channels"]
    dapi.update(color="0000FF", window={"start": 10, "end": 200, "min": 0, "max": 250})
    gfp["color"] = "12FF80"
    group.attrs["ome"] = about
    for data, options, _ in get_reader(str(path))(str(path)):
        viewer.add_image(data, **options)
    layers = list(viewer.layers)
    assert [layer.name for layer in layers] == [f"i.ome.zarr: {n}" for n in ("DAPI", "channel 1", "GFP")]
    colors = [layer.colormap.colors[-1][:3].tolist() for layer in layers]
    np.testing.assert_allclose(colors, [(0, 0, 1), (1, 1, 1), (18 / 255, 1, 128 / 255)], atol=1e-3)
    assert {str(layer.blending) for layer in layers} == {"additive"}
    assert layers[0].contrast_limits == [10, 200]


def test_channels_without_colors_have_those_of_naparis_own_split(tmp_path, viewer):
    for count in (2, 3):
        path = write_ome_zarr(tmp_path / f"{count}.ome.zarr", noise((count, 2, 16, 16)), axes="czyx")
        theirs = [layer.colormap.name for layer in viewer.add_image(noise((count, 2, 16, 16)), channel_axis=0)]
        ours = [options["colormap"] for _, options, _ in get_reader(str(path))(str(path))]
        assert sorted(ours) == sorted(theirs)  # versions of napari order them in two ways


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
