"""The chosen volume is seen, also where an opaque image was opened after it."""

import numpy as np
import pytest
import tifffile

from napari_distillfss._layers import camera_of, covers_of, hide_covers

MICROMETERS = {"scale": (2.5, 1, 1), "units": ("um",) * 3}


def choose(dock, index):
    dock.volume.layers.setCurrentIndex(index)
    dock.volume.layers.activated.emit(index)


@pytest.fixture
def later(viewer, nuclei, sample):
    return viewer.add_image(sample.image[::-1].copy(), name="later", **MICROMETERS)


def test_opaque_images_above_an_image_cover_it(viewer, nuclei, later):
    layers = viewer.layers
    assert covers_of(layers, nuclei, nuclei) == [later]
    assert covers_of(layers, later, nuclei) == []  # a layer above it is seen
    for name, value in (("visible", False), ("opacity", 0.5), ("blending", "additive")):
        before = getattr(later, name)
        setattr(later, name, value)
        assert covers_of(layers, nuclei, nuclei) == []
        setattr(later, name, before)
    viewer.add_labels(np.ones((8, 96, 96), int), **MICROMETERS)
    assert hide_covers(layers, nuclei, nuclei) == [later]
    assert not later.visible
    assert covers_of(layers, nuclei, nuclei) == []


@pytest.mark.parametrize(("shift", "covers"), [(40, True), (60, False), (-40, True), (200, False)])
def test_an_image_covers_what_it_hides_half_of(viewer, nuclei, later, shift, covers):
    later.translate = (0, 0, shift)
    assert bool(covers_of(viewer.layers, nuclei, nuclei)) is covers


def test_a_volume_that_is_chosen_is_shown_and_no_layer_is_moved(viewer, nuclei, open_dock, sample):
    dock = open_dock(viewer)
    later = viewer.add_image(sample.image[::-1].copy(), name="later", **MICROMETERS)
    assert dock.volume.message.text().startswith("'later' covers it: choose it again to see it")
    order = list(viewer.layers)
    choose(dock, 0)
    assert (nuclei.visible, later.visible) == (True, False)
    assert dock.volume.message.text().startswith("'later' covered it and is hidden")
    choose(dock, 1)
    assert (nuclei.visible, later.visible) == (True, True)
    assert "hidden" not in dock.volume.message.text()
    assert list(viewer.layers) == order


def test_paint_shows_the_annotations_that_another_image_covers(viewer, nuclei, open_dock, sample):
    dock = open_dock(viewer)
    dock.support.take_brush()
    later = viewer.add_image(sample.image[::-1].copy(), name="later", **MICROMETERS)
    dock.support.take_brush()
    assert not later.visible
    assert dock.support.message.text() == "'later' covered this volume, and is hidden"
    later.visible = True
    viewer.layers.move(viewer.layers.index(dock.support.layer), len(viewer.layers))
    dock.support.take_brush()
    assert later.visible  # whoever has put the annotations above it wants to see both


def lies_on_screen(viewer, layer):
    """Whether all of a layer's plane is in the view, and fills a good part of it."""
    low, high = layer.extent.world[:, -2:]
    camera = camera_of(viewer)
    half = np.array(viewer._canvas_size if hasattr(viewer, "_canvas_size") else viewer.canvas.size) / camera.zoom / 2
    center = np.array(camera.center[-2:])
    return bool((center - half <= low).all() and (center + half >= high).all() and ((high - low) > half).any())


@pytest.mark.parametrize("beside", [(), (2, 4, 40, 40), (2, 2, 4, 40, 40)], ids=["alone", "time", "time and channels"])
def test_the_view_follows_a_volume_of_another_size_and_stays_for_one_of_the_same(
    viewer, nuclei, later, open_dock, beside, qtbot
):
    dock = open_dock(viewer)
    if beside:
        viewer.add_image(np.zeros(beside, np.uint8), visible=False)
        viewer.layers.move(2, 0)
    large = viewer.add_image(np.zeros((4, 2000, 3000), np.uint8), name="large", **MICROMETERS)
    viewer.dims.set_point(viewer.dims.ndim - 3, 15)  # plane 6, which the large one has not
    first = viewer.layers.index(nuclei)
    choose(dock, first + 2)
    qtbot.waitUntil(lambda: dock.session.volume.layer is large)  # it is hashed in another thread
    assert lies_on_screen(viewer, large)
    assert viewer.dims.point[-3] == 7.5  # its last plane
    choose(dock, first)
    assert lies_on_screen(viewer, nuclei)
    camera_of(viewer).zoom = 50
    choose(dock, first + 1)
    assert camera_of(viewer).zoom == 50
    choose(dock, first + 1)
    assert camera_of(viewer).zoom == 50


def test_a_file_that_is_opened_beside_a_volume_of_another_size_is_seen(viewer, nuclei, open_dock, open_path, tmp_path):
    tifffile.imwrite(tmp_path / "large.tif", np.zeros((3, 1000, 1200), np.uint8), photometric="minisblack")
    dock = open_dock(viewer)
    viewer.dims.set_point(0, 15)
    open_path(dock, tmp_path / "large.tif")
    assert lies_on_screen(viewer, viewer.layers["large.tif"])
    assert viewer.dims.point[0] == 2


def test_a_volume_takes_the_place_of_one_that_was_removed_only_when_it_is_added(viewer, nuclei, later, open_dock):
    dock = open_dock(viewer)
    viewer.layers.remove(nuclei)
    viewer.add_labels(np.ones((8, 96, 96), int))
    later.name = "other"
    assert dock.session.volume is None
    added = viewer.add_image(np.zeros((4, 30, 30), np.uint8), name="added")
    assert dock.session.volume.layer is added
