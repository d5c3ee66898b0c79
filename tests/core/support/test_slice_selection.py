"""Planes are suggested by the published rule, or by how they differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distillfss_core.errors import SupportSetError
from distillfss_core.support.slice_selection import (
    LOOKED_AT,
    choose_medoids,
    describe_plane,
    iter_diverse_planes,
    suggest_diverse_planes,
    suggest_planes,
)
from distillfss_core.volumes.volume import open_volume


def test_the_published_choice_of_support_images(root: Path) -> None:
    published = json.loads((root / "tests" / "data" / "hierarchical_uniform_sampling.json").read_text())
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


def stack(kinds: str, size: int = 64) -> np.ndarray:
    """A plane a letter: f fine grain, c coarse grain, b bright, 0 nothing."""
    rng = np.random.default_rng(0)
    made = {
        "f": lambda: rng.normal(100, 20, (size, size)),
        "c": lambda: rng.normal(100, 20, (size // 16, size // 16)).repeat(16, 0).repeat(16, 1),
        "b": lambda: rng.normal(250, 20, (size, size)),
        "0": lambda: np.zeros((size, size)),
    }
    return np.stack([made[kind]() for kind in kinds]).astype(np.float32)


def test_every_kind_of_plane_is_suggested_however_few_there_are() -> None:
    kinds = "f" * 26 + "cc" + "f" * 4 + "bbb" + "f" * 5
    chosen = suggest_diverse_planes(open_volume(stack(kinds)), 5)
    assert {kinds[z] for z in chosen} == {"f", "c", "b"}
    assert {kinds[z] for z in suggest_planes(len(kinds), 5)} == {"f"}


def test_what_is_like_an_annotated_plane_is_not_suggested_again() -> None:
    kinds = "f" * 10 + "c" * 10
    (chosen,) = suggest_diverse_planes(open_volume(stack(kinds)), 1, taken=[4])
    assert kinds[chosen] == "c"


def test_planes_that_are_alike_are_spread_over_the_stack() -> None:
    gaps = np.diff([-1, *suggest_diverse_planes(open_volume(stack("f" * 40)), 4), 40])
    assert gaps.max() < 20


def test_the_diverse_choice_of_fewer_is_part_of_that_of_more() -> None:
    volume = open_volume(stack("fcbffcbbfffc"))
    for count in range(1, 12):
        assert set(suggest_diverse_planes(volume, count)) < set(suggest_diverse_planes(volume, count + 1))


def test_empty_planes_are_suggested_only_where_there_are_no_others() -> None:
    assert suggest_diverse_planes(open_volume(stack("000f00f0")), 5) == [3, 6]
    assert len(suggest_diverse_planes(open_volume(stack("0000")), 2)) == 2


def test_a_bounded_number_of_planes_is_read_and_of_large_ones_the_middle() -> None:
    class Counting:
        shape, dtype, ndim, read = (10_000, 4096, 2050), np.dtype(np.uint8), 3, 0

        def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
            z, y, x = (s.indices(n) for s, n in zip(box, self.shape, strict=True))
            assert (y[:2], x[:2]) == ((1024, 3072), (1, 2049))
            self.read += z[1] - z[0]
            return np.full((z[1] - z[0], 2048, 2048), z[0] % 250, np.uint8)

    array = Counting()
    run = iter_diverse_planes(open_volume(array), 3)
    steps = [next(run) for _ in range(3)]
    assert array.read == 3
    assert (steps[-1].index, steps[-1].total) == (3, LOOKED_AT)


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (300, 70, 3)])
def test_planes_of_any_shape_are_described_alike(shape: tuple[int, ...]) -> None:
    plane = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    assert [len(group) for group in describe_plane(plane)] == [7, 5, 32]
    assert all(np.isfinite(group).all() for group in describe_plane(np.where(plane > 1, plane, np.nan)))


def test_a_greedy_choice_is_at_least_63_percent_of_the_best() -> None:
    from itertools import combinations

    rows = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    distance = np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(-1))
    most = (distance.max() + 1) * len(rows)

    def gain(chosen):
        return most - distance[list(chosen)].min(0).sum()

    best = max(gain(c) for c in combinations(range(9), 3))
    assert gain(choose_medoids(rows, 3, range(9))) >= (1 - 1 / np.e) * best
    assert choose_medoids(rows, 20, [2, 5]) in ([2, 5], [5, 2])


@pytest.mark.parametrize("count", [0, 9])
def test_impossible_numbers_of_different_planes_are_refused(count: int) -> None:
    with pytest.raises(SupportSetError, match=f"{count} of 8"):
        suggest_diverse_planes(open_volume(np.zeros((8, 4, 4))), count)
