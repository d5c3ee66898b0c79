"""The dock can be read, reached and heard: contrast, heights, widths, and names for assistive technology."""

import numpy as np
import pytest
from qtpy.QtCore import QPoint, QRect, Qt
from qtpy.QtGui import QColor
from qtpy.QtWidgets import (
    QAbstractButton,
    QAbstractItemView,
    QAbstractSpinBox,
    QCheckBox,
    QComboBox,
    QLabel,
    QLineEdit,
    QListWidget,
    QPlainTextEdit,
    QProgressBar,
    QPushButton,
    QStyle,
    QStyleOptionComboBox,
)

from napari_distillfss._annotations import Class
from napari_distillfss._tasks import THUMBNAIL
from napari_distillfss._widgets._colors import ERROR, ERROR_IN_LIST, IOU, LOSS, MUTED_IN_LIST, contrast
from napari_distillfss._widgets._common import JobBar, Message, Section

THEMES = ("dark", "light")
LONG = "no such file: " + "/a/folder_with_a_name/that is long" * 20 + "; choose another one"


@pytest.fixture
def drawn(display, make_napari_viewer, open_dock, sample, qtbot):
    """A shown window of 1280 x 800 with the dock and a volume."""
    viewer = make_napari_viewer(show=True)
    viewer.window._qt_window.setGeometry(0, 0, 1280, 800)
    dock = open_dock(viewer)
    viewer.window.add_dock_widget(dock, name="DistillFSS", area="right")
    viewer.add_image(sample.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
    qtbot.wait(300)
    return viewer, dock


def set_theme(viewer, theme, qtbot):
    viewer.theme = theme
    qtbot.wait(300)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("#000000", "#ffffff", 21),
        ("#777777", "#ffffff", 4.478),
        ("#ff0000", "#ffffff", 3.998),
        ("#123456", "#123456", 1),
    ],
)
def test_contrast_is_that_of_wcag(first, second, expected):
    assert contrast(QColor(first), QColor(second)) == pytest.approx(expected, abs=0.001)
    assert contrast(QColor(second), QColor(first)) == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("tone", [ERROR, LOSS, IOU])
def test_colors_of_texts_have_a_contrast_of_four_and_a_half_on_each_background_of_napari(theme, tone):
    from napari.utils.theme import get_theme

    colors = get_theme(theme)
    for name in ("background", "canvas") if theme == "dark" else ("background",):
        background = QColor(*colors.__getattribute__(name).as_rgb_tuple()[:3])
        assert contrast(tone.on(background), background) >= 4.5, name


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("tone", [ERROR_IN_LIST, MUTED_IN_LIST])
def test_colors_of_rows_have_a_contrast_of_four_and_a_half_on_naparis_lists(theme, tone):
    from napari.utils.theme import get_theme

    background = QColor(*get_theme(theme).primary.as_rgb_tuple()[:3])  # of its lists
    assert contrast(tone.on(background), background) >= 4.5


def sources_that_cannot_be_used(viewer, dock, sample, painted_truth):
    """The list of other volumes, with one row that cannot be chosen."""
    from napari_distillfss._widgets.sources import SourceList

    dock.session.annotations.put(1, painted_truth[1])
    viewer.add_image(sample.image[::-1].copy(), name="another")
    dock.volume.layers.setCurrentIndex(1)
    dock.volume.layers.activated.emit(1)
    (other,) = dock.session.others()
    return SourceList([(other, "is no file, and not open here")], dock)


@pytest.mark.parametrize("theme", THEMES)
def test_rows_that_cannot_be_used_are_readable_in_the_window(theme, drawn, qtbot, sample, painted_truth):
    from napari_distillfss._widgets.slices import SliceRow

    viewer, dock = drawn
    set_theme(viewer, theme, qtbot)
    choice = sources_that_cannot_be_used(viewer, dock, sample, painted_truth)
    dock.support.list.setRows([SliceRow("nuclei: 2 slices cannot be used", is_problem=True)])
    for widget in (choice.list, dock.support.list):
        widget.show()
        holder = widget if widget is dock.support.list else choice
        holder.resize(300, 120)
        holder.show()
        qtbot.wait(100)
        background = widget.grab().toImage().pixelColor(widget.width() // 2, widget.height() - 4)
        assert contrast(widget.item(0).foreground().color(), background) >= 4.5


def test_rows_follow_the_theme_at_once(drawn, qtbot, painted_truth, sample):
    from napari_distillfss._widgets.slices import SliceRow

    viewer, dock = drawn
    choice = sources_that_cannot_be_used(viewer, dock, sample, painted_truth)
    rows = dock.support.list
    rows.setRows([SliceRow("nuclei: 2 slices cannot be used", is_problem=True), SliceRow("plane 3: suggested")])
    changes = []
    for widget in (choice.list, rows):
        widget.itemChanged.connect(changes.append)
        holder = widget if widget is rows else choice
        holder.resize(300, 120)
        holder.show()
    for theme in (*THEMES, *THEMES):
        set_theme(viewer, theme, qtbot)
        for widget in (choice.list, rows):
            background = widget.grab().toImage().pixelColor(widget.width() // 2, widget.height() - 4)
            assert contrast(widget.item(0).foreground().color(), background) >= 4.5, theme
    assert rows.item(1).foreground().style() == Qt.BrushStyle.NoBrush  # as the theme has it
    assert changes == []


def test_errors_are_readable_in_the_window_of_each_theme(drawn, qtbot):
    viewer, dock = drawn
    colors = []
    dock.distill.message.warn("it went wrong")
    for theme in (*THEMES, "dark"):
        set_theme(viewer, theme, qtbot)
        label = dock.distill.message
        text = label.palette().windowText().color()
        background = dock.grab().toImage().pixelColor(2, dock.height() - 3)
        assert contrast(background, label.palette().window().color()) < 1.2
        assert contrast(text, background) >= 4.5
        colors.append(text.name())
    assert colors[0] == colors[2] != colors[1]
    dock.distill.message.tell("it goes on")
    assert dock.distill.message.palette().windowText().color() == dock.support.message.palette().windowText().color()


def test_scribbles_of_background_are_seen_on_black():
    from napari_distillfss._annotations import BACKGROUND_COLOR

    color = QColor(BACKGROUND_COLOR)
    half = QColor(color.red() // 2, color.green() // 2, color.blue() // 2)  # the layer's opacity is 0.5
    assert contrast(half, QColor("#000000")) >= 3


def test_the_main_button_is_in_sight_with_and_without_slices(drawn, qtbot):
    _, dock = drawn

    def is_in_sight():
        top = dock.distill.distill.mapTo(dock.viewport(), QPoint(0, 0)).y()
        return top >= 0 and top + dock.distill.distill.height() <= dock.viewport().height()

    assert dock.viewport().height() < 800
    assert is_in_sight()
    dock.support.suggest.click()
    qtbot.waitUntil(lambda: not dock.support.selecting.running)
    qtbot.wait(100)
    assert dock.support.list.count() == 5
    assert is_in_sight()
    dock.support.rest.click()
    qtbot.waitUntil(lambda: dock.support.total.isVisible())
    qtbot.wait(100)
    assert is_in_sight()


def test_messages_and_progress_move_nothing(drawn, qtbot):
    _, dock = drawn
    for section in dock.findChildren(Section):
        section.heading.setChecked(True)
    dock.model.history.show()
    qtbot.wait(100)

    def places():
        return {section: section.y() for section in dock.sections.values()}

    before = places()
    messages = [m for m in dock.findChildren(Message) if m.isVisible() and m is not dock.model.history.message]
    assert {dock.support.message, dock.distill.message, dock.preview.message, dock.apply.message} <= set(messages)
    for message in messages:
        message.warn(LONG)
        qtbot.wait(1)
        assert message.text() == LONG
        assert message.toolTip() == LONG
        shown = QLabel.text(message).replace("\u200b", "")
        assert shown.endswith("…")
        assert LONG.startswith(shown[:-1])
        message.tell("short")
        assert message.toolTip() == ""
        assert QLabel.text(message) == "Short"
    qtbot.wait(50)
    assert places() == before
    for bar in dock.findChildren(JobBar):
        bar._on_job_started()
        qtbot.wait(50)
        assert bar.isVisible()
        assert places() == before
        bar._on_job_ended()
    qtbot.wait(50)
    assert places() == before


def needed_width(widget):
    """Pixels that the text of a widget needs, of a combo box that of its longest item."""
    metrics = widget.fontMetrics()
    if isinstance(widget, QComboBox):
        option = QStyleOptionComboBox()
        widget.initStyleOption(option)
        kind = QStyle.ComplexControl.CC_ComboBox
        field = widget.style().subControlRect(kind, option, QStyle.SubControl.SC_ComboBoxEditField, widget)
        texts = [widget.itemText(i) for i in range(widget.count())]
        return max((metrics.horizontalAdvance(t) for t in texts), default=0) + widget.width() - field.width()
    return (
        widget.sizeHint().width()
        if isinstance(widget, (QLabel, QCheckBox))
        else metrics.horizontalAdvance(widget.text()) + 8
    )


@pytest.mark.parametrize("theme", THEMES)
def test_no_text_is_cut_off(theme, drawn, qtbot):
    viewer, dock = drawn
    set_theme(viewer, theme, qtbot)
    for section in dock.findChildren(Section):  # those within others, too
        section.heading.setChecked(True)
    dock.objects.of_class.addItem("object")
    dock.model.history.show()
    dock.distill.settings.more.setCurrentIndex(1)
    qtbot.wait(200)
    kinds = (QLabel, QCheckBox, QPushButton, QComboBox)
    shown = [
        w for kind in kinds for w in dock.widget().findChildren(kind) if w.isVisible() and not isinstance(w, Message)
    ]
    assert {dock.support.rest, dock.preview.source, dock.distill.settings.preset, dock.apply.batch.replace} <= set(
        shown
    )
    named_by_user = {dock.volume.layers}
    cut = {w.toolTip() or w.text(): (needed_width(w), w.width()) for w in shown
           if w not in named_by_user and needed_width(w) > w.width()}  # fmt: skip
    assert not cut
    assert dock.widget().minimumSizeHint().width() <= dock.viewport().width()  # it has no bar to scroll by


def test_every_widget_that_takes_input_has_a_name_for_assistive_technology(viewer, nuclei, open_dock, qtbot):
    dock = open_dock(viewer)
    dock.distill.settings.more.setCurrentIndex(1)
    kinds = (QAbstractButton, QComboBox, QAbstractSpinBox, QAbstractItemView, QLineEdit, QPlainTextEdit, QProgressBar)
    widgets = [w for kind in kinds for w in dock.widget().findChildren(kind) if not w.objectName().startswith("qt_")]
    inside = (QComboBox, QAbstractSpinBox)  # parts of them are no widgets of their own
    widgets = [w for w in widgets if not any(isinstance(p, inside) for p in parents(w))]
    assert len(widgets) > 60
    unnamed = [w for w in widgets if w.focusPolicy() != Qt.FocusPolicy.NoFocus and not name_of(w)]
    assert not [w.toolTip() or type(w).__name__ for w in unnamed]
    assert name_of(dock.apply.mode) == "Mode"
    assert name_of(dock.distill.settings.form.boxes["steps"].native) == "Steps"
    lists = [w for w in widgets if isinstance(w, QListWidget)]
    assert sorted(map(name_of, lists)) == ["Annotated slices", "Classes", "Models of this volume"]


def parents(widget):
    while (widget := widget.parentWidget()) is not None:
        yield widget


def name_of(widget):
    """As Qt gives it to a screen reader: the name that was set, or the text of a button that shows letters."""
    text = widget.text() if isinstance(widget, QAbstractButton) else ""
    return widget.accessibleName() or (text if any(c.isalpha() for c in text) else "")


def test_buttons_with_nothing_to_act_on_are_disabled(viewer, open_dock, sample, painted_truth, qtbot):
    dock = open_dock(viewer)
    support, preview, model = dock.support, dock.preview, dock.model
    always = {"File…", "Folder…", "Address…", "Load…", "Add class", "Color…", "…", "Cancel", "Apply to files…"}
    enabled = {b.text() for b in dock.widget().findChildren(QPushButton) if b.isEnabled() and b.text()} - always
    assert enabled == set()
    viewer.add_image(sample.image, name="nuclei")
    for button in (support.suggest, support.paint, support.rest, support.import_file, dock.apply.on_screen):
        assert button.isEnabled()
    for button in (support.anew, support.remove, support.restore, dock.distill.distill, dock.distill.refine,
                   preview.take, dock.apply.apply, dock.objects.count, model.save, model.command):  # fmt: skip
        assert not button.isEnabled()
    dock.session.annotations.put(2, painted_truth[2])
    dock.session.painted()
    assert dock.distill.distill.isEnabled()
    assert support.anew.isEnabled()
    assert not dock.distill.refine.isEnabled()
    support.list.setCurrentRow(0)
    assert support.remove.isEnabled()
    support.classes.setBrush(0)
    assert not support.classes.color.isEnabled()  # the eraser has no color
    support.classes.setBrush(2)
    assert support.classes.color.isEnabled()


def test_the_whole_of_an_elided_message_is_copied(qtbot):
    from qtpy.QtWidgets import QApplication

    message = Message()
    qtbot.addWidget(message)
    message.resize(200, 60)
    message.warn(LONG)
    message.actions()[0].trigger()
    assert QApplication.clipboard().text() == LONG
    assert np.char.find(LONG, "\u200b") == -1


def test_rows_of_slices_fit_the_dock_whatever_their_classes_and_sources(drawn, qtbot, painted_truth, sample):
    viewer, dock = drawn
    classes = (Class("mitochondria", "#112233"), Class("endoplasmic reticulum", "#445566"))
    other = viewer.add_image(
        sample.image * 2, name="fixed_2026-03-11_well_B07_position_3.ome.tif", scale=(2.5, 1, 1), units=("um",) * 3
    )
    for index in (1, 0):
        dock.volume.layers.setCurrentIndex(index)
        dock.volume.layers.activated.emit(index)
        dock.session.set_classes(classes)
        for z in (1, 6):
            dock.session.annotations.put(z, np.where(painted_truth[z] == 2, 3, painted_truth[z]))
        dock.session.painted()
    dock.session.use_also([dock.session.others()[0].key])
    dock.support.suggest_slices()
    rows = dock.support.list
    qtbot.waitUntil(lambda: not dock.support.selecting.running and not dock.support.list.busy, timeout=60_000)
    qtbot.wait(300)
    assert other in viewer.layers
    assert rows.count() > 5
    for number in range(rows.count()):
        item = rows.item(number)
        place = rows.visualItemRect(item)
        assert place.right() <= rows.viewport().width()
        room = place.width() - (THUMBNAIL if not item.icon().isNull() else 0) - 30  # the check box
        needed = rows.fontMetrics().boundingRect(QRect(0, 0, room, 1000), Qt.TextFlag.TextWordWrap, item.text())
        assert needed.height() <= place.height(), item.text()
        assert needed.width() <= room, item.text()
