"""The pictures of docs/user-guide.md and the film of README.md: a whole session in napari on the generated nuclei.

python docs/screenshots.py [FOLDER]          (by default docs/images; needs a screen, or Xvfb)
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from qtpy.QtWidgets import QWidget

WIDTH, HEIGHT = 1280, 800
THEMES = ("light", "dark")
FILM = (960, 600)
CAPTION = 36  # pixels below the picture


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "images")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.environ.get("DISPLAY") and sys.platform == "linux":
        if shutil.which("xvfb-run") is None:
            sys.exit("needs a screen: install xvfb")
        screen = f"-screen 0 {WIDTH}x{HEIGHT}x24"
        os.execvp("xvfb-run", ["xvfb-run", "-a", "-s", screen, sys.executable, os.path.abspath(__file__), str(folder)])
    with tempfile.TemporaryDirectory() as kept:
        os.chdir(kept)  # so that short names are shown
        session = Session(folder, Path(kept))
        session.run()
        session.draw_samples()


class Session:
    """napari with the dock, doing what the guide tells."""

    def __init__(self, folder: Path, kept: Path) -> None:
        import napari
        from qtpy.QtWidgets import QApplication

        from napari_distillfss._widgets.dock import DistillDock

        self.folder, self.kept = folder, kept
        self.frames: list[tuple[Image.Image, float]] = []
        self.caption = ""
        self.viewer = napari.Viewer(title="napari", show=True)
        self.app = QApplication.instance() or QApplication([])
        self.viewer.window._qt_window.setGeometry(0, 0, WIDTH, HEIGHT)  # no window manager does it here
        self.dock = DistillDock(self.viewer, kept)
        self.viewer.window.add_dock_widget(self.dock, name="DistillFSS", area="right")

    def run(self) -> None:
        from distillfss_core import generate_sample

        dock, viewer = self.dock, self.viewer
        made = generate_sample(planes=12, size=256)
        viewer.add_image(made.image, name="nuclei", scale=(2.5, 1, 1), units=("um",) * 3)
        viewer.dims.axis_labels = ("z", "y", "x")
        dock.apply.out.setText("nuclei-labels.ome.zarr")
        dock.support.suggest_slices()
        self.wait(lambda: not dock.support.selecting.running)
        self.wait(lambda: "Computes" in dock.volume.device.text())
        self.photograph("1-volume", dock.volume)
        self.film(4, "1  Choose a volume: here a stack of nuclei")
        self.annotate(made.labels)
        self.distill()
        self.preview()
        self.refine(made.labels)
        self.segment()
        viewer.close()
        self.save_film()

    def annotate(self, labels: np.ndarray) -> None:
        """Annotate the suggested slices, object by object."""
        dock = self.dock
        self.scroll_to(dock.support)
        self.film(4, "2  Slices are suggested. A handful of them is enough")
        for number, z in enumerate(dock.support.suggested):
            dock.support.go_to(z)
            self.film(1.5, f"Annotate plane {z}")
            objects = [int(n) for n in np.unique(labels[z])[1:]]
            if number == 0:
                objects = self.outline(labels[z], objects)
                self.caption = "Or paint them"
            for part in np.array_split(objects, 10):
                rows, columns = np.nonzero(np.isin(labels[z], part))
                dock.support.layer.data_setitem((np.full(len(rows), z), rows, columns), 2)
                self.wait_for_instant()
                self.film(0.6)
            dock.support.fill_rest()
            self.film(2, "All else is background")
            if number == 0:
                self.show_instant()
        dock.preview.on.setChecked(False)
        dock.support.go_to(dock.support.suggested[2])
        dock.support.paint.click()
        self.wait(lambda: (first := dock.support.list.item(0)) is not None and not first.icon().isNull())
        self.photograph("2-support", dock.support)

    def outline(self, labels: np.ndarray, objects: list[int]) -> list[int]:
        """Accept the outlines of four clicked objects; returns the other objects."""
        dock, tool = self.dock, self.dock.support.outline
        sizes = np.bincount(labels.ravel())
        clicked = sorted(objects, key=lambda n: -int(sizes[n]))[:4]
        tool.on.setChecked(True)
        self.caption = "A click proposes an outline, Enter accepts it"
        for n in clicked:
            rows, columns = np.nonzero(labels == n)
            tool.add_stroke([(rows.mean(), columns.mean())])
            self.wait(lambda: tool.answer is not None and not tool.busy)
            self.film(1.2)
            tool.accept()
            self.film(0.6)
        tool.on.setChecked(False)
        dock.support.paint.click()
        return [n for n in objects if n not in clicked]

    def show_instant(self) -> None:
        """Let the instant model answer in a plane without annotations, and follow from then on."""
        dock = self.dock
        dock.preview.on.setChecked(True)
        dock.support.go_to(dock.support.suggested[0] + 1)
        self.wait_for_instant()
        self.scroll_to(dock.preview)
        self.film(5, "An instant model answers from the first slice on, after each stroke")
        self.scroll_to(dock.support)

    def wait_for_instant(self) -> None:
        """Wait for the answer of the preview, if it is on."""
        if self.dock.preview.on.isChecked():
            self.wait_a_moment()  # it waits for further strokes
            self.wait(lambda: not self.dock.preview.busy)

    def distill(self) -> None:
        """Train, and show how."""
        from distillfss_core import DistillSettings

        dock = self.dock
        settings = DistillSettings(steps=200, crops=96, crop_size=128, zoom=Fraction(2), validation_slice=2)
        dock.distill.settings.setValue(settings)
        dock.distill.start()
        self.scroll_to(dock.distill)
        self.caption = "3  A teacher learns from the slices, and a small student from the teacher"
        for count in range(0, 150, 10):
            self.wait(partial(self.has_trained, count))
            self.film(0.8)
        self.photograph("3-distill", dock.distill)
        self.wait(lambda: not dock.session.busy)
        self.film(4, "The student is ready, and the plot shows its IoU on a slice that it has not learned")

    def preview(self) -> None:
        """Walk through planes that are not annotated."""
        dock = self.dock
        dock.support.layer.visible = False
        dock.preview.on.setChecked(True)
        self.scroll_to(dock.preview)
        self.caption = "4  Preview: the student segments each plane on screen"
        for z in (0, 1, 3, 5, 6, 8):
            dock.support.go_to(z)
            self.wait(partial(self.has_preview, z))
            self.film(1.5)
        dock.support.go_to(4)
        dock.preview.shown["uncertainty"].setChecked(True)
        self.wait(partial(self.has_preview, 4))
        self.film(4, "Uncertainty is bright where another annotation helps")
        self.photograph("4-preview", dock.preview)
        dock.preview.shown["uncertainty"].setChecked(False)

    def refine(self, labels: np.ndarray) -> None:
        """Take the preview of a plane as its annotation, mend it, and go on training."""
        dock, z = self.dock, 4
        dock.preview.correct_plane()
        dock.preview.on.setChecked(False)
        dock.support.layer.visible = True
        self.scroll_to(dock.support)
        self.film(4, "Correct a plane: its preview becomes the annotation")
        annotations = dock.session.annotations
        assert annotations is not None
        rows, columns = np.nonzero((labels[z] > 0) != (annotations.plane(z) == 2))
        wanted = np.where(labels[z] > 0, 2, 1)[rows, columns]
        dock.support.layer.data_setitem((np.full(len(rows), z), rows, columns), wanted)
        self.film(3, "Repaint what is wrong")
        self.scroll_to(dock.distill)
        dock.distill.start_refining()
        self.wait(lambda: bool(dock.session.busy))
        self.film(2, "Refine: the training goes on, in a fifth of the steps")
        self.wait(lambda: not dock.session.busy)
        self.film(3)

    def segment(self) -> None:
        """Write the labels of the whole volume, and count its objects."""
        dock = self.dock
        dock.preview.on.setChecked(False)
        dock.support.layer.visible = False
        self.scroll_to(dock.apply)
        self.film(3, "5  Apply: the whole volume is written to OME-Zarr, piece by piece")
        dock.apply.start()
        self.wait(lambda: not dock.session.busy)
        self.caption = "A cancelled run can be continued"
        for z in (4, 7, 10):
            dock.support.go_to(z)
            self.film(2)
        self.scroll_to(dock.objects)
        self.caption = "6  Count objects, and find one by its row"
        dock.objects.start()
        self.wait(lambda: not dock.session.busy)
        for row in (3, 20, 40):
            dock.objects.table.view.selectRow(row)
            dock.objects.table.choose(row)
            self.film(3)
        self.photograph("5-apply", dock.apply)
        self.scroll_to(dock.model)
        self.film(5, "7  Models are kept: save one, restore an earlier one, or compare two")
        self.photograph("6-model", dock.model)

    def draw_samples(self) -> None:
        """A plane of each generated stack, with its truth outlined."""
        from distillfss_core.samples import generate_sample
        from distillfss_core.settings import SAMPLES

        panels = []
        for kind in SAMPLES:
            made = generate_sample(kind)
            plane, labels = made.image[6].astype(float), made.labels[6]
            low, high = (-1000, 400) if kind == "nodules" else np.percentile(plane, (0.5, 99.5))
            panel = np.repeat((np.clip((plane - low) / (high - low), 0, 1) * 255)[..., None], 3, -1)
            edge = np.zeros(labels.shape, bool)
            edge[1:] |= labels[1:] != labels[:-1]
            edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
            panel[edge] = (243, 155, 127)
            panels += [panel, np.full((len(panel), 8, 3), 255.0)]
        picture = Image.fromarray(np.concatenate(panels[:-1], 1).astype(np.uint8))
        picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(self.folder / "samples.png", optimize=True)

    def photograph(self, name: str, section: QWidget) -> None:
        """One picture in each theme, with a section of the dock at its top."""
        from napari.settings import get_settings

        for theme in THEMES:
            get_settings().appearance.theme = theme
            self.viewer.theme = theme
            self.wait_a_moment()
            self.scroll_to(section)
            self.wait_a_moment()
            picture = self.picture()
            picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(self.folder / f"{name}-{theme}.png", optimize=True)

    def has_trained(self, steps: int) -> bool:
        return len(self.dock.distill.plot.losses) > steps

    def has_preview(self, z: int) -> bool:
        return self.dock.preview.plane == z and not self.dock.preview.busy

    def picture(self) -> Image.Image:
        return Image.fromarray(self.viewer.screenshot(canvas_only=False, flash=False)[..., :3])

    def scroll_to(self, section: QWidget) -> None:
        if (bar := self.dock.verticalScrollBar()) is not None:
            bar.setValue(self.dock.sections[section].y())

    def film(self, seconds: float, caption: str = "") -> None:
        """Add a frame that is shown for so long, with a caption that stays until there is another."""
        self.caption = caption or self.caption
        self.wait_a_moment(0.1)
        frame = Image.new("RGB", (FILM[0], FILM[1] + CAPTION), "#1d2128")
        frame.paste(self.picture().resize(FILM, Image.Resampling.LANCZOS))
        font = ImageFont.load_default(20)
        ImageDraw.Draw(frame).text((12, FILM[1] + CAPTION // 2), self.caption, "white", font, anchor="lm")
        self.frames.append((frame, seconds))

    def save_film(self) -> None:
        """Write the frames as an animation; all have one palette, so that only changes are stored."""
        some = [np.asarray(frame) for frame, _ in self.frames[:: max(1, len(self.frames) // 12)]]
        palette = Image.fromarray(np.concatenate(some)).quantize(128)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame, _ in self.frames]
        durations = [round(1000 * seconds) for _, seconds in self.frames]
        frames[0].save(self.folder / "session.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)

    def wait(self, until: Callable[[], bool], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                sys.exit("waited too long")
            self.app.processEvents()
            time.sleep(0.01)

    def wait_a_moment(self, seconds: float = 0.6) -> None:
        end = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() > end)


if __name__ == "__main__":
    main()
