"""Figures as sheets of panels with outlines, filled labels or error maps, by Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from distillfss_core.errors import ImageError
from distillfss_core.io.images import PathLike
from distillfss_core.io.writing import atomic_path
from distillfss_core.types import CLASS_COLORS, IGNORE, Array, Rgb, check_image

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

HIT, INVENTED, MISSED, MIXED_UP = (86, 180, 233), (213, 94, 0), (240, 228, 66), (204, 121, 167)
INK, FAINT = (25, 25, 25), (105, 105, 105)

STYLES = ("plain", "outline", "fill", "errors")

GAP, MARGIN = 12, 22


@dataclass(frozen=True, eq=False)
class Panel:
    """One image of a sheet.

    Parameters
    ----------
    image : array, shape (y, x) or (y, x, c)
        Stretched from its 0.5 to its 99.8 percentile; one or three channels are shown, of others the first.
    labels : uint8 array, shape (y, x), optional
        0 background, 1..K classes, IGNORE not annotated (hatched by "outline" and "fill").
    style : str
        "plain", "outline", "fill", or "errors" (needs ``truth``: right, too much, missed).
    truth : uint8 array, shape (y, x), optional
    caption : str
        A short line below the picture.

    Raises
    ------
    ImageError
        If shapes differ, or the style lacks its labels or truth.
    """

    image: Array
    labels: Array | None = None
    style: str = "plain"
    truth: Array | None = None
    caption: str = ""

    def __post_init__(self) -> None:
        check_image(self.image, "panel")
        if self.style not in STYLES:
            raise ImageError(f"there is no panel style {self.style!r}; choose one of: {', '.join(STYLES)}")
        if self.style != "plain" and self.labels is None:
            raise ImageError(f"a panel of style {self.style!r} needs labels")
        if self.style == "errors" and self.truth is None:
            raise ImageError("a panel of style 'errors' needs the truth to compare with")
        for name, array in (("labels", self.labels), ("truth", self.truth)):
            if array is not None and array.shape != self.image.shape[:2]:
                raise ImageError(f"a panel's {name} are {array.shape}, its image is {self.image.shape[:2]}")


@dataclass(frozen=True, eq=False)
class Row:
    """Panels side by side, with a name at the left; None leaves a place empty."""

    name: str
    panels: Sequence[Panel | None]


def draw_panels(
    rows: Sequence[Row],
    path: PathLike,
    *,
    headers: Sequence[str] = (),
    title: str = "",
    class_names: Sequence[str] = (),
    width: int = 280,
) -> None:
    """Draw rows of panels on one sheet and write it as PNG, whole or not at all.

    Parameters
    ----------
    rows : sequence of Row
    path : path
        Of the PNG.
    headers : sequence of str
        One a column.
    title : str
        A line at the top.
    class_names : sequence of str
        For the legend; by default "class 1" and so on.
    width : int
        Of one panel, in pixels.

    Raises
    ------
    ImageError
        If there is no panel.
    OutputError
        If the file cannot be written.
    """
    panels = [p for row in rows for p in row.panels if p is not None]
    if not panels:
        raise ImageError("there is no panel to draw")
    big, bold, text = _font(22), _font(16), _font(14)
    columns = max(len(row.panels) for row in rows)
    side = max((_wrapped_width(row.name, bold) for row in rows), default=0)
    left = MARGIN + (side + GAP if side else 0)
    total = left + columns * width + (columns - 1) * GAP + MARGIN
    keys = _legend(panels, class_names)

    top = MARGIN + (38 if title else 0)
    header_lines = [_wrap(h, bold, width) for h in headers]
    header_height = 21 * max((len(lines) for lines in header_lines), default=0)
    heights = [_row_height(row, width) for row in rows]
    captions = [19 * max((len(_wrap(p.caption, text, width)) for p in row.panels if p), default=0) for row in rows]
    legend_lines = _flow(keys, text, total - left - MARGIN)
    bottom = top + header_height + 6 + sum(heights) + sum(captions) + (GAP + 4) * len(rows)
    sheet = Image.new("RGB", (total, bottom + 26 * len(legend_lines) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)

    if title:
        draw.text((left, MARGIN - 4), title, INK, big)
    for column, lines in enumerate(header_lines[:columns]):
        for i, line in enumerate(lines):  # a short header stands on the pictures, not in the air
            y = top + header_height - 21 * (len(lines) - i)
            draw.text((left + column * (width + GAP), y), line, INK, bold)
    y = top + header_height + 6
    for row, height, caption_height in zip(rows, heights, captions, strict=True):
        for i, line in enumerate(_wrap(row.name, bold, 150)):
            draw.text((MARGIN, y + 2 + 21 * i), line, INK, bold)
        for column, panel in enumerate(row.panels):
            if panel is None:
                continue
            x = left + column * (width + GAP)
            picture = render(panel, width)
            sheet.paste(picture, (x, y))
            for i, line in enumerate(_wrap(panel.caption, text, width)):
                draw.text((x, y + picture.height + 3 + 19 * i), line, FAINT, text)
        y += height + caption_height + GAP + 4
    for entries in legend_lines:
        for offset, (name, color) in entries:
            if color is None:
                draw.text((left + offset, y + 1), name, FAINT, text)
                continue
            draw.rectangle((left + offset, y + 4, left + offset + 15, y + 17), color, (60, 60, 60))
            draw.text((left + offset + 22, y + 1), name, INK, text)
        y += 26
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def render(panel: Panel, width: int) -> Image.Image:
    """One panel as an RGB picture ``width`` pixels wide, its aspect kept."""
    size = (width, _height(panel, width))
    base = Image.fromarray(_to_rgb(panel.image))
    way = Image.Resampling.BICUBIC if base.width < width else Image.Resampling.LANCZOS
    picture = np.asarray(base.resize(size, way)).astype(np.float32)
    if panel.labels is not None and panel.style != "plain":
        labels = _fit(panel.labels, size)
        if panel.style == "errors" and panel.truth is not None:
            picture = _paint_errors(picture, labels, _fit(panel.truth, size))
        else:
            picture = _paint_labels(picture, labels, filled=panel.style == "fill")
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _paint_labels(picture: npt.NDArray[np.float32], labels: Array, filled: bool) -> npt.NDArray[np.float32]:
    picture = picture.copy()
    unknown = labels == IGNORE
    y, x = np.indices(labels.shape)
    picture[unknown & ((x + y) % 8 < 2)] *= 0.45
    for value in np.unique(labels[(labels != 0) & ~unknown]):
        color = np.array(_class_color(int(value)), np.float32)
        inside = labels == value
        if filled:
            picture[inside] = 0.5 * picture[inside] + 0.5 * color
        picture[_edge(inside)] = color
    return picture


def _paint_errors(picture: npt.NDArray[np.float32], labels: Array, truth: Array) -> npt.NDArray[np.float32]:
    picture = picture.copy() * 0.8
    annotated = truth != IGNORE
    on, real = (labels != 0) & annotated, (truth != 0) & annotated
    for where, color, strength in (
        (on & (labels == truth), HIT, 0.45),
        (on & ~real, INVENTED, 0.9),
        (real & ~on, MISSED, 0.9),
        (on & real & (labels != truth), MIXED_UP, 0.9),
    ):
        picture[where] = (1 - strength) * picture[where] + strength * np.array(color, np.float32)
    return picture


def _legend(panels: Sequence[Panel], class_names: Sequence[str]) -> list[tuple[str, Rgb | None]]:
    """Names and colors of what is on the sheet, in order; an entry without color heads those after it."""
    classes: set[int] = set()
    errors = mixed = False
    for panel in panels:
        if panel.style == "errors":
            errors = True
            mixed = mixed or _mixed_up(panel)
        elif panel.style != "plain" and panel.labels is not None:
            classes |= {int(v) for v in np.unique(panel.labels) if v not in (0, IGNORE)}
    keys: list[tuple[str, Rgb | None]] = [("labels:", None)] if classes else []
    for k in sorted(classes)[:12]:
        keys.append((class_names[k - 1] if k <= len(class_names) else f"class {k}", _class_color(k)))
    if errors:
        keys += [
            ("errors:", None),
            ("right", HIT),
            ("too much (false positive)", INVENTED),
            ("missed (false negative)", MISSED),
        ]
        keys += [("wrong class", MIXED_UP)] if mixed else []
    return keys


def _mixed_up(panel: Panel) -> bool:
    """Whether one class stands anywhere for another."""
    if panel.labels is None or panel.truth is None:
        return False
    both = (panel.labels != 0) & (panel.truth != 0) & (panel.truth != IGNORE)
    return bool((panel.labels[both] != panel.truth[both]).any())


def _class_color(value: int) -> Rgb:
    return CLASS_COLORS[(value - 1) % len(CLASS_COLORS)]


def _edge(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The outermost two pixels of a region."""
    core = inside
    for _ in range(2):
        padded = np.pad(core, 1, mode="edge")
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


def _to_rgb(image: Array) -> npt.NDArray[np.uint8]:
    """Stretch to 8 bits; gray becomes RGB."""
    values = image.astype(np.float32)
    if values.ndim == 3 and values.shape[2] != 3:
        values = values[..., 0]
    low, high = np.percentile(values, (0.5, 99.8))
    values = np.clip((values - low) / max(float(high - low), 1e-6), 0, 1)
    if values.ndim == 2:
        values = np.repeat(values[..., None] ** 0.75, 3, axis=2)  # dim structure of fluorescence stays visible
    return (values * 255).astype(np.uint8)


def _fit(labels: Array, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))


def _height(panel: Panel, width: int) -> int:
    result: int = max(1, round(width * panel.image.shape[0] / panel.image.shape[1]))
    return result


def _row_height(row: Row, width: int) -> int:
    return max((_height(p, width) for p in row.panels if p is not None), default=0)


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _wrap(text: str, font: Font, width: float) -> list[str]:
    """Lines of whole words that fit ``width``; a line break in the text stays one."""
    lines: list[str] = []
    for paragraph in text.split("\n") if text else []:
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        lines.append(line)
    return lines


def _wrapped_width(text: str, font: Font) -> int:
    return int(max((font.getlength(line) for line in _wrap(text, font, 150)), default=0)) + 1


def _flow(
    keys: Sequence[tuple[str, Rgb | None]], font: Font, width: float
) -> list[list[tuple[int, tuple[str, Rgb | None]]]]:
    """Legend entries with their offsets, in as many lines as they need."""
    lines: list[list[tuple[int, tuple[str, Rgb | None]]]] = []
    offset = 0
    for key in keys:
        need = int(font.getlength(key[0])) + (46 if key[1] else 12)
        if not lines or (offset + need > width and lines[-1]):
            lines.append([])
            offset = 0
        lines[-1].append((offset, key))
        offset += need
    return lines
