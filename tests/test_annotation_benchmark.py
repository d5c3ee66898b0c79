"""benchmarks/annotation.py: which planes it tests, which it chooses, and the table of its rows."""

import json

import numpy as np
import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("skimage", reason="needs scikit-image")


@pytest.fixture(scope="module")
def annotation(import_benchmark):
    return import_benchmark("annotation")


@pytest.fixture
def parts(annotation):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (20, 300, 40), dtype=np.uint8)
    return annotation.slices_of((image, image > 200), 0)


def test_tested_planes_are_never_chosen(parts):
    slices, tested, first = parts
    assert len(tested) == 6
    assert {s.source for s in slices}.isdisjoint(s.source for s in tested)
    assert slices[first].labels.any()
    assert slices[0].image.shape == (256, 40)


@pytest.mark.parametrize("way", ["even", "diverse"])
def test_planes_are_added_until_there_are_enough(annotation, parts, way):
    slices, _, first = parts
    added = annotation.choose(way, slices, [first], 4, None)
    assert len({first, *added}) == 4


def test_disagreement_is_none_where_both_models_are_alike_and_large_where_they_differ(annotation, monkeypatch):
    class Model:
        def __init__(self, chances):
            self.probabilities = np.array(chances)[:, None, None]

        def predict(self, image):
            return self

    for teacher, least, most in (([0.9, 0.1], -1e-9, 1e-9), ([0.1, 0.9], 0.3, 0.7)):
        monkeypatch.setattr(annotation, "unrefined_teacher", lambda *_, of=teacher: Model(of))
        (worth,) = annotation.doubts("disagreement", None, [None], Model([0.9, 0.1]))
        assert least <= worth <= most
    (unsure,) = annotation.doubts("least sure", None, [None], Model([0.5, 0.5]))
    assert unsure == pytest.approx(np.log(2))


def test_curves_are_means_over_the_seeds(annotation, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    lines = [{"stack": "ovule", "seed": s, "way": "even", "iou": {"1": 0.5 + s, "2": 0.25}} for s in range(2)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert annotation.curves(rows) == {("ovule", "even"): {1: 1.0, 2: 0.25}}
    annotation.table(rows)
    assert "| ovule | even | 1.000 | 0.250 |" in capsys.readouterr().out
