"""Image of generated tasks: one row for each family, several tasks in a row, the object outlined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from distillfss_core.metatraining.synthetic import FAMILIES, synthetic_task
from distillfss_core.metatraining.task import U8

OUTLINE = (255, 210, 0)
MARGIN = 14
"""Height of a row's caption, and the space between two tasks, in pixels."""


def gallery(
    path: str | Path,
    *,
    seed: int = 0,
    rows: Sequence[str] | None = None,
    tasks: int = 3,
    tile: int = 128,
    size: int = 256,
) -> None:
    """Write a PNG of generated tasks: two images of each, plain and with the object outlined.

    Parameters
    ----------
    path : str or Path
        The file to write.
    seed : int
        Which tasks are shown.
    rows : sequence of str, optional
        Families, one a row; all of them by default.
    tasks : int
        Tasks a row.
    tile : int
        Width of an image in the picture, pixels.
    size : int
        Width of an image as generated, pixels.
    """
    families = tuple(FAMILIES) if rows is None else tuple(rows)
    wide, high = 4 * tile + MARGIN, tile + MARGIN
    sheet = Image.new("RGB", (tasks * wide - MARGIN, len(families) * high), "white")
    draw = ImageDraw.Draw(sheet)
    for row, family in enumerate(families):
        draw.text((2, row * high + 1), family, fill="black")
        for column in range(tasks):
            task = synthetic_task((seed, row, column), n_images=3, size=size, family=family)
            shown = [i for i in range(3) if task.labels[i].any()][:2]
            for place, i in enumerate(shown):
                left, top = column * wide + 2 * place * tile, row * high + MARGIN
                for k, pixels in enumerate((task.images[i], _outlined(task.images[i], task.labels[i]))):
                    small = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.BOX)
                    sheet.paste(small, (left + k * tile, top))
    sheet.quantize(160, dither=Image.Dither.NONE).save(path, optimize=True)


def _outlined(image: U8, labels: U8) -> U8:
    """The picture (y x 3) with what is labeled tinted and a line round it: a line alone does not tell the sides."""
    inside = labels == 1
    line = ndimage.binary_dilation(inside, iterations=1) & ~ndimage.binary_erosion(inside, iterations=1, border_value=1)
    out = image.copy()
    out[inside] = np.rint(0.78 * image[inside] + 0.22 * np.array(OUTLINE)).astype(np.uint8)
    out[line] = np.array(OUTLINE, np.uint8)
    return out
