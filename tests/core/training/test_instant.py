"""The instant model: it follows every stroke, and encodes nothing twice."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from distillfss_core.errors import ImageError, NoStudentYetError, SupportSetError
from distillfss_core.metrics import evaluate
from distillfss_core.nn.backbones import Backbone
from distillfss_core.nn.features import FeaturePyramid
from distillfss_core.segmentation.lazy import sample_volume, segment_lazy
from distillfss_core.settings import DistillSettings
from distillfss_core.training import instant
from distillfss_core.training.instant import ContentCache, InstantModel
from distillfss_core.types import IGNORE, AnnotatedSlice
from distillfss_core.volumes.volume import open_volume
from pictures import blobs


@dataclass
class Bytes:
    nbytes: int


def scribbled(seed: int, *, classes: int = 1, rows: int = 7, size: int = 96) -> AnnotatedSlice:
    """Every n-th row of a picture is annotated."""
    whole = blobs(seed, size, classes=classes)
    labels = np.full_like(whole.labels, IGNORE)
    labels[::rows] = whole.labels[::rows]
    return replace(whole, labels=labels)


def without(labeled: AnnotatedSlice, label: int) -> AnnotatedSlice:
    return replace(labeled, labels=np.where(labeled.labels == label, IGNORE, labeled.labels).astype(np.uint8))


def iou(model: InstantModel, *slices: AnnotatedSlice) -> float:
    pairs = [(model.predict_labels(s.image), s.labels) for s in slices]
    return float(np.mean(evaluate(pairs, len(model.class_names)).pooled.iou))


@pytest.fixture(scope="module")
def fresh(tiny: DistillSettings) -> InstantModel:
    return InstantModel(blobs(0).image, tiny)


@pytest.fixture
def model(fresh: InstantModel) -> InstantModel:
    """One that has learned nothing, with a cache of its own; loading a backbone takes a second."""
    made = copy.copy(fresh)
    made.cache = ContentCache()
    return made


@pytest.fixture
def encoded(model: InstantModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of all that goes through the backbone."""
    shapes: list[tuple[int, ...]] = []
    forward = Backbone.forward

    def counting(self: Backbone, x: torch.Tensor):
        shapes.append(tuple(x.shape[-2:]))
        return forward(self, x)

    monkeypatch.setattr(Backbone, "forward", counting)
    return shapes


def test_what_is_in_the_cache_is_not_made_again():
    cache, made = ContentCache(100), []
    for key in (b"a", b"b", b"a", b"a"):
        cache.get(key, lambda key=key: made.append(key) or Bytes(30))
    assert made == [b"a", b"b"]
    assert (cache.hits, cache.misses, cache.nbytes, len(cache)) == (2, 2, 60, 2)


def test_the_least_recently_used_leaves_a_cache_that_is_full():
    cache, made = ContentCache(100), []

    def ask(key: bytes, size: int = 40) -> None:
        cache.get(key, lambda: made.append(key) or Bytes(size))

    for key in (b"a", b"b", b"a", b"c"):
        ask(key)
    assert (cache.nbytes, len(cache)) == (80, 2)
    ask(b"a")
    assert made == [b"a", b"b", b"c"]
    ask(b"b")
    assert made == [b"a", b"b", b"c", b"b"]


def test_a_value_larger_than_the_cache_is_returned_and_leaves_the_others():
    cache = ContentCache(100)
    cache.get(b"a", lambda: Bytes(60))
    assert cache.get(b"b", lambda: Bytes(101)).nbytes == 101
    assert (cache.nbytes, len(cache)) == (60, 1)


@pytest.mark.parametrize("classes", [1, 2])
def test_scribbles_on_one_slice_segment_another(model, classes):
    model.fit([scribbled(0, classes=classes)], ("bright", "dark")[:classes])
    assert iou(model, blobs(10, classes=classes)) > 0.6


def test_a_stroke_encodes_nothing_again(model, encoded):
    model.fit([scribbled(0), scribbled(1)])
    model.predict(blobs(0).image)
    assert encoded == [(96, 96)] * 2
    model.fit([scribbled(0, rows=6), scribbled(1)])
    model.predict(blobs(0).image)
    assert encoded == [(96, 96)] * 2
    model.predict(blobs(2).image)
    assert len(encoded) == 3


def test_features_are_kept_in_half_precision_and_intensities_are_not(model):
    model.fit([scribbled(0)])
    kept = next(value for value in model.cache._values.values() if isinstance(value, FeaturePyramid))
    *stages, pixels, around = (stage[-1].dtype for stage in kept.stages)
    assert set(stages) == {torch.float16}
    assert pixels == around == torch.float32


def test_without_memory_everything_is_encoded_again(model, encoded):
    model.cache = ContentCache(1000)
    for _ in range(2):
        model.fit([scribbled(0)])
        model.predict(blobs(0).image)
    assert len(encoded) == 4
    assert model.cache.nbytes == 0


def test_a_fit_from_the_last_one_predicts_as_one_from_nothing(model):
    warm = model
    for rows in (20, 13, 9, 7, 5):
        slices = [scribbled(0, rows=rows), scribbled(1, rows=rows + 1)]
        warm.fit(slices)
        cold = copy.copy(warm)
        cold.probe = None
        cold.fit(slices)
        labels = [each.predict_labels(blobs(10, 256).image) for each in (warm, cold)]
        assert (labels[0] == labels[1]).mean() >= 0.99
    assert 0 < labels[0].mean() < 1


def test_it_goes_on_from_the_last_fit(model, monkeypatch):
    model.fit([scribbled(0)])
    monkeypatch.setattr(instant, "WARM_ITERATIONS", 1)
    model.fit([scribbled(0)])
    assert iou(model, blobs(10)) > 0.6
    model.probe = model.probe.__class__(model.backbone.spec, 1, 1)  # from zero one step is too few
    model.fit([scribbled(0)])
    assert iou(model, blobs(10)) < 0.6


def test_the_same_strokes_give_the_same_model(model, fresh):
    again = copy.copy(fresh)
    again.cache = ContentCache(0)
    for each in (model, again):
        each.fit([scribbled(0, rows=20)])
        each.fit([scribbled(0), scribbled(1)])
    image = blobs(10).image
    np.testing.assert_array_equal(model.predict(image).probabilities, again.predict(image).probabilities)
    assert model.digest() == again.digest()


def test_a_class_that_was_just_added_is_predicted_once_it_is_painted(model):
    both = scribbled(0, classes=2)
    model.fit([without(both, 2)], ("bright",))
    model.fit([without(both, 2)], ("bright", "dark"))
    prediction = model.predict(both.image)
    assert prediction.probabilities.shape == (3, 96, 96)
    assert not prediction.probabilities[2].any()
    np.testing.assert_allclose(prediction.probabilities.sum(0), 1, atol=1e-5)
    assert set(np.unique(prediction.labels)) == {0, 1}
    model.fit([both], ("bright", "dark"))
    assert iou(model, blobs(10, classes=2)) > 0.6


def test_a_class_whose_last_stroke_was_erased_is_predicted_no_more(model):
    both = scribbled(0, classes=2)
    model.fit([both], ("bright", "dark"))
    assert set(np.unique(model.predict_labels(both.image))) == {0, 1, 2}
    model.fit([without(both, 1)], ("bright", "dark"))
    prediction = model.predict(both.image)
    assert set(np.unique(prediction.labels)) == {0, 2}
    assert not prediction.probabilities[1].any()
    alone = copy.copy(model)
    alone.probe = None
    renumbered = without(both, 1)
    alone.fit([replace(renumbered, labels=np.where(renumbered.labels == 2, 1, renumbered.labels).astype(np.uint8))])
    assert (alone.predict_labels(both.image) == (prediction.labels == 2)).mean() >= 0.99


def test_the_rest_of_a_plane_that_is_mostly_annotated_is_background(model):
    whole = blobs(0, classes=2)
    bright = replace(whole, labels=np.where(whole.image < 140, 1, IGNORE).astype(np.uint8))
    assert (bright.labels == 1).mean() > 0.5
    model.fit([bright])
    labels = model.predict_labels(whole.image)
    assert ((labels == 1) == (whole.image < 140)).mean() > 0.9
    few = np.full_like(bright.labels, IGNORE)
    few[:3] = bright.labels[:3]
    with pytest.raises(SupportSetError, match="no pixel is labeled background; scribble some, or label half"):
        model.fit([replace(bright, labels=few)])
    assert np.array_equal(model.predict_labels(whole.image), labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no pixel of a class is labeled; paint an object"),
        ([0, IGNORE], "no pixel of a class is labeled; paint an object"),
        ([0, 1, 2], "label 2 has no class name; there are 1 classes"),
    ],
)
def test_what_cannot_be_learned_from_is_an_error_of_one_line(model, labels, message):
    image = np.zeros((32, 32), np.uint8)
    painted = np.resize(np.array(labels or [0], np.uint8), image.shape)
    with pytest.raises(SupportSetError, match=message):
        model.fit([AnnotatedSlice(image, painted)] if labels else [])


def test_a_model_that_was_not_fitted_predicts_nothing(model):
    with pytest.raises(NoStudentYetError, match="learned nothing yet; fit it"):
        model.predict(blobs(0).image)


def test_a_slice_with_other_channels_is_an_error(model):
    with pytest.raises(ImageError, match="2 channel"):
        model.fit([AnnotatedSlice(np.zeros((32, 32, 2), np.uint8), np.eye(32, dtype=np.uint8))])


def test_pixels_of_the_sample_that_are_not_finite_do_not_count(fresh, tiny):
    sample = blobs(0).image.astype(np.float32)
    with_holes = np.concatenate([np.full_like(sample, np.nan), sample])
    assert InstantModel(with_holes, tiny).preprocess.fitted == fresh.preprocess.fitted
    with pytest.raises(ImageError, match="sample: the image is empty"):
        InstantModel(with_holes[:96], tiny)


@pytest.mark.parametrize("zoom", ["1/2", "2"])
def test_it_learns_and_predicts_at_the_zoom_of_its_settings(tiny, zoom, monkeypatch):
    from fractions import Fraction

    model = InstantModel(blobs(0).image, replace(tiny, zoom=Fraction(zoom)))
    model.fit([scribbled(0, rows=3), scribbled(1, rows=3)])
    assert iou(model, blobs(10)) > 0.5


def test_color_is_learned_from(tiny):
    def colored(seed: int, rows: int = 1) -> AnnotatedSlice:
        rng = np.random.default_rng(seed)
        labels = blobs(seed).labels
        image = np.where(labels[..., None] == 1, (200, 60, 60), (60, 200, 60)) + rng.normal(0, 8, (96, 96, 3))
        annotated = np.full_like(labels, IGNORE)
        annotated[::rows] = labels[::rows]
        return AnnotatedSlice(image.clip(0, 255).astype(np.uint8), annotated)

    model = InstantModel(colored(0).image, tiny)
    model.fit([colored(0, 7)])
    assert iou(model, colored(10)) > 0.8


def test_a_plane_of_many_tiles_is_encoded_once_whether_learned_from_or_predicted(model, encoded, monkeypatch):
    monkeypatch.setattr(InstantModel, "tile", 96)
    model.halo = 32
    labeled = scribbled(3, size=256)
    model.fit([labeled])
    learned = len(encoded)
    assert learned == 9
    prediction = model.predict(labeled.image, tile=model.tile)
    assert len(encoded) == learned
    whole = model.predict(labeled.image)
    assert (prediction.labels == whole.labels).mean() > 0.99


def test_of_many_tiles_a_few_are_learned_from_and_those_of_every_class(model, encoded, monkeypatch):
    monkeypatch.setattr(InstantModel, "tile", 32)
    monkeypatch.setattr(instant, "WINDOWS", 5)
    model.halo = 32
    labels = np.zeros((160, 160), np.uint8)
    labels[97:100, 33:36], labels[:3, 150:] = 1, 2
    model.fit([AnnotatedSlice(blobs(0, 160).image, labels)], ("rare", "rarer"))
    assert len(encoded) == 5
    assert model.predict(blobs(0, 160).image).probabilities.any((1, 2)).all()  # zero for a class not learned from


def test_pixels_are_drawn_from_every_class_and_stay_after_a_stroke(monkeypatch):
    monkeypatch.setattr(instant, "POINTS", 50)
    labels = np.zeros((80, 80), np.uint8)
    labels[20:60, 20:60] = 1
    halves = [(slice(0, 40), slice(0, 80)), (slice(40, 80), slice(0, 80))]
    first, second = (np.concatenate(instant._draw_pixels(each, halves, 1, 0)) for each in (labels, labels.copy()))
    np.testing.assert_array_equal(first, second)
    assert np.bincount(labels[tuple(first.T)]).tolist() == [50, 50]
    stroke = labels.copy()
    stroke[:3, :20] = 1
    drawn = set(map(tuple, np.concatenate(instant._draw_pixels(stroke, halves, 1, 0)).tolist()))
    assert len(drawn & set(map(tuple, first.tolist()))) > 90


def test_a_volume_is_segmented_lazily(tiny):
    stack = np.stack([blobs(seed).image for seed in range(4)])
    volume = open_volume(stack)
    model = InstantModel(sample_volume(volume)[0], tiny)
    model.fit([scribbled(0)])
    outputs = segment_lazy(volume, model, what="probabilities", tile=model.tile)
    np.testing.assert_array_equal(outputs[:, 2].compute(), model.predict(stack[2]).probabilities)


def test_a_fit_that_is_stopped_changes_nothing_and_goes_on_later(fresh, model, encoded, monkeypatch):
    monkeypatch.setattr(InstantModel, "tile", 32)
    model.halo = 32
    slices = [scribbled(0, size=160), scribbled(1, size=160)]
    parts = model.iter_fit(slices)
    for _ in range(3):
        next(parts)
    assert len(encoded) == 3
    parts.close()
    with pytest.raises(NoStudentYetError):
        model.predict(slices[0].image)
    model.fit(slices)
    whole = len(encoded)
    assert whole > 3
    assert list(model.iter_fit(slices)) == []  # all is stored
    again = copy.copy(fresh)
    again.cache, again.halo = ContentCache(), 32
    again.fit(slices)
    assert len(encoded) == 2 * whole  # so none was encoded twice before
    assert again.probe.state_dict().keys() == model.probe.state_dict().keys()


def test_a_stroke_encodes_no_other_slice_again_where_features_of_all_have_no_room(model, encoded, monkeypatch):
    monkeypatch.setattr(instant, "POINTS", 5)
    slices = [scribbled(seed) for seed in range(6)]
    model.fit(slices[:1])
    model.cache = ContentCache(model.cache.nbytes * 5 // 2)
    model.fit(slices)
    before = len(encoded)
    model.fit([*slices[:-1], scribbled(5, rows=6)])
    assert len(encoded) <= before + 1


def test_features_of_many_parts_leave_those_of_the_plane_on_screen(model, encoded, monkeypatch):
    monkeypatch.setattr(instant, "POINTS", 5)
    model.fit([scribbled(0)])
    model.cache = ContentCache(model.cache.nbytes * 5 // 2)
    on_screen = blobs(20).image
    model.predict(on_screen)
    model.fit([scribbled(seed) for seed in range(8)])
    before = len(encoded)
    model.predict(on_screen)
    assert len(encoded) == before


def test_a_first_answer_learns_from_two_parts_of_each_slice_and_the_rest_follows(model, encoded, monkeypatch):
    monkeypatch.setattr(InstantModel, "tile", 32)
    model.halo = 32
    slices = [scribbled(seed, size=128) for seed in range(3)]
    assert model.takes_long(slices)
    assert len(list(model.iter_fit(slices, quickly=True))) == 3 * 2
    assert iou(model, blobs(10)) > 0.5
    model.fit(slices)
    assert len(encoded) >= 3 * 16
    assert not model.takes_long(slices)
    before = len(encoded)
    stroke = [*slices[:2], scribbled(2, size=128, rows=6)]
    assert not model.takes_long(stroke)  # its parts are stored
    assert list(model.iter_fit(stroke, quickly=True)) == []
    assert len(encoded) == before


def test_drawn_pixels_are_the_first_of_each_class_in_one_order():
    rng = np.random.default_rng(3)
    labels = (rng.random((300, 300)) < 0.4).astype(np.uint8)
    labels[:2, :9] = 2
    parts = [(slice(0, 150), slice(0, 300)), (slice(150, 300), slice(0, 300))]
    drawn = np.concatenate(instant._draw_pixels(labels, parts, 2, seed=1))
    order = np.random.default_rng(1).random(labels.shape, np.float32)
    for value in range(3):
        own = np.flatnonzero(labels == value)
        first = own[np.argsort(order.ravel()[own])][: instant.POINTS]
        assert set(first) == {y * 300 + x for y, x in drawn if labels[y, x] == value}
