"""One declaration of the settings serves validation, documentation and files."""

import json
from dataclasses import fields
from fractions import Fraction

import pytest

from distillfss_core import DistillSettings, SettingsError
from distillfss_core.settings import PretrainSettings, format_setting, parse_zoom


@pytest.mark.parametrize("kind", [DistillSettings, PretrainSettings])
def test_help_shows_every_setting(kind):
    for setting in fields(kind):
        assert f"    {setting.name} : {setting.type}, default {setting.default!r}\n" in kind.__doc__
        assert setting.metadata["help"] in kind.__doc__


def test_settings_come_back_from_json():
    settings = DistillSettings(zoom=Fraction(1, 2), invert_prob=0.25, validation_slice=None, steps=7)
    stored = json.loads(json.dumps(settings.to_json()))
    assert stored["zoom"] == "1/2"
    assert DistillSettings.from_json(stored) == settings
    assert settings.changed() == {"zoom": "1/2", "invert_prob": 0.25, "validation_slice": None, "steps": 7}
    assert DistillSettings().changed() == {}


def test_values_are_formatted_as_they_are_typed():
    assert [format_setting(value) for value in ("auto", None, Fraction(2, 3), 0.5)] == ["auto", "none", "2/3", "0.5"]


@pytest.mark.parametrize("zoom", ["x", "1/0", "nan", "7", "1e400"])
def test_a_zoom_that_is_not_on_offer_is_refused(zoom):
    with pytest.raises(SettingsError, match="choose one of 1/4, 1/3"):
        parse_zoom(zoom)
