"""How labels are laid out on disk, and made coarser."""

from __future__ import annotations

import numpy as np
import pytest

from distillfss_core.labelstore.layout import plan_layout
from distillfss_core.labelstore.pyramid import coarsen_labels


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
