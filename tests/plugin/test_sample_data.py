"""What the plugin offers napari."""

import numpy as np
import pytest

from napari_distillfss._sample_data import make_mitochondria, make_nodules, make_nuclei


def test_the_manifest_is_valid_and_its_functions_exist(root):
    npe2 = pytest.importorskip("npe2", reason="needs npe2 (extra 'dev')")
    manifest = npe2.PluginManifest.from_file(root / "src" / "napari_distillfss" / "napari.yaml")
    manifest.validate_imports()
    assert manifest.name == "napari-distillfss"
    assert [s.key for s in manifest.contributions.sample_data] == ["nuclei", "mitochondria", "nodules"]


def test_the_manifest_at_the_root_is_the_one_in_the_package(root):
    in_package = root / "src" / "napari_distillfss" / "napari.yaml"
    assert (root / "napari.yaml").read_text() == in_package.read_text()


@pytest.mark.parametrize("make", [make_nuclei, make_mitochondria, make_nodules])
def test_a_sample_is_an_image_and_its_labels_in_one_place(make):
    (image, image_meta, image_type), (labels, labels_meta, labels_type) = make()
    assert (image_type, labels_type) == ("image", "labels")
    assert image.shape == labels.shape
    assert image.ndim == 3
    assert np.issubdtype(labels.dtype, np.integer)
    assert (image_meta["scale"], image_meta["units"]) == (labels_meta["scale"], labels_meta["units"])
    assert image_meta["name"] != labels_meta["name"]
    assert labels_meta["name"] == f"{image_meta['name']} (ground truth)"
    assert image_meta["axis_labels"] == ("z", "y", "x")
    assert image_meta["units"][0] in ("micrometer", "nanometer", "millimeter")
    assert labels_meta["visible"] is False
