"""The support set checks itself."""

from __future__ import annotations

import numpy as np
import pytest

from distillfss_core.errors import DistillFSSError, ImageError, SettingsError, SupportSetError
from distillfss_core.support.support_set import SupportSet, check_pixel_size, load_support
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
        ([_slice(1)], ("background",), "'background', which stands for label 0"),
        ([_slice(1)], "nucleus", r"'nucleus' are one text.*\['nucleus'\]"),
    ],
)
def test_a_bad_support_set_says_what_is_wrong(slices, names, message: str) -> None:
    with pytest.raises(SupportSetError, match=message) as caught:
        SupportSet(slices, names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0.5, (0, -3), (-1, 1), (0.5,), (1, float("inf")), (1, "x")])
def test_a_pixel_size_that_is_not_possible_is_named(size) -> None:
    with pytest.raises(SupportSetError, match=r"pixel size .*not possible; give height and width") as caught:
        check_pixel_size(size)
    assert repr(size) in str(caught.value)


def test_options_that_are_not_possible_are_named_before_anything_is_read(tmp_path) -> None:
    with pytest.raises(SupportSetError, match="pixel size"):
        load_support(tmp_path / "i.tif", tmp_path / "l.tif", pixel_size=(0, -3))
    with pytest.raises(SupportSetError, match="pixel size"):
        SupportSet([_slice(1)], pixel_size=(0, -3))
    with pytest.raises(SupportSetError, match="'ab' are one text"):
        load_support(tmp_path / "i.tif", tmp_path / "l.tif", classes="ab")


def test_planes_outside_the_region_are_refused(tmp_path) -> None:
    labels = np.zeros((6, 8, 8), np.uint8)
    labels[1:5, :4] = 1
    np.save(tmp_path / "i.npy", labels * 9)
    np.save(tmp_path / "l.npy", labels)
    region = ((1, 3), (None, None), (0, 6))
    support = load_support(tmp_path / "i.npy", tmp_path / "l.npy", planes=[2], region=region)
    assert [s.source for s in support.slices] == ["i.npy plane 2"]
    assert support.slices[0].image.shape == (8, 6)
    assert len(load_support(tmp_path / "i.npy", tmp_path / "l.npy", region=region)) == 2
    with pytest.raises(SettingsError, match=r"plane 3 is outside the region of i.npy, whose planes are 1 to 2"):
        load_support(tmp_path / "i.npy", tmp_path / "l.npy", planes=[2, 3], region=region)


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
