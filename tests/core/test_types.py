"""Values of all layers."""

from __future__ import annotations

import numpy as np
import pytest

from distillfss_core.errors import UnfinishedError
from distillfss_core.types import PREPARATION, GeneratorRun, TrainStep, describe_step, is_usable, sample_step


@pytest.mark.parametrize("stage", PREPARATION)
def test_every_stage_of_the_preparation_has_a_phrase_and_counts_its_steps(stage):
    phrase, comma, count = describe_step(TrainStep(2, 5, stage=stage)).partition(", ")
    assert phrase not in (stage, "")
    assert (comma, count) == (", ", "2 of 5")


@pytest.mark.parametrize(
    ("stage", "following"),
    [("load", "choosing the zoom"), ("probe", "fitting the probe"), ("fit", "preparing augmented crops")],
)
def test_after_its_last_step_a_stage_is_called_by_what_follows(stage, following):
    assert describe_step(TrainStep(5, 5, stage=stage)) == following


def test_the_loss_of_a_training_step_is_the_sum_of_its_terms():
    step = TrainStep(7, 300, {"student": 0.25, "teacher": 0.5}, stage="distill")
    assert describe_step(step) == "distilling, 7 of 300, loss 0.75"


def test_a_stage_without_a_text_is_called_by_its_name():
    assert describe_step(TrainStep(1, 2, stage="importing")) == "importing, 1 of 2"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite_cannot_be_used(dtype):
    values = np.array([0, -60000, np.nan, np.inf, -np.inf], dtype)
    assert is_usable(values).tolist() == [True, True, False, False, False]


def test_float32_beyond_a_sum_cannot_be_used():
    assert is_usable(np.array([2.9e38, -3.1e38], np.float32)).tolist() == [True, False]


def test_a_run_is_stopped_at_the_end_of_its_block_and_not_by_a_loop_that_is_left():
    ended = []

    def steps():
        try:
            yield from range(5)
        finally:
            ended.append(True)

    with GeneratorRun(steps()) as run:
        for step in run:
            if step == 1:
                break
        assert not ended
        assert next(run) == 2
    assert ended
    assert list(run) == []
    with pytest.raises(UnfinishedError):
        run.result()


@pytest.mark.parametrize("shape", [(1, 1), (1024, 1024), (1025, 1024), (5000, 3000), (3, 10**9)])
def test_about_as_many_pixels_are_sampled_as_is_stated(shape):
    step = sample_step(shape)
    assert shape[0] * shape[1] / step**2 <= 1 << 20
    assert step == 1 or shape[0] * shape[1] / (step - 1) ** 2 > 1 << 20
