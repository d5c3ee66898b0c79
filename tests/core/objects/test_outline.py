"""Outlines of objects are proposed around clicks and strokes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from distillfss_core import generate_sample, propose_object
from distillfss_core.errors import ImageError, SettingsError
from distillfss_core.objects.outline import _IMPOSSIBLE, _closed_paths, _own_part, _Window, _window

SIDE = 160


def ellipse(center: tuple[float, float], radii: tuple[float, float], shape: tuple[int, int] = (SIDE, SIDE)):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return ((y - center[0]) / radii[0]) ** 2 + ((x - center[1]) / radii[1]) ** 2 < 1


def blurred(mask: np.ndarray, seed: int = 0, noise: float = 4.0) -> np.ndarray:
    """Intensities 100 on 40, blurred, with noise, as whole numbers."""
    image = ndimage.gaussian_filter(40 + 60 * mask.astype(float), 1.0)
    return np.rint(image + np.random.default_rng(seed).normal(0, noise, mask.shape)).astype(np.uint16)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def is_connected(mask: np.ndarray) -> bool:
    return ndimage.label(mask, np.ones((3, 3)))[1] == 1


def click(y: float, x: float) -> np.ndarray:
    return np.array([[y, x]], float)


@pytest.mark.parametrize("radius", [4, 8, 15, 30])
def test_a_click_outlines_objects_of_any_size(radius: int) -> None:
    truth = ellipse((80, 76), (radius, radius))
    proposal = propose_object(blurred(truth), [click(81, 75)])
    assert iou(proposal.mask, truth) > 0.9
    (y0, y1), (x0, x1) = proposal.box
    assert proposal.mask[y0:y1, x0:x1].sum() == proposal.mask.sum()
    assert proposal.mask[[y0, y1 - 1]].any(1).all()
    assert proposal.mask[:, [x0, x1 - 1]].any(0).all()


def test_a_stroke_gives_size_and_direction_of_a_long_object() -> None:
    truth = ellipse((80, 80), (12, 45))
    assert iou(propose_object(blurred(truth), [np.array([[81.0, 38.0], [79.0, 121.0]])]).mask, truth) > 0.9


def test_the_size_of_a_stroke_chooses_between_an_object_and_what_is_in_it() -> None:
    outer, inner = ellipse((80, 80), (40, 40)), ellipse((80, 80), (12, 12))
    image = blurred(outer) + 60 * inner.astype(np.uint16)
    assert iou(propose_object(image, [np.array([[80.0, 42.0], [80.0, 118.0]])]).mask, outer) > 0.9
    assert iou(propose_object(image, [np.array([[80.0, 69.0], [80.0, 91.0]])]).mask, inner) > 0.9


def test_a_small_object_in_an_object_is_found_by_a_click_on_it() -> None:
    inner = ellipse((80, 80), (10, 10))
    image = blurred(ellipse((80, 80), (40, 40))) + 60 * inner.astype(np.uint16)
    assert iou(propose_object(image, [click(80, 80)]).mask, inner) > 0.9


def test_dark_objects_are_outlined_as_bright_ones_are() -> None:
    image = blurred(ellipse((80, 80), (14, 14)))
    bright = propose_object(image, [click(80, 80)]).mask
    assert np.array_equal(propose_object(1000 - image, [click(80, 80)]).mask, bright)


def test_of_colors_the_mixture_that_tells_the_object_apart_is_used() -> None:
    truth = ellipse((80, 80), (14, 14))
    rng = np.random.default_rng(0)
    common = ndimage.gaussian_filter(rng.normal(0, 60, (SIDE, SIDE)), 2)  # stronger than the contrast in any channel
    noise = rng.normal(0, 2, (SIDE, SIDE, 3))
    image = np.stack([common + 12 * truth, common - 12 * truth, common], -1) + noise
    assert iou(propose_object(image, [click(80, 80)]).mask, truth) > 0.85
    assert iou(propose_object(image[..., 0], [click(80, 80)]).mask, truth) < 0.85


def test_touching_objects_are_separated_by_what_is_annotated_already() -> None:
    left, right = ellipse((80, 66), (15, 15)), ellipse((80, 94), (15, 15))
    image = blurred(left | right)
    mask = propose_object(image, [click(80, 93)], taken=left).mask
    assert not (mask & left).any()
    assert iou(mask, right & ~left) > 0.85


def test_evidence_decides_where_the_image_does_not() -> None:
    truth = ellipse((80, 80), (16, 16))
    image = np.random.default_rng(0).normal(0, 1, (SIDE, SIDE))
    evidence = np.where(truth, 0.9, 0.1)
    assert iou(propose_object(image, [click(80, 80)]).mask, truth) < 0.6
    assert iou(propose_object(image, [click(80, 80)], evidence=evidence).mask, truth) > 0.9


def test_a_neighbor_in_a_contour_is_cut_off_where_it_is_less_likely_between_them() -> None:
    first, second = ellipse((80, 60), (20, 20)), ellipse((80, 96), (20, 20))
    both = first | second

    def part(stroke: np.ndarray, between: float | None) -> np.ndarray:
        evidence = np.where(both, 0.9, 0.1)
        if between is not None:
            evidence[:, 75:82] = np.where(both[:, 75:82], between, 0.1)
        near = _window([stroke], both.shape)
        window = _Window.of(both * 100.0, near, [stroke], [], None, evidence)
        result = np.zeros_like(both)
        result[near] = _own_part(window, both[near])
        return result

    for center, truth in ((60, first), (96, second)):
        assert iou(part(click(80, center), 0.6), truth) > 0.95
        assert iou(part(click(80, center), None), both) == 1
        assert iou(part(click(80, center), 0.85), both) == 1
    assert iou(part(np.array([[80.0, 45.0], [80.0, 110.0]]), 0.6), both) == 1  # the stroke lies in both


def test_more_clicks_extend_the_object_and_clicks_outside_take_away() -> None:
    body, arm = ellipse((80, 60), (15, 15)), ellipse((80, 84), (4, 16))
    image = blurred(body | arm)
    without = propose_object(image, [click(80, 60)], outside=[click(80, 86)]).mask
    with_arm = propose_object(image, [click(80, 60), click(80, 97)]).mask
    assert (with_arm & arm & ~body).sum() > 2 * (without & arm & ~body).sum()
    assert iou(without, body) > 0.85


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(45, 115), st.integers(45, 115)), min_size=1, max_size=4, unique=True),
    st.lists(st.tuples(st.integers(40, 120), st.integers(40, 120)), max_size=4, unique=True),
    st.integers(0, 3),
)
def test_the_mask_is_connected_holds_all_points_inside_and_none_outside(inside, outside, seed) -> None:
    outside = [point for point in outside if min(np.hypot(*np.subtract(point, p)) for p in inside) > 1.5]
    image = blurred(ellipse((80, 80), (25, 18)), seed)
    mask = propose_object(image, [click(*p) for p in inside], outside=[click(*p) for p in outside]).mask
    assert all(mask[point] for point in inside)
    assert not any(mask[point] for point in outside)
    assert is_connected(mask)


@settings(max_examples=10, deadline=None)
@given(st.integers(-20, 20), st.integers(-20, 20), st.booleans())
def test_a_shifted_image_gives_the_shifted_mask(dy, dx, is_stroke) -> None:
    image = blurred(ellipse((200, 200), (14, 20), (400, 400)))
    stroke = np.array([[200.0, 184.0], [201.0, 215.0]]) if is_stroke else click(201, 198)
    mask = propose_object(image, [stroke]).mask
    moved = propose_object(np.roll(image, (dy, dx), (0, 1)), [stroke + np.array([dy, dx])]).mask
    assert np.array_equal(np.roll(mask, (dy, dx), (0, 1)), moved)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([np.uint8, np.int16, np.uint16, np.float32, np.float64]), st.sampled_from([1, 2]), st.integers(0, 9)
)
def test_dtype_scale_and_offset_do_not_matter(dtype, scale, offset) -> None:
    image = blurred(ellipse((80, 80), (14, 18)))
    mask = propose_object(image, [click(80, 80)]).mask
    assert np.array_equal(propose_object((image * scale + offset).astype(dtype), [click(80, 80)]).mask, mask)


def test_any_linear_map_gives_nearly_the_same_mask() -> None:
    image = blurred(ellipse((80, 80), (14, 18)))
    mask = propose_object(image, [click(80, 80)]).mask
    assert iou(propose_object(image * 0.37 - 11.3, [click(80, 80)]).mask, mask) > 0.98


def test_an_object_at_the_border_of_the_image_is_outlined() -> None:
    truth = ellipse((2, 80), (15, 15))
    mask = propose_object(blurred(truth), [click(3, 80)]).mask
    assert mask[0, 80]
    assert iou(mask, truth) > 0.7


@pytest.mark.parametrize("kind", ["mitochondria", "nodules"])
def test_strokes_along_the_objects_of_samples_give_them(kind: str) -> None:
    sample = generate_sample(kind, planes=3, size=256)
    image, labels = sample.image[1], sample.labels[1]
    scores = []
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        truth = labels == number
        if box is None or truth.sum() < 30:
            continue
        rows, columns = np.nonzero(truth)
        _, _, axes = np.linalg.svd(np.stack([rows, columns], -1) - (rows.mean(), columns.mean()), full_matrices=False)
        half = 1.8 * np.std((np.stack([rows, columns], -1) - (rows.mean(), columns.mean())) @ axes[0])
        ends = np.array([[rows.mean(), columns.mean()]]) + np.array([[-half], [half]]) * axes[0]
        scores.append(iou(propose_object(image, [np.clip(ends, 0, 255)]).mask, truth))
    assert len(scores) >= 3
    assert np.median(scores) > 0.85


def test_closed_paths_are_the_best_of_all() -> None:
    """Compared with the enumeration of all closed paths over few rays."""
    from itertools import product

    rng = np.random.default_rng(1)
    gains = rng.normal(size=(3, 6, 4))
    gains[:, :, 0] = _IMPOSSIBLE

    def value(gain: np.ndarray, path: tuple[int, ...]) -> float:
        turns = np.abs(np.diff([*path, path[0]]))
        return -np.inf if turns.max() > 1 else gain[np.arange(6), list(path)].sum() - 0.05 * turns.sum()

    for gain, path in zip(gains, _closed_paths(gains), strict=True):
        best = max(value(gain, p) for p in product(range(1, 4), repeat=6))
        assert value(gain, tuple(path)) == pytest.approx(best, abs=0.3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"inside": []}, SettingsError, "no point"),
        ({"inside": [np.zeros((0, 2))]}, SettingsError, "shape"),
        ({"inside": [click(500, 3)]}, SettingsError, "outside of the image"),
        ({"outside": [click(80, 80)]}, SettingsError, "both inside and outside"),
        ({"image": np.full((SIDE, SIDE), 7)}, ImageError, "one value"),
        ({"image": np.zeros(5)}, ImageError, "axes y x"),
        ({"image": np.full((SIDE, SIDE), np.nan)}, ImageError, "NaN"),
        ({"taken": np.zeros((3, 3), bool)}, ImageError, "taken has shape"),
        ({"evidence": np.zeros((3, 3))}, ImageError, "evidence has shape"),
        ({"evidence": np.full((SIDE, SIDE), 2.0)}, ImageError, "probabilities"),
    ],
)
def test_what_cannot_be_used_is_one_line(change, error, words) -> None:
    arguments = {"image": blurred(ellipse((80, 80), (9, 9))), "inside": [click(80, 80)], **change}
    with pytest.raises(error, match=words) as caught:
        propose_object(arguments.pop("image"), arguments.pop("inside"), **arguments)
    assert "\n" not in str(caught.value)


def test_a_point_that_is_walled_in_is_an_error() -> None:
    image = blurred(ellipse((80, 80), (20, 20)))
    ring = [np.array([[70, 90], [70, 98], [78, 98], [78, 90], [70, 90]], float)]
    with pytest.raises(SettingsError, match="cut off"):
        propose_object(image, [click(80, 80), click(74, 94)], outside=ring)


@pytest.mark.parametrize("radii", [(6, 6), (30, 30), (12, 45), (70, 20)])
def test_a_box_outlines_the_object_that_fills_it(radii: tuple[int, int]) -> None:
    truth = ellipse((80, 76), radii)
    box = tuple((middle - r - 1, middle + r + 2) for middle, r in zip((80, 76), radii, strict=True))
    assert iou(propose_object(blurred(truth), [], box=box).mask, truth) > 0.9


def test_a_box_chooses_between_an_object_and_what_is_in_it() -> None:
    outer, inner = ellipse((80, 80), (40, 40)), ellipse((80, 80), (12, 12))
    image = blurred(outer) + 60 * inner.astype(np.uint16)
    assert iou(propose_object(image, [], box=((39, 122), (39, 122))).mask, outer) > 0.9
    assert iou(propose_object(image, [], box=((66, 95), (66, 95))).mask, inner) > 0.9


def test_nothing_outside_of_a_box_is_of_the_object_and_points_are_heeded() -> None:
    truth = ellipse((80, 60), (20, 20)) | ellipse((80, 95), (20, 20))  # they touch
    box = ((59, 102), (39, 82))
    mask = propose_object(blurred(truth), [click(80, 60)], box=box, outside=[click(80, 78)]).mask
    assert not mask[:, 82:].any()
    assert mask[80, 60]
    assert not mask[80, 78]
    assert iou(mask, ellipse((80, 60), (20, 20))) > 0.85


@pytest.mark.parametrize(
    ("box", "words"),
    [
        (((10, 12), (10, 40)), "2 rows; draw one of at least 3 pixels"),
        (((10, 30), (150, 161)), "columns 150 to 161, but the image has 160"),
        (((30, 10), (10, 40)), "rows 30 to 10"),
    ],
)
def test_a_box_that_cannot_be_is_named(box, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        propose_object(blurred(ellipse((80, 80), (9, 9))), [], box=box)


def test_a_point_inside_that_lies_beyond_the_box_is_named() -> None:
    with pytest.raises(SettingsError, match="both inside and outside"):
        propose_object(blurred(ellipse((80, 80), (9, 9))), [click(80, 95)], box=((70, 91), (70, 91)))


@pytest.mark.parametrize("angle", [30, 45, 120])
def test_a_long_object_may_lie_across_its_box(angle: int) -> None:
    truth = ndimage.rotate(ellipse((80, 80), (12, 45)).astype(float), angle, reshape=False, order=1) > 0.5
    rows, columns = (np.flatnonzero(truth.any(axis)) for axis in (1, 0))
    box = ((int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1))
    assert iou(propose_object(blurred(truth), [], box=box).mask, truth) > 0.85
