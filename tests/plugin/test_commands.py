"""Commands of the palette, run by napari's registries of commands."""

from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
from napari.utils.notifications import notification_manager
from npe2 import PluginManifest
from qtpy.QtWidgets import QDockWidget, QFileDialog

from distillfss_core import DistillFSSError, TrainStep
from napari_distillfss._widgets.dock import ApplyDock, DistillDock

DOCK = "Label, distill, segment"


def notified():
    return [record.message for record in notification_manager.records]


EFFECTS = {
    "show_dock": lambda dock: dock.session.volume is not None,
    "suggest_slices": lambda dock: 0 in dock.support.suggested,
    "add_slice": lambda dock: dock.support.suggested == [dock.support.plane()],
    "next_slice": lambda dock: "No slice is annotated yet" in dock.support.message.text(),
    "previous_slice": lambda dock: "No slice is annotated yet" in dock.support.message.text(),
    "next_suggested": lambda dock: "No suggested slice is left" in dock.support.message.text(),
    "fill_rest": lambda dock: dock.session.annotations.planes() == [dock.support.plane()],
    "train": lambda dock: "no slice is annotated" in dock.distill.message.text(),
    "refine": lambda dock: "there is no model to refine yet" in dock.distill.message.text(),
    "toggle_preview": lambda dock: dock.preview.on.isChecked(),
    "correct_plane": lambda dock: "there is no preview of this plane yet" in dock.preview.message.text(),
    "apply": lambda dock: "there is no model yet" in dock.apply.message.text(),
    "count_objects": lambda dock: "there are no labels yet" in dock.objects.message.text(),
    "export_labels": lambda dock: "there are no labels yet" in dock.objects.message.text(),
    "load_model": lambda dock: notified() == ["asked for a model"],
    "cancel": lambda dock: notified() == ["DistillFSS: nothing is running"],
}
"""What a command does in a dock that has an image and nothing else."""


@pytest.fixture
def manifest(root):
    return PluginManifest.from_file(root / "src" / "napari_distillfss" / "napari.yaml")


@pytest.fixture
def execute(npe2pm, manifest, monkeypatch):
    """Runs a command of the plugin by its registry in npe2."""
    from napari.utils.notifications import show_info

    npe2pm.register(manifest)
    notification_manager.records.clear()

    def ask(*_):
        show_info("asked for a model")
        return "", ""

    monkeypatch.setattr(QFileDialog, "getOpenFileName", ask)
    return lambda name: npe2pm.commands.execute(f"napari-distillfss.{name}")


class Window:
    """What napari's window has of docks, without a screen."""

    def __init__(self, open_dock, viewer):
        self.dock_widgets = {}
        self._open = lambda: open_dock(viewer)

    def add_plugin_dock_widget(self, plugin, name):
        assert (plugin, name) == ("napari-distillfss", DOCK)
        self.dock_widgets[name] = self._open()
        return None, self.dock_widgets[name]


@pytest.fixture
def window(monkeypatch, open_dock, viewer, nuclei):
    made = Window(open_dock, viewer)
    monkeypatch.setattr("napari.current_viewer", lambda: SimpleNamespace(window=made))
    return made


def test_each_command_of_the_palette_has_a_test(manifest):
    module = "napari_distillfss._widgets.commands:"
    assert {
        command.id.partition(".")[2] for command in manifest.contributions.commands
        if command.python_name.startswith(module)
    } == set(EFFECTS)  # fmt: skip


@pytest.mark.parametrize("name", EFFECTS)
def test_a_command_opens_a_dock_that_is_closed_and_does_its_work_in_one_that_is_open(name, execute, window, qtbot):
    execute(name)
    (dock,) = window.dock_widgets.values()
    assert EFFECTS[name](dock)
    if name == "toggle_preview":
        execute(name)
        assert not dock.preview.on.isChecked()
    elif name != "load_model":
        notification_manager.records.clear()
        execute(name)
        assert EFFECTS[name](dock)
    assert list(window.dock_widgets.values()) == [dock]


def test_commands_of_the_palette_run_in_naparis_window(
    display, npe2pm, manifest, make_napari_viewer, sample, monkeypatch, tmp_path, qtbot
):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    npe2pm.register(manifest)
    viewer = make_napari_viewer()
    viewer.add_image(sample.image, name="nuclei")
    from napari._app_model import get_app_model

    commands = get_app_model().commands
    for name in ("train", "toggle_preview", "add_slice"):
        assert commands[f"napari-distillfss.{name}"].title.endswith("(DistillFSS)")
        commands.execute_command(f"napari-distillfss.{name}").result()
        (dock,) = viewer.window.dock_widgets.values()
        assert EFFECTS[name](dock)
        (holder,) = [h for h in viewer.window._qt_window.findChildren(QDockWidget) if h.isAncestorOf(dock)]
        holder.hide()
        commands.execute_command("napari-distillfss.show_dock").result()
        assert not holder.isHidden()
        dock.session.close()
        qtbot.waitUntil(lambda dock=dock: not dock.session.busy and not dock.preview.busy)
        viewer.window.remove_dock_widget(dock)
        assert not viewer.window.dock_widgets


def test_a_command_unfolds_its_section(execute, window):
    execute("show_dock")
    (dock,) = window.dock_widgets.values()
    assert not dock.sections[dock.apply].heading.isChecked()
    execute("apply")
    assert dock.sections[dock.apply].heading.isChecked()


def test_without_a_window_a_command_is_one_sentence(execute, monkeypatch):
    monkeypatch.setattr("napari.current_viewer", lambda: None)
    with pytest.raises(DistillFSSError, match="there is no napari window"):
        execute("train")


def test_a_dock_for_a_model_is_used_where_it_has_the_section(execute, window, viewer, qtbot, tmp_path):
    window.dock_widgets["Apply a model"] = small = ApplyDock(viewer, tmp_path / "other")
    execute("apply")
    assert list(window.dock_widgets.values()) == [small]
    assert "there is no model yet" in small.apply.message.text()
    execute("correct_plane")
    assert "there is no preview of this plane yet" in window.dock_widgets[DOCK].preview.message.text()
    execute("train")
    assert type(window.dock_widgets[DOCK]) is DistillDock
    assert "no slice is annotated" in window.dock_widgets[DOCK].distill.message.text()
    small.session.close()
    small.deleteLater()


def test_cancel_stops_what_is_running(execute, window, qtbot):
    execute("show_dock")
    (dock,) = window.dock_widgets.values()
    stops = []

    def work(stop: Event):
        yield TrainStep(1, 2)
        stops.append(stop.wait(60))
        return None

    dock.apply.job.start(work)
    assert dock.session.busy
    execute("cancel")
    qtbot.waitUntil(lambda: not dock.session.busy)
    qtbot.waitUntil(lambda: stops == [True])  # its thread ends later than the job, which writes nothing yet
    assert notified() == []


def test_commands_go_from_one_annotated_slice_to_the_next_and_round(execute, window, qtbot):
    execute("show_dock")
    (dock,) = window.dock_widgets.values()
    for z in (2, 5, 6):
        dock.session.annotations.put(z, np.ones((96, 96), np.uint8))
    dock.session.painted()
    dock.support.go_to(3)
    visited = []
    for name in ("next_slice", "next_slice", "next_slice", "previous_slice", "previous_slice"):
        execute(name)
        visited.append(dock.support.plane())
    assert visited == [5, 6, 2, 6, 5]


def test_a_plane_that_is_added_can_be_painted_at_once_and_is_listed(execute, window, viewer):
    execute("show_dock")
    (dock,) = window.dock_widgets.values()
    for z in (6, 2):
        dock.support.go_to(z)
        execute("add_slice")
    assert dock.support.suggested == [2, 6]
    rows = [dock.support.list.item(i).text() for i in range(dock.support.list.count())]
    assert rows == ["plane 2: suggested, not painted yet", "plane 6: suggested, not painted yet"]
    assert viewer.layers.selection.active is dock.support.layer
    assert dock.support.layer.mode == "paint"
    dock.session.annotations.put(3, np.ones((96, 96), np.uint8))
    dock.support.go_to(3)
    execute("add_slice")
    assert dock.support.suggested == [2, 6]  # it is annotated already
