"""Text for sizes, times, shares and the cost of work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime

import numpy as np

from napari_distillfss._annotations import BACKGROUND, FIRST_CLASS, PaintedSlice
from napari_distillfss._layers import ChosenVolume

_BLOCK = 1 << 23  # voxels that the engine works on at a time, about
_FIXED = 900 << 20  # libraries and a backbone


def sentence(text: str) -> str:
    """The text with a capital letter, unless it begins with the name of a file, as in "stack.tif: ..."."""
    first = text.partition(" ")[0]
    return text[:1].upper() + text[1:] if first.rstrip(",").isalpha() and ": " not in text.partition("\n")[0] else text


def size(count: float, digits: int = 3) -> str:
    """Bytes: "3.2 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.{digits}g} {unit}"
        count /= 1000
    return f"{count:.{digits}g} TB"


def running(what: str) -> str:
    """Why no job can be started while another runs."""
    return f"{what} is running; cancel it, or wait until it has ended"


def count(number: int, what: str) -> str:
    """A number of things: "1 piece", "2 pieces"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def lengths(*micrometers: float) -> str:
    """Lengths in one unit of suitable size: "8 × 8 nm", "0.5 × 0.5 µm", "2.5 mm"."""
    unit, factor = "µm", 1.0
    if max(micrometers) < 0.1:
        unit, factor = "nm", 1e3
    elif min(micrometers) >= 100:
        unit, factor = "mm", 1e-3
    return " × ".join(f"{factor * length:.3g}" for length in micrometers) + f" {unit}"


def duration(seconds: float) -> str:
    """An approximate waiting time."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def moment(when: datetime) -> str:
    """A time of today, or of another day: "14:32", "2026-11-28 14:32"."""
    return f"{when:%H:%M}" if when.date() == datetime.now(when.tzinfo).date() else f"{when:%Y-%m-%d %H:%M}"


def share(value: float) -> str:
    """A share in percent; a share above zero is never "0 %"."""
    return "0 %" if not value else "<1 %" if value < 0.01 else f"{100 * value:.0f} %"


def volume(chosen: ChosenVolume) -> str:
    """Size, axes, pixel size and memory of a volume, one line each."""
    v = chosen.volume
    extent = " × ".join(f"{n:,}".replace(",", " ") for n in v.shape)
    lead = "".join(f", {name} {chosen.lead[letter]}" for letter, name in (("t", "time"), ("c", "channel"))
                   if letter in chosen.lead)  # fmt: skip
    lines = [f"{extent} voxels ({' '.join(v.axes)}{lead}), {v.dtype}"]
    z, y, x = v.scale
    if v.unit and y and x:
        along = f", planes every {lengths(z)}" if z and chosen.planes > 1 else ""
        lines.append(f"pixel {lengths(y, x)}{along}")
    elif y:
        lines.append(f"pixel {y:.3g} × {x:.3g}, no unit: set the layer's units")
    else:
        lines.append("no pixel size: set the layer's scale and units")
    whole = float(np.prod(v.shape, dtype=float)) * v.dtype.itemsize
    lines.append(f"{size(whole)} in all; work needs about {size(working_memory(chosen), 2)} of memory")
    return "\n".join(lines)


def working_memory(chosen: ChosenVolume, cache_mb: int = 600) -> float:
    """Estimated peak memory of training and segmentation, bytes."""
    v = chosen.volume
    voxels = min(float(np.prod(v.shape, dtype=float)), 4.0 * _BLOCK)
    result: float = _FIXED + max(cache_mb << 20, voxels * (v.dtype.itemsize + 1))
    return result


def painted(slice_: PaintedSlice, class_names: tuple[str, ...], source: str = "") -> str:
    """The labeled share of a plane, of a source where it is another volume, and the shares of its classes in it."""
    head = f"{source}{', ' if source else ''}plane {slice_.plane}: {share(slice_.annotated)} labeled"
    shares = [share(slice_.share(FIRST_CLASS + k)) for k in range(len(class_names))]
    if len(class_names) == 1:
        return f"{head}\n{shares[0]} of the labeled pixels are {class_names[0]}"
    parts = [f"{part} {name}" for part, name in zip(shares, class_names, strict=True)]
    return f"{head}\nof the labeled pixels: {', '.join(parts)}"


def total(slices: Sequence[tuple[PaintedSlice, tuple[str, ...]]]) -> str:
    """Number of slices, the labeled share of their pixels, and the pixels of background and each class, by its name.

    Parameters
    ----------
    slices : sequence of (PaintedSlice, names of its classes)
    """
    pixels: dict[str, int] = {}
    for slice_, names in slices:
        for label, name in enumerate(("background", *names), BACKGROUND):
            pixels[name] = pixels.get(name, 0) + int(slice_.counts[label])
    labeled = sum(pixels.values()) / max(1, sum(int(slice_.counts.sum()) for slice_, _ in slices))
    each = ", ".join(f"{name} {short(number)}" for name, number in pixels.items())
    return f"{count(len(slices), 'slice')}, {share(labeled)} labeled; pixels: {each}"


def short(number: int) -> str:
    """A count in few characters: "940", "12 k", "1.2 M"."""
    if number < 1000:
        return str(number)
    unit, value = ("k", number / 1e3) if number < 999_500 else ("M", number / 1e6)
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


class Pace:
    """Estimates the remaining time of a job from its last steps.

    Parameters
    ----------
    clock : function
        Seconds, always rising.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._seen = clock, [(0, clock())]

    def left(self, index: int, total: int) -> float:
        """Seconds until ``total`` after ``index`` steps; NaN before the pace is known."""
        self._seen = [*self._seen[-19:], (index, self._clock())]
        (first, begun), (last, now) = self._seen[0], self._seen[-1]
        return (now - begun) / (last - first) * (total - last) if last > first else math.nan
