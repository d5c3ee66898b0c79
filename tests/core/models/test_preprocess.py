"""Intensity, channels and zoom."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distillfss_core.errors import ImageError, SettingsError
from distillfss_core.models.intensities import PERCENTILES
from distillfss_core.models.preprocess import Preprocess, fit_preprocess, parse_zoom, percentile_limits

RNG = np.random.default_rng(0)
GRAY = RNG.integers(100, 4000, (40, 50), dtype=np.uint16)


def _tensor(preprocess: Preprocess, image: np.ndarray) -> torch.Tensor:
    plane = preprocess.as_channels(image)
    return preprocess.to_tensor(plane, preprocess.limits(plane))


@given(
    seed=st.integers(0, 999),
    size=st.integers(1, 3000),
    dtype=st.sampled_from(["uint8", "int8", ">u2", "int16"]),
    spread=st.integers(1, 120),
    together=st.booleans(),
)
def test_limits_of_small_integers_are_those_of_the_same_numbers(seed, size, dtype, spread, together) -> None:
    """Small integers are counted, others are sorted."""
    low = 0 if dtype in ("uint8", ">u2") else -100
    pixels = np.random.default_rng(seed).integers(low, low + spread, (size, 2)).astype(dtype)
    found = percentile_limits(pixels, together=together)
    assert found == percentile_limits(pixels.astype(np.float64), together=together)
    expected = np.percentile(pixels.astype(np.float64), PERCENTILES, axis=None if together else 0)
    if (np.diff(expected, axis=0) > 1).all():
        np.testing.assert_array_equal(np.transpose([found.low, found.high]), np.broadcast_to(expected.T, (2, 2)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
def test_any_dtype_and_range_becomes_the_same_picture(dtype: str) -> None:
    picture = np.linspace(0, 250, 2000).reshape(40, 50).astype(np.uint8)
    image = picture.astype(dtype)
    expected = _tensor(fit_preprocess([picture]), picture)
    torch.testing.assert_close(_tensor(fit_preprocess([image]), image), expected)
    stretched = image.astype(np.float64) * 12.5 + 300
    torch.testing.assert_close(_tensor(fit_preprocess([stretched]), stretched), expected, atol=1e-5, rtol=0)


def test_bool_images_keep_their_two_values() -> None:
    image = np.zeros((8, 8), bool)
    image[2, 3] = True  # rarer than the percentile leaves room for
    x = _tensor(fit_preprocess([image]), image)
    assert x.unique().tolist() == [0.0, 1.0]
    assert x[0, 2, 3] == 1


def test_a_constant_image_becomes_black_not_nan() -> None:
    for value in (0, 7, 65535):
        image = np.full((5, 6), value, np.uint16)
        assert _tensor(fit_preprocess([image]), image).abs().max() == 0


def test_a_volume_keeps_its_support_limits_and_an_image_has_its_own() -> None:
    dark = GRAY // 4
    volume, image = fit_preprocess([GRAY], scope="volume"), fit_preprocess([GRAY], scope="image")
    assert float(_tensor(volume, dark).max()) < 0.3
    assert float(_tensor(image, dark).max()) == 1.0


def test_outliers_do_not_darken_the_rest() -> None:
    hot = GRAY.copy()
    hot[0, 0] = 65535
    assert percentile_limits(hot[..., None], together=False).high[0] < 4000


def test_gray_and_rgb_are_turned_into_one_another() -> None:
    rgb = np.repeat(GRAY[..., None], 3, -1)
    colored = rgb.copy()
    colored[..., 0] //= 2
    gray_model = fit_preprocess([GRAY])
    torch.testing.assert_close(_tensor(gray_model, rgb), _tensor(gray_model, GRAY))
    with pytest.raises(ImageError, match="3 channel"):
        gray_model.as_channels(colored, "photo.png")
    assert fit_preprocess([rgb]).channels == 3  # saved as RGB: color images may follow
    mixed = fit_preprocess([GRAY, colored])
    assert mixed.channels == 3
    assert _tensor(mixed, GRAY).shape == (3, 40, 50)


@pytest.mark.parametrize("channels", [2, 4, 5, 17])
def test_any_number_of_channels_becomes_three_in_a_way_that_is_stored(channels: int) -> None:
    image = RNG.integers(0, 255, (30, 30, channels), dtype=np.uint8)
    preprocess = fit_preprocess([image])
    again = Preprocess.from_json(json.loads(json.dumps(preprocess.to_json())))
    assert again == preprocess
    x = _tensor(again, image)
    assert x.shape == (3, 30, 30)
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    with pytest.raises(ImageError, match=f"made for {channels}"):
        again.as_channels(image[..., :1])


def test_images_of_different_kinds_are_refused() -> None:
    with pytest.raises(ImageError, match="different numbers of channels"):
        fit_preprocess([np.zeros((4, 4, 2)), np.zeros((4, 4, 5))])


@pytest.mark.parametrize("zoom", ["7", "nonsense", 0, "1/0", 1.37])
def test_zooms_that_are_not_on_offer_are_refused(zoom) -> None:
    with pytest.raises(SettingsError, match="zoom"):
        parse_zoom(zoom)


@pytest.mark.parametrize(("zoom", "expected"), [(2, 2), ("1/2", 0.5), (0.5, 0.5), ("1.5", 1.5), (1 / 3, 1 / 3)])
def test_zooms_are_read_in_any_notation(zoom, expected: float) -> None:
    assert float(parse_zoom(zoom)) == pytest.approx(expected)
