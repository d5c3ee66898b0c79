"""Images without labels: which are read, and what the student learns from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch

from distillfss_core.errors import ImageError, InputFileError, SettingsError, WeightsUnavailableError
from distillfss_core.metrics import evaluate
from distillfss_core.models.preprocess import Limits, fit_preprocess
from distillfss_core.models.segmenter import Segmenter
from distillfss_core.support.support_set import SupportSet
from distillfss_core.support.unlabeled import load_unlabeled
from distillfss_core.training import distill, distillation, iter_distill
from distillfss_core.training import unlabeled as module
from distillfss_core.training.crops import PLAIN, CropSampler
from distillfss_core.training.unlabeled import check_unlabeled, iter_segment_images
from distillfss_core.types import IGNORE, AnnotatedSlice, GeneratorRun, UnlabeledImage, finish
from distillfss_core.volumes.volume import open_volume
from pictures import blobs

OTHERS = [blobs(seed).image for seed in range(20, 24)]


class Oracle(Segmenter):
    """Knows the truth of the images that it was given."""

    def __init__(self, slices: list[AnnotatedSlice], like: Segmenter) -> None:
        self.slices, self.preprocess, self.class_names = slices, like.preprocess, like.class_names

    def predict_region(self, read, shape, region, limits, *, tile: int = 0) -> np.ndarray:
        image = read(*(slice(*side) for side in region))
        labels = next(s.labels for s in self.slices if np.array_equal(s.image, image))
        return np.eye(len(self.class_names) + 1, dtype=np.float32)[labels].transpose(2, 0, 1)


# -- the run -----------------------------------------------------------------------------------------------


def test_a_run_ends_with_the_images_without_labels(support, tiny) -> None:
    run = iter_distill(support, tiny, unlabeled=OTHERS)
    steps = list(run)
    stages = list(dict.fromkeys(step.stage for step in steps))
    assert stages[-3:] == ["joint", "label", "unlabeled"]
    assert not any(step.is_preparation for step in steps if step.stage in ("label", "unlabeled"))
    assert [step.index for step in steps if step.stage == "unlabeled"] == [1, 2]
    assert all("unlabeled" in step.losses for step in steps if step.stage == "unlabeled")
    card = run.result().training
    assert (card["unlabeled"], card["steps"]) == (len(OTHERS), 6)
    assert "foundation" not in card


@pytest.mark.parametrize("method", ["two-stage", "direct"])
def test_other_methods_use_them_too(support, tiny, method: str) -> None:
    stages = [s.stage for s in iter_distill(support, replace(tiny, method=method), unlabeled=OTHERS)]
    assert stages[-1] == "unlabeled"


def test_without_such_images_nothing_changes(support, tiny, student) -> None:
    again = distill(support, tiny, unlabeled=[])
    for name, value in student.head.state_dict().items():
        assert torch.equal(value, again.head.state_dict()[name]), name
    assert "unlabeled" not in again.training


def test_a_run_that_is_stopped_while_it_segments_them_keeps_the_student(support, tiny, student) -> None:
    run = iter_distill(support, tiny, unlabeled=OTHERS)
    next(step for step in run if step.stage == "label")
    run.close()
    for name, value in student.head.state_dict().items():
        assert torch.equal(value, run.result().head.state_dict()[name]), name


def test_the_student_learns_what_the_ensemble_knows(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    # the supports show bright blobs only; in the images without labels the blobs are dark
    support = SupportSet(tuple(blobs(i) for i in range(3)), ("blob",))
    dark = [AnnotatedSlice(255 - s.image, s.labels) for s in map(blobs, range(30, 34))]
    settings = replace(tiny, steps=80, crops=24, invert_prob=0.0, probe="none")

    def ious(model) -> float:
        return evaluate([(model.predict_labels(s.image), s.labels) for s in dark], 1).iou

    before = ious(distill(support, settings))
    segmented = module.iter_segment_images
    monkeypatch.setattr(
        "distillfss_core.training.distillation.iter_segment_images",
        lambda images, models, *rest: segmented(images, [Oracle(dark, models[0])], *rest),
    )
    after = ious(distill(support, settings, unlabeled=[s.image for s in dark]))
    assert before < 0.2
    assert after > 0.4


def test_a_probe_on_a_foundation_model_joins_the_student(support, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from distillfss_core.nn.backbones import load_backbone

    with pytest.warns(UserWarning, match="random weights"):
        stand_in = load_backbone("convnext_atto", "random")
    monkeypatch.setattr(distillation, "load_backbone", lambda name: stand_in)
    asked: list[int] = []
    segmented = module.iter_segment_images

    def note(images, models, *rest):
        asked.append(len(models))
        return segmented(images, models, *rest)

    monkeypatch.setattr("distillfss_core.training.distillation.iter_segment_images", note)
    run = iter_distill(support, replace(tiny, foundation="convnext_atto"), unlabeled=OTHERS)
    steps = [step for step in run if step.stage == "foundation"]
    assert [step.index for step in steps] == [1, 2, 3]  # slices
    card = run.result().training
    assert (card["foundation"], card["foundation_weights"]) == ("convnext_atto", "random:0")
    assert asked == [2]


def test_what_cannot_be_used_is_refused_before_the_training(support, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def stages(**given) -> list[str]:
        seen = []
        for step in iter_distill(support, replace(tiny, **given), unlabeled=images):
            seen.append(step.stage)
            assert step.is_preparation
        return seen

    images = [*OTHERS, np.full((64, 64), np.nan, np.float32)]
    with pytest.raises(ImageError, match="image 4 without labels"):
        stages()
    images = [np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)]
    with pytest.raises(ImageError, match="image 0 without labels"):
        stages()
    images = OTHERS
    with pytest.raises(SettingsError, match="no backbone is called 'dino'"):
        stages(foundation="dino")

    def unavailable(name: str) -> None:
        raise WeightsUnavailableError("not here")

    monkeypatch.setattr(distillation, "load_backbone", unavailable)
    with pytest.raises(WeightsUnavailableError, match="not here"):
        stages(foundation="dinov2_base")


def test_of_many_images_a_dozen_are_used_and_of_large_ones_a_window(student) -> None:
    images = check_unlabeled([np.pad(OTHERS[i % 4], 100, mode="wrap") for i in range(30)], student.preprocess)
    made = finish(GeneratorRun(iter_segment_images(images, [student], 32, 0)))
    assert len(made.slices) == module.IMAGES
    assert {labeled.image.shape for labeled in made.slices} == {(64, 64)}


@pytest.mark.parametrize("scope", ["image", "volume"])
def test_a_window_has_the_limits_that_a_slice_would_have(scope: str) -> None:
    bright = blobs(3, size=512).image.astype(np.uint16) + 300
    bright[:128, :128] //= 8  # a window that shows this corner alone has another range
    support = SupportSet(tuple(blobs(i) for i in range(3)), ("blob",))
    dark = [s.image for s in support.slices]
    preprocess = fit_preprocess([*dark, bright], scope=scope)
    sample = bright[::2, ::2]
    (image,) = check_unlabeled([UnlabeledImage(bright[:128, :128], sample)], preprocess)

    class Blind(Oracle):
        def predict_region(self, read, shape, region, limits, *, tile: int = 0) -> np.ndarray:
            seen.append(limits)
            return np.stack([np.full(shape, 0.9, np.float32), np.full(shape, 0.1, np.float32)])

    seen: list[Limits] = []
    model = Blind([], SimpleNamespace(preprocess=preprocess, class_names=("blob",)))
    made = finish(GeneratorRun(iter_segment_images([image], [model], 32, 0)))
    expected = preprocess.fitted if scope == "volume" else preprocess.sample_limits(sample)
    assert made.limits == seen == [expected]
    assert expected != preprocess.limits(bright[:128, :128]) or scope == "volume"
    sampler = CropSampler(made, preprocess, 64, PLAIN, limits=made.limits)
    shown = sampler.grid(0, 1)[0].image
    low, high = expected.low[0], expected.high[0]
    (y0, x0, y1, x1) = sampler.grid(0, 1)[0].box
    plain = (made.slices[0].image[y0:y1, x0:x1].astype(float) - low) / (high - low)
    np.testing.assert_allclose(shown[0].numpy(), plain.clip(0, 1), atol=1e-6)


def test_images_on_another_scale_are_brought_to_that_of_the_volume(student) -> None:
    slices = [blobs(i) for i in range(6)]
    preprocess = fit_preprocess([s.image for s in slices[:3]], scope="volume")
    model = Oracle([replace(s, image=s.image.astype(np.uint16) * 200) for s in slices[3:]], student)
    model.preprocess = preprocess
    images = check_unlabeled([s.image for s in model.slices], preprocess)
    made = finish(GeneratorRun(iter_segment_images(images, [model], 96, 0)))
    assert made.limits == [made.limits[0]] * 3  # one scale for all
    low, high = (side[0] / 200 for side in (made.limits[0].low, made.limits[0].high))
    assert low == pytest.approx(preprocess.fitted.low[0], abs=10)
    assert high == pytest.approx(preprocess.fitted.high[0], abs=10)


def test_pixels_of_which_the_ensemble_is_not_sure_are_not_labeled(student) -> None:
    class Torn(Oracle):
        def predict_region(self, read, shape, region, limits, *, tile: int = 0) -> np.ndarray:
            shares = np.linspace(0, 1, np.prod(shape), dtype=np.float32).reshape(shape)
            return np.stack([1 - shares, shares])

    images = check_unlabeled(OTHERS[:1], student.preprocess)
    (made,) = finish(GeneratorRun(iter_segment_images(images, [Torn([], student)], 64, 0))).slices
    shares = np.linspace(0, 1, OTHERS[0].size).reshape(OTHERS[0].shape)
    np.testing.assert_array_equal(made.labels == 0, shares < 0.35)
    np.testing.assert_array_equal(made.labels == 1, shares > 0.65)
    np.testing.assert_array_equal(made.labels == IGNORE, (shares > 0.35) & (shares < 0.65))


# -- which images are read ---------------------------------------------------------------------------------


def test_planes_of_a_volume_are_spread_and_none_is_annotated() -> None:
    planes = np.random.default_rng(0).integers(0, 255, (40, 16, 20), dtype=np.uint8)
    labels = np.zeros((16, 20), np.uint8)
    labels[4:9, 4:9] = 1
    annotated = SupportSet(tuple(AnnotatedSlice(planes[z], labels) for z in (0, 20, 39)))
    images = load_unlabeled(open_volume(planes), annotated, limit=8)
    where = [next(z for z in range(40) if np.array_equal(planes[z], image.pixels)) for image in images]
    assert len(where) == len(set(where)) == 8
    assert not {0, 20, 39} & set(where)
    assert max(where) - min(where) > 20
    part = load_unlabeled(open_volume(planes), annotated, limit=4, region=((10, 20), (None, None), (0, 8)))
    assert [image.pixels.shape for image in part] == [(16, 8)] * 4


@pytest.mark.parametrize("side", [3000, 9000])
def test_of_a_large_plane_a_window_is_read_with_a_sample_of_the_whole(side: int, support) -> None:
    plane = np.broadcast_to(np.arange(side, dtype=np.uint16), (3, side, side))  # each column has its own value
    (image,) = load_unlabeled(open_volume(plane), support, limit=1)
    assert image.pixels.shape == (2048, 2048)
    assert np.ptp(image.pixels) == 2047
    step = -(-side // 1024)
    np.testing.assert_array_equal(image.sample[0], np.arange(0, side, step))
    rows = -(-side // step)
    assert image.sample.shape[0] == rows if side**2 < 1 << 26 else rows * 0.7 < image.sample.shape[0] < rows


def test_a_folder_is_read_without_annotated_files_labels_and_images_of_other_channels(tmp_path: Path) -> None:
    slices = [blobs(seed) for seed in range(5)]
    for index, labeled in enumerate(slices):
        tifffile.imwrite(tmp_path / f"{index}.tif", labeled.image)
    tifffile.imwrite(tmp_path / "0_mask.tif", slices[0].labels)
    tifffile.imwrite(tmp_path / "color.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    (tmp_path / "notes.txt").write_text("not an image")
    annotated = SupportSet((slices[0],))
    images = load_unlabeled(tmp_path, annotated, leave_out=[tmp_path / "0_mask.tif"])
    assert len(images) == 4
    assert all(np.array_equal(image.pixels, s.image) for image, s in zip(images, slices[1:], strict=True))
    with pytest.raises(InputFileError, match="no such file or folder"):
        load_unlabeled(tmp_path / "nowhere", annotated)
