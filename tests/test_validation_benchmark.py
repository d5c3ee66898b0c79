"""The sets of benchmarks/validation.py, and the table of its rows."""

import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("skimage", reason="needs scikit-image")


@pytest.fixture(scope="module")
def validation(import_benchmark):
    return import_benchmark("validation")


def test_phases_of_levels_differ_by_their_gray_level(validation):
    image, labels = validation.levels(0)
    means = [image[labels == value].mean() for value in range(4)]
    assert np.all(np.diff(means) > 25)


def test_classes_of_place_look_alike_and_lie_on_two_sides(validation):
    image, labels = validation.place(0)
    left, right = (image[labels == value] for value in (1, 2))
    assert abs(left.mean() - right.mean()) < 1
    borders = (labels[:, :, :-1] == 1) & (labels[:, :, 1:] == 2)
    assert borders.sum() > 500
    assert borders.sum() > 3 * ((labels[:, :, :-1] == 2) & (labels[:, :, 1:] == 1)).sum()


def test_a_nested_core_is_dark_in_a_bright_shell(validation):
    image, labels = validation.nested(0)
    core, shell, rest = (image[labels == value].mean() for value in (2, 1, 0))
    assert shell > rest + 20 > core + 20


def test_a_generated_set_is_learned_from_one_stack_and_tested_on_another(validation):
    (task,) = validation.tasks(Path("nowhere"), {"nuclei-scribbled"}, 1)
    (again,) = validation.tasks(Path("nowhere"), {"nuclei-scribbled"}, 1)
    assert (len(task.support), len(task.queries)) == (5, 10)
    assert 255 in task.support.slices[0].labels  # scribbles
    assert 255 not in task.queries[0].labels
    assert np.array_equal(task.support.slices[0].labels, again.support.slices[0].labels)
    assert not any(np.array_equal(q.image, s.image) for q in task.queries for s in task.support.slices)


def test_pictures_of_the_support_are_not_tested(validation, shared):
    for task in validation.tasks(shared, {"skin", "axon"}, 2):
        names = {s.source for s in task.support.slices}
        assert len(names) == 5
        assert names.isdisjoint(q.source for q in task.queries)


def test_the_table_has_the_mean_of_the_sets_that_all_models_have(validation, tmp_path, capsys):
    rows = [("skin", "a", 0.5), ("skin", "a", 0.7), ("skin", "b", 0.4), ("levels", "a", 0.9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"task": t, "model": m, "pooled": v}) + "\n" for t, m, v in rows))
    validation.table(path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["| skin | 0.600 | 0.400 |", "| levels | 0.900 |  |", "| mean of 1 | 0.600 | 0.400 |"]
    validation.plot(path, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 5000


def test_the_table_says_how_far_the_expected_iou_is_off(validation, tmp_path, capsys):
    rows = [
        {"task": "skin", "model": "a", "pooled": 0.5, "expected": 0.6},
        {"task": "skin", "model": "b", "pooled": 0.4},
        {"task": "levels", "model": "a", "pooled": 0.9, "expected": 0.7},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    validation.table(path)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        "measured - expected IoU, 2 students: mean +0.050, mean absolute 0.150, root of the mean square 0.158"
    )
