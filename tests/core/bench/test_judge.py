"""Scores of the benchmark, beside plain ways to compute them."""

import math

import numpy as np
import pytest

from distillfss_core.bench.judge import TOLERANCE, Judge, at_side, boundary_f1
from distillfss_core.types import IGNORE


def slow_boundary(mask: np.ndarray) -> list[tuple[int, int]]:
    h, w = mask.shape
    found = []
    for y, x in np.argwhere(mask):
        near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        if any(0 <= a < h and 0 <= b < w and not mask[a, b] for a, b in near):
            found.append((int(y), int(x)))
    return found


def slow_f1(found: np.ndarray, truth: np.ndarray) -> float:
    f, t = slow_boundary(found), slow_boundary(truth)
    reach = TOLERANCE * math.hypot(*truth.shape)

    def share(these, those):
        return np.mean([min(math.dist(p, q) for q in those) <= reach for p in these])

    precision, recall = share(f, t), share(t, f)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(20, 24), (150, 130)])
def test_the_f1_of_boundaries_is_that_of_its_definition(seed, size):
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(2):
        mask = np.zeros(size, bool)
        for _ in range(3):
            y, x = (rng.integers(0, n - 6) for n in size)
            mask[y : y + rng.integers(3, 12), x : x + rng.integers(3, 12)] = True
        masks.append(mask)
    assert boundary_f1(*masks) == pytest.approx(slow_f1(*masks))
    assert boundary_f1(masks[0], masks[0]) == 1


def test_a_shift_within_the_tolerance_costs_nothing():
    truth = np.zeros((300, 400), bool)  # diagonal 500: 3.75 pixels
    truth[100:200, 100:200] = True
    assert boundary_f1(np.roll(truth, 2, (0, 1)), truth) == 1
    assert boundary_f1(np.roll(truth, 30, (0, 1)), truth) < 0.2


def test_empty_and_full_masks():
    empty, full = np.zeros((8, 8), bool), np.ones((8, 8), bool)
    assert math.isnan(boundary_f1(empty, empty))
    assert boundary_f1(empty, full) == boundary_f1(full, empty) == 0
    assert boundary_f1(full, full) == 1


def test_pixels_without_truth_count_nowhere():
    truth = np.zeros((40, 40), np.uint8)
    truth[10:20, 10:20] = 1
    hidden = truth.copy()
    hidden[25:] = IGNORE
    wrong = truth.copy()
    wrong[30:36, 30:36] = 1
    judge = Judge(1)
    judge.add(wrong, hidden)
    found = judge.accuracy()
    assert (found.pooled, found.dice, found.boundary) == (1, 1, 1)


def test_pooled_and_mean_differ_as_they_should():
    small, large = np.zeros((2, 40, 40), np.uint8)
    small[:2, :2], large[:20] = 1, 1
    judge = Judge(1)
    judge.add(np.zeros_like(small), small)  # missed
    judge.add(large, large)
    found = judge.accuracy()
    assert found.images == 2
    assert found.pooled == pytest.approx(800 / 804, abs=1e-4)
    assert found.mean == found.boundary == 0.5
    assert found.dice == pytest.approx(1600 / 1604, abs=1e-4)


def test_a_class_that_occurs_nowhere_counts_in_no_mean():
    labels = np.zeros((30, 30), np.uint8)
    labels[5:20, 5:20] = 1
    judge = Judge(2)
    judge.add(labels, labels)
    found = judge.accuracy()
    assert (found.pooled, found.mean, found.boundary) == (1, 1, 1)
    assert math.isnan(found.by_class[1])


def test_scores_are_taken_at_the_protocols_size():
    labels = np.zeros((96, 48), np.uint8)
    labels[:48] = 2
    assert at_side(labels, 24).shape == (24, 24)
    assert (at_side(labels, 24)[:12] == 2).all()
    assert at_side(labels, None) is labels
