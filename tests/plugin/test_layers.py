"""Layers of every kind become volumes, or say in one sentence why not."""

import dask.array as da
import numpy as np
import pytest
import tifffile
import zarr
from napari.components import ViewerModel
from napari.layers import Image, Labels
from napari.layers._source import layer_source
from napari.plugins import _initialize_plugins

from distillfss_core import DistillFSSError
from napari_distillfss._annotations import Annotations
from napari_distillfss._layers import OnGrid, choose_layer, layer_of_file, lead_axes, move_layer

STACK = np.arange(4 * 20 * 30, dtype=np.uint16).reshape(4, 20, 30)


@pytest.mark.parametrize(
    ("layer", "lead", "shape", "grid"),
    [
        (Image(STACK[0]), {}, (1, 20, 30), (20, 30)),
        (Image(STACK), {}, (4, 20, 30), (4, 20, 30)),
        (Image(np.stack([STACK] * 3)), {"t": 2}, (4, 20, 30), (1, 4, 20, 30)),
        (Image(np.stack([[STACK] * 2] * 3)), {"t": 2, "c": 1}, (4, 20, 30), (1, 1, 4, 20, 30)),
        (Image(np.zeros((20, 30, 3), np.uint8), rgb=True), {}, (1, 20, 30, 3), (20, 30)),
        (Image(np.zeros((4, 20, 30, 3), np.uint8), rgb=True), {}, (4, 20, 30, 3), (4, 20, 30)),
        (Image(da.from_array(STACK, chunks=(1, 20, 30))), {}, (4, 20, 30), (4, 20, 30)),
        (Image(zarr.array(STACK)), {}, (4, 20, 30), (4, 20, 30)),
        (Image([STACK, STACK[:, ::2, ::2]]), {}, (4, 20, 30), (4, 20, 30)),
    ],
    ids=["2d", "3d", "4d", "5d", "rgb", "rgb stack", "dask", "zarr", "multiscale"],
)
def test_a_layer_is_a_volume_on_a_grid_of_its_own_axes(layer, lead, shape, grid):
    chosen = choose_layer(layer, lead=lead)
    assert chosen.volume.shape == shape
    assert chosen.shape == grid
    assert chosen.volume.plane(0).shape == shape[1:]
    assert np.zeros(grid)[chosen.index(0)].shape == shape[1:3]


def test_the_time_point_and_channel_chosen_are_what_is_read():
    data = np.stack([np.stack([STACK + 100 * t + 7 * c for c in range(2)]) for t in range(3)])
    chosen = choose_layer(Image(data), lead={"t": 2, "c": 1})
    np.testing.assert_array_equal(chosen.volume.plane(1), STACK[1] + 207)


def test_an_axis_that_is_labeled_as_channel_is_one():
    assert lead_axes(Image(np.stack([STACK] * 3), axis_labels=("c", "z", "y", "x"))) == "c"


@pytest.mark.parametrize("layer", [Labels(STACK.astype(int)), Image(np.zeros((2,) * 4 + (8, 8)))], ids=["labels", "6d"])
def test_what_cannot_be_segmented_is_said_in_a_sentence(layer):
    with pytest.raises(DistillFSSError, match="layer '"):
        choose_layer(layer)


def test_units_of_the_layer_become_micrometers():
    chosen = choose_layer(Image(STACK, scale=(2000, 325, 325), units=("nm",) * 3))
    assert chosen.volume.scale == pytest.approx((2.0, 0.325, 0.325))
    assert chosen.pixel_size == pytest.approx((0.325, 0.325))


def test_without_units_there_is_no_pixel_size():
    assert choose_layer(Image(STACK, scale=(2, 1, 1))).pixel_size is None
    assert choose_layer(Image(STACK)).volume.scale == (None, None, None)


def test_a_coarser_level_has_coarser_voxels_in_the_same_place():
    layer = Image([STACK, STACK[:, ::2, ::2]], scale=(3, 1, 1), units=("um",) * 3)
    chosen = choose_layer(layer, level=1)
    assert chosen.volume.scale == pytest.approx((3, 2, 2))
    place = chosen.place()
    np.testing.assert_allclose(place["scale"], (3, 2, 2))
    np.testing.assert_allclose(place["translate"], (0, 0.5, 0.5))


def test_an_array_on_the_grid_of_a_turned_layer_lies_where_the_layer_lies():
    layer = Image(np.stack([STACK] * 3), scale=(1, 2, 0.5, 0.5), translate=(0, 5, 6, 7), rotate=np.eye(4)[[0, 1, 3, 2]],
                  affine=np.diag([1, 1, 3, 3, 1]))  # fmt: skip
    chosen = choose_layer(layer, lead={"t": 2})
    labels = Labels(np.zeros(chosen.shape, np.uint8), **chosen.place())
    np.testing.assert_allclose(labels.data_to_world((0, 1, 3, 4)), layer.data_to_world((2, 1, 3, 4)))
    plane = Labels(np.zeros((1, 1, 20, 30), np.uint8), **chosen.place(3))
    np.testing.assert_allclose(plane.data_to_world((0, 0, 3, 4)), layer.data_to_world((2, 3, 3, 4)))


def test_the_plane_at_a_point_is_that_whose_point_it_is():
    chosen = choose_layer(Image(STACK, scale=(2.5, 1, 1), translate=(10, 0, 0)))
    assert [chosen.plane_at(chosen.point_of(z)) for z in range(4)] == [0, 1, 2, 3]
    assert chosen.plane_at((-100, 0, 0)) == 0


def test_a_file_becomes_a_lazy_layer_that_is_read_from_the_file_again(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", STACK, metadata={"axes": "ZYX"})
    levels, about = layer_of_file(tmp_path / "stack.tif")
    layer = Image(levels[0], **about)
    chosen = choose_layer(layer)
    assert chosen.volume.path == tmp_path / "stack.tif"
    np.testing.assert_array_equal(chosen.volume.plane(2), STACK[2])


def test_a_layer_that_was_worked_on_is_what_is_segmented(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", STACK, photometric="minisblack", metadata={"axes": "ZYX"})
    with layer_source(path=str(tmp_path / "stack.tif")):
        read = Image(tifffile.imread(tmp_path / "stack.tif"))
    assert choose_layer(read).volume.path == tmp_path / "stack.tif"
    read.data = read.data[:, ::-1]
    np.testing.assert_array_equal(choose_layer(read).volume.plane(1), STACK[1, ::-1])
    levels, about = layer_of_file(tmp_path / "stack.tif")
    lazy = Image(levels[0], **about)
    lazy.data = lazy.data[:, ::-1]
    np.testing.assert_array_equal(choose_layer(lazy).volume.plane(1), STACK[1, ::-1])


def open_by_napari(path):
    """The layer that napari's own reader makes of a file."""
    model = ViewerModel()
    _initialize_plugins()
    return model.open(str(path), plugin="napari")[0]


SIZES = {"ZCYX": (4, 2), "TZCYX": (3, 4, 2), "TZYX": (3, 4), "TCYX": (4, 2), "CYX": (2,), "CZYX": (2, 4)}


@pytest.mark.parametrize(
    ("axes", "ome"),
    [(axes, ome) for axes in SIZES for ome in (False, True) if ome or axes != "CZYX"],  # ImageJ has channels after z
)
def test_a_file_that_napari_opened_has_the_axes_that_it_states(tmp_path, axes, ome):
    data = np.random.default_rng(0).integers(0, 999, (*SIZES[axes], 20, 30)).astype(np.uint16)
    path = tmp_path / ("a.ome.tif" if ome else "a.tif")
    options = {"ome": True} if ome else {"imagej": True}
    tifffile.imwrite(path, data, photometric="minisblack", metadata={"axes": axes}, **options)
    layer = open_by_napari(path)
    lead = {a: 1 for a in "tc" if (a in axes.lower() and "Z" in axes) or (a == "c" and "C" in axes)}
    chosen = choose_layer(layer, lead=lead)
    assert dict(chosen.lead) == lead
    where = tuple(1 if a.lower() in lead else slice(None) for a in axes)
    expected = data[where].reshape(-1, 20, 30)
    np.testing.assert_array_equal(chosen.volume.read(), expected)
    assert np.zeros(chosen.shape)[chosen.index(0)].shape == (20, 30)
    labels = Labels(np.zeros(chosen.shape, np.uint8), **chosen.place())
    first = [0] * layer.ndim
    of_layer = [1 if a.lower() in lead else 0 for a in axes]
    np.testing.assert_allclose(labels.data_to_world(first), layer.data_to_world(of_layer))
    assert [chosen.plane_at(chosen.point_of(z)) for z in range(len(expected))] == list(range(len(expected)))


def test_painted_planes_of_interleaved_channels_are_planes(tmp_path):
    data = np.stack([np.stack([STACK, STACK + 1], 1)] * 2)
    tifffile.imwrite(tmp_path / "a.tif", data, imagej=True, metadata={"axes": "TZCYX"})
    chosen = choose_layer(open_by_napari(tmp_path / "a.tif"), lead={"c": 1})
    annotations = Annotations(tmp_path / "kept", chosen.shape, chosen.index)
    assert chosen.shape == (1, 4, 1, 20, 30)
    annotations.put(2, np.ones((20, 30), np.uint8))
    assert annotations.planes() == [2]
    assert annotations.array[0, 2, 0].all()
    assert np.asarray(annotations.array).sum() == 600
    grid = chosen.on_grid(zarr.array(STACK))
    assert grid.shape == (1, 4, 1, 20, 30)
    np.testing.assert_array_equal(grid[0, 2, 0], STACK[2])
    np.testing.assert_array_equal(grid[:, 1:3, 0, 5], STACK[None, 1:3, 5])
    np.testing.assert_array_equal(np.asarray(grid), STACK[None, :, None])


def test_a_plane_of_results_is_read_once_until_the_array_has_changed(monkeypatch):
    array = zarr.array(STACK)
    level = choose_layer(Image(STACK)).pyramid([array], shown=[2])[0]
    before = STACK[2].copy()
    array[2] = 7
    np.testing.assert_array_equal(level[2, 3:9, 4:8], before[3:9, 4:8])
    np.testing.assert_array_equal(level[1], STACK[1])
    np.testing.assert_array_equal(level[2], np.full_like(before, 7))  # only one plane is held
    array[2] = 8
    level.renew()
    np.testing.assert_array_equal(level[2], np.full_like(before, 8))
    monkeypatch.setattr("napari_distillfss._layers._HELD", 10)
    large = choose_layer(Image(STACK)).on_grid(array)
    assert (large[2] == 8).all()
    array[2] = 9
    assert (large[2] == 9).all()


def test_labels_of_a_layer_say_more_than_its_file(tmp_path):
    layer = Image(np.stack([STACK] * 3, 1), axis_labels=("z", "channel", "y", "x"))
    assert lead_axes(layer) == "c"
    np.testing.assert_array_equal(choose_layer(layer, lead={"c": 2}).volume.read(), STACK)


def test_a_layer_whose_planes_are_not_y_and_x_is_refused(tmp_path):
    layer = Image(np.stack([STACK] * 5, 3), axis_labels=("z", "y", "x", "c"))
    with pytest.raises(DistillFSSError, match="has axes zyxc, and y and x are not its last"):
        choose_layer(layer)


def test_the_first_voxel_lies_where_napari_shows_it():
    layer = Image([STACK, STACK[:, ::2, ::2]], scale=(3, 1, 1), translate=(10, 20, 30), units=("nm",) * 3)
    assert choose_layer(layer).volume.origin == pytest.approx((0.01, 0.02, 0.03))
    assert choose_layer(layer, level=1).volume.origin == pytest.approx((0.01, 0.0205, 0.0305))
    assert choose_layer(Image(STACK, translate=(1, 2, 3))).volume.origin == (0, 0, 0)


def test_labels_on_disk_are_seen_with_the_axes_of_the_layer():
    array = zarr.array(STACK)
    assert OnGrid(array, "zyx")[1, 2, 3] == STACK[1, 2, 3]
    assert OnGrid(array, "tzyx").shape == (1, 4, 20, 30)
    np.testing.assert_array_equal(OnGrid(array, "tzyx")[0, 2], STACK[2])
    np.testing.assert_array_equal(OnGrid(array, "tzyx")[:, 2, :, 5], STACK[2, :, 5][None])
    np.testing.assert_array_equal(np.asarray(OnGrid(array, "yx")), STACK[0])


@pytest.mark.parametrize(("axes", "lead"), [("CZYX", "c"), ("TZYX", "t"), ("TCZYX", "tc")])
def test_axes_of_a_tiff_layer_are_those_of_its_file(axes, lead, tmp_path):
    sizes = {"T": 3, "C": 2, "Z": 4, "Y": 20, "X": 30}
    data = np.random.default_rng(0).integers(0, 999, [sizes[a] for a in axes]).astype(np.uint16)
    pixel = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", data, photometric="minisblack", metadata={"axes": axes, **pixel})
    with layer_source(path=str(tmp_path / "a.ome.tif")):
        layer = Image(tifffile.imread(tmp_path / "a.ome.tif"))
    assert lead_axes(layer) == lead
    chosen = choose_layer(layer, lead=dict.fromkeys(lead, 1))
    np.testing.assert_array_equal(chosen.volume.plane(2), data[(*(1 for _ in lead), 2)])
    assert chosen.pixel_size == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("axes", ["ZCYX", "TZCYX"])
def test_channels_after_z_are_not_taken_for_planes(axes, tmp_path):
    sizes = {"T": 3, "C": 2, "Z": 4, "Y": 20, "X": 30}
    data = np.random.default_rng(0).integers(0, 999, [sizes[a] for a in axes]).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", data, imagej=True, metadata={"axes": axes})
    with layer_source(path=str(tmp_path / "a.tif")):
        layer = Image(tifffile.imread(tmp_path / "a.tif"))
    lead = dict.fromkeys(lead_axes(layer), 1)
    assert set(lead) == set(axes.lower()) & set("tc")
    chosen = choose_layer(layer, lead=lead)
    np.testing.assert_array_equal(chosen.volume.plane(2), data[1, 2, 1] if "T" in axes else data[2, 1])


def test_the_plane_between_two_is_the_one_that_napari_shows(viewer):
    image = np.arange(8, dtype=np.uint8)[:, None, None] * np.ones((16, 16), np.uint8)
    layer = viewer.add_image(image, scale=(2, 1, 1))
    viewer.add_image(np.zeros((16, 16, 16)), name="finer")
    chosen = choose_layer(layer)
    for step in range(15):
        viewer.dims.set_current_step(0, step)
        point = viewer.dims.point
        assert chosen.plane_at(point) == layer.get_value((point[0], 8, 8), world=True)


def test_a_layer_that_is_moved_along_one_axis_is_changed_in_that_alone(viewer):
    image = viewer.add_image(np.zeros((3, 4, 16, 16)), axis_labels=("t", "z", "y", "x"), scale=(1, 2, 0.5, 0.5))
    layer = viewer.add_labels(np.zeros((1, 4, 16, 16), np.uint8), **choose_layer(image).place())
    changed = []
    for name in ("scale", "translate", "rotate", "shear", "affine", "units", "axis_labels", "set_data"):
        getattr(layer.events, name).connect(lambda event, name=name: changed.append(name))
    place = choose_layer(image, lead={"t": 2}).place()
    move_layer(viewer, layer, layer.data, place)
    assert set(changed) <= {"translate", "set_data"}
    np.testing.assert_array_equal(layer.translate, (2, 0, 0, 0))
    changed.clear()
    move_layer(viewer, layer, layer.data, place)
    assert changed == []


class Counted:
    """An array (z, y, x) that notes how many values are read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []

    def __getitem__(self, key):
        values = self.array[key]
        self.read.append(np.size(values))
        return values


@pytest.mark.parametrize("axes", ["zyx", "tzyx", "zcyx", "yx"])
def test_windows_of_a_grid_are_read_as_of_an_array_of_numpy(axes):
    rng, array = np.random.default_rng(0), Counted(STACK[:1] if axes == "yx" else STACK)
    grid = OnGrid(array, axes)
    expected = np.asarray(grid)
    assert expected.shape == grid.shape
    for _ in range(60):
        spans = [sorted(rng.integers(0, n + 1, 2)) for n in grid.shape]
        key = tuple(slice(*span, rng.choice([1, 2])) if rng.random() < 0.8 else int(rng.integers(n))
                    for span, n in zip(spans, grid.shape, strict=True))  # fmt: skip
        cut, whole = grid[key], expected[key]
        assert (cut.shape, cut.ndim, cut.size, cut.dtype) == (whole.shape, whole.ndim, whole.size, whole.dtype)
        np.testing.assert_array_equal(cut, whole)
        if whole.ndim and len(whole):
            inner = (int(rng.integers(-len(whole), len(whole))), *(slice(1, None),) * int(rng.integers(whole.ndim)))
            np.testing.assert_array_equal(cut[inner], whole[inner])


def test_napari_reads_one_plane_of_written_labels_at_a_time(viewer):
    chosen = choose_layer(viewer.add_image(np.zeros((6, 20, 30), np.uint8)))
    arrays = [Counted(np.arange(6 * 20 * 30, dtype=np.uint16).reshape(6, 20, 30)), Counted(np.ones((6, 10, 15), int))]
    layer = viewer.add_labels(chosen.pyramid([np.zeros((6, 20, 30), np.uint8)]), multiscale=True, **chosen.place())
    for array in arrays:
        array.read.clear()
    move_layer(viewer, layer, chosen.pyramid(arrays, shown=[3]), chosen.place())
    for z in (0, 5, 2):
        viewer.dims.set_point(0, z)
    assert arrays[1].read
    assert max(max(array.read) for array in arrays if array.read) <= 20 * 30
    np.testing.assert_array_equal(layer._slice.image.raw, arrays[layer.data_level].array[2])
    viewer.dims.ndisplay = 3
    assert max(arrays[1].read) == 6 * 10 * 15  # a volume is shown then, of the coarsest level
