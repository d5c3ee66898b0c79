"""The sheet of panels has the size, colors and legend it should."""

import numpy as np
import pytest
from PIL import Image

from distillfss_core.errors import ImageError
from distillfss_core.plotting import (
    CLASS_COLORS,
    HIT,
    INVENTED,
    MISSED,
    MIXED_UP,
    Panel,
    Row,
    _legend,
    draw_panels,
    render,
)
from distillfss_core.types import IGNORE


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 4000, (60, 80)).astype(np.uint16)


@pytest.fixture
def labels():
    labels = np.zeros((60, 80), np.uint8)
    labels[10:30, 10:40] = 1
    labels[40:50, 50:70] = 2
    return labels


def colors_of(picture) -> set[tuple[int, ...]]:
    return {tuple(int(v) for v in c) for c in np.unique(np.asarray(picture).reshape(-1, 3), axis=0)}


def test_a_sheet_is_written_with_room_for_all(tmp_path, image, labels):
    panels = [Panel(image), Panel(image, labels, "outline", caption="IoU 0.91"), None]
    draw_panels(
        [Row("plane 3", panels), Row("plane 7", panels)],
        tmp_path / "sheet.png",
        headers=["image", "student", "empty"],
        title="Nuclei",
        class_names=["nucleus", "debris"],
        width=100,
    )
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 300
        assert sheet.height > 150
        corners = [sheet.getpixel(p) for p in ((0, 0), (sheet.width - 1, sheet.height - 1))]
        assert corners == [(255, 255, 255)] * 2
        assert set(CLASS_COLORS[:2]) <= colors_of(sheet)


def test_a_picture_keeps_its_aspect(image):
    assert render(Panel(image), 160).size == (160, 120)


def test_outlines_leave_the_inside_as_it_was(image, labels):
    plain = np.asarray(render(Panel(image), 80))
    outlined = np.asarray(render(Panel(image, labels, "outline"), 80))
    assert (plain[15:25, 15:35] == outlined[15:25, 15:35]).all()
    assert tuple(outlined[10, 20]) == CLASS_COLORS[0]


def test_errors_are_colored_by_kind(labels):
    dark = np.zeros((60, 80), np.uint8)
    truth = labels.copy()
    truth[10:30, 10:20] = 0  # too much
    truth[0:5] = 1  # missed
    truth[40:50, 60:70] = 1  # wrong class
    truth[:, 79] = IGNORE
    picture = np.asarray(render(Panel(dark, labels, "errors", truth), 80)).astype(float)
    for (y, x), color in {(20, 15): INVENTED, (2, 40): MISSED, (45, 65): MIXED_UP, (20, 30): HIT}.items():
        cosine = picture[y, x] @ np.array(color) / np.linalg.norm(picture[y, x]) / np.linalg.norm(color)
        assert cosine > 0.999, (y, x)
    assert picture[20, 79].max() < 60


def test_the_legend_names_only_what_is_shown(image, labels):
    assert [k for k, _ in _legend([Panel(image, labels, "fill")], ["nucleus"])] == ["labels:", "nucleus", "class 2"]
    names = [k for k, _ in _legend([Panel(image, labels, "errors", labels)], [])]
    assert names == ["errors:", "right", "too much (false positive)", "missed (false negative)"]


def test_panels_that_do_not_fit_are_refused(tmp_path, image, labels):
    with pytest.raises(ImageError, match="needs labels"):
        Panel(image, style="fill")
    with pytest.raises(ImageError, match="truth"):
        Panel(image, labels, "errors")
    with pytest.raises(ImageError, match="wobbly"):
        Panel(image, labels, "wobbly")
    with pytest.raises(ImageError, match=r"\(60, 80\), its image is \(5, 5\)"):
        Panel(image[:5, :5], labels, "fill")
    with pytest.raises(ImageError, match="no panel"):
        draw_panels([], tmp_path / "x.png")


def test_color_and_many_channel_images_are_drawn(tmp_path, image):
    color = np.stack([image] * 3, -1)
    draw_panels([Row("", [Panel(color), Panel(color[..., :2])])], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0
