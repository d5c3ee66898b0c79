"""Which pictures a seed draws, and scribbles made of a truth."""

import numpy as np
import pytest

from distillfss_core.bench.datasets import SETS, Item, Split
from distillfss_core.bench.supports import (
    PUBLISHED,
    STROKES,
    draw_support,
    fingerprint,
    read_support,
    scribble,
    share_annotated,
    spread_tests,
)
from distillfss_core.errors import SettingsError
from distillfss_core.types import IGNORE, AnnotatedSlice
from layouts import write_isic, write_pairs
from pictures import blobs


def split_of(labels: list[np.ndarray], classes: int = 1) -> Split:
    def item(i: int) -> Item:
        slice_ = AnnotatedSlice(np.full(labels[i].shape, i, np.uint8), labels[i], f"p{i}")
        return Item(f"p{i:02d}", lambda: slice_)

    items = [item(i) for i in range(len(labels))]
    return Split([f"c{k}" for k in range(1, classes + 1)], items, items[:3])


def square(*values: int) -> np.ndarray:
    labels = np.zeros((32, 32), np.uint8)
    for i, value in enumerate(values):
        labels[4 + 10 * i : 12 + 10 * i, 8:24] = value
    return labels


def test_a_seed_draws_the_same_pictures_for_all(tmp_path):
    write_pairs(tmp_path)
    split = SETS["own"].open(tmp_path)
    first, again, other = (read_support(split, 3, seed) for seed in (0, 0, 1))
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    wanted = np.random.default_rng(0).choice(len(split.training), 3, replace=False)
    assert [s.source for s in first.slices] == [split.training[i].name for i in wanted]


def test_the_published_choice_is_uniform_over_the_sorted_names(tmp_path):
    write_pairs(tmp_path)
    split = SETS["own"].open(tmp_path)
    names = sorted(i.name for i in split.training)
    assert [i.name for i in draw_support(split, 3, PUBLISHED)] == [names[0], names[3], names[7]]


def test_each_listed_class_is_shown_as_often(tmp_path):
    write_isic(tmp_path)
    split = SETS["isic"].open(tmp_path)
    for seed in (0, 1, PUBLISHED):
        chosen = draw_support(split, 6, seed)
        assert sorted(i.shows for i in chosen) == [1, 1, 2, 2, 3, 3]
    with pytest.raises(SettingsError, match="3 classes"):
        draw_support(split, 2, 0)
    with pytest.raises(SettingsError, match="pictures of a kind"):
        draw_support(split, 60, 0)


def test_a_class_that_was_not_drawn_gets_a_picture():
    split = split_of([square(1)] * 19 + [square(1, 2)], classes=2)
    for seed in range(4):
        support = read_support(split, 3, seed)
        assert len(support) == 3
        assert len({s.source for s in support.slices}) == 3


def test_test_pictures_are_spread_evenly():
    split = split_of([square(1)] * 3)
    assert [i.name for i in spread_tests(split, 2)] == ["p00", "p02"]
    assert len(spread_tests(split, None)) == len(spread_tests(split, 9)) == 3


def test_a_scribble_is_thin_true_and_of_every_class():
    whole = blobs(0, 128, classes=2)
    drawn = scribble(whole, np.random.default_rng(0))
    known = drawn.labels != IGNORE
    np.testing.assert_array_equal(drawn.labels[known], whole.labels[known])
    assert set(np.unique(drawn.labels[known])) == {0, 1, 2}
    for value in (0, 1, 2):
        # a stroke is a walk of an eighth of the side; three pixels wide, a step adds at most five
        assert 0 < np.count_nonzero(drawn.labels == value) <= STROKES * (9 + 5 * (128 // 8 - 1))
    np.testing.assert_array_equal(drawn.labels, scribble(whole, np.random.default_rng(0)).labels)
    assert (drawn.labels != scribble(whole, np.random.default_rng(1)).labels).any()


def test_the_smallest_object_gets_a_stroke():
    labels = np.zeros((40, 40), np.uint8)
    labels[20, 20] = 1
    drawn = scribble(AnnotatedSlice(labels, labels, "dot"), np.random.default_rng(0))
    assert drawn.labels[20, 20] == 1
    assert np.count_nonzero(drawn.labels == 1) == 1


def test_scribbles_of_a_support_annotate_a_small_share(tmp_path):
    write_pairs(tmp_path, size=128)
    split = SETS["own"].open(tmp_path)
    dense, drawn = read_support(split, 3, 0), read_support(split, 3, 0, scribbled=True)
    assert share_annotated(dense) == 1
    assert 0.001 < share_annotated(drawn) < 0.1
    np.testing.assert_array_equal(dense.slices[0].image, drawn.slices[0].image)
