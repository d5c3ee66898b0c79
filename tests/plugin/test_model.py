"""The card of a model in words."""

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
