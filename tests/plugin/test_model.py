"""The card of a model in words."""

import pytest

from napari_distillfss._widgets.model import describe


def test_an_imported_model_is_described_by_its_checkpoint():
    card = {
        "classes": ["crop", "weed"],
        "created": "2026-11-29T07:00:00+00:00",
        "pixel_size_um": None,
        "backbone": {"name": "resnet50", "license": "that of the checkpoint"},
        "preprocess": {"zoom": "1", "scope": "volume"},
        "training": {"imported": {"layout": "DistillFSS", "file": "model.safetensors"}},
    }
    lines = describe(card).splitlines()
    assert lines[-1] == "imported: DistillFSS, from model.safetensors"
    assert lines[0] == "classes: crop, weed"


@pytest.mark.parametrize(
    ("method", "steps", "line"),
    [
        ("joint", 600, "trained: teacher and model together, 600 steps in 46 s on cpu, 5 slices"),
        ("probe", 0, "trained: linear classifier, in 46 s on cpu, 5 slices"),
    ],
)
def test_a_trained_model_is_described_in_words(method, steps, line):
    training = {"method": method, "steps": steps, "seconds": 46, "device": "cpu", "support": ["plane 1"] * 5}
    card = {
        "classes": ["nucleus"],
        "created": "2026-11-29T07:00:00+00:00",
        "pixel_size_um": None,
        "backbone": {"name": "dinov3", "license": "MIT"},
        "preprocess": {"zoom": "1", "scope": "volume"},
        "training": training,
    }
    assert line in describe(card).splitlines()
