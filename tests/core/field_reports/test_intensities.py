"""Images whose intensities are unlike those that the student learned from."""

from __future__ import annotations

import csv
import json
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distillfss_core import (
    AnnotatedSlice,
    DistillSettings,
    IntensityWarning,
    StudentModel,
    SupportSet,
    compare_intensities,
    distill,
    generate_sample,
    iter_batch,
    open_volume,
    plan_batch,
    segment_lazy,
    segment_to_zarr,
)
from distillfss_core.cli.main import main
from pictures import soft_balls

pytestmark = pytest.mark.slow
QUICK = DistillSettings(steps=20, zoom=Fraction(1), crop_size=128, crops=16, device="cpu")
STACK, TRUTH = soft_balls()


def _student(stack: np.ndarray, labels: np.ndarray, *, same_volume: bool, steps: int = 20) -> StudentModel:
    slices = [AnnotatedSlice(plane, labels[z], f"plane {z}") for z, plane in enumerate(stack)]
    return distill(SupportSet(slices, planes_of_one_volume=same_volume), replace(QUICK, steps=steps))


@pytest.fixture(scope="module")
def of_volume() -> StudentModel:
    """A student of three planes of a 16-bit stack, with limits of the whole."""
    return _student(STACK[::2], TRUTH[::2], same_volume=True)


@pytest.fixture(scope="module")
def of_pictures() -> StudentModel:
    """A student of pictures on their own."""
    return _student(STACK[::2], TRUTH[::2], same_volume=False)


@pytest.fixture(scope="module")
def of_ct() -> StudentModel:
    """A student of CT in Hounsfield units."""
    sample = generate_sample("nodules", planes=6, size=96)
    return _student(sample.image[::2], (sample.labels[::2] > 0).astype(np.uint8), same_volume=True, steps=2)


@pytest.fixture
def student_file(of_volume: StudentModel, tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    of_volume.save(path)
    return path


def _iou(labels: np.ndarray, truth: np.ndarray) -> float:
    return float((labels & truth).sum() / (labels | truth).sum())


def _segment(model: StudentModel, source: object) -> np.ndarray:
    return np.asarray(segment_lazy(open_volume(source), model).compute(scheduler="synchronous"))


RESCALED = {
    "8 bit": (np.clip(STACK / 2500, 0, 1) * 255).astype(np.uint8),
    "float 0..1": (STACK / 65535).astype(np.float32),
    "offset": STACK + 2000,
    "12 bit in 16": STACK * 16,
    "very dark": STACK // 10,
    "signed": (STACK.astype(int) - 32768).astype(np.int16),
    "big-endian": (STACK * 2).astype(">u2"),
}


@pytest.fixture(scope="module")
def as_learned(of_volume: StudentModel) -> np.ndarray:
    return _segment(of_volume, STACK)


@pytest.mark.parametrize("kind", RESCALED)
def test_another_bit_depth_scale_or_offset(kind: str, of_volume: StudentModel, as_learned: np.ndarray) -> None:
    """A stack saved as 8 bit, as float 0..1 or recorded with an offset is segmented as the one that was learned."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", IntensityWarning)
        labels = _segment(of_volume, RESCALED[kind])
    assert _iou(as_learned, TRUTH) > 0.85
    assert abs(_iou(labels, TRUTH) - _iou(as_learned, TRUTH)) <= 0.01
    assert _iou(labels, as_learned) > 0.98


def test_every_command_segments_a_rescaled_stack(student_file: Path, as_learned: np.ndarray, tmp_path: Path) -> None:
    """The 8-bit copy of a stack is segmented by segment (files and volumes) and batch as the stack itself."""
    (tmp_path / "in").mkdir()
    image = tmp_path / "in" / "a.tif"
    tifffile.imwrite(image, RESCALED["8 bit"], photometric="minisblack", metadata={"axes": "ZYX"})
    flat, volume = tmp_path / "o.tif", tmp_path / "o.ome.zarr"
    assert main(["segment", str(image), "-m", str(student_file), "-o", str(flat)]) == 0
    assert main(["segment", str(image), "-m", str(student_file), "-o", str(volume)]) == 0
    assert main(["batch", str(tmp_path / "in"), "-m", str(student_file), "-o", str(tmp_path / "out")]) == 0
    batch = tmp_path / "out" / "a.ome.zarr"
    for labels in (tifffile.imread(flat), *(zarr.open_array(path / "0", mode="r")[:] for path in (volume, batch))):
        assert _iou(labels, as_learned) > 0.98


def test_an_empty_plane_of_a_rescaled_stack_stays_empty(of_volume: StudentModel) -> None:
    """A plane without objects is not stretched, in a stack of whatever scale."""
    stack = RESCALED["float 0..1"].copy()
    stack[3] = np.random.default_rng(0).normal(200, 60, stack[3].shape) / 65535
    labels = _segment(of_volume, stack)
    assert labels[3].mean() < 0.005
    matched = of_volume.matched_to(stack)
    assert matched.predict_labels(stack[3]).mean() < 0.005
    np.testing.assert_array_equal(matched.predict_labels(stack[1]), labels[1])


def test_planes_of_a_rescaled_volume_in_files_of_their_own(
    student_file: Path, as_learned: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of 8-bit planes has one scale, so that a plane without objects stays empty and none is warned of."""
    eight = RESCALED["8 bit"].copy()
    eight[4] = np.random.default_rng(0).normal(20, 6, eight[4].shape).clip(0, 255)
    (tmp_path / "planes").mkdir()
    for z, plane in enumerate(eight):
        tifffile.imwrite(tmp_path / "planes" / f"{z}.tif", plane)
    assert main(["segment", str(tmp_path / "planes"), "-m", str(student_file), "-o", str(tmp_path / "out")]) == 0
    assert "warning" not in capsys.readouterr().err
    labels = np.stack([tifffile.imread(tmp_path / "out" / f"{z}.tif") for z in range(6)])
    assert labels[4].mean() < 0.005
    assert _iou(np.delete(labels, 4, 0), np.delete(as_learned, 4, 0)) > 0.97


def test_what_lies_in_the_range_that_was_learned_keeps_its_limits(of_volume: StudentModel) -> None:
    """Another part of the same specimen, an empty one included, has the limits of the support bit for bit."""
    older = of_volume.with_engine(of_volume.engine)
    older.preprocess = replace(of_volume.preprocess, intensities=None)  # a student of before
    for balls in (0, 3, 30):
        other, _ = soft_balls(seed=5, balls=balls)
        np.testing.assert_array_equal(_segment(of_volume, other), _segment(older, other))


def test_hounsfield_units_are_kept(of_ct: StudentModel) -> None:
    """CT of another body part has the limits of the support; CT with an offset is named."""
    sample = generate_sample("nodules", planes=4, size=96, seed=3)
    soft_tissue = np.clip(sample.image, -150, None)
    older = of_ct.with_engine(of_ct.engine)
    older.preprocess = replace(of_ct.preprocess, intensities=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IntensityWarning)
        np.testing.assert_array_equal(_segment(of_ct, soft_tissue), _segment(older, soft_tissue))
    raw = (sample.image + 1024).astype(np.uint16)
    with pytest.warns(IntensityWarning, match="no Hounsfield units"):
        labels = _segment(of_ct, raw)
    np.testing.assert_array_equal(labels, _segment(older, raw))


def test_ranges_that_cannot_be_reconciled_are_named_once_by_each_route(
    student_file: Path, of_volume: StudentModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stack in other units with other contents gives one line on stderr, in the report and in Python."""
    sparse = (np.clip(soft_balls(seed=7, balls=3)[0] / 2500, 0, 1) * 255).astype(np.uint8)
    (tmp_path / "in").mkdir()
    image = tmp_path / "in" / "sparse.tif"
    tifffile.imwrite(image, sparse, photometric="minisblack", metadata={"axes": "ZYX"})
    for out in ("o.tif", "o.ome.zarr"):
        assert main(["segment", str(image), "-m", str(student_file), "-o", str(tmp_path / out)]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "intensities" in line]
        assert len(lines) == 1
        assert "(uint8, 4 to 228)" in lines[0]
        assert "(uint16, 4" in lines[0]
        assert "distill with slices of this kind" in lines[0]
    assert main(["segment", str(image), "-m", str(student_file), "-o", str(tmp_path / "j.ome.zarr"), "--json"]) == 0
    assert "uint8, 4 to 228" in json.loads(capsys.readouterr().out)["warning"]
    report = tmp_path / "report.csv"
    with pytest.warns(IntensityWarning):
        iter_to_end(iter_batch(plan_batch(tmp_path / "in", tmp_path, {}), of_volume, report))
    with open(report, newline="", encoding="utf-8") as file:
        assert "uint8, 4 to 228" in next(csv.DictReader(file))["warning"]
    with pytest.warns(IntensityWarning) as caught:
        segment_to_zarr(open_volume(image), of_volume, tmp_path / "p.ome.zarr")
    assert len([w for w in caught if w.category is IntensityWarning]) == 1
    with pytest.warns(IntensityWarning, match="uint8, 4 to 228"):
        compare_intensities(open_volume(image), of_volume)


def iter_to_end(run: object) -> None:
    for _ in run:  # type: ignore[attr-defined]
        pass


def test_inverted_contrast_is_named(of_volume: StudentModel, of_pictures: StudentModel) -> None:
    """A negative of what was learned gives a warning, for volumes and for pictures."""
    for model in (of_volume, of_pictures):
        with pytest.warns(IntensityWarning, match="contrast seems to be inverted"):
            model.predict_labels(4095 - STACK[2])
        with pytest.warns(IntensityWarning, match="contrast seems to be inverted"):
            _segment(model, 4095 - STACK)


Y, X = np.mgrid[:128, :128]
DUST = (Y - 20) ** 2 + (X - 110) ** 2 < 81


def _marked(plane: np.ndarray, kind: str, value: int) -> np.ndarray:
    marked = plane.copy()
    if kind == "dust":
        marked[DUST] = value
    elif kind == "scale bar":
        marked[-14:-8, 70:120] = value
    else:
        marked[np.random.default_rng(1).random(plane.shape) < 0.03] = value
    return marked


@pytest.mark.parametrize("value", [0, 4095, 65535])
@pytest.mark.parametrize("kind", ["dust", "scale bar"])
def test_dust_or_a_scale_bar_changes_no_label_elsewhere(kind: str, value: int, of_pictures: StudentModel) -> None:
    """A piece of dust or a burnt-in scale bar in a picture leaves the labels beyond its surroundings as they are."""
    clean, marked = STACK[1], _marked(STACK[1], kind, value)
    apart = np.ones(clean.shape, bool)
    if kind == "dust":
        apart[:45, 85:] = False
    else:
        apart[100:, 55:] = False
    labels, expected = of_pictures.predict_labels(marked), of_pictures.predict_labels(clean)
    assert _iou(expected, TRUTH[1]) > 0.85
    assert _iou(labels[apart], expected[apart]) > 0.97


@pytest.mark.parametrize("model", ["of_pictures", "of_volume"])
def test_saturated_pixels_do_not_darken_a_picture(model: str, request: pytest.FixtureRequest) -> None:
    """Three saturated pixels in a hundred, in a picture or in a stack on another scale, move no limit."""
    student = request.getfixturevalue(model)
    twice = np.minimum(STACK[1].astype(int) * 2, 65535).astype(np.uint16)  # another scale than the support's
    salted = _marked(twice, "scattered", 65535)
    clean, limits = (
        student.matched_to(plane[None]).preprocess.limits(plane[..., None]).high[0] for plane in (twice, salted)
    )
    assert clean == pytest.approx(2 * student.preprocess.fitted.high[0], rel=0.05)
    assert limits == pytest.approx(clean, rel=0.05)


def test_dust_in_an_annotated_slice_spoils_no_student() -> None:
    """Dust at full scale in one annotated slice does not darken the others."""
    dusty = STACK[::2].copy()
    dusty[0][DUST] = 65535
    student = _student(dusty, TRUTH[::2], same_volume=True)
    assert student.preprocess.fitted.high[0] < 2500
    assert _iou(_segment(student, STACK), TRUTH) > 0.85


def test_a_student_refined_on_another_scale(of_volume: StudentModel) -> None:
    """Refining with slices saved as 8 bit takes over their scale, and the student then segments such stacks."""
    eight = RESCALED["8 bit"]
    slices = [AnnotatedSlice(eight[z], TRUTH[z]) for z in (1, 3)]
    support = SupportSet(slices, planes_of_one_volume=True)
    refined = distill(support, replace(QUICK, steps=2), init_from=of_volume)
    assert 200 < refined.preprocess.fitted.high[0] < 256
    assert refined.card["preprocess"]["intensities"]["dtype"] == "uint8"
    assert _iou(_segment(refined, eight), TRUTH) > 0.8


def test_a_student_of_before_compares_nothing(
    of_volume: StudentModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student whose card holds no intensities loads, and keeps its limits and its digest, without a warning."""
    older = of_volume.with_engine(of_volume.engine)
    older.preprocess = replace(of_volume.preprocess, intensities=None)
    older.save(tmp_path / "older.safetensors")
    loaded = StudentModel.load(tmp_path / "older.safetensors", device="cpu")
    assert "intensities" not in loaded.card["preprocess"]
    assert loaded.digest() == older.digest()
    with warnings.catch_warnings():
        warnings.simplefilter("error", IntensityWarning)
        labels = loaded.predict_labels(RESCALED["8 bit"][1])
    limits = of_volume.preprocess.fitted
    read = RESCALED["8 bit"][1]
    shape = read.shape
    expected = older.region_labels(lambda y, x: read[y, x], shape, ((0, shape[0]), (0, shape[1])), limits)
    np.testing.assert_array_equal(labels, expected)


def test_the_card_shows_the_intensities(student_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command info prints the type and the range that a student learned from."""
    assert main(["info", str(student_file)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("intensities"))
    assert line.split(maxsplit=1)[1].startswith("uint16, 4")


SMALL = (STACK[:3, 32:96, 32:96] // 20).astype(np.uint8)  # 0 to 125: exact in every type


def _write(stack: np.ndarray, container: str, axes: str, tiled: bool, packed: str | None, path: Path) -> object:
    """The stack in a file of a kind (or in memory), and the options that open it."""
    turned = np.ascontiguousarray(stack.transpose(["zyx".index(a) for a in axes]))
    if container == "array":
        return open_volume(turned, axes=axes)
    if container == "npy":
        np.save(path / "v.npy", turned)
        return open_volume(path / "v.npy", axes=axes)
    if container == "zarr":
        chunks = (2, 32, 48) if tiled else turned.shape
        codecs = {"zlib": zarr.codecs.GzipCodec(), "lzw": zarr.codecs.ZstdCodec(), None: None}[packed]
        array = zarr.create_array(
            path / "v.zarr", shape=turned.shape, chunks=chunks, dtype=turned.dtype, compressors=codecs
        )
        array[:] = turned
        return open_volume(path / "v.zarr", axes=axes)
    tifffile.imwrite(
        path / "v.tif",
        stack,
        photometric="minisblack",
        metadata={"axes": "ZYX"},
        tile=(32, 48) if tiled else None,
        compression=packed,
        byteorder=">" if stack.dtype.byteorder == ">" else "<",
        ome=container == "ome-tiff",
        bigtiff=container == "bigtiff",
    )
    return open_volume(path / "v.tif")


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(["u1", "u2", ">u2", "i2", ">i4", "u4", "f4", ">f4", "f8"]),
    gain=st.sampled_from([1, 2, 5, 50, 200]),
    offset=st.integers(0, 5),
    container=st.sampled_from(["array", "npy", "zarr", "tiff", "bigtiff", "ome-tiff"]),
    axes=st.sampled_from(["zyx", "zxy", "yxz", "xyz"]),
    tiled=st.booleans(),
    packed=st.sampled_from([None, "zlib", "lzw"]),
)
def test_labels_do_not_depend_on_type_scale_layout_axes_and_container(
    dtype: str,
    gain: int,
    offset: int,
    container: str,
    axes: str,
    tiled: bool,
    packed: str | None,
    of_bytes: StudentModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Whatever way a stack is stored in, and on whatever scale, one student gives it the same labels."""
    if dtype == "u1":
        gain = min(gain, 2)
    if dtype == "i2":
        gain = min(gain, 50)
    exact = SMALL.astype(np.int64) * gain + offset
    if np.dtype(dtype).kind == "f":
        scaled = (exact / 512 - offset).astype(dtype)
    else:
        scaled = exact.astype(dtype)
    volume = _write(scaled, container, axes, tiled, packed, tmp_path_factory.mktemp("stored"))
    labels = np.asarray(segment_lazy(volume, of_bytes).compute(scheduler="synchronous"))
    expected = _segment(of_bytes, SMALL)
    assert expected.mean() > 0.03
    assert _iou(labels, expected) > 0.98


@pytest.fixture(scope="module")
def of_bytes() -> StudentModel:
    """A student of a stack whose values are exact in every type."""
    return _student((STACK[::2] // 20).astype(np.uint8), TRUTH[::2], same_volume=True)
