"""Robust limits, and the comparison of an input with the support, on arrays alone."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from distillfss_core.models.preprocess import Limits, Preprocess, fit_preprocess, percentile_limits
from distillfss_core.samples import generate_sample
from pictures import soft_balls

STACK, TRUTH = soft_balls()
VOLUME = fit_preprocess(list(STACK[::2]), scope="volume", objects=list(TRUTH[::2] > 0))
PICTURES = fit_preprocess(list(STACK), scope="image", objects=list(TRUTH > 0))
Y, X = np.mgrid[:128, :128]
DISK = (Y - 30) ** 2 + (X - 100) ** 2 < 12**2  # 2.7 % of the area


def _limits(preprocess: Preprocess, image: np.ndarray) -> tuple[float, float]:
    limits = preprocess.limits(preprocess.as_channels(image))
    return limits.low[0], limits.high[0]


@pytest.mark.parametrize(
    ("gain", "offset", "dtype"),
    [
        (1 / 65535, 0, "f4"),
        (0.1, 0, "u2"),
        (0.5, 0, "u2"),
        (2, 0, "u2"),
        (16, 0, "u2"),
        (16, 0, ">u2"),
        (1, 2000, "u2"),
        (1, -5000, "i2"),
        (1, -5000, "f8"),
        (0.09, 3, "u1"),
        (1000, 1e6, "i4"),
    ],
)
def test_limits_follow_a_linear_map(gain: float, offset: float, dtype: str) -> None:
    stack = (STACK.astype(float) * gain + offset).astype(dtype)
    matched, warning = VOLUME.matched_to(stack, "stack")
    span = gain * (VOLUME.fitted.high[0] - VOLUME.fitted.low[0])
    assert warning == ""
    assert matched.fitted.low[0] == pytest.approx(gain * VOLUME.fitted.low[0] + offset, abs=0.02 * span)
    assert matched.fitted.high[0] == pytest.approx(gain * VOLUME.fitted.high[0] + offset, abs=0.02 * span)


@pytest.mark.parametrize(("offset", "dtype"), [(90, "u2"), (300, "u2"), (90, "f4"), (-90, "i4"), (-90.5, "f8")])
def test_limits_follow_a_small_offset_of_all_gray_values(offset: float, dtype: str) -> None:
    matched, warning = VOLUME.matched_to((STACK.astype(float) + offset).astype(dtype), "stack")
    assert warning == ""
    assert matched.fitted.low[0] == pytest.approx(VOLUME.fitted.low[0] + offset, abs=5)
    assert matched.fitted.high[0] == pytest.approx(VOLUME.fitted.high[0] + offset, abs=5)


@pytest.mark.parametrize("kind", ["objects", "ground", "drift", "single plane", "within the scatter of planes"])
def test_what_is_no_offset_of_all_gray_values_keeps_the_limits(kind: str) -> None:
    """Brighter objects, a brighter ground or one brighter plane are content; planes of a volume differ by a little."""
    stack = STACK.copy()
    if kind == "objects":
        stack[TRUTH > 0] += 300
    elif kind == "ground":
        stack[TRUTH == 0] += 120
    elif kind == "drift":
        stack = stack + np.linspace(0, 300, len(stack)).astype(np.uint16)[:, None, None]
    elif kind == "single plane":
        stack = stack[:1] + 90
    else:
        stack = stack + 60
    assert VOLUME.matched_to(stack, "stack", is_plane=kind == "single plane") == (VOLUME, "")


@pytest.mark.parametrize("balls", [0, 3, 9, 30, 50])
@pytest.mark.parametrize("padded", [False, True])
def test_another_part_of_the_specimen_keeps_the_limits(balls: int, padded: bool) -> None:
    other, _ = soft_balls(seed=7, balls=balls)
    if padded:
        other = np.pad(other, ((0, 0), (0, 100), (0, 0)))
    assert VOLUME.matched_to(other, "other") == (VOLUME, "")


def test_each_plane_of_the_volume_keeps_the_limits() -> None:
    for plane in STACK:
        assert VOLUME.matched_to(plane[None], "plane") == (VOLUME, "")


def test_a_range_that_no_map_explains_is_stretched_with_a_warning_that_names_both() -> None:
    sparse = (np.clip(soft_balls(seed=7, balls=3)[0] / 2500, 0, 1) * 255).astype(np.uint8)
    matched, warning = VOLUME.matched_to(sparse, "sparse.tif")
    assert warning.startswith("sparse.tif: its intensities (uint8, 4 to 228)")
    assert "(uint16, 4" in warning
    assert "distill with slices of this kind" in warning
    assert "\n" not in warning
    assert matched.fitted == percentile_limits(sparse.reshape(-1, 1), together=False)


@pytest.mark.parametrize("kind", ["nuclei", "mitochondria"])
def test_inverted_contrast_is_named(kind: str) -> None:
    sample = generate_sample(kind, planes=6, size=128)
    preprocess = fit_preprocess(list(sample.image[::2]), scope="volume", objects=list(sample.labels[::2] > 0))
    inverted = np.iinfo(sample.image.dtype).max - sample.image
    assert preprocess.matched_to(sample.image, "same")[1] == ""
    assert "contrast seems to be inverted" in preprocess.matched_to(inverted, "inverted")[1]


def test_the_inverted_contrast_of_single_pictures_is_named_too() -> None:
    for plane in STACK:
        assert PICTURES.matched_to(plane[None], "plane") == (PICTURES, "")
        assert PICTURES.matched_to(plane[None] // 16, "plane") == (PICTURES, "")
    assert "inverted" in PICTURES.matched_to(4095 - STACK, "inverted")[1]


def test_hounsfield_units_keep_their_limits_and_anything_else_is_named() -> None:
    sample = generate_sample("nodules", planes=6, size=128)
    preprocess = fit_preprocess(list(sample.image[::2]), scope="volume", objects=list(sample.labels[::2] > 0))
    assert preprocess.intensities is not None
    assert preprocess.intensities.absolute
    soft_tissue, contrast = np.clip(sample.image, -150, None), np.where(sample.labels > 0, 300, sample.image)
    for same in (sample.image, sample.image.astype(np.float32), soft_tissue, contrast.astype(np.int16)):
        assert preprocess.matched_to(same, "ct") == (preprocess, "")
    for other in (sample.image + 1024, (sample.image + 1024) / 4096, sample.image.astype(np.float32) / 1000):
        matched, warning = preprocess.matched_to(other, "ct")
        assert matched == preprocess
        assert "no Hounsfield units" in warning


def test_a_signed_tomogram_is_no_ct() -> None:
    tomogram = np.random.default_rng(0).normal(0, 300, (2, 100, 100)).astype(np.int16)
    intensities = fit_preprocess(list(tomogram), scope="volume").intensities
    assert intensities is not None
    assert not intensities.absolute


@pytest.mark.parametrize("value", [0, 4095, 65535])
@pytest.mark.parametrize("kind", ["disk", "bar", "scattered", "soft"])
def test_dust_takes_no_limit(kind: str, value: int) -> None:
    plane = STACK[1].astype(float)
    if kind == "disk":
        plane[DISK] = value
    elif kind == "bar":
        plane[-14:-8, 60:120] = value
    elif kind == "scattered":
        plane[np.random.default_rng(0).random(plane.shape) < 0.03] = value
    else:
        bell = np.exp(-((Y - 64) ** 2 + (X - 64) ** 2) / 2 / 4**2)  # 2 % of it is brighter than the balls
        plane = np.maximum(plane, bell * value)
    low, high = _limits(PICTURES, STACK[1])
    dirty_low, dirty_high = _limits(PICTURES, plane.astype(np.uint16))
    slack = 0.35 if kind == "soft" else 0.05
    assert dirty_low == pytest.approx(low, abs=0.05 * (high - low))
    assert dirty_high == pytest.approx(high, abs=slack * (high - low))


def test_dust_in_a_support_slice_takes_no_limit_but_objects_do() -> None:
    dusty = list(STACK.copy())
    dusty[0][DISK] = 65535
    labels = [plane > 0 for plane in TRUTH]
    clean = fit_preprocess(list(STACK), scope="volume", objects=labels).fitted
    assert fit_preprocess(dusty, scope="volume", objects=labels).fitted.high[0] == pytest.approx(
        clean.high[0], rel=0.02
    )
    assert _limits(fit_preprocess(dusty, objects=labels), dusty[0])[1] == pytest.approx(clean.high[0], rel=0.1)
    objects = [DISK] + [np.zeros_like(DISK)] * 5  # the bright disk is what is looked for
    assert fit_preprocess(dusty[:1], objects=objects[:1]).fitted.high[0] == 65535


def test_rare_bright_objects_are_no_dust() -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(200, 20, (128, 128))
    plane[DISK] = rng.normal(2000, 20, int(DISK.sum()))
    image = plane.astype(np.uint16)
    preprocess = fit_preprocess([image], objects=[DISK])
    assert _limits(preprocess, image)[1] > 1900
    assert _limits(PICTURES, image)[1] > 1900


def test_a_clean_picture_has_the_percentiles_as_limits() -> None:
    for plane in STACK:
        assert PICTURES.limits(plane[..., None]) == percentile_limits(plane[..., None], together=False)


def test_students_without_intensities_on_their_card_compare_nothing() -> None:
    older = replace(VOLUME, intensities=None)
    assert "intensities" not in older.to_json()
    assert Preprocess.from_json(json.loads(json.dumps(older.to_json()))) == older
    assert older.matched_to(STACK // 16, "dark") == (older, "")
    dirty = STACK[1].copy()
    dirty[DISK] = 65535
    assert _limits(replace(PICTURES, intensities=None), dirty)[1] == 65535  # as ever


def test_the_card_holds_type_and_quantiles() -> None:
    again = Preprocess.from_json(json.loads(json.dumps(VOLUME.to_json())))
    assert again == VOLUME
    assert again.intensities is not None
    assert again.intensities.dtype == "uint16"
    assert again.intensities.quantiles[0][23] == np.median(STACK[::2])
    assert again.intensities.quantiles[0][1] == VOLUME.fitted.low[0]


def test_channels_in_another_order_are_named() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.normal((60, 120, 180), 15, (3, 64, 64, 3)).clip(0, 255).astype(np.uint8)
    preprocess = fit_preprocess(list(rgb))
    assert preprocess.matched_to(rgb, "rgb") == (preprocess, "")
    assert "another order (2, 1, 0)" in preprocess.matched_to(rgb[..., ::-1], "bgr")[1]
    pair = fit_preprocess(list(rgb[..., :2]), scope="volume")
    assert "another order (1, 0)" in pair.matched_to(rgb[..., 1::-1], "pair")[1]


def test_each_channel_has_its_own_map() -> None:
    rng = np.random.default_rng(0)
    pair = np.stack([STACK, rng.gamma(2, 100, STACK.shape) + 500], -1).astype(np.uint16)
    preprocess = fit_preprocess(list(pair[::2]), scope="volume")
    changed = (pair * np.array([4, 1]) + np.array([0, 3000])).astype(np.uint16)
    matched, warning = preprocess.matched_to(changed, "pair")
    (low, low2), (high, high2) = preprocess.fitted.low, preprocess.fitted.high
    assert warning == ""
    assert matched.fitted.low == pytest.approx((4 * low, low2 + 3000), rel=0.1)
    assert matched.fitted.high == pytest.approx((4 * high, high2 + 3000), rel=0.03)


def test_an_empty_or_constant_input_keeps_the_limits() -> None:
    for image in (np.zeros((1, 20, 20), np.uint16), np.full((1, 20, 20), 255, np.uint8), np.zeros((0, 1, 1), "u2")):
        assert VOLUME.matched_to(image, "constant") == (VOLUME, "")
    broken = np.where(STACK > 2000, np.nan, STACK / 65535)
    assert isinstance(VOLUME.matched_to(broken, "nan")[0].fitted, Limits)


def test_a_scale_bar_at_the_brightest_value_of_dim_pictures_takes_no_limit() -> None:
    dim = (STACK // 40).astype(np.uint8)  # 0 to 60
    dim[0, 5, 5] = 255  # a hot pixel of the camera
    preprocess = fit_preprocess(list(dim), objects=list(TRUTH > 0))
    marked = dim[1].copy()
    marked[-14:-8, 60:120] = 255
    assert _limits(preprocess, marked)[1] == pytest.approx(_limits(preprocess, dim[1])[1], abs=2)


def test_saturated_objects_that_were_annotated_stay_bright() -> None:
    image = np.random.default_rng(0).normal(40, 5, (128, 128)).astype(np.uint8)
    image[DISK] = 255
    preprocess = fit_preprocess([image], objects=[DISK])
    assert _limits(preprocess, image)[1] == 255
    assert _limits(fit_preprocess([image], objects=[~DISK]), image)[1] < 60


def test_color_keeps_its_hue_beside_a_scale_bar() -> None:
    rgb = np.random.default_rng(0).normal((60, 120, 150), 15, (2, 128, 128, 3)).clip(0, 255).astype(np.uint8)
    preprocess = fit_preprocess(list(rgb), objects=[DISK, DISK])
    marked = rgb[1].copy()
    marked[-14:-8, 60:120] = 255
    clean, limits = preprocess.limits(rgb[1]), preprocess.limits(marked)
    assert clean.high[0] < 200
    assert limits.high == pytest.approx(clean.high, abs=2)
    assert len(set(limits.high)) == len(set(limits.low)) == 1


def test_few_gray_values_are_named() -> None:
    assert "take few of the steps" in VOLUME.matched_to((STACK // 400).astype(np.uint8), "dark")[1]
    assert VOLUME.matched_to((STACK // 100).astype(np.uint8), "dim")[1] == ""


def test_a_matched_input_is_compared_on_its_own_scale_from_then_on() -> None:
    eight = (np.clip(STACK / 2500, 0, 1) * 255).astype(np.uint8)
    matched, _ = VOLUME.matched_to(eight, "stack")
    empty = np.random.default_rng(0).normal(20, 6, (1, 128, 128)).clip(0, 255).astype(np.uint8)
    assert matched.matched_to(empty, "empty plane") == (matched, "")
    assert matched.intensities is not None
    assert matched.intensities.dtype == "uint8"


def test_a_dim_plane_of_the_specimen_keeps_the_limits_but_a_volume_on_half_the_scale_does_not() -> None:
    sample = generate_sample(planes=8, size=96)
    support = generate_sample(planes=2, size=96)
    preprocess = fit_preprocess(list(support.image), scope="volume", objects=list(support.labels > 0))
    for plane in sample.image:
        assert preprocess.matched_to(plane[None], "plane", is_plane=True) == (preprocess, "")
    assert preprocess.matched_to(sample.image, "stack") == (preprocess, "")
    half, warning = preprocess.matched_to(sample.image // 2, "stack")
    assert warning == ""
    assert half.fitted.high[0] == pytest.approx(preprocess.fitted.high[0] / 2, rel=0.15)


def test_a_support_of_very_many_slices_of_several_types() -> None:
    many = [STACK[0, :16, :16], *[STACK[0, :16, :16].astype(np.int32)] * 99]
    intensities = fit_preprocess(many).intensities
    assert intensities is not None
    assert intensities.dtype == "int32"


@pytest.mark.parametrize("value", [0, 7, 5000])
def test_an_image_of_one_value_is_compared_without_a_warning(value: int) -> None:
    matched, warning = PICTURES.matched_to(np.full((1, 64, 64), value, np.uint16), "blank", is_plane=True)
    assert (matched, warning) == (PICTURES, "")


def test_a_channel_of_one_value_keeps_the_limits_of_the_support() -> None:
    support = np.stack([STACK[0], STACK[1][::-1]], -1)
    preprocess = fit_preprocess([support], scope="volume")
    blank = support.copy()
    blank[..., 1] = 0
    matched, _ = preprocess.matched_to(blank[None], "blank", is_plane=True)
    assert matched.fitted == preprocess.fitted
