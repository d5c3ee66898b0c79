"""Episodes are pure indices: what may ask, what may answer."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distillfss_core.training.episodes import draw_episode


@given(st.integers(2, 9), st.integers(2, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 50))
def test_no_query_has_its_own_slice_in_the_support(slices: int, each: int, queries: int, shots: int, walk: int) -> None:
    owner = np.repeat(np.arange(slices), each)
    boxes = [(0, 0, 8, 8)] * len(owner)
    episode = draw_episode(owner, boxes, np.random.default_rng(walk), queries=queries, shots=shots, walk=walk)
    assert episode.query
    assert episode.support
    assert not set(owner[list(episode.query)]) & set(owner[list(episode.support)])


def test_the_walk_asks_every_slice_in_turn() -> None:
    owner = np.repeat(np.arange(3), 4)
    rng = np.random.default_rng(0)
    for walk in range(3):
        asked = [
            owner[list(draw_episode(owner, [(0, 0, 1, 1)] * 12, rng, queries=9, shots=2, walk=walk).query)]
            for _ in range(5)
        ]
        assert all(walk in a for a in asked)


@given(st.integers(2, 30), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_one_slice_answers_itself_with_other_views(views: int, queries: int, shots: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = [(int(y), int(x), int(y) + 10, int(x) + 10) for y, x in rng.integers(0, 60, (views, 2))]
    episode = draw_episode(np.zeros(views, int), boxes, rng, queries=queries, shots=shots, walk=0)
    assert episode.query
    assert episode.support
    assert not set(episode.query) & set(episode.support)


def test_one_slice_prefers_views_that_do_not_overlap() -> None:
    boxes = [(0, 0, 10, 10)] * 8 + [(50, 50, 60, 60)] * 8
    for seed in range(20):
        rng = np.random.default_rng(seed)
        episode = draw_episode(np.zeros(16, int), boxes, rng, queries=1, shots=4, walk=0)
        side = episode.query[0] // 8
        assert all(i // 8 != side for i in episode.support)
