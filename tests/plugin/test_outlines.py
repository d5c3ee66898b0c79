"""Objects are outlined by clicks and strokes, and taken over into the annotations."""

from types import SimpleNamespace

import numpy as np
import pytest
from napari.utils.interactions import mouse_move_callbacks, mouse_press_callbacks, mouse_release_callbacks
from scipy import ndimage

from napari_distillfss._annotations import BACKGROUND, FIRST_CLASS, UNLABELED
from napari_distillfss._outlines import Draft, PlaneCache, iter_outline, probability_of, taken_by_others, within

TIMEOUT = 60_000
CENTER, RADIUS = (40, 60), 12


def disc(center=CENTER, radius=RADIUS, shape=(80, 120)):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2


def picture(seed=0, **options):
    """A disc of 100 on 40, blurred, with noise."""
    smooth = ndimage.gaussian_filter(40 + 60 * disc(**options).astype(float), 1.0)
    return (smooth + np.random.default_rng(seed).normal(0, 3, smooth.shape)).astype(np.float32)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def drag(layer, world, *, shift=False, control=False):
    """Press, move and release the mouse over a layer, at positions of napari's world."""
    modifiers = ("Shift",) * shift + ("Control",) * control
    event = SimpleNamespace(button=1, modifiers=modifiers, type="mouse_press", position=world[0])
    event.dims_displayed, event.is_dragging = (len(world[0]) - 2, len(world[0]) - 1), True
    mouse_press_callbacks(layer, event)
    for position in world[1:]:
        event.type, event.position = "mouse_move", position
        mouse_move_callbacks(layer, event)
    event.type = "mouse_release"
    mouse_release_callbacks(layer, event)


def press(layer, key):
    function = next(f for k, f in layer.keymap.items() if str(k) == key)
    function(layer)


class User:
    """Outlines objects in a dock, in voxels of the annotated volume."""

    def __init__(self, dock, viewer, qtbot):
        self.dock, self.viewer, self.qtbot = dock, viewer, qtbot
        self.tool = dock.support.outline

    @property
    def target(self):
        return self.dock.support.layer

    @property
    def annotations(self):
        return self.dock.session.annotations

    def draw(self, *points, shift=False, control=False):
        z = self.dock.support.plane()
        world = [self.dock.session.volume.point_of(z, *point) for point in points]
        drag(self.target, [(*self.viewer.dims.point[: -len(w)], *w) for w in world], shift=shift, control=control)
        self.wait()

    def wait(self):
        self.qtbot.waitUntil(lambda: not self.tool.busy, timeout=TIMEOUT)

    def proposed(self):
        z = self.dock.support.plane()
        shown = np.zeros(self.dock.session.volume.plane_shape, bool)
        y, x = self.tool.answer.corner
        mask = self.tool.answer.mask
        shown[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
        assert self.tool.answer.draft.plane == z
        return shown


@pytest.fixture
def user(viewer, open_dock, qtbot):
    def on(image, **options):
        viewer.add_image(image, name="discs", **options)
        dock = open_dock(viewer)
        dock.support.outline.on.setChecked(True)
        return User(dock, viewer, qtbot)

    return on


def test_a_click_proposes_an_object_and_enter_paints_it(user):
    user = user(picture())
    user.draw((41, 59))
    assert iou(user.proposed(), disc()) > 0.9
    assert not user.annotations.plane(0).any()  # nothing is painted before it is accepted
    assert user.tool.layer.visible
    assert user.tool.layer.contour
    expected = user.proposed()
    press(user.target, "Enter")
    assert np.array_equal(user.annotations.plane(0) == FIRST_CLASS, expected)
    assert not user.tool.layer.visible
    assert user.tool.answer is None


def test_the_outline_is_drawn_where_the_object_lies(user):
    user = user(np.stack([picture(), picture(center=(30, 80))]), scale=(2.5, 0.3, 0.7), translate=(5, -3, 11))
    user.viewer.dims.set_current_step(0, 1)
    user.draw((31, 79))
    layer = user.tool.layer
    corner = layer.data_to_world([0, *np.argwhere(layer.data[0]).min(0)])
    mask = user.proposed()
    assert np.allclose(corner, user.dock.session.volume.point_of(1, *np.argwhere(mask).min(0)))
    assert iou(mask, disc((30, 80))) > 0.9


def test_an_accepted_outline_is_one_step_of_undo_and_is_on_disk(user):
    user = user(np.stack([picture()] * 2))
    user.draw((41, 59))
    press(user.target, "Enter")
    assert user.dock.support.plane() in user.annotations.planes()
    user.target.undo()
    assert not user.annotations.planes()
    user.target.redo()
    assert iou(user.annotations.plane(user.dock.support.plane()) == FIRST_CLASS, disc()) > 0.9


def test_escape_drops_the_proposal(user):
    user = user(picture())
    user.draw((41, 59))
    press(user.target, "Escape")
    assert not user.tool.layer.visible
    press(user.target, "Enter")
    assert not user.annotations.plane(0).any()


def test_no_message_asks_for_a_key_that_does_nothing_any_more(user):
    user = user(picture())
    user.draw((41, 59))
    message = user.dock.support.message
    assert message.text().startswith("Enter makes it object")
    press(user.target, "Escape")
    assert message.text().startswith("Click an object")
    user.draw((41, 59))
    user.dock.support.paint.click()
    assert message.text() == ""


def test_a_box_proposes_the_object_in_it_and_enter_paints_it(user):
    user = user(picture())
    user.draw((53, 74), (40, 60), (27, 47), control=True)  # from the lower right corner
    assert user.tool.answer.draft.box == ((27, 54), (47, 75))
    assert iou(user.proposed(), disc()) > 0.9
    expected = user.proposed()
    press(user.target, "Enter")
    assert np.array_equal(user.annotations.plane(0) == FIRST_CLASS, expected)
    user.target.undo()
    assert not user.annotations.plane(0).any()
    assert user.target.mode == "pan_zoom"


def test_a_box_is_shown_while_it_is_drawn_and_dropped_by_escape(user, monkeypatch):
    user = user(picture())
    shown, show = [], user.tool._show_box
    monkeypatch.setattr(
        user.tool, "_show_box", lambda *corners: (show(*corners), shown.append(user.tool.layer.visible))
    )
    user.draw((27, 47), (40, 60), (53, 74), control=True)
    assert shown == [True, True]
    press(user.target, "Escape")
    assert not user.tool.layer.visible
    assert user.tool.answer is None
    assert not user.annotations.plane(0).any()


def test_strokes_take_away_from_the_object_of_a_box_and_a_new_box_is_of_another(user):
    both = picture() + picture(seed=1, center=(40, 100), radius=9)
    user = user(both)
    user.draw((27, 47), (53, 74), control=True)
    user.draw((40, 70), shift=True)
    assert not user.proposed()[40, 70]
    user.draw((30, 90), (50, 111), control=True)
    assert iou(user.proposed(), disc((40, 100), 9)) > 0.9
    assert not user.tool.answer.draft.outside


def test_a_box_that_is_too_small_says_so_and_leaves_nothing_on_screen(user):
    user = user(picture())
    user.draw((40, 60), (41, 60), control=True)
    assert "draw one of at least 3 pixels" in user.dock.support.message.text()
    assert user.tool.answer is None
    assert not user.tool.layer.visible


def test_a_stroke_gives_the_size_and_more_strokes_add_and_take_away(user):
    both = disc() | disc((40, 76), 7)
    image = ndimage.gaussian_filter(40 + 60.0 * both, 1.0)
    user = user(image)
    user.draw((40, 49), (40, 60), (40, 71))
    first = user.proposed()
    user.draw((40, 81))
    added = user.proposed()
    assert added[40, 81]
    assert not first[40, 81]
    user.draw((40, 79), shift=True)
    assert not user.proposed()[40, 79]


def test_shift_without_a_proposal_is_refused(user):
    user = user(picture())
    user.draw((41, 59), shift=True)
    assert user.tool.answer is None
    assert "click an object first" in user.dock.support.message.text()


def test_what_cannot_be_outlined_is_said_and_the_earlier_proposal_stays(user):
    user = user(picture())
    user.draw((41, 59))
    before = user.proposed()
    user.draw((41, 59), shift=True)  # where it was clicked
    assert user.dock.support.message.warns
    assert np.array_equal(user.proposed(), before)
    press(user.target, "Enter")
    assert np.array_equal(user.annotations.plane(0) == FIRST_CLASS, before)


def test_the_plane_the_class_and_the_volume_drop_the_proposal(user):
    user = user(np.stack([picture()] * 3))
    classes = user.dock.support.classes
    classes.add.click()
    classes.setBrush(FIRST_CLASS)
    user.draw((41, 59))
    user.viewer.dims.set_current_step(0, 2)
    assert user.tool.answer is None
    assert not user.tool.layer.visible
    assert user.tool.on.isChecked()
    user.draw((41, 59))
    classes.setBrush(FIRST_CLASS + 1)
    assert user.tool.answer is None
    user.draw((41, 59))
    assert user.tool.answer.draft.label == FIRST_CLASS + 1
    user.viewer.add_image(picture(1), name="other")
    user.dock.volume.layers.setCurrentText("other")
    assert user.tool.answer is None
    assert not user.tool.on.isChecked()
    assert user.tool.layer in user.viewer.layers  # hidden, never removed
    assert not user.tool.layer.visible


def test_objects_of_all_classes_are_kept_and_background_unless_labels_are_preserved(user):
    user = user(picture())
    other, background = disc((40, 52), 5), np.zeros((80, 120), bool)
    background[:36] = True
    painted = np.where(other, FIRST_CLASS + 1, np.where(background, BACKGROUND, UNLABELED)).astype(np.uint8)
    user.dock.support.put_into_plane(painted)
    user.target.preserve_labels = True
    user.draw((42, 63))
    press(user.target, "Enter")
    kept = user.annotations.plane(0)
    assert np.array_equal(kept[painted != UNLABELED], painted[painted != UNLABELED])
    assert (kept == FIRST_CLASS).sum() > 100
    user.target.undo()
    user.target.preserve_labels = False
    user.draw((42, 63))
    press(user.target, "Enter")
    after = user.annotations.plane(0)
    assert (after[other] == FIRST_CLASS + 1).all()
    assert (after[background & disc() & ~other] == FIRST_CLASS).sum() > 50


def test_it_begins_with_a_class_and_may_outline_background(user):
    user = user(picture())
    assert user.dock.support.classes.brush() == FIRST_CLASS
    user.dock.support.classes.setBrush(BACKGROUND)
    user.draw((41, 59))
    press(user.target, "Enter")
    assert iou(user.annotations.plane(0) == BACKGROUND, disc()) > 0.9


def test_the_eraser_outlines_nothing(user):
    user = user(picture())
    user.dock.support.classes.setBrush(UNLABELED)
    user.draw((41, 59))
    assert user.tool.answer is None
    assert "eraser" in user.dock.support.message.text()


def test_enter_before_the_answer_accepts_it_when_it_comes(user):
    user = user(picture())
    user.tool.add_stroke([(41, 59)])
    user.tool.accept()
    user.wait()
    assert iou(user.annotations.plane(0) == FIRST_CLASS, disc()) > 0.9


def test_images_in_colors_are_outlined(user):
    rgb = np.stack([picture(), picture(1), np.full((80, 120), 90.0)], -1).astype(np.uint8)
    user = user(rgb, rgb=True)
    user.draw((41, 59))
    assert iou(user.proposed(), disc()) > 0.9


def test_the_chosen_time_point_and_plane_of_a_4d_layer_are_outlined(user):
    image = np.zeros((2, 3, 80, 120), np.float32)
    image[...] = picture(center=(20, 20))
    image[1, 2] = picture()
    user = user(image, axis_labels=("t", "z", "y", "x"), scale=(1, 3, 0.5, 0.5))
    user.dock.volume.lead["t"].setValue(1)
    user.viewer.dims.set_current_step(1, 2)
    user.tool.on.setChecked(True)
    assert user.dock.session.volume.lead == {"t": 1}
    user.draw((41, 59))
    assert iou(user.proposed(), disc()) > 0.9
    press(user.target, "Enter")
    assert user.annotations.planes() == [2]


def test_a_click_where_the_volume_has_no_pixels_is_refused(user):
    user = user(np.stack([picture()] * 2))
    user.viewer.add_image(np.zeros((9, 80, 120), np.float32), name="longer")
    user.viewer.layers.selection.active = user.target
    user.tool.on.setChecked(True)
    user.viewer.dims.set_current_step(0, 7)
    drag(user.target, [(7.0, 41.0, 59.0)])
    assert not user.tool.busy
    assert "not on screen" in user.dock.support.message.text()


def test_painting_and_other_layers_switch_it_off(user):
    user = user(picture())
    assert not user.target.mouse_pan  # a stroke does not move the image
    user.dock.support.paint.click()
    assert not user.tool.on.isChecked()
    assert user.target.mode == "paint"
    assert not any(str(key) in ("Enter", "Escape") for key in user.target.keymap)
    user.tool.on.setChecked(True)
    assert user.target.mode == "pan_zoom"
    user.viewer.layers.selection.active = user.viewer.layers["discs"]
    assert not user.tool.on.isChecked()
    assert user.target.mouse_pan
    user.tool.on.setChecked(True)
    user.viewer.layers.remove(user.target)
    assert not user.tool.on.isChecked()


def test_it_needs_a_plane_on_screen(user):
    user = user(np.stack([picture()] * 3))
    user.viewer.dims.ndisplay = 3
    assert not user.tool.on.isChecked()
    user.tool.on.setChecked(True)
    assert not user.tool.on.isChecked()
    assert "2D" in user.dock.support.message.text()


def test_the_probabilities_of_the_preview_are_evidence_for_its_plane(user, monkeypatch):
    noise = np.random.default_rng(0).normal(0, 1, (2, 80, 120)).astype(np.float32)
    user = user(noise)
    preview, z = user.dock.preview, user.dock.support.plane()
    monkeypatch.setattr(preview, "_ask", lambda: None)
    preview.on.setChecked(True)
    preview._probabilities = np.stack([np.where(disc(), 0.1, 0.9), np.where(disc(), 0.9, 0.1)]).astype(np.float32)
    preview._plane, preview._painted_tiles = z, {(0, 0): (slice(0, 80), slice(0, 120))}
    user.draw((41, 59))
    assert iou(user.proposed(), disc()) > 0.9
    preview._plane = 1 - z
    user.tool.drop()
    user.draw((41, 59))
    assert iou(user.proposed(), disc()) < 0.8


def test_the_probability_of_a_label_is_that_of_its_channel():
    probabilities = np.stack([np.full((2, 3), 0.25), np.full((2, 3), 1.0000001)]).astype(np.float32)
    assert (probability_of(BACKGROUND, probabilities) == 0.25).all()
    assert (probability_of(FIRST_CLASS, probabilities) == 1).all()
    assert probability_of(FIRST_CLASS + 1, probabilities) is None
    assert probability_of(UNLABELED, probabilities) is None
    assert probability_of(FIRST_CLASS, None) is None


def test_the_evidence_reaches_the_outline():
    from threading import Event

    image = np.random.default_rng(0).normal(0, 1, (80, 120))
    draft = Draft(0, FIRST_CLASS, (np.array([[40.0, 60.0]]),))
    evidence = np.where(disc(), 0.9, 0.1)
    none = np.zeros((80, 120), np.uint8)
    answers = [
        next(iter_outline(lambda: image, draft, lambda: none, e, Event(), preserve=False)).proposal.mask
        for e in (None, evidence)
    ]
    assert iou(answers[0], disc()) < 0.8
    assert iou(answers[1], disc()) > 0.9


def test_a_plane_is_read_once():
    reads = []

    class Volume:
        def plane(self, z):
            reads.append(z)
            return np.full((2, 2), z)

    volume, cache = Volume(), PlaneCache()
    assert [int(cache.read(volume, z)[0, 0]) for z in (1, 1, 2, 1)] == [1, 1, 2, 1]
    assert reads == [1, 2, 1]


def test_strokes_keep_the_points_in_the_plane_once_each():
    stroke = within([(-3, 0), (0, 0), (0.2, 0.1), (0, 1), (0, 9), (0, 0)], (4, 5))
    assert np.array_equal(np.rint(stroke), [(0, 0), (0, 1), (0, 0)])
    assert within([(9, 9)], (4, 5)).shape == (0, 2)


def test_labels_of_background_are_taken_unless_they_are_preserved():
    painted = np.array([[UNLABELED, BACKGROUND, FIRST_CLASS]], np.uint8)
    assert taken_by_others(painted, preserve=False).tolist() == [[False, False, True]]
    assert taken_by_others(painted, preserve=True).tolist() == [[False, True, True]]
