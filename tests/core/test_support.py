"""The support set checks itself, and planes are suggested by the published rule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distillfss_core.errors import DistillFSSError, ImageError, SupportSetError
from distillfss_core.support import SupportSet, suggest_planes
from distillfss_core.types import IGNORE, LabelledSlice

IMAGE = np.arange(64, dtype=np.uint8).reshape(8, 8)


def _slice(*values: int) -> LabelledSlice:
    labels = np.zeros((8, 8), np.uint8)
    labels.ravel()[: len(values)] = values
    return LabelledSlice(IMAGE, labels, "plane 3")


def test_the_published_choice_of_support_images(shared: Path) -> None:
    published = json.loads((shared / "parity" / "hierarchical_uniform_sampling.json").read_text())
    assert len(published) >= 10
    for key, expected in published.items():
        last, count = (int(n) for n in key.split(","))
        assert suggest_planes(last + 1, count) == expected


def test_fewer_suggestions_are_part_of_more() -> None:
    for count in range(1, 20):
        assert set(suggest_planes(20, count)) < set(suggest_planes(20, count + 1)) or count == 20


@pytest.mark.parametrize("count", [0, 21])
def test_impossible_suggestions_are_refused(count: int) -> None:
    with pytest.raises(SupportSetError, match=f"{count} of 20"):
        suggest_planes(20, count)


@pytest.mark.parametrize(
    ("slices", "names", "message"),
    [
        ([], ("a",), "empty"),
        ([_slice()], ("nuclei",), "no slice has a pixel of class 'nuclei'"),
        ([_slice(1)], ("a", "debris"), "'debris'"),
        ([_slice(1, 2)], ("a",), "label 2 has no class name"),
        ([_slice(*[IGNORE] * 64)], ("a",), "plane 3: nothing is annotated"),
        ([_slice(*[1] * 64)], ("a",), "background"),
        ([_slice(1)], ("a", "a"), "differ"),
    ],
)
def test_a_bad_support_set_says_what_is_wrong(slices, names, message: str) -> None:
    with pytest.raises(SupportSetError, match=message) as caught:
        SupportSet(slices, names)
    assert "\n" not in str(caught.value)


def test_shares_ignore_what_is_not_annotated() -> None:
    support = SupportSet((_slice(1, 1, *[IGNORE] * 54),))
    np.testing.assert_allclose(support.shares(), [0.8, 0.2])


@pytest.mark.parametrize(
    ("image", "labels", "message"),
    [
        (np.zeros((4, 5)), np.zeros((5, 4), np.uint8), "4 x 5.*5 x 4"),
        (np.full((2, 2), np.nan), np.zeros((2, 2), np.uint8), "4 of 4 pixels are NaN"),
        (np.zeros((0, 3)), np.zeros((0, 3), np.uint8), "empty"),
        (np.zeros((2, 2)), np.zeros((2, 2), np.int64), "int64"),
        (np.zeros((2, 2, 2, 2)), np.zeros((2, 2), np.uint8), "shape"),
        (np.zeros((2, 2), complex), np.zeros((2, 2), np.uint8), "complex"),
    ],
)
def test_a_bad_slice_says_what_is_wrong(image, labels, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        LabelledSlice(image, labels)
    assert isinstance(caught.value, DistillFSSError)
