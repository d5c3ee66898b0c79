"""What users really give and what machines really do: each expected error is one line, and nothing is lost."""

import copy
import errno
import os
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from distillfss_core import (
    IGNORE,
    AnnotatedSlice,
    DistillSettings,
    ImageError,
    OutOfMemoryError,
    OutputError,
    StudentModel,
    SupportSet,
    SupportSetError,
    distill,
    open_volume,
)
from distillfss_core.cli.console import ERROR, FINE
from distillfss_core.cli.main import main
from distillfss_core.io import labels as label_files
from distillfss_core.models.segmenter import Segmenter
from distillfss_core.support import label_volumes
from distillfss_core.training.crops import FeatureCache
from pictures import blobs

FEW = ["--steps=2", "--crops=2", "--queries=1", "--shots=1", "--crop-size=64", "--zoom=1", "--device=cpu"]
TINY = DistillSettings(steps=2, crops=2, queries=1, shots=1, crop_size=64, zoom=Fraction(1), device="cpu")
IMAGE = np.random.default_rng(0).integers(0, 200, (96, 96)).astype(np.uint8)
LABELS = np.zeros((96, 96), np.uint8)
LABELS[20:50, 30:70] = 1
OTHER = np.random.default_rng(1).permuted(IMAGE)


@pytest.fixture(scope="module", autouse=True)
def halos_are_not_measured(student):
    """To measure a halo takes longer than such a small training; the tests of models and trainings do it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmenter, "fit_halo", lambda self, image: None)
        yield


@pytest.fixture
def here(tmp_path, monkeypatch, student):
    """The current folder, with images/, labels/ (two pairs) and a model."""
    monkeypatch.chdir(tmp_path)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for name, image in (("a", IMAGE), ("b", OTHER)):
        tifffile.imwrite(f"images/{name}.tif", image)
        tifffile.imwrite(f"labels/{name}.tif", LABELS)
    student.save("model.safetensors")
    return tmp_path


def run_distill(*options: str) -> int:
    return main(["distill", "images", "labels", "-o", "new.safetensors", *FEW, *options])


def segment(source: str, *options: str) -> int:
    return main(["segment", source, "-m", "model.safetensors", "-o", "out.tif", "--device=cpu", *options])


@pytest.fixture
def error(capsys):
    """Check a command's exit code and give its one line on stderr."""

    def check(code: int) -> str:
        said = capsys.readouterr()
        assert code == ERROR
        assert said.err.count("\n") == 1, said.err
        assert said.err.startswith("distillfss: error: ")
        assert "Traceback" not in said.out + said.err
        return said.err

    return check


# labels that do not make a support set


def test_a_label_image_of_another_size(here, error):
    tifffile.imwrite("labels/b.tif", LABELS[:90])
    assert "b.tif: the image is 96 x 96 but its labels are 90 x 96" in error(run_distill())
    assert not Path("new.safetensors").exists()


def test_labels_without_any_object(here, error):
    for name in "ab":
        tifffile.imwrite(f"labels/{name}.tif", np.zeros_like(LABELS))
    assert "no slice has a pixel of class 'object'" in error(run_distill())


def test_labels_without_any_background(here, error):
    for name in "ab":
        tifffile.imwrite(f"labels/{name}.tif", np.ones_like(LABELS))
    assert "no pixel is labeled background" in error(run_distill())


def test_a_class_that_is_named_but_never_painted(here, error):
    assert "no slice has a pixel of class 'debris'" in error(run_distill("--classes=nucleus,debris"))


def test_a_class_that_is_painted_but_never_named(here, error):
    tifffile.imwrite("labels/b.tif", LABELS * 3)
    assert "b.tif: holds the label 3, but there are 2 classes" in error(run_distill("--classes=nucleus,debris"))


def test_a_scribble_image_with_nothing_scribbled(here, error):
    tifffile.imwrite("labels/a.tif", LABELS + 1)
    tifffile.imwrite("labels/b.tif", np.zeros_like(LABELS))
    assert "b.tif: nothing is annotated" in error(run_distill("--scribbles"))


def test_bool_and_float_labels_are_labels(here, capsys):
    np.save("labels/a.npy", LABELS > 0)
    Path("labels/a.tif").unlink()
    tifffile.imwrite("labels/b.tif", LABELS.astype(np.float32))
    assert run_distill() == FINE
    assert StudentModel.load("new.safetensors").training["support_shares"][1] == pytest.approx(1200 / 9216, abs=1e-5)


def test_fractional_labels_are_none(here, error):
    tifffile.imwrite("labels/b.tif", LABELS.astype(np.float32) * 0.5)
    assert "b.tif: holds 0.5" in error(run_distill())


# images that are not what they should be


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_number(here, error, value):
    image = IMAGE.astype(np.float32)
    image[3, 4] = value
    tifffile.imwrite("images/b.tif", image)
    assert "b.tif: 1 of 9216 pixels are NaN or infinite" in error(run_distill())
    assert "b.tif: 1 of 9216 pixels are NaN or infinite" in error(segment("images/b.tif"))
    assert not Path("out.tif").exists()


def test_volumes_with_pixels_that_are_no_number_are_segmented_and_learned_from_on_demand(here, error, capsys):
    stack = np.stack([IMAGE.astype(np.float32)] * 3)
    stack[1, :4, 0] = np.nan, np.inf, -np.inf, 3.1e38
    np.save("stack.npy", stack)
    np.save("stack-labels.npy", np.stack([LABELS] * 3))

    def to_zarr(*options):
        return main(["segment", "stack.npy", "-m", "model.safetensors", "-o", "o.ome.zarr", "--device=cpu", *options])

    def learn(*options):
        return main(
            ["distill", "stack.npy", "stack-labels.npy", "--planes=0,1", "-o", "new.safetensors", *FEW, *options]
        )

    assert "4 of 9216 pixels are NaN or infinite" in error(to_zarr())
    assert "open the volume with replace_nan 0" in error(learn())
    assert "--replace-nan is for volumes" in error(segment("images/b.tif", "--replace-nan=0"))
    assert to_zarr("--replace-nan=-2", "--overwrite") == learn("--replace-nan=-2") == FINE
    capsys.readouterr()
    stack[1, :4, 0] = -2
    labels = open_volume("o.ome.zarr")
    for z in range(3):
        np.testing.assert_array_equal(labels.plane(z), StudentModel.load("model.safetensors").predict(stack[z]).labels)
    assert "was begun with another replace_nan (-2.0, not 0.0);" in error(to_zarr("--replace-nan=0", "--resume"))
    assert "was begun with another replace_nan (-2.0, not None);" in error(to_zarr("--resume"))
    assert to_zarr("--replace-nan=-2", "--resume") == FINE


def test_a_bad_plane_is_named_and_no_half_stack_stays(here, error):
    stack = np.stack([IMAGE.astype(np.float32)] * 3)
    stack[1, 0, 0] = np.nan
    tifffile.imwrite("stack.tif", stack, photometric="minisblack")
    assert "stack.tif plane 1: 1 of 9216 pixels" in error(segment("stack.tif", "--uncertainty"))
    assert not [p.name for p in here.iterdir() if "out" in p.name]


@pytest.mark.parametrize("value", [0, 255])
def test_constant_images_are_segmented_and_learned_from(here, value):
    flat = np.full_like(IMAGE, value)
    for name in "ab":
        tifffile.imwrite(f"images/{name}.tif", flat)
    assert run_distill() == FINE
    assert segment("images/a.tif", "--probabilities") == FINE
    assert np.isfinite(tifffile.imread("out_probabilities.tif")).all()
    assert np.isfinite(StudentModel.load("new.safetensors").predict(flat).probabilities).all()


def test_empty_files_and_arrays(here, error):
    Path("images/b.tif").write_bytes(b"")
    assert "b.tif" in error(run_distill())
    np.save("empty.npy", np.zeros((0, 5)))
    assert "empty.npy" in error(segment("empty.npy"))
    (here / "nothing").mkdir()
    assert "holds no image" in error(main(["segment", "nothing", "-m", "model.safetensors", "-o", "out"]))
    assert "no label image" in error(main(["distill", "images", "nothing", "-o", "new.safetensors"]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (2, 3), (33, 31)])
def test_images_of_any_small_size_are_segmented(student, shape):
    image = np.random.default_rng(2).integers(0, 255, shape).astype(np.uint16)
    found = student.predict(image)
    assert found.labels.shape == shape
    np.testing.assert_allclose(found.probabilities.sum(0), 1, atol=1e-5)


def test_a_one_pixel_slice_may_be_learned_from():
    slices = (
        AnnotatedSlice(IMAGE, LABELS, "large"),
        AnnotatedSlice(np.array([[7]], np.uint8), np.array([[1]], np.uint8), "dot"),
    )
    model = distill(SupportSet(slices), TINY)
    assert np.isfinite(model.predict(IMAGE).probabilities).all()


@pytest.mark.parametrize("zoom", ["auto", Fraction(1, 4)])
def test_two_scribbled_pixels_are_little_but_no_crash(zoom):
    labels = np.full((200, 200), IGNORE, np.uint8)
    labels[50, 50], labels[100, 100] = 0, 1
    image = np.tile(IMAGE, (3, 3))[:200, :200]
    model = distill(SupportSet((AnnotatedSlice(image, labels, "dots"),)), replace(TINY, zoom=zoom, steps=10))
    assert np.isfinite(model.predict(image).probabilities).all()


def test_five_channels_are_learned_from_and_others_refused(here, error):
    five = np.random.default_rng(3).integers(0, 4000, (96, 96, 5)).astype(np.uint16)
    for name in "ab":
        np.save(f"images/{name}.npy", five)
        Path(f"images/{name}.tif").unlink()
    assert run_distill() == FINE
    Path("new.safetensors").rename("model.safetensors")
    assert segment("images/a.npy") == FINE
    tifffile.imwrite("gray.tif", IMAGE)
    assert "gray.tif: the image has 1 channel(s), the model was made for 5" in error(segment("gray.tif", "--overwrite"))
    np.save("images/b.npy", five[..., :4])
    assert "different numbers of channels" in error(run_distill())


def test_complex_pixels_are_refused(student):
    with pytest.raises(ImageError, match="complex64"):
        student.predict(IMAGE.astype(np.complex64))


# very large planes

LARGE = 8192


def test_a_plane_of_8k_is_segmented_in_windows_of_bounded_size(student, monkeypatch):
    # It looks at the plane at a quarter of its size: 16 times less to compute.
    small = replace(student.preprocess, zoom="1/4")
    quarter = StudentModel(student.backbone, student.head, small, ("blob",), device=student.device, halo=32)
    windows = []
    original = Segmenter._window

    def seen(self, window):
        windows.append(tuple(window.shape[-2:]))
        return original(self, window)

    monkeypatch.setattr(Segmenter, "_window", seen)
    labels = quarter.predict_labels(np.tile(IMAGE, (86, 86))[:LARGE, :LARGE], tile=512)
    assert labels.shape == (LARGE, LARGE)
    assert labels.dtype == np.uint8
    most = 4 * (512 + 2 * quarter.halo) + 2 * quarter.step
    assert len(windows) == 16
    assert max(max(window) for window in windows) <= most


def test_the_first_tile_of_8k_needs_no_room_for_the_whole(student):
    plane = np.tile(IMAGE, (86, 86))[:LARGE, :LARGE]
    next(student.iter_tiles(plane, tile=256))  # what is loaded once is loaded
    resource = pytest.importorskip("resource", reason="there is no such limit on Windows")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    where, found = next(student.iter_tiles(plane, tile=256))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert found.shape == (2, where.y.inner[1], where.x.inner[1])
    assert grown < 200_000  # kilobytes; as float32 the plane alone has 262144


def test_a_slice_of_8k_is_learned_from_in_crops():
    plane = np.tile(IMAGE, (86, 86))[:LARGE, :LARGE]
    labels = np.zeros((LARGE, LARGE), np.uint8)
    labels[4000:4100, 5000:5200] = 1
    model = distill(SupportSet((AnnotatedSlice(plane, labels, "large"),)), TINY)
    assert model.predict_labels(IMAGE).shape == IMAGE.shape


# machines that fail


def test_a_label_file_that_vanishes_after_it_was_listed(here, error, monkeypatch):
    listed = label_volumes.pair_files

    def vanish(*listed_from, **options):
        pairs = listed(*listed_from, **options)
        pairs[1][1].unlink()
        return pairs

    monkeypatch.setattr(label_volumes, "pair_files", vanish)
    assert "b.tif: no such file" in error(run_distill())


def test_an_image_that_vanishes_after_it_was_listed(here, capsys):
    Path("images/b.tif").unlink()
    Path("images/b.tif").symlink_to("nowhere")  # listed by its folder, but not there
    assert main(["segment", "images", "-m", "model.safetensors", "-o", "out", "--device=cpu"]) == ERROR
    assert capsys.readouterr().err == "distillfss: error: images/b.tif: no such file; check the name\n"
    assert Path("out/a.tif").exists()


def test_a_full_disk_while_the_model_is_saved_keeps_the_old_file(here, error, monkeypatch):
    old = Path("model.safetensors").read_bytes()
    before = sorted(os.listdir())

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    line = error(main(["distill", "images", "labels", "-o", "model.safetensors", "--overwrite", *FEW]))
    assert "model.safetensors: No space left on device; free some space" in line
    assert Path("model.safetensors").read_bytes() == old
    assert sorted(os.listdir()) == before


@contextmanager
def little_room():
    """Files cannot grow beyond 30 kB: writing truly fails, in the middle.

    No fixture: between tests pytest writes its own progress, and where that goes to a file it is held by the limit too.
    """
    resource = pytest.importorskip("resource", reason="there is no such limit on Windows")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("planes", [1, 5])
def test_a_write_that_fails_midway_keeps_the_old_results(here, error, planes):
    tifffile.imwrite("in.tif", np.stack([IMAGE] * planes)[:, :40, :40], compression="zlib")
    names = ("out.tif", "out_probabilities.tif")
    for name in names:
        Path(name).write_bytes(b"old")
    if planes == 1:
        tifffile.imwrite("in.tif", IMAGE)
    with little_room():
        code = segment("in.tif", "--probabilities", "--overwrite")
    assert "cannot write out_probabilities.tif: File too large" in error(code)
    assert [Path(name).read_bytes() for name in names] == [b"old", b"old"]
    assert not [name for name in os.listdir() if name.startswith(".")]


def test_a_full_disk_while_saving_from_python_is_an_output_error(here, student):
    old = Path("model.safetensors").read_bytes()
    with pytest.raises(OutputError, match=r"model\.safetensors"), little_room():
        student.save("model.safetensors")
    assert Path("model.safetensors").read_bytes() == old


def out_of_memory_beyond(pixels: int, monkeypatch) -> list[int]:
    """A device whose memory ends at windows of so many pixels; the list gets the sizes that were computed."""
    original, computed = Segmenter._window, []

    def window(self, window):
        size = window.shape[-1] * window.shape[-2]
        if size > pixels:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        computed.append(size)
        return original(self, window)

    monkeypatch.setattr(Segmenter, "_window", window)
    return computed


def test_out_of_memory_goes_on_in_smaller_tiles_with_the_same_answer(support, tiny, monkeypatch, caplog):
    model = distill(support, replace(tiny, steps=30))  # steps enough to find something
    model.halo = 96
    image = np.tile(support.slices[0].image, (5, 7))
    whole = model.predict(image)
    assert 0.02 < whole.labels.mean() < 0.98
    computed = out_of_memory_beyond(400 * 400, monkeypatch)
    pieces = model.predict(image)
    assert len(computed) == 4  # one halving is enough
    assert "out of memory; going on with tiles of" in caplog.text
    # The deepest features see farther than a halo: hairs by the border of a tile may fall the other way.
    assert (pieces.labels != whole.labels).mean() < 1e-3
    np.testing.assert_allclose(pieces.probabilities, whole.probabilities, atol=0.1)


def test_what_does_not_fit_is_tried_and_told_once(student, monkeypatch, caplog):
    model = copy.copy(student)
    model.halo = 32
    planes = [np.roll(np.tile(blobs(i).image, (6, 4)), i) for i in range(4)]
    computed = out_of_memory_beyond(220 * 220, monkeypatch)
    afresh = []
    for plane in planes:
        afresh.append(copy.copy(model).predict(plane).probabilities)  # a copy that has met no limit yet
    tried = Segmenter._window
    asked = []
    monkeypatch.setattr(Segmenter, "_window", lambda self, window: asked.append(1) or tried(self, window))
    caplog.clear()
    computed.clear()
    found = [model.predict(plane).probabilities for plane in planes]
    assert [record.getMessage().split()[-2] for record in caplog.records] == ["288", "144"]
    assert len(asked) == len(computed) + 2  # the two sizes that do not fit, once each
    np.testing.assert_array_equal(found, afresh)
    caplog.clear()
    model.to("cpu").predict(planes[0])  # may be a device with more room
    assert len(caplog.records) == 2


def test_out_of_memory_even_for_the_smallest_tile_is_an_error(here, capsys, student, monkeypatch):
    out_of_memory_beyond(100, monkeypatch)
    with pytest.raises(OutOfMemoryError, match="--device cpu"):
        student.predict(IMAGE)
    assert segment("images/a.tif") == ERROR
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("distillfss: error: cpu has no memory left")
    assert all(line.startswith("distillfss: warning: cpu is out of memory") for line in lines[:-1])
    assert not Path("out.tif").exists()


@pytest.mark.parametrize("raised", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_out_of_memory_in_training_is_an_error(here, raised, monkeypatch, error):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(FeatureCache, "iter_fill", fail)
    assert "out of memory" in error(run_distill())


def test_a_bug_is_not_hidden(here, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(FeatureCache, "iter_fill", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run_distill()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(here, error):
    Path("images").chmod(0)
    try:
        assert "images" in error(run_distill())
    finally:
        Path("images").chmod(0o755)


def test_an_error_of_the_system_is_one_line(here, error, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "images")

    monkeypatch.setattr(label_files, "_by_stem", denied)
    assert error(run_distill()) == "distillfss: error: images: Permission denied\n"


def test_a_support_set_says_itself_what_is_wrong():
    with pytest.raises(SupportSetError, match="empty"):
        SupportSet(())
    with pytest.raises(ImageError, match="y x x"):
        AnnotatedSlice(IMAGE, LABELS[:5], "a")


def test_the_disk_is_not_filled_with_left_overs(here):
    assert run_distill() == FINE
    assert segment("images/a.tif", "--probabilities", "--uncertainty") == FINE
    assert not list(here.rglob(".*"))
