"""benchmarks/engines.py: its rows, of a student with a probe and of its backbone alone."""

from fractions import Fraction

import pytest

from distillfss_core import DistillSettings, SupportSet, distill
from pictures import blobs

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def test_a_student_costs_more_than_its_backbone_in_every_engine(import_benchmark, monkeypatch):
    engines = import_benchmark("engines")
    monkeypatch.setattr(engines, "SIDE", 128)
    monkeypatch.setattr(engines, "FORMS", (("torch", "float32"), ("onnxruntime", "float32")))
    support = SupportSet([blobs(i) for i in range(2)], ("blob",))
    student = distill(support, DistillSettings(steps=1, zoom=Fraction(1), device="cpu", crop_size=64))
    assert student.probe is not None
    rows = list(engines.rows(student, blobs(9).image, ("network", "labels"), runs=3, planes=1))
    network, labels = rows[:4], rows[4:]
    assert [(row["engine"].split()[0], row["part"]) for row in network] == [
        ("torch", "student"),
        ("torch", "backbone"),
        ("onnxruntime", "student"),
        ("onnxruntime", "backbone"),
    ]
    assert all(row["ms"] > 0 for row in network)
    assert all(row["differing"] < 1e-3 for row in labels)
