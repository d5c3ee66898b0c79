"""Layers without units, and of other units, beside one in micrometers."""

import numpy as np
import pytest

from napari_distillfss._layers import ANNOTATIONS, LABELS, OBJECT, PREVIEW, choose_layer, has_mark, point_on, to_world


def choose(dock, index):
    dock.volume.layers.setCurrentIndex(index)
    dock.volume.layers.activated.emit(index)


def plane_shown(layer):
    """Number of the plane that napari shows of a stack whose planes are numbered."""
    return int(layer._slice.image.raw[0, 0])


@pytest.fixture
def numbered():
    return np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None], (8, 96, 96)).copy()


def test_a_layer_without_units_keeps_its_own_scale_beside_one_in_micrometers(viewer, nuclei, open_dock, numbered):
    dock = open_dock(viewer)
    bare = viewer.add_image(numbered, name="bare", scale=(2, 0.5, 0.5))
    assert dock.session.volume.pixel_size == (1, 1)
    assert "beside" not in dock.volume.message.text().lower()  # of the volume in micrometers nothing is in doubt
    choose(dock, 1)
    assert dock.session.volume.pixel_size is None
    assert dock.session.volume.volume.scale == (2, 0.5, 0.5)
    assert "Beside 'nuclei' napari takes its scale to be in micrometers" in dock.volume.message.text()
    for z in (3, 0, 7):
        dock.support.go_to(z)
        assert dock.support.plane() == plane_shown(bare) == z
    dock.support.take_brush()
    assert dock.support.layer.units == bare.units
    viewer.layers.remove(nuclei)
    assert "Beside" not in dock.volume.message.text()


@pytest.mark.parametrize(("unit", "size"), [("nm", 1000), ("mm", 0.001)])
def test_the_sliders_of_a_world_in_other_units_show_the_same_plane(viewer, nuclei, open_dock, numbered, unit, size):
    nuclei.data = numbered
    dock = open_dock(viewer)
    viewer.add_image(numbered, name="other", scale=(2.5 * size, size, size), units=(unit,) * 3)
    for index in (0, 1):
        choose(dock, index)
        viewer.layers[index].visible = True
        for z in (5, 0, 7, 2):
            dock.support.go_to(z)
            assert dock.support.plane() == plane_shown(viewer.layers[index]) == z
    assert "give both one unit" in dock.volume.message.text()


def test_a_time_point_is_found_in_other_units(viewer, open_dock, numbered):
    series = np.stack([numbered] * 3)
    image = viewer.add_image(series, name="series", scale=(20, 1, 1, 1), units=("s", "um", "um", "um"))
    dock = open_dock(viewer)
    viewer.add_image(series, name="other", scale=(20_000, 1, 1, 1), units=("ms", "um", "um", "um"))
    dock.volume.lead["t"].setValue(2)
    assert round(image.world_to_data(point_on(image, viewer.dims))[0]) == 2
    viewer.dims.set_point(0, 20_000)
    dock.volume._on_slider_settled()
    assert dock.volume.lead["t"].value() == 1


def test_a_place_in_the_world_is_converted_there_and_back(viewer, nuclei, sample):
    place = choose_layer(nuclei).point_of(3)
    np.testing.assert_array_equal(to_world(nuclei, viewer.dims, place), place)
    viewer.add_image(sample.image, units=("nm",) * 3)
    np.testing.assert_allclose(to_world(nuclei, viewer.dims, place), 1000 * place)
    viewer.dims.set_point((0, 1, 2), 1000 * place)
    np.testing.assert_allclose(point_on(nuclei, viewer.dims), place)
    viewer.add_image(sample.image)
    np.testing.assert_array_equal(to_world(nuclei, viewer.dims, place), place)  # no unit is common to all


def test_without_sliders_a_layer_is_seen_at_its_first_pixel(viewer, nuclei):
    chosen = choose_layer(nuclei)
    viewer.dims.set_point(0, 10)
    assert chosen.plane_on(viewer.dims) == 4
    viewer.layers.clear()
    assert viewer.dims.ndim == 2
    assert chosen.plane_on(viewer.dims) == 0


def test_hidden_layers_of_the_dock_have_the_units_of_the_volume(viewer, nuclei, open_dock, student, qtbot, sample):
    dock = open_dock(viewer)
    with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
        dock.model.load_from(student)
    dock.preview.on.setChecked(False)
    bare = viewer.add_image(sample.image, name="bare")
    choose(dock, 1)
    viewer.layers.remove(nuclei)
    (preview,) = (layer for layer in viewer.layers if layer.metadata.get(PREVIEW))
    assert preview.units == bare.units
    assert viewer.dims.units == bare.units  # napari has found one unit for all


@pytest.mark.parametrize("is_mixed", [False, True])
def test_all_layers_of_the_dock_have_units_and_scale_of_the_volume(
    is_mixed, viewer, nuclei, open_dock, student, qtbot, sample, tmp_path
):
    bare = viewer.add_image(sample.image, name="bare", scale=(3, 0.5, 0.5))
    dock = open_dock(viewer)
    dock.model.load_from(student)
    if not is_mixed:
        viewer.layers.remove(nuclei)
    for index, image in enumerate([nuclei, bare] if is_mixed else [bare]):
        choose(dock, index)
        qtbot.waitUntil(lambda: not dock.session.busy and not dock.preview.busy, timeout=60_000)
        for name in ("probability", "uncertainty"):
            dock.preview.shown[name].setChecked(True)
        dock.support.fill_rest()
        dock.apply.out.setText(str(tmp_path / f"{index}.ome.zarr"))
        for start in (dock.apply.start, dock.objects.start):
            start()
            qtbot.waitUntil(lambda: not dock.session.busy, timeout=60_000)
        assert dock.objects.table.model.values.size
        dock.objects.table.view.selectRow(0)
        with qtbot.waitSignal(dock.preview.settled, timeout=60_000):
            dock.preview.on.setChecked(True)
        own = [layer for layer in viewer.layers if has_mark(layer, ANNOTATIONS, PREVIEW, OBJECT, LABELS)]
        present = [layer for layer in own if layer not in (dock.support.layer,)]
        assert dock.support.layer.units == image.units
        shown = [dock.apply.layer, dock.objects.layer, *dock.preview.layers.values()]
        for layer in (*shown, *(layer for layer in present if has_mark(layer, OBJECT))):
            assert layer.units == image.units, layer.name
            np.testing.assert_allclose(layer.scale, image.scale)
        assert (viewer.layers.extent.units is None) is is_mixed
