"""What is written here is read by libraries that are not ours, with the same labels, scale and classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from distillfss_core.labelstore import layout as label_layout
from distillfss_core.objects.instances import label_instances
from distillfss_core.segmentation.to_zarr import segment_to_zarr
from distillfss_core.volumes.volume import open_volume
from pictures import blobs
from volumes import write_ome_zarr

TILE = 96
STACK = np.stack([blobs(seed, 200).image for seed in range(5)])
KINDS = ("standalone", "inside", "instances")


@pytest.fixture(scope="module")
def written(plain_student, tmp_path_factory) -> dict[str, Path]:
    """Labels beside an image and inside it, and numbered objects; sharded, three levels (as many as the image has)."""
    folder = tmp_path_factory.mktemp("written")
    image = write_ome_zarr(folder / "image.ome.zarr", STACK, scale=(2.0, 0.5, 0.5), levels=3)
    paths = {
        "standalone": folder / "labels.ome.zarr",
        "inside": image / "labels" / "blob",
        "instances": folder / "objects.ome.zarr",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_layout, "_SIDE", 96)
        patch.setattr(label_layout, "_SHARD", 2 * 96 * 96)
        patch.setattr(label_layout, "_SMALLEST", 60)
        for kind in ("standalone", "inside"):
            segment_to_zarr(open_volume(image), plain_student, paths[kind], tile=TILE)
        label_instances(open_volume(paths["standalone"]), paths["instances"], block=(2, 64, 64))
    assert all(labels_of(path).any() for path in paths.values())
    return paths


def labels_of(path: Path, level: int = 0) -> np.ndarray:
    return zarr.open_array(path / str(level), mode="r")[...]


@pytest.mark.parametrize("kind", KINDS)
def test_tensorstore_reads_every_level(written, kind):
    tensorstore = pytest.importorskip("tensorstore", reason="needs tensorstore: pip install tensorstore")
    for level in range(3):
        kvstore = {"driver": "file", "path": str(written[kind] / str(level))}
        theirs = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
        assert np.array_equal(theirs.read().result(), labels_of(written[kind], level))


@pytest.mark.parametrize("kind", KINDS)
def test_ome_zarr_models_takes_it_for_a_label_image(written, kind):
    models = pytest.importorskip("ome_zarr_models", reason="needs ome-zarr-models: pip install ome-zarr-models")
    found = models.open_ome_zarr(zarr.open_group(written[kind], mode="r"))
    assert type(found).__name__ == "ImageLabel"
    assert found.ome_zarr_version == "0.5"
    image = models.open_ome_zarr(zarr.open_group(written["inside"].parents[1], mode="r"))
    assert image.ome_zarr_version == "0.5"


@pytest.mark.parametrize("kind", KINDS)
def test_ngff_zarr_validates_it(written, kind):
    ngff_zarr = pytest.importorskip("ngff_zarr", reason="needs ngff-zarr: pip install 'ngff-zarr[validate]'")
    pytest.importorskip("jsonschema", reason="needs jsonschema: pip install 'ngff-zarr[validate]'")
    found = ngff_zarr.from_ngff_zarr(str(written[kind]), validate=True)
    assert [image.scale for image in found.images] == [
        {"z": 2.0, "y": 0.5, "x": 0.5},
        {"z": 2.0, "y": 1.0, "x": 1.0},
        {"z": 2.0, "y": 2.0, "x": 2.0},
    ]
    assert found.images[1].translation == {"z": 0.0, "y": 0.25, "x": 0.25}
    assert np.array_equal(np.asarray(found.images[0].data), labels_of(written[kind]))


def test_ome_zarr_py_finds_image_and_labels(written):
    reader = pytest.importorskip("ome_zarr.reader", reason="needs ome-zarr: pip install ome-zarr")
    from ome_zarr.io import parse_url

    nodes = list(reader.Reader(parse_url(written["inside"].parents[1]))())
    labels = next(node for node in nodes if node.zarr.basename() == "blob")
    assert [np.asarray(level).shape for level in labels.data] == [(5, 200, 200), (5, 100, 100), (5, 50, 50)]
    assert np.array_equal(np.asarray(labels.data[0]), labels_of(written["inside"]))
    assert labels.metadata["properties"] == {0: {"class": "background"}, 1: {"class": "blob"}}
    assert set(labels.metadata["color"]) == {0, 1}
    nodes = list(reader.Reader(parse_url(written["standalone"]))())  # with the image that it names as its source
    alone = next(node for node in nodes if node.zarr.basename() == written["standalone"].name)
    assert np.array_equal(np.asarray(alone.data[0]), labels_of(written["standalone"]))


@pytest.mark.parametrize("kind", KINDS)
def test_napari_ome_zarr_opens_it_as_labels(written, kind):
    plugin = pytest.importorskip("napari_ome_zarr", reason="needs napari-ome-zarr: pip install napari-ome-zarr")
    path = str(written[kind].parents[1] if kind == "inside" else written[kind])
    layers = plugin.napari_get_reader(path)(path)
    data, about, layer = next(found for found in layers if found[2] == "labels")
    assert layer == "labels"
    assert np.array_equal(np.asarray(data[0]), labels_of(written[kind]))
    assert list(about["scale"])[-3:] == [2.0, 0.5, 0.5]
