"""Which zoom is chosen, and on what grounds."""

from __future__ import annotations

from collections.abc import Callable, Generator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distillfss_core.models.preprocess import fit_preprocess
from distillfss_core.nn.backbones import load_backbone
from distillfss_core.nn.device import choose_device
from distillfss_core.nn.pretrained import packaged_head, write_head
from distillfss_core.nn.teachers import PrototypeTeacher, Teacher
from distillfss_core.settings import DistillSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import unrefined_teacher, zoom
from distillfss_core.training.crops import FeatureCache
from distillfss_core.training.preparation import iter_prepare
from distillfss_core.types import AnnotatedSlice, GeneratorRun, finish

pytestmark = pytest.mark.slow

Choose = Callable[..., tuple[Fraction, dict[str, float]]]


def discs(radius: int, *, foreign: bool = False, side: int = 384) -> SupportSet:
    """Three slices with bright discs on noise; foreign masks belong to other discs."""
    rng = np.random.default_rng(radius)
    y, x = np.indices((side, side))
    slices = []
    for _ in range(3):
        image = rng.normal(90, 12, (side, side))
        masks = np.zeros((2, side, side), np.uint8)
        for mask in masks:
            for cy, cx in rng.integers(radius, side - radius, (max(3, 400 // radius**2), 2)):
                mask[(y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = 1
        image[masks[0] > 0] += 60
        slices.append(AnnotatedSlice(np.clip(image, 0, 255).astype(np.uint8), masks[1 if foreign else 0]))
    return SupportSet(tuple(slices), planes_of_one_volume=True)


@pytest.fixture(scope="module")
def choose() -> Choose:
    cache = FeatureCache(load_backbone(), choose_device("cpu", "float32"), memory=1, limit=1)

    def run(support: SupportSet, *teachers: Teacher) -> tuple[Fraction, dict[str, float]]:
        preprocess = fit_preprocess([s.image for s in support.slices])
        return finish(GeneratorRun(zoom.iter_zoom(support, preprocess, cache, 0, teachers)))

    return run


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return unrefined_teacher(discs(12), DistillSettings(zoom=Fraction(1), device="cpu")).teacher


def test_meta_trained_teacher_enlarges_small_objects_only(choose: Choose, teacher: Teacher) -> None:
    small, large = choose(discs(3), teacher)[0], choose(discs(40), teacher)[0]
    assert small > large == Fraction(1, 2)


@pytest.mark.parametrize("judge", ["teacher", "probe"])
def test_left_out_slices_are_judged_by_what_the_others_show(choose: Choose, teacher: Teacher, judge: str) -> None:
    who = [teacher] if judge == "teacher" else []
    _, told = choose(discs(20), *who)
    _, misled = choose(discs(20, foreign=True), *who)
    assert max(told.values()) > 0.8
    assert max(misled.values()) < 0.4


@pytest.mark.parametrize(
    ("changes", "judges"),
    [
        ({}, ["DcamaTeacher", "AlignmentTeacher"]),
        ({"teacher": "prototype"}, ["AlignmentTeacher", "DcamaTeacher"]),
        ({"head": "none"}, []),
        ({"method": "probe"}, []),
        ({"width": 16}, []),
        ({"head": "file"}, ["DcamaTeacher"]),
    ],
)
def test_packaged_teachers_judge_together_and_a_given_head_alone(
    changes: dict[str, Any], judges: list[str], tmp_path: Path
) -> None:
    if changes.get("head") == "file":
        weights = packaged_head("efficientnet_lite0")
        assert weights is not None
        write_head(tmp_path / "head.safetensors", weights.card, weights.tensors, weights.backbone_tensors)
        changes = {"head": str(tmp_path / "head.safetensors")}
    settings = DistillSettings(zoom=Fraction(1), orientation="any", device="cpu", **changes)
    ready = finish(GeneratorRun(iter_prepare(discs(20), settings, choose_device("cpu", "float32"))))
    assert [type(judge).__name__ for judge in ready.judges] == judges
    assert all(not part.training for judge in ready.judges for part in judge.own_modules)


def test_several_teachers_are_judged_by_the_mean_of_their_probabilities(teacher: Teacher) -> None:
    support = discs(8, foreign=True)  # hard, so that their answers differ
    preprocess = fit_preprocess([s.image for s in support.slices])
    cache = FeatureCache(load_backbone(), choose_device("cpu", "float32"), memory=1, limit=1)
    seen: list[Tensor] = []

    def shares(*teachers: Teacher) -> Tensor:
        seen.clear()
        finish(GeneratorRun(zoom.iter_score(support, preprocess, cache, 0, teachers)))
        return torch.cat(seen)

    with pytest.MonkeyPatch.context() as patch:
        best_iou = zoom._best_iou
        patch.setattr(zoom, "_best_iou", lambda scores, truth: seen.append(scores) or best_iou(scores, truth))
        first, second = shares(teacher), shares(PrototypeTeacher())
        torch.testing.assert_close(shares(teacher, PrototypeTeacher()), (first + second) / 2)
    assert (first - second).abs().mean() > 0.01


def test_each_fold_is_a_step_and_none_follows_once_the_choice_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[int] = []
    ridge = zoom._ridge
    monkeypatch.setattr(zoom, "_ridge", lambda x, *rest: fits.append(len(x)) or ridge(x, *rest))
    support = discs(20)
    preprocess = fit_preprocess([s.image for s in support.slices])
    cache = FeatureCache(load_backbone(), choose_device("cpu", "float32"), memory=1, limit=1)
    run = zoom.iter_zoom(support, preprocess, cache, 0)
    steps = [next(run) for _ in range(3)]  # the features, and two of three folds
    run.close()
    assert len(fits) == 2
    steps += list(zoom.iter_zoom(support, preprocess, cache, 0))[3:]
    assert [(step.stage, step.index, step.total) for step in steps] == [("zoom", n, 12) for n in range(1, 13)]


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ((0.70, 0.73, 0.74), "1"),
        ((0.73, 0.73, 0.74), "1/2"),
        ((0.5, 0.6, 0.7), "2"),
        ((1.0, 1.0, 1.0), "1"),
        ((0.02, 0.021, 0.02), "1"),
        ((0.443, 0.439, 0.450), "1"),
        ((0.30, 0.25, 0.24), "1/2"),
    ],
)
def test_smallest_zoom_close_to_the_best(
    choose: Choose, monkeypatch: pytest.MonkeyPatch, scores: tuple[float, ...], wanted: str
) -> None:
    answers = iter(scores)

    def answer(*_: object) -> Generator[None, None, float]:
        yield
        return next(answers)

    monkeypatch.setattr(zoom, "_iter_probe", answer)
    assert choose(discs(20))[0] == Fraction(wanted)


@pytest.mark.parametrize(("side", "candidates"), [(97, ["1/2", "1", "2"]), (96, ["1/2", "1", "2", "4"])])
def test_zoom_4_is_tried_on_small_slices(
    choose: Choose, monkeypatch: pytest.MonkeyPatch, side: int, candidates: list[str]
) -> None:
    answers = iter((0.5, 0.6, 0.7, 0.8))

    def answer(*_: object) -> Generator[None, None, float]:
        yield
        return next(answers)

    monkeypatch.setattr(zoom, "_iter_probe", answer)
    chosen, scores = choose(discs(6, side=side))
    assert list(scores) == candidates
    assert str(chosen) == candidates[-1]
