"""Colors of texts and curves that can be read in napari's dark and light themes."""

from __future__ import annotations

from dataclasses import dataclass

from qtpy.QtGui import QColor


@dataclass(frozen=True)
class Tone:
    """A color in two forms ("#rrggbb"): for dark and for light backgrounds."""

    on_dark: str
    on_light: str

    def on(self, background: QColor) -> QColor:
        """The form that has more contrast with a background."""
        forms = (QColor(self.on_dark), QColor(self.on_light))
        return max(forms, key=lambda color: contrast(color, background))


ERROR = Tone("#ff8f87", "#a51d17")
ERROR_IN_LIST = Tone("#ffd9d6", "#85120d")  # napari's lists lie on gray
MUTED_IN_LIST = Tone("#dfe2e6", "#3f4247")
LOSS = Tone("#4dbbd5", "#005f78")
IOU = Tone("#f39b7f", "#97380f")


def contrast(first: QColor, second: QColor) -> float:
    """Contrast of two colors, 1 to 21, as defined by WCAG 2 (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio)."""
    darker, lighter = sorted((_luminance(first), _luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: QColor) -> float:
    red, green, blue = (_linear(part) for part in (color.redF(), color.greenF(), color.blueF()))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
