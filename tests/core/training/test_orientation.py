"""Whether training crops are turned: asked of the support where classes may differ by direction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distillfss_core.models.preprocess import fit_preprocess
from distillfss_core.nn.backbones import load_backbone
from distillfss_core.nn.device import choose_device
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import distill, iter_distill
from distillfss_core.training.crops import FeatureCache
from distillfss_core.training.orientation import iter_orientation
from distillfss_core.training.preparation import augmentation
from distillfss_core.types import AnnotatedSlice, GeneratorRun, finish
from pictures import blobs

pytestmark = pytest.mark.slow


def halves(seed: int, size: int = 192) -> AnnotatedSlice:
    """Bright discs, whose left half is class 1 and whose right half is class 2."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    image, labels = np.full((size, size), 60.0), np.zeros((size, size), np.uint8)
    for row in range(24, size, 48):
        for column in range(24, size, 48):
            center = np.array([row, column]) + rng.uniform(-5, 5, 2)
            inside = np.hypot(y - center[0], x - center[1]) < rng.uniform(13, 18)
            image[inside], labels[inside] = 160, np.where(x < center[1], 1, 2)[inside]
    image += rng.normal(0, 8, image.shape)
    return AnnotatedSlice(image.clip(0, 255).astype(np.uint8), labels, f"halves {seed}")


def of_halves() -> SupportSet:
    return SupportSet(tuple(halves(i) for i in range(3)), ("left", "right"), planes_of_one_volume=True)


def choice(support: SupportSet) -> tuple[str, dict[str, float]]:
    cache = FeatureCache(load_backbone(), choose_device("cpu", "float32"), memory=1, limit=1)
    return finish(GeneratorRun(iter_orientation(support, fit_preprocess([s.image for s in support.slices]), cache, 0)))


def test_classes_that_differ_by_side_are_not_turned():
    orientation, scores = choice(of_halves())
    assert orientation == "fixed"
    assert scores["turned"] < 0.65 * scores["upright"]
    assert scores["upright"] > 0.7


def test_classes_that_differ_otherwise_are_turned():
    orientation, scores = choice(SupportSet(tuple(blobs(i, 192, 2) for i in range(3)), ("bright", "dark")))
    assert orientation == "any"
    assert scores["turned"] > 0.9 * scores["upright"]


def test_one_class_is_not_looked_at():
    assert choice(SupportSet((blobs(0),), ("blob",))) == ("any", {})


@pytest.mark.parametrize(("orientation", "turned"), [("any", True), ("fixed", False)])
def test_crops_are_turned_by_the_orientation_alone(tiny, orientation, turned):
    assert augmentation(tiny, of_halves(), orientation).turn is turned


def test_a_training_takes_and_records_the_choice_and_a_refinement_keeps_it(tiny):
    settings = replace(tiny, crop_size=96)
    run = iter_distill(of_halves(), settings)
    assert [step.index for step in run if step.stage == "orientation"] == [1, 2, 3, 4, 5]
    model = run.result()
    assert model.training["orientation"] == "fixed"
    assert set(model.training["orientation_scores"]) == {"upright", "turned"}
    again = iter_distill(of_halves(), settings, init_from=model)
    assert "orientation" not in {step.stage for step in again}
    assert again.result().training["orientation"] == "fixed"
    assert distill(of_halves(), replace(settings, orientation="any")).training["orientation"] == "any"
