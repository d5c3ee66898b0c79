"""Geometry of tiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillfss_core.models.tiling import split_axis, split_plane

lengths, sides = st.integers(1, 700), st.integers(1, 300)


@given(lengths, lengths, sides, st.integers(0, 90), st.sampled_from([16, 32, 64]))
def test_tiles_cover_every_pixel_exactly_once(h: int, w: int, tile: int, halo: int, step: int) -> None:
    seen = np.zeros((h, w), int)
    for piece in split_plane((h, w), tile, halo, step):
        seen[piece.inner] += 1
    assert (seen == 1).all()


@given(lengths, sides, st.integers(0, 90), st.sampled_from([16, 32, 64]))
def test_windows_start_on_the_grid_and_hold_tile_and_halo(length: int, tile: int, halo: int, step: int) -> None:
    for span in split_axis(length, tile, halo, step):
        assert span.outer[0] % step == 0
        assert span.outer[0] <= max(0, span.inner[0] - halo)
        assert span.outer[1] >= min(length, span.inner[1] + halo)
        assert np.arange(length)[slice(*span.outer)][span.crop].tolist() == list(range(*span.inner))


@given(lengths, sides, st.integers(0, 90))
def test_no_window_is_needlessly_large(length: int, tile: int, halo: int) -> None:
    step = 32
    most = (-(-tile // step) + 2 * -(-halo // step)) * step
    assert all(span.outer[1] - span.outer[0] <= most for span in split_axis(length, tile, halo, step))


@given(lengths, sides, st.integers(0, 90), st.sampled_from([16, 32, 64]))
def test_windows_that_are_to_be_alike_have_one_length_and_no_less_context(
    length: int, tile: int, halo: int, step: int
) -> None:
    plain, alike = (split_axis(length, tile, halo, step, alike=alike) for alike in (False, True))
    assert [span.inner for span in alike] == [span.inner for span in plain]
    assert {-(-span.length // step) for span in alike} == {max(-(-span.length // step) for span in plain)}
    for one, other in zip(alike, plain, strict=True):
        assert one.outer[0] % step == 0
        assert 0 <= one.outer[0] <= other.outer[0]
        assert other.outer[1] <= one.outer[1] <= length


@given(lengths, sides, st.integers(1, 90))
def test_fading_windows_add_up_to_one(length: int, tile: int, halo: int) -> None:
    spans = split_axis(length, max(tile, 2 * halo + 64), halo, 32)
    total = np.zeros(length)
    for span in spans:
        total[slice(*span.outer)] += span.fade()
    if len(spans) < 2 or spans[-1].inner[1] - spans[-1].inner[0] >= 2 * halo + 32:
        np.testing.assert_allclose(total, 1, atol=1e-6)
    assert (total > 0).all()


@pytest.mark.parametrize("beyond", [False, True])
def test_a_span_touches_what_its_pixels_are_in(beyond: bool) -> None:
    spans = split_axis(300, 64, 32, 32)
    for start in range(0, 300, 7):
        for stop in (start + 1, min(start + 90, 300)):
            touched = [s for s in spans if s.touches(start, stop, beyond=beyond)]
            parts = [s.outer if beyond else s.inner for s in spans]
            assert touched == [
                s for s, (a, b) in zip(spans, parts, strict=True) if set(range(a, b)) & set(range(start, stop))
            ]
