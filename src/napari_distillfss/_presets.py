"""Presets of the training settings."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import distillfss_core as core

OWN = "own settings"
"""Stands for settings that are no preset."""

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "probe": {"method": "probe"},
        "quick": {"steps": 80, "crops": 96},
        "default": {},
        "fast model": {"backbone": core.SIZES["fast"]},
        "thorough": {"steps": 1200, "crops": 384, "cache_mb": 1200},
    }
)

EXPLAINED: Mapping[str, str] = MappingProxyType(
    {
        "probe": "A linear classifier of pixels, in seconds. Shows at once what the painted slices are worth.",
        "quick": "A first look: 80 steps, about a third of the time of default.",
        "default": "300 steps or more, by the number of slices. Suitable for most data.",
        "fast model": "As default, for a model that is about 2.4 times as fast, and less exact on some images.",
        "thorough": "1200 steps on twice as many crops. Gains the last percent; takes a night with large backbones.",
    }
)


def preset_of(changed: Mapping[str, Any]) -> str | None:
    """Name of the preset with these changes of the default settings, or None."""
    return next((name for name, preset in PRESETS.items() if dict(preset) == changed), None)
