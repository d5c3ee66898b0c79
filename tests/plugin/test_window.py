"""The dock in napari's own window."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from qtpy.QtCore import QTimer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def window(display, make_napari_viewer):
    return make_napari_viewer()


@pytest.fixture
def docked(window, open_dock, few):
    dock = open_dock(window)
    window.window.add_dock_widget(dock, name="DistillFSS", area="right")
    dock.distill.settings.setValue(few)
    return dock


def test_the_menus_lead_to_the_dock(display, npe2pm, make_napari_viewer, root, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    from npe2 import PluginManifest

    npe2pm.register(PluginManifest.from_file(root / "src" / "napari_distillfss" / "napari.yaml"))
    viewer = make_napari_viewer()
    from napari._app_model import get_app_model

    menus = get_app_model().menus
    in_segment = {item.command.id for item in menus.get_menu("napari/layers/segment") if hasattr(item, "command")}
    assert {"napari-distillfss.dock", "napari-distillfss.apply_dock"} <= in_segment
    plugins = {item.title for item in menus.get_menu("napari/plugins") if hasattr(item, "submenu")}
    assert "DistillFSS" in plugins
    _, dock = viewer.window.add_plugin_dock_widget("napari-distillfss", "Label, distill, segment")
    dock.session.close()


def test_nothing_is_cut_off_at_the_width_of_the_dock(docked, window):
    window.add_image(np.zeros((2, 3, 4, 64, 64)), name="a long name of an image that does not fit in any box")
    docked.distill.settings.more.setCurrentIndex(1)
    for section in docked.sections.values():
        section.heading.setChecked(True)
    docked.objects.table.show()
    bar = docked.verticalScrollBar().sizeHint().width()
    assert docked.widget().minimumSizeHint().width() + bar <= docked.minimumWidth()


def test_the_window_stays_alive_while_distilling_and_applying(
    docked, window, sample, painted_truth, few, qtbot, tmp_path
):
    docked.distill.settings.setValue(replace(few, steps=20))
    window.add_image(np.tile(sample.image, (8, 2, 2)), name="nuclei")
    for z in (1, 5):
        docked.session.annotations.put(z, np.tile(painted_truth[z], (2, 2)))
    docked.session.painted()
    docked.support.paint.click()  # napari's first labels layer takes it a moment
    docked.distill.start()
    qtbot.waitUntil(lambda: bool(docked.distill.plot.losses), timeout=120_000)  # torch is loaded by now
    docked.apply.out.setText(str(tmp_path / "o.ome.zarr"))
    ticks = []
    timer = QTimer()
    timer.timeout.connect(lambda: ticks.append(None))
    timer.start(1)
    for start in (lambda: None, docked.apply.start):
        start()
        ticks.clear()
        qtbot.waitUntil(lambda: not docked.session.busy, timeout=120_000)
        assert len(ticks) > 3  # other work may hold the cores, so no time is asked for; the bench measures the gaps
    timer.stop()


def test_closing_the_window_while_distilling_ends_the_work(
    display, make_napari_viewer, qtbot, sample, painted_truth, few, tmp_path
):
    from napari_distillfss._widgets.dock import DistillDock

    viewer = make_napari_viewer()
    viewer.add_image(sample.image, name="nuclei")
    dock = DistillDock(viewer, tmp_path)
    viewer.window.add_dock_widget(dock, name="DistillFSS", area="right")
    dock.session.annotations.put(1, painted_truth[1])
    dock.session.painted()
    dock.distill.settings.setValue(replace(few, steps=100_000))
    dock.distill.start()
    qtbot.waitUntil(lambda: bool(dock.distill.plot.losses), timeout=120_000)
    session = dock.session
    with qtbot.waitSignal(dock.destroyed):
        viewer.window.remove_dock_widget(dock)
        dock.deleteLater()
    qtbot.waitUntil(lambda: not any("distillfss" in t.name for t in threading.enumerate()), timeout=60_000)
    assert session.annotations is None
