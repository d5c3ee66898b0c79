"""Presets of the training settings, from the fastest to the most thorough."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import distillfss_core as core

OWN = "own settings"
"""Stands for settings that are no preset."""

OTHER = "other"
"""Stands for a backbone that is no size of the student."""

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "probe": {"method": "probe"},
        "quick": {"steps": 80, "crops": 96},
        "default": {},
        "thorough": {"steps": 1200, "crops": 384, "cache_mb": 1200},
    }
)

EXPLAINED: Mapping[str, str] = MappingProxyType(
    {
        "probe": "A linear classifier of pixels, in seconds. Shows at once what the painted slices are worth.",
        "quick": "A first look: 80 steps, about a third of the time of default.",
        "default": "300 steps or more, by the number of slices. Suitable for most data.",
        "thorough": "1200 steps on twice as many crops. Gains the last percent; takes a night with large backbones.",
    }
)


def preset_of(changed: Mapping[str, Any]) -> str | None:
    """Name of the preset with these changes of the default settings, or None; any size of the student goes with it."""
    if size_of(changed.get("backbone", core.SIZES["balanced"])):
        changed = {name: value for name, value in changed.items() if name != "backbone"}
    return next((name for name, preset in PRESETS.items() if dict(preset) == changed), None)


def size_of(backbone: str) -> str | None:
    """Name of the size of students on a backbone, or None."""
    return next((name for name, own in core.SIZES.items() if own == backbone), None)
