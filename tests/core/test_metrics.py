"""Scores agree with scikit-learn's, and empty cases follow the written convention."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distillfss_core.errors import ImageError
from distillfss_core.metrics import Tally, confusion, evaluate
from distillfss_core.types import IGNORE

sk = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn (extra 'dev')")


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    truths = [rng.integers(0, 4, (20, 24)).astype(np.uint8) for _ in range(3)]
    return [(np.where(rng.random(t.shape) < 0.7, t, rng.integers(0, 4, t.shape)).astype(np.uint8), t) for t in truths]


def test_pooled_scores_are_those_of_sklearn(pairs):
    p, t = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    scores = evaluate(pairs)
    options = {"labels": [1, 2, 3], "average": None}
    np.testing.assert_allclose(scores.pooled.iou, sk.jaccard_score(t, p, **options))
    np.testing.assert_allclose(scores.pooled.dice, sk.f1_score(t, p, **options))
    np.testing.assert_allclose(scores.pooled.precision, sk.precision_score(t, p, **options))
    np.testing.assert_allclose(scores.pooled.recall, sk.recall_score(t, p, **options))
    np.testing.assert_array_equal(scores.matrix, sk.confusion_matrix(t, p))
    assert scores.iou == pytest.approx(sk.jaccard_score(t, p, labels=[1, 2, 3], average="macro"))


def test_means_over_images_are_those_of_sklearn(pairs):
    each = [sk.jaccard_score(t.ravel(), p.ravel(), labels=[1, 2, 3], average=None) for p, t in pairs]
    scores = evaluate(pairs)
    np.testing.assert_allclose(scores.mean.iou, np.mean(each, 0))
    assert scores.images == 3
    assert scores.counted.tolist() == [3, 3, 3]


@given(hnp.arrays(np.uint8, (2, 6, 7), elements=st.integers(0, 2)))
@settings(deadline=None)
def test_binary_scores_are_those_of_sklearn(arrays):
    p, t = arrays > 0
    scores = evaluate([(p, t)], n_classes=1)
    if not (p | t).any():
        assert np.isnan(scores.iou)
        return
    assert scores.iou == pytest.approx(sk.jaccard_score(t.ravel(), p.ravel(), zero_division=0))
    assert scores.dice == pytest.approx(sk.f1_score(t.ravel(), p.ravel(), zero_division=0))


def test_ignored_pixels_do_not_count(pairs):
    predicted, truth = pairs[0]
    holes = truth.copy()
    holes[:, :10] = IGNORE
    whole, part = evaluate([(predicted, holes)]), evaluate([(predicted[:, 10:], truth[:, 10:])])
    np.testing.assert_array_equal(whole.matrix, part.matrix)


def test_a_class_absent_from_an_image_is_not_in_its_mean():
    blank, full = np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)
    scores = evaluate([(full, full), (blank, blank)], n_classes=2)
    assert scores.mean.iou[0] == 1
    assert scores.counted.tolist() == [1, 0]
    assert np.isnan(scores.mean.iou[1])
    assert scores.iou == 1


def test_an_object_missed_or_invented_scores_zero():
    blank, full = np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)
    for pair in ((blank, full), (full, blank)):
        scores = evaluate([pair])
        assert [scores.pooled.iou[0], scores.pooled.precision[0], scores.pooled.recall[0]] == [0, 0, 0]


def test_images_with_different_classes_are_put_together():
    a, b = np.full((3, 3), 1, np.uint8), np.full((3, 3), 3, np.uint8)
    scores = evaluate([(a, a), (b, b)])
    assert scores.counted.tolist() == [1, 0, 1]
    assert scores.matrix.shape == (4, 4)


def test_the_table_names_classes_and_numbers():
    a = np.ones((3, 3), np.uint8)
    table = evaluate([(a, a)], n_classes=2).table(["nucleus"])
    assert "nucleus" in table
    assert "class 2" in table
    assert "1.000" in table
    assert "nan" not in table


def test_what_cannot_be_compared_is_said():
    a = np.zeros((3, 3), np.uint8)
    with pytest.raises(ImageError, match="nothing to compare"):
        Tally().scores()
    with pytest.raises(ImageError, match=r"shape \(3, 3\), its truth \(3, 4\)"):
        evaluate([(a, np.zeros((3, 4), np.uint8))])
    with pytest.raises(ImageError, match="prediction holds the label 5"):
        confusion(a + 5, a, 2)
    with pytest.raises(ImageError, match="integer"):
        confusion(a.astype(float), a, 2)
    with pytest.raises(ImageError, match="holds the label 300"):
        evaluate([(a, a.astype(np.uint16) + 300)])
