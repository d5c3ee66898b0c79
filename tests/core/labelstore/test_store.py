"""How labels are laid out on disk, and made coarser."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import zarr

from distillfss_core.errors import SettingsError
from distillfss_core.labelstore.layout import Layout, plan_blocks, plan_layout, slices
from distillfss_core.labelstore.metadata import Description
from distillfss_core.labelstore.pyramid import coarsen_labels
from distillfss_core.labelstore.store import LabelStore


def test_coarsening_takes_the_majority_and_fills_the_ends():
    labels = np.array([[[1, 1, 0], [1, 0, 0], [2, 2, 5]]], np.uint8)
    assert coarsen_labels(labels, (1, 2, 2)).tolist() == [[[1, 0], [2, 5]]]
    assert coarsen_labels(labels, (1, 2, 2), majority=False).tolist() == [[[1, 0], [2, 5]]]


@pytest.mark.parametrize("step", [(1, 2, 2), (2, 2, 2)])
def test_labels_of_one_class_are_coarsened_as_those_of_several(step):
    labels = np.random.default_rng(0).integers(0, 2, (3, 21, 30), np.uint8)
    several = coarsen_labels(np.concatenate([labels, np.full_like(labels[:2], 2)]), step)
    whole = labels.shape[0] // step[0]
    assert np.array_equal(coarsen_labels(labels, step)[:whole], several[:whole])
    assert coarsen_labels(labels, step).dtype == np.uint8


def test_shards_are_made_of_whole_tiles_and_levels_halve_where_the_scale_allows():
    layout = plan_layout((1000, 5000, 3000), (1024, 1024), (2.0, 0.5, 0.5))
    assert layout.shard == (8, 1024, 1024)
    assert layout.chunk == (4, 512, 512)
    assert layout.factors[:4] == ((1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 8, 8))
    assert max(layout.shapes[-1][1:]) <= 512
    assert plan_layout((7, 60, 60), (64, 64)).shard == (8, 64, 64)
    for region in (layout.whole(0), ((3, 17), (1023, 1025), (0, 3000)), ((0, 8), (0, 1024), (0, 1024))):
        assert layout.count(0, region) == len(list(layout.shards(0, region)))
    assert plan_layout((7, 9000, 9000), (736, 736)).shard[1:] == (736, 736)
    assert plan_layout((99, 9000, 9000), (1536, 1536)).shard == (2, 1536, 1536)
    assert plan_layout((99, 9000, 9000), (1536, 1536), growth=2.5).shard == (8, 1536, 1536)
    boxes = [layout.box(0, at) for at in layout.shards(0, ((0, 1000), (0, 5000), (0, 3000)))]
    assert sum(np.prod([b - a for a, b in box]) for box in boxes) == 1000 * 5000 * 3000


def begin(path, layout: Layout) -> LabelStore:
    about = Description(path.name, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), "micrometer", ("blob",), {})
    return LabelStore(path, layout, about, {}, resume=False)


def test_planes_that_become_one_are_in_one_shard(tmp_path, monkeypatch):
    """Large tiles fill a shard by one plane; the second plane of two was written over the first."""
    for name, small in (("_SHARD", 32 * 32), ("_SIDE", 32), ("_SMALLEST", 16)):
        monkeypatch.setattr(f"distillfss_core.labelstore.layout.{name}", small)
    assert plan_layout((5, 60, 60), (32, 32)).shard == (1, 32, 32)  # z is not halved
    assert plan_layout((5, 60, 60), (32, 32), (2.5, 1.0, 1.0)).shard == (2, 32, 32)  # z is halved last
    layout = plan_layout((5, 60, 60), (32, 32), (1.0, 1.0, 1.0))
    labels = np.random.default_rng(0).integers(0, 3, layout.shapes[0], np.uint8)
    store = begin(tmp_path / "a.ome.zarr", layout)
    for at in layout.shards(0, layout.whole(0)):
        box = layout.box(0, at)
        store.note(0, at, [box], store.write(0, box, labels[slices(box)]))
    for level in range(1, len(layout.shapes)):
        for at in layout.shards(level, layout.whole(level)):
            store.coarsen(level, at)
        labels = coarsen_labels(labels, layout.step(level))
        assert np.array_equal(store.arrays[level][...], labels)
    store.close()


def test_a_shard_without_labels_has_no_file_until_it_had_some(tmp_path, monkeypatch):
    for name, small in (("_SHARD", 32 * 32), ("_SIDE", 32), ("_SMALLEST", 16)):
        monkeypatch.setattr(f"distillfss_core.labelstore.layout.{name}", small)
    layout = plan_layout((1, 64, 32), (32, 32))
    upper, lower = (layout.box(0, (0, y, 0)) for y in (0, 1))
    corner = np.zeros((1, 32, 32), np.uint8)
    corner[0, :3, :3] = 1  # other chunks of the shard are empty
    store = begin(tmp_path / "labels.ome.zarr", layout)
    assert store.write(0, upper, np.zeros_like(corner)) == ""
    assert not store.file(0, (0, 0, 0)).exists()
    digests = [store.write(0, lower, labels) for labels in (corner, np.zeros_like(corner), corner)]
    store.close()
    assert digests[0] == digests[2] != digests[1] != ""
    labels = zarr.open_array(tmp_path / "labels.ome.zarr" / "0", mode="r")[:]
    assert (int(labels.sum()), int(labels[0, 32:35, :3].sum())) == (9, 9)


@pytest.mark.parametrize("shard", [(3, 64, 64), (2, 63, 64), (2, 64, 63), (0, 64, 64), (2, -2, 64)])
def test_shards_of_odd_sides_are_refused_where_levels_halve_them(shard):
    with pytest.raises(SettingsError, match="give even numbers"):
        plan_blocks((6, 640, 640), shard, (1, 1, 1), (1.0, 1.0, 1.0), dtype="uint8")
    if shard[0] == 3:
        assert plan_blocks((6, 640, 640), shard, (1, 1, 1), dtype="uint8").factors[1] == (1, 2, 2)


def _list_itself(path, barrier) -> None:
    barrier.wait()
    begin(path, Layout(((1, 8, 8),), ((1, 1, 1),), (1, 8, 8), (1, 8, 8))).close()


def test_labels_that_begin_at_once_in_one_image_are_all_listed(tmp_path):
    image = zarr.create_group(tmp_path / "image.ome.zarr", zarr_format=3)
    image.create_group("labels").attrs.put({"ome": {"version": "0.5", "labels": ["old"], "more": 1}, "other": 2})
    forked = multiprocessing.get_context("fork")
    for turn in range(3):
        barrier = forked.Barrier(4)
        paths = [tmp_path / "image.ome.zarr" / "labels" / f"{turn}{k}" for k in range(4)]
        runs = [forked.Process(target=_list_itself, args=(path, barrier)) for path in paths]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        listed = zarr.open_group(tmp_path / "image.ome.zarr" / "labels", mode="r").attrs.asdict()
        assert {path.name for path in paths} <= set(listed["ome"]["labels"])
    assert listed["ome"]["labels"][0] == "old"
    assert (listed["ome"]["more"], listed["other"]) == (1, 2)
