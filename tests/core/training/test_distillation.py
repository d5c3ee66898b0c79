"""Refining and distilling: what they promise whatever the data."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from distillfss_core.errors import NoStudentYetError, SettingsError, SupportSetError
from distillfss_core.metrics import evaluate
from distillfss_core.models.preprocess import fit_preprocess
from distillfss_core.models.segmenter import Segmenter
from distillfss_core.nn.backbones import load_backbone
from distillfss_core.nn.device import choose_device
from distillfss_core.nn.features import EncodedSupport
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.pretrained import packaged_head
from distillfss_core.settings import DistillSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import distill, iter_distill, refine, unrefined_teacher
from distillfss_core.training import loop as fit
from distillfss_core.training.crops import PLAIN, Augmentation, CropSampler, FeatureCache
from distillfss_core.training.distillation import auto_steps
from distillfss_core.training.loop import NOISE
from distillfss_core.training.student_init import start_from_attention
from distillfss_core.types import IGNORE, AnnotatedSlice
from pictures import blobs


def _weights(model) -> torch.Tensor:
    return torch.cat([v.flatten().float() for v in model.head.state_dict().values()])


def _iou(model, slices) -> float:
    return evaluate([(model.predict_labels(s.image), s.labels) for s in slices], 1).iou


def _ious(model, classes: int) -> list[float]:
    queries = [blobs(seed, classes=classes) for seed in (10, 11)]
    pairs = [(model.predict_labels(s.image), s.labels) for s in queries]
    return [float(v) for v in evaluate(pairs, classes).pooled.iou]


def test_the_same_seed_gives_the_same_student_and_another_seed_another(support, student, tiny) -> None:
    assert torch.equal(_weights(student), _weights(distill(support, tiny)))
    assert not torch.equal(_weights(student), _weights(distill(support, replace(tiny, seed=1))))


@pytest.mark.parametrize("method", ["joint", "two-stage", "direct"])
def test_every_method_learns_to_segment_the_blobs(support, tiny, method: str) -> None:
    settings = replace(tiny, steps=40 if method == "two-stage" else 60, method=method, crops=24)
    model = distill(support, settings)
    assert _iou(model, [blobs(10), blobs(11)]) > 0.6


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("method", ["joint", "two-stage"])
def test_a_student_begins_where_its_teacher_is(tiny, method: str, classes: int) -> None:
    names = ("bright", "dark")[:classes]
    support = SupportSet(tuple(blobs(i, classes=classes) for i in range(3)), names)
    run = iter_distill(support, replace(tiny, method=method, steps=4, probe="none"))
    for step in run:
        if not step.is_preparation and step.stage != "refine":
            break
    assert min(_ious(run.result(), classes)) > 0.6

    unprepared = iter_distill(support, replace(tiny, method="direct", steps=4, probe="none"))
    next(step for step in unprepared if not step.is_preparation)
    assert max(_ious(unprepared.result(), classes)) < 0.4


@pytest.mark.parametrize("shown", [(0, 10), (3, 4)], ids=["half of the classes", "one class and nothing else"])
def test_every_channel_of_a_student_can_learn_whatever_the_support_shows(shown: tuple[int, int]) -> None:
    backbone = load_backbone("efficientnet_lite0", "random")
    head = FewShotHead(
        backbone.spec, 20, HeadForm("default", "default", "default", 8)
    )  # more classes than channels a block
    labels = torch.randint(*shown, (2, 64, 64), dtype=torch.uint8)
    encoded = EncodedSupport.of(backbone(torch.rand(2, 3, 64, 64)), labels, 20)
    start_from_attention(head, encoded)
    for reduce, read in zip(head.student.reduce, head.student.read, strict=True):
        assert (reduce.weight.flatten(1).norm(dim=1) > 0).all()
        assert (read.weight.flatten(1).norm(dim=1) > 0).all()
        assert torch.isfinite(reduce.weight).all()


def test_a_published_student_starts_as_published() -> None:
    backbone = load_backbone("efficientnet_lite0", "random")
    head = FewShotHead(backbone.spec, 1, HeadForm("published", "default", "default", 8))
    before = {name: value.clone() for name, value in head.state_dict().items()}
    image, labels = torch.rand(2, 3, 64, 64), torch.randint(0, 2, (2, 64, 64), dtype=torch.uint8)
    encoded = EncodedSupport.of(backbone(image), labels, 1)
    start_from_attention(head, encoded)
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


def test_refining_makes_a_better_teacher(support, tiny) -> None:
    queries = [blobs(10), blobs(11)]
    unskilled = replace(tiny, head="none")
    before = unrefined_teacher(support, unskilled)
    after = refine(support, replace(unskilled, steps=40, crops=24))
    assert _iou(after, queries) > max(0.6, _iou(before, queries))


def test_the_prototype_teacher_answers_without_training(support, tiny) -> None:
    teacher = unrefined_teacher(support, tiny, kind="prototype")
    share = float(np.mean(blobs(10).labels))
    assert _iou(teacher, [blobs(10)]) > 1.5 * share


def test_the_backbone_stays_as_it_was(student) -> None:
    told = packaged_head("efficientnet_lite0")
    assert told is not None
    backbone = told.trained_backbone()
    assert backbone is not None
    assert student.backbone.digest() == backbone.digest()
    fresh = dict(backbone.named_parameters())
    assert all(torch.equal(fresh[k], v) for k, v in student.backbone.named_parameters())


def test_cancelling_keeps_the_best_so_far(support, tiny) -> None:
    run = iter_distill(support, replace(tiny, steps=1000))
    for step in run:
        if step.is_preparation:
            continue
        assert step.total == 1000
        if step.index == 3:
            run.close()
    model = run.result()
    assert model.training["steps"] == 3
    assert model.predict(support.slices[0].image).labels.shape == (96, 96)


def test_the_end_of_a_block_stops_a_training(support, tiny) -> None:
    with iter_distill(support, replace(tiny, steps=1000)) as run:
        assert next(run).is_preparation
    assert next(run, None) is None


def test_a_result_is_there_before_the_first_step(support, tiny) -> None:
    assert iter_distill(support, tiny).result().training["steps"] == 0


def test_a_run_loads_nothing_before_its_first_step_and_prepares_step_by_step(support, tiny, monkeypatch) -> None:
    run = iter_distill(support, replace(tiny, zoom="auto", steps=1))
    steps = [(step.stage, step.index, step.total) for step in run]
    before = [("load", 1, 1), *[("zoom", i, 16) for i in range(1, 17)], *[("probe", i, 3) for i in (1, 2, 3)]]
    before += [("fit", i, 4) for i in (1, 2, 3, 4)]  # of all slices, and without each
    encoded = [step for step in steps if step[0] == "encode"]
    assert steps == [*before, *encoded, ("joint", 1, 1)]
    assert encoded[-1][1] == encoded[-1][2]

    def no_loading(*_args: object) -> None:
        raise AssertionError("a backbone was loaded")

    monkeypatch.setattr("distillfss_core.training.preparation.load_backbone", no_loading)
    monkeypatch.setattr("distillfss_core.training.preparation.packaged_head", no_loading)
    untouched = iter_distill(support, tiny)
    untouched.close()
    with pytest.raises(NoStudentYetError, match="closed before its backbone was loaded"):
        untouched.result()


def test_the_left_out_slice_is_never_trained_on_and_chooses_the_step(tiny, monkeypatch) -> None:
    support = SupportSet(tuple(blobs(i) for i in range(3)))
    cut: set[int] = set()
    original = CropSampler.cut

    def spy(self, index, rng):
        cut.add(index)
        return original(self, index, rng)

    monkeypatch.setattr(CropSampler, "cut", spy)
    run = iter_distill(support, replace(tiny, steps=24, validation_slice=1))
    scores = {s.index: s.metrics["iou"] for s in run if "iou" in s.metrics}
    record = run.result().training
    assert cut == {0, 2}
    assert len(scores) >= 2
    assert record["validation_slice"] == 1
    assert record["validation_iou"] == scores[record["best_step"]]
    assert record["validation_iou"] > max(scores.values()) - NOISE


@pytest.mark.parametrize(
    ("looks", "kept"), [([0.5, 0.8, 0.79, 0.7], 3), ([0.5, 0.8, 0.6, 0.7], 2), ([0.5, 0.6, 0.7], 3)]
)
def test_of_states_that_one_slice_cannot_tell_apart_the_latest_is_kept(support, tiny, monkeypatch, looks, kept) -> None:
    monkeypatch.setattr(fit, "validation_iou", lambda *_: coming.pop(0))
    coming = list(looks)
    run = iter_distill(support, replace(tiny, steps=10 * len(looks), validation_slice=1))
    for _ in run:
        pass
    record = run.result().training
    assert not coming
    assert (record["best_step"], record["validation_iou"]) == (10 * kept, looks[kept - 1])


def test_a_training_stops_where_the_left_out_slice_finds_it_worse_for_long(support, tiny, monkeypatch) -> None:
    monkeypatch.setattr(fit, "validation_iou", lambda *_: coming.pop(0))
    coming = [0.8, *[0.5] * fit.PATIENCE]
    run = iter_distill(support, replace(tiny, steps=200, validation_slice=1))
    assert len([step for step in run if not step.is_preparation]) == 16 * (1 + fit.PATIENCE)
    assert run.result().training["best_step"] == 16


def test_from_eight_slices_on_one_is_left_out_by_itself(tiny) -> None:
    many = SupportSet(tuple(blobs(i, 64) for i in range(8)))
    assert distill(many, replace(tiny, steps=1)).training["validation_slice"] == 4
    few = SupportSet(tuple(blobs(i, 64) for i in range(7)))
    assert distill(few, replace(tiny, steps=1)).training["validation_slice"] is None


def _with_rare_class(slices: int, *where: int) -> SupportSet:
    """Slices of blobs; class "rare" is painted in those of ``where`` only."""
    made = [blobs(i, 64) for i in range(slices)]
    for i in where:
        made[i].labels[:8, :8] = 2
    return SupportSet(tuple(made), ("blob", "rare"))


@pytest.mark.parametrize(("where", "left_out"), [((4,), 3), ((3,), 4), ((3, 4), 4)])
def test_what_only_one_slice_shows_is_learned_from_it(tiny, where: tuple[int, ...], left_out: int) -> None:
    run = iter_distill(_with_rare_class(8, *where), replace(tiny, steps=1))
    assert run.result().training["validation_slice"] == left_out


def test_no_slice_is_left_out_where_each_alone_shows_something(tiny) -> None:
    names = tuple(f"class {k}" for k in range(1, 9))
    slices = [replace(s, labels=s.labels * np.uint8(k)) for k, s in enumerate((blobs(i, 64) for i in range(8)), 1)]
    run = iter_distill(SupportSet(slices, names), replace(tiny, steps=1))
    assert run.result().training["validation_slice"] is None


def test_the_only_slice_of_a_class_cannot_be_left_out(tiny) -> None:
    with pytest.raises(SettingsError, match=r"validation_slice is 1, but no other slice shows 'rare'.*give another"):
        iter_distill(_with_rare_class(3, 1), replace(tiny, validation_slice=1))
    scribbled = [
        replace(s, labels=np.where(s.labels == 0, IGNORE, s.labels).astype(np.uint8)) for s in map(blobs, (0, 1))
    ]
    with pytest.raises(SettingsError, match=r"validation_slice is 2, but no other slice shows background"):
        iter_distill(SupportSet((*scribbled, blobs(2))), replace(tiny, validation_slice=2))


@pytest.mark.parametrize("left_out", [3, -1])
def test_a_slice_that_is_not_there_cannot_be_left_out(support, tiny, left_out: int) -> None:
    with pytest.raises(SettingsError, match="validation_slice"):
        iter_distill(support, replace(tiny, validation_slice=left_out))


def test_a_single_slice_works_through_crops(tiny) -> None:
    model = distill(SupportSet((blobs(0, 160),)), replace(tiny, steps=50, crops=24))
    assert _iou(model, [blobs(10)]) > 0.5


def test_scribbles_are_enough(tiny) -> None:
    slices = []
    for i in range(3):
        dense = blobs(i)
        labels = np.full_like(dense.labels, IGNORE)
        labels[::12] = dense.labels[::12]  # one row in twelve
        slices.append(AnnotatedSlice(dense.image, labels, f"scribbles {i}"))
    model = distill(SupportSet(tuple(slices)), replace(tiny, steps=60, crops=24))
    assert _iou(model, [blobs(10), blobs(11)]) > 0.5


def test_several_classes_some_of_them_missing_in_some_slices(tiny) -> None:
    slices = (blobs(0, classes=2), blobs(1), blobs(2, classes=2), blobs(3))
    model = distill(SupportSet(slices, ("bright", "dark")), replace(tiny, steps=80, crops=24))
    query = blobs(10, classes=2)
    scores = evaluate([(model.predict_labels(query.image), query.labels)], 2)
    assert min(scores.pooled.iou) > 0.4
    assert model.predict(query.image).probabilities.shape == (3, 96, 96)


def test_rare_objects_do_not_collapse_to_background(tiny) -> None:
    def rare(seed: int) -> AnnotatedSlice:
        rng = np.random.default_rng(seed)
        image = rng.normal(100, 10, (192, 192))
        labels = np.zeros((192, 192), np.uint8)
        y, x = rng.integers(16, 160, 2)
        image[y : y + 14, x : x + 14] += 60
        labels[y : y + 14, x : x + 14] = 1
        return AnnotatedSlice(image.clip(0, 255).astype(np.uint8), labels, f"rare {seed}")

    support = SupportSet(tuple(rare(i) for i in range(3)))
    assert support.shares()[1] < 0.006
    assert _iou(distill(support, replace(tiny, steps=60, crops=24)), [rare(10), rare(11)]) > 0.4


def test_refining_again_goes_on_from_where_it_was(support, student, tiny) -> None:
    more = SupportSet((*support.slices, blobs(7)), support.class_names)
    again = iter_distill(more, replace(tiny, zoom="auto"), init_from=student)
    assert torch.equal(_weights(again.result()), _weights(student))
    assert again.preprocess == student.preprocess
    list(again)
    assert not torch.equal(_weights(again.result()), _weights(student))


def test_a_warm_start_keeps_the_pixel_size_and_follows_another(support, tiny) -> None:
    sized = replace(support, pixel_size=(0.5, 0.5))
    first = distill(sized, replace(tiny, steps=1))
    assert iter_distill(support, tiny, init_from=first).result().pixel_size == (0.5, 0.5)
    finer = iter_distill(replace(support, pixel_size=(0.25, 0.25)), tiny, init_from=first)
    assert finer.preprocess.zoom == "1/2"
    assert first.preprocess.zoom == "1"


def test_a_warm_start_needs_the_same_classes(support, student, tiny) -> None:
    other = SupportSet(support.slices, ("cell",))
    with pytest.raises(SupportSetError, match=r"blob.*cell"):
        iter_distill(other, tiny, init_from=student)


def test_published_forms_train_too(support, tiny) -> None:
    settings = replace(tiny, student="published", decoder="published", teacher="published", loss="published", steps=2)
    model = distill(support, settings)
    assert np.isfinite(model.predict(support.slices[0].image).probabilities).all()


def test_the_store_of_features_keeps_to_its_memory(support) -> None:
    backbone = load_backbone()
    cache = FeatureCache(backbone, choose_device("cpu"), memory=2_000_000, limit=1000)
    sampler = CropSampler(support, fit_preprocess([s.image for s in support.slices]), 64, Augmentation())
    steps = list(cache.iter_fill(sampler, [0, 1, 2], np.random.default_rng(0)))
    assert [step.index for step in steps] == [3 * (i + 1) for i in range(len(steps))]
    assert steps[-1].index == steps[-1].total == len(cache)
    assert 6 <= len(cache) < 60
    assert sum(f.nbytes for f in cache.features) <= 2_000_000


def test_stored_features_are_those_of_the_view(support) -> None:
    cache = FeatureCache(load_backbone(), choose_device("cpu"), memory=1 << 30, limit=4)
    sampler = CropSampler(support, fit_preprocess([s.image for s in support.slices]), 64, PLAIN)
    view = sampler.cut(0, np.random.default_rng(0))
    cache.add(view)
    stored, fresh = cache.pyramid([0]), cache.encode([view])
    for a, b in zip(stored.skips, fresh.skips, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-3)


def test_views_keep_image_and_labels_together(support) -> None:
    sampler = CropSampler(support, fit_preprocess([s.image for s in support.slices]), 64, Augmentation(noise=0))
    rng = np.random.default_rng(0)
    for _ in range(20):
        view = sampler.cut(int(rng.integers(3)), rng)
        inside, outside = view.image[0][view.labels == 1], view.image[0][view.labels == 0]
        assert view.image.shape == (3, 64, 64)
        assert not len(inside) or float(inside.mean()) > float(outside.mean()) + 0.1


@pytest.mark.parametrize(("zoom", "side"), [("1", 64), ("2", 96), ("4", 160)])
def test_views_are_no_larger_than_the_longest_slice_needs(zoom: str, side: int) -> None:
    """A plane of 40 px is segmented with the plane's border around it; views must show it so."""
    small = SupportSet((blobs(0, 40), blobs(1, 24)))
    sampler = CropSampler(small, fit_preprocess([s.image for s in small.slices], zoom=zoom), 256, Augmentation())
    assert sampler.cut(0, np.random.default_rng(0)).image.shape == (3, side, side)


def test_a_slice_smaller_than_a_view_is_mirrored_and_the_margin_not_annotated() -> None:
    small = SupportSet((blobs(0, 40),))
    sampler = CropSampler(small, fit_preprocess([small.slices[0].image]), 64, PLAIN)
    view = sampler.cut(0, np.random.default_rng(0))
    assert int((view.labels != IGNORE).sum()) == 40 * 40
    assert float(view.image[:, 0].std()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps is -1; give a whole number from 0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"method": "magic"}, "method is 'magic'; choose joint"),
        ({"crop_size": 100}, "crop_size is 100; give a multiple of 32"),
        ({"seed": -1}, "seed"),
        ({"device": "tpu"}, "device"),
        ({"zoom": Fraction(9)}, "zoom 9"),
        ({"invert_prob": 2.0}, "invert_prob is 2.0; give auto or a probability"),
        ({"backbone": "vgg"}, "vgg"),
    ],
)
def test_bad_settings_say_what_is_allowed(support, tiny, change, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        iter_distill(support, replace(tiny, **change))


def test_every_setting_explains_itself() -> None:
    from dataclasses import fields

    for setting in fields(DistillSettings):
        assert setting.metadata["label"]
        assert setting.metadata["help"].endswith(".")


@pytest.mark.parametrize("method", ["joint", "two-stage", "direct"])
def test_half_precision_arithmetic_trains_and_answers(support, tiny, method: str) -> None:
    settings = replace(tiny, method=method, precision="bfloat16", steps=2)
    run = iter_distill(support, settings)
    list(run)
    for model in (run.result(), run.teacher(), unrefined_teacher(support, settings, kind="prototype")):
        assert np.isfinite(model.predict(support.slices[0].image).probabilities).all()


def test_a_two_stage_run_has_no_student_before_its_second_stage(support, tiny) -> None:
    run = iter_distill(support, replace(tiny, method="two-stage", steps=2))
    next(step for step in run if not step.is_preparation)
    with pytest.raises(NoStudentYetError, match="after 1 steps"):
        run.result()
    list(run)
    record = run.result().training
    assert record["steps"] == record["best_step"] == 4


def test_a_thinned_grid_of_views_covers_the_slice_and_shows_every_class() -> None:
    labels = np.zeros((640, 640), np.uint8)
    labels[600:, 600:] = 1
    image = np.random.default_rng(0).integers(0, 255, labels.shape, dtype=np.uint8)
    support = SupportSet((AnnotatedSlice(image, labels),))
    views = CropSampler(support, fit_preprocess([image]), 64, PLAIN).grid(0, 8)
    assert len(views) == 8
    assert len({v.box[1] for v in views}) > 3
    assert len({v.box[0] for v in views}) > 3
    assert any((v.labels == 1).any() for v in views)


def test_a_student_keeps_small_samples_of_every_slice(tiny) -> None:
    slices = tuple(blobs(i, 200) for i in range(3))
    samples = distill(SupportSet(slices, ("blob",)), replace(tiny, crop_size=128)).samples
    assert (samples.shape, samples.dtype) == ((6, 3, 96, 96), np.uint8)
    assert len(np.unique(samples.reshape(6, -1), axis=0)) == 6
    assert samples.max() > 200
    assert distill(SupportSet(slices[:1], ("blob",)), tiny).samples.shape == (8, 3, 64, 64)


def test_the_halo_is_measured_where_the_objects_are(tiny, monkeypatch) -> None:
    """Most pictures are empty in a corner; there no halo could be seen to be wide enough."""
    parts = []
    monkeypatch.setattr(Segmenter, "fit_halo", lambda self, image: parts.append(image))
    image, labels = np.zeros((1300, 900), np.uint8), np.zeros((1300, 900), np.uint8)
    piece = blobs(0)
    h, w = piece.labels.shape
    image[1000 : 1000 + h, 600 : 600 + w], labels[1000 : 1000 + h, 600 : 600 + w] = piece.image, piece.labels
    distill(SupportSet((AnnotatedSlice(image, labels),)), tiny)
    assert [part.shape for part in parts] == [(576, 576)]
    assert parts[0].sum() == piece.image.sum()


@pytest.mark.parametrize("slices", [1, 5, 8, 30])
def test_a_warm_start_takes_a_fifth_of_the_steps(slices: int) -> None:
    assert auto_steps(5, again=True) == 60
    assert auto_steps(slices, again=True) == auto_steps(slices) // 5
