"""Which planes are chosen because two models of the annotated slices disagree on them."""

import numpy as np
import pytest

from distillfss_core import DistillSettings, SupportSet, SupportSetError, iter_disputed_planes, open_volume
from distillfss_core.training import disagreement
from distillfss_core.training.disagreement import divergence
from distillfss_core.types import AnnotatedSlice, finish
from distillfss_core.volumes.volume import Volume


@pytest.fixture
def stack():
    """Six planes with a bright square; one of them also has what no other plane has: dark stripes."""
    rng = np.random.default_rng(0)
    planes = rng.normal(90, 4, (6, 96, 96))
    labels = np.zeros(planes.shape, np.uint8)
    labels[:, 30:66, 30:66] = 1
    planes += 90 * labels
    planes[3, :, ::6] -= 60
    return planes.astype(np.uint8), labels


@pytest.fixture
def support(stack):
    images, labels = stack
    return SupportSet(tuple(AnnotatedSlice(images[z], labels[z], f"plane {z}") for z in (0, 5)))


def test_divergence_is_zero_for_equal_answers_and_log_2_for_opposite_ones():
    yes, no = np.array([0.0, 1.0])[:, None, None], np.array([1.0, 0.0])[:, None, None]
    assert divergence(yes, yes) == 0
    assert divergence(yes, no) == pytest.approx(np.log(2))


def test_planes_that_are_annotated_are_not_chosen_and_each_other_one_is_looked_at(stack, support):
    run = iter_disputed_planes(open_volume(stack[0]), support, 4, taken=(0, 5), settings=DistillSettings())
    steps = list(run)
    assert run.result() == [1, 2, 3, 4]
    assert [step.index for step in steps if step.stage == "looking"] == [1, 2, 3, 4]


def test_the_planes_of_the_largest_divergence_are_chosen(stack, support, monkeypatch):
    values = iter([0.1, 0.4, 0.3, 0.2])
    monkeypatch.setattr(disagreement, "divergence", lambda p, q: next(values))
    assert finish(iter_disputed_planes(open_volume(stack[0]), support, 2, taken=(0, 5))) == [2, 3]


def test_an_odd_plane_is_chosen(stack, support):
    assert finish(iter_disputed_planes(open_volume(stack[0]), support, 1, taken=(0, 5))) == [3]


def test_planes_up_to_the_last_are_looked_at_whichever_are_annotated(stack, support, monkeypatch):
    read = []
    monkeypatch.setattr(disagreement, "LOOKED_AT", 3)
    monkeypatch.setattr(Volume, "plane", lambda self, z, side: read.append(z) or stack[0][z])
    finish(iter_disputed_planes(open_volume(stack[0]), support, 1, taken=(4,)))
    assert read == [0, 2, 5]


@pytest.mark.parametrize("count", [0, 7])
def test_a_number_that_there_is_not_is_refused(stack, support, count):
    with pytest.raises(SupportSetError, match=f"cannot choose {count} of 6 planes"):
        finish(iter_disputed_planes(open_volume(stack[0]), support, count))
