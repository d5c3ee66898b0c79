"""The chosen volume is seen, also where an opaque image was opened after it."""

import numpy as np
import pytest

from napari_distillfss._layers import covers_of, hide_covers

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
