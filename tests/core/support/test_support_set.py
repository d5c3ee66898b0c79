"""The support set checks itself."""

from __future__ import annotations

import numpy as np
import pytest

from distillfss_core.errors import DistillFSSError, ImageError, SupportSetError
from distillfss_core.support.support_set import SupportSet
from distillfss_core.types import IGNORE, AnnotatedSlice

IMAGE = np.arange(64, dtype=np.uint8).reshape(8, 8)


def _slice(*values: int) -> AnnotatedSlice:
    labels = np.zeros((8, 8), np.uint8)
    labels.ravel()[: len(values)] = values
    return AnnotatedSlice(IMAGE, labels, "plane 3")


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
        AnnotatedSlice(image, labels)
    assert isinstance(caught.value, DistillFSSError)
