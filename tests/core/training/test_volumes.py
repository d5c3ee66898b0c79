"""Annotated planes of several volumes as one support set."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from distillfss_core.errors import ImageError, IntensityWarning, SupportSetError
from distillfss_core.metrics import evaluate
from distillfss_core.models.student import StudentModel
from distillfss_core.samples import generate_sample
from distillfss_core.segmentation.lazy import sample_volume, segment_lazy
from distillfss_core.settings import DistillSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.distillation import distill
from distillfss_core.training.volumes import VolumeSlices, join_volumes, match_volumes
from distillfss_core.types import AnnotatedSlice
from distillfss_core.volumes.volume import open_volume

LEARNED, JUDGED = (1, 3, 6), (2, 5, 7)
PROBE = DistillSettings(method="probe", zoom=Fraction(1), device="cpu")
FIRST = generate_sample("nuclei", planes=8, size=128, seed=0)
SECOND = generate_sample("nuclei", planes=8, size=128, seed=1)


def slices_of(image: np.ndarray, labels: np.ndarray, planes: Sequence[int] = LEARNED) -> list[AnnotatedSlice]:
    return [AnnotatedSlice(image[z], (labels[z] > 0).astype(np.uint8), f"plane {z}") for z in planes]


def volume_of(name: str, image: np.ndarray, labels: np.ndarray, **options: object) -> VolumeSlices:
    volume = open_volume(image, axes="zyxc"[: image.ndim], channel="all" if image.ndim == 4 else None)
    return VolumeSlices(name, slices_of(image, labels), sample=sample_volume(volume), **options)  # type: ignore[arg-type]


def iou(model: StudentModel, image: np.ndarray, labels: np.ndarray) -> float:
    outputs = segment_lazy(open_volume(image), model)
    pairs = [(outputs[z].compute(), (labels[z] > 0).astype(np.uint8)) for z in JUDGED]
    return float(evaluate(pairs, 1).iou)


@pytest.mark.parametrize(("gain", "offset"), [(8, 0), (0.5, 3000), (4, -100)])
def test_a_copy_of_a_volume_on_another_scale_is_brought_back_to_its_own(gain: float, offset: float) -> None:
    copied = (FIRST.image * float(gain) + offset).clip(0).astype(np.uint16)
    joined = join_volumes([volume_of("a", FIRST.image, FIRST.labels), volume_of("b", copied, FIRST.labels)])
    assert joined.planes_of_one_volume
    assert {s.image.dtype for s in joined.slices} == {np.dtype(np.uint16)}
    for own, other in zip(joined.slices[:3], joined.slices[3:], strict=True):
        np.testing.assert_allclose(other.image, own.image, rtol=0.02, atol=6)  # of a range of 700
        np.testing.assert_array_equal(other.labels, own.labels)


def test_whole_volumes_are_compared_where_their_slices_differ() -> None:
    copied = (FIRST.image * 8).astype(np.uint16)
    one, other = (slices_of(image, FIRST.labels, planes) for image, planes in ((FIRST.image, [1]), (copied, [6])))
    samples = [sample_volume(open_volume(image)) for image in (FIRST.image, copied)]
    joined = join_volumes([VolumeSlices("a", one, sample=samples[0]), VolumeSlices("b", other, sample=samples[1])])
    np.testing.assert_allclose(joined.slices[1].image, FIRST.image[6], rtol=0.01, atol=2)


def test_a_volume_on_the_scale_of_the_first_stays_as_it_is() -> None:
    volumes = [volume_of("a", FIRST.image, FIRST.labels), volume_of("b", SECOND.image, SECOND.labels)]
    joined = join_volumes(volumes)
    given = [s for volume in volumes for s in volume.slices]
    assert all(s is before for s, before in zip(joined.slices, given, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("gain", [8, 0.3])
def test_a_student_of_two_volumes_of_different_brightness_is_as_good_on_each_as_one_of_its_own(gain: float) -> None:
    other = (SECOND.image * gain).astype(np.uint16)
    alone = [
        iou(distill(SupportSet(slices_of(image, labels), planes_of_one_volume=True), PROBE), image, labels)
        for image, labels in ((FIRST.image, FIRST.labels), (other, SECOND.labels))
    ]
    joined = join_volumes([volume_of("a", FIRST.image, FIRST.labels), volume_of("b", other, SECOND.labels)])
    model = distill(joined, PROBE)
    both = [iou(model, FIRST.image, FIRST.labels), iou(model, other, SECOND.labels)]
    assert min(alone) > 0.8
    assert min(np.subtract(both, alone)) > -0.03, (both, alone)


def test_colors_share_one_scale() -> None:
    colors = np.stack([FIRST.image, FIRST.image // 2, FIRST.image // 4], -1).astype(np.float32)
    joined = join_volumes([volume_of("a", colors, FIRST.labels), volume_of("b", colors * 3, FIRST.labels)])
    assert {s.image.dtype for s in joined.slices} == {np.dtype(np.float32)}
    np.testing.assert_allclose(joined.slices[3].image, joined.slices[0].image, rtol=0.02, atol=6)


def test_hounsfield_units_are_never_mapped() -> None:
    ct = generate_sample("nodules", planes=8, size=96)
    volumes = [volume_of("a", ct.image, ct.labels), volume_of("b", ct.image + 1024, ct.labels)]
    with pytest.warns(IntensityWarning, match="b: .* no Hounsfield units"):
        joined = join_volumes(volumes)
    np.testing.assert_array_equal(joined.slices[3].image, ct.image[1] + 1024)


def test_one_volume_is_its_own_support_set() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        joined = join_volumes([volume_of("a", FIRST.image, FIRST.labels, pixel_size=(0.5, 0.5)), VolumeSlices("b", ())])
    np.testing.assert_array_equal([s.image for s in joined.slices], FIRST.image[list(LEARNED)])
    assert joined.pixel_size == (0.5, 0.5)


def test_pixels_may_differ_by_a_quarter() -> None:
    first = volume_of("a.tif", FIRST.image, FIRST.labels, pixel_size=(0.4, 0.4))
    near = volume_of("b.tif", SECOND.image, SECOND.labels, pixel_size=(0.49, 0.49))
    far = volume_of("b.tif", SECOND.image, SECOND.labels, pixel_size=(0.3, 0.3))
    unknown = volume_of("c.tif", SECOND.image, SECOND.labels)
    assert join_volumes([unknown, first, near]).pixel_size == (0.4, 0.4)
    with pytest.raises(SupportSetError, match=r"b\.tif: has pixels of 0\.3 x 0\.3 micrometers, a\.tif of 0\.4 x 0\.4"):
        join_volumes([first, unknown, far])


def test_volumes_of_other_channels_and_no_slices_are_refused() -> None:
    colors = np.stack([FIRST.image] * 2, -1)
    with pytest.raises(ImageError, match="b: has 2"):
        join_volumes([volume_of("a", FIRST.image, FIRST.labels), volume_of("b", colors, FIRST.labels)])
    with pytest.raises(SupportSetError, match="empty"):
        join_volumes([VolumeSlices("a", ())])


def test_a_first_volume_without_slices_gives_its_scale_by_its_sample() -> None:
    bright = (SECOND.image * 8.0).astype(np.float32)
    own = VolumeSlices("own", (), sample=sample_volume(open_volume(FIRST.image)))
    alone = match_volumes([own, volume_of("bright", bright, SECOND.labels)])
    with_own = match_volumes(
        [VolumeSlices("own", slices_of(FIRST.image, FIRST.labels), sample=own.sample),
         volume_of("bright", bright, SECOND.labels)]
    )  # fmt: skip
    assert {s.image.dtype for s in alone} == {FIRST.image.dtype}
    np.testing.assert_array_equal([s.image for s in alone], [s.image for s in with_own[3:]])
    np.testing.assert_allclose(alone[0].image, SECOND.image[1], rtol=0.05, atol=20)  # of a range of 700
    assert len(join_volumes([own, volume_of("bright", bright, SECOND.labels)]).slices) == 3
    assert match_volumes([own]) == []
