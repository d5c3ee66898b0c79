"""benchmarks/mixture.py: which weights left-out slices choose, and what a member is worth."""

import json
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from distillfss_core.support.support_set import SupportSet
from distillfss_core.types import AnnotatedSlice

pytestmark = pytest.mark.slow

pytest.importorskip("skimage", reason="needs scikit-image")


@pytest.fixture(scope="module")
def mixture(import_benchmark):
    return import_benchmark("mixture")


@pytest.fixture
def slices():
    rng = np.random.default_rng(0)
    return [AnnotatedSlice(m.astype(np.uint8) * 200, m.astype(np.uint8)) for m in rng.random((7, 32, 32)) < 0.3]


def member(chance_inside: float, chance_outside: float):
    """A member that gives objects and background constant probabilities; objects are bright."""

    def predict(image):
        inside = np.where(image > 100, chance_inside, chance_outside).astype(np.float32)
        return SimpleNamespace(probabilities=np.stack([1 - inside, inside]))

    return lambda support, settings: SimpleNamespace(predict=predict)


def task(mixture, slices):
    return mixture.Task("bright", 0, SupportSet(slices[:5]), slices[5:], None)


def test_left_out_slices_choose_the_member_that_is_right(mixture, slices):
    made = {"right": member(0.9, 0.2), "wrong": member(0.1, 0.8)}
    row = mixture.measure(task(mixture, slices), made, Fraction(1))
    assert row["left_out"]["right"] == row["tests"]["right"] == 1
    assert row["tests"]["wrong"] == 0
    everyone = row["mixtures"][mixture.ALL]
    assert everyone["weights"][0] == 1
    assert everyone["chosen"] == everyone["bound"] == 1
    assert row["mixtures"]["without right"]["chosen"] == 0


def test_members_that_err_on_different_sides_are_right_together(mixture, slices):
    made = {"eager": member(1.0, 0.55), "shy": member(0.45, 0.0)}
    row = mixture.measure(task(mixture, slices), made, Fraction(1))
    assert max(row["tests"].values()) < 0.5
    assert row["mixtures"][mixture.ALL]["equal"] == row["mixtures"][mixture.ALL]["shrunk"] == 1


def test_the_table_has_the_means_of_its_rows(mixture, slices, tmp_path, capsys):
    made = {"eager": member(1.0, 0.55), "shy": member(0.45, 0.0)}
    rows = [{"task": name, **mixture.measure(task(mixture, slices), made, Fraction(1))} for name in ("one", "two")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"draw": 0, **row}) + "\n" for row in rows))
    mixture.table(path)
    shown = capsys.readouterr().out
    assert "| equal | 1.000 | 1.000 | 1.000 |" in shown
    assert "| mean | all members | without eager | without shy |" in shown
