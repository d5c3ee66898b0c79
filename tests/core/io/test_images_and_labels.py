"""Files in and out: every kind is read as it was written, everything doubtful is named."""

import errno
import os

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from distillfss_core.errors import ImageError, InputFileError, OutputError, SettingsError, SupportSetError
from distillfss_core.io import images, writing
from distillfss_core.io.images import read_image, read_stack
from distillfss_core.io.labels import labels_from_image, pair_files, read_label_stack, read_labels
from distillfss_core.io.writing import atomic_path, write_float_tiff, write_label_stack, write_labels, write_stack
from distillfss_core.support.support_set import load_support
from distillfss_core.types import IGNORE
from distillfss_core.volumes.volume import open_volume

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 255, (20, 30)).astype(np.uint8)
DEEP = RNG.integers(0, 60000, (20, 30)).astype(np.uint16)
RGB = RNG.integers(0, 255, (20, 30, 3)).astype(np.uint8)
STACK = RNG.integers(0, 60000, (5, 20, 30)).astype(np.uint16)


def png(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


# Images


@pytest.mark.parametrize("array", [GRAY, DEEP, RGB, DEEP.astype(np.float32), GRAY > 100])
def test_a_tiff_is_read_as_it_was_written(tmp_path, array):
    tifffile.imwrite(tmp_path / "a.tif", array)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), array)


@pytest.mark.parametrize("array", [GRAY, DEEP, RGB, GRAY > 100])
def test_a_png_is_read_as_it_was_written(tmp_path, array):
    back = read_image(png(tmp_path / "a.png", array))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_a_16_bit_color_png_keeps_its_depth(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    deep = np.stack([DEEP, DEEP // 2, DEEP // 3], -1)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(deep))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), deep)


def test_jpeg_and_bmp_are_read(tmp_path):
    assert read_image(png(tmp_path / "a.jpg", RGB)).shape == (20, 30, 3)
    np.testing.assert_array_equal(read_image(png(tmp_path / "a.BMP", RGB)), RGB)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("ending", ["png", "jpg", "bmp"])
def test_a_picture_may_have_more_pixels_than_pillow_likes_up_to_a_bound(tmp_path, monkeypatch, ending):
    path, limit = tmp_path / f"large.{ending}", 100
    array = np.full((30, 40), 77, np.uint8)
    Image.fromarray(array).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    np.testing.assert_array_equal(read_image(path), array)
    if ending != "jpg":  # whose numbers are no labels
        np.testing.assert_array_equal(read_labels(path), array)
    assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(images, "_MOST_PIXELS", 1000)
    with pytest.raises(InputFileError, match=rf"large\.{ending}: has 40 x 30 pixels, .* at most 1000; save it as TIFF"):
        read_image(path)


def test_a_palette_image_becomes_rgb_and_palette_labels_stay_numbers(tmp_path):
    picture = Image.fromarray((GRAY % 3).astype(np.uint8)).convert("P")
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    picture.save(tmp_path / "a.png")
    image, labels = read_image(tmp_path / "a.png"), read_labels(tmp_path / "a.png")
    assert image.shape == (20, 30, 3)
    np.testing.assert_array_equal(labels, GRAY % 3)
    assert (image[labels == 1] == (255, 0, 0)).all()


def test_a_tiff_gives_its_numbers_whatever_its_lookup_table(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GRAY, photometric="palette", colormap=np.zeros((3, 256), np.uint16))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), GRAY)


def test_an_alpha_that_says_nothing_is_dropped(tmp_path):
    opaque = np.dstack([RGB, np.full((20, 30), 255, np.uint8)])
    np.testing.assert_array_equal(read_image(png(tmp_path / "a.png", opaque)), RGB)
    tifffile.imwrite(tmp_path / "a.tif", opaque, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), RGB)
    gray = np.dstack([GRAY, np.full((20, 30), 255, np.uint8)])
    np.testing.assert_array_equal(read_image(png(tmp_path / "b.png", gray)), GRAY)
    opaque[0, 0, 3] = 7
    assert read_image(png(tmp_path / "c.png", opaque)).shape == (20, 30, 4)


def test_channels_come_last(tmp_path):
    planes = np.stack([DEEP, DEEP // 2])
    tifffile.imwrite(tmp_path / "a.ome.tif", planes, metadata={"axes": "CYX"})
    np.testing.assert_array_equal(read_image(tmp_path / "a.ome.tif"), planes.transpose(1, 2, 0))
    volume = np.stack([STACK, STACK // 2], 1)
    tifffile.imwrite(tmp_path / "b.tif", volume, imagej=True, metadata={"axes": "ZCYX"})
    np.testing.assert_array_equal(read_stack(tmp_path / "b.tif"), volume.transpose(0, 2, 3, 1))


def test_a_stack_is_read_and_a_plane_is_a_stack_of_one(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, compression="zlib")
    np.testing.assert_array_equal(read_stack(tmp_path / "a.tif"), STACK)
    assert read_stack(png(tmp_path / "a.png", GRAY)).shape == (1, 20, 30)
    np.save(tmp_path / "a.npy", STACK[:, :, :3])
    assert read_stack(tmp_path / "a.npy").shape == (5, 20, 3)
    assert read_image(tmp_path / "a.npy").shape == (5, 20, 3)


def test_a_stack_is_no_plane(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK)
    with pytest.raises(ImageError, match="stack of 5 planes"):
        read_image(tmp_path / "a.tif")
    np.save(tmp_path / "a.npy", STACK)
    with pytest.raises(ImageError, match="stack of 5 planes"):
        read_image(tmp_path / "a.npy")


def test_time_and_depth_together_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.stack([STACK] * 2), imagej=True, metadata={"axes": "TZYX"})
    with pytest.raises(ImageError, match="TZYX"):
        read_stack(tmp_path / "a.tif")


def test_several_images_in_one_file_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(GRAY, metadata=None)
        writer.write(GRAY[:10], metadata=None)
    with pytest.raises(ImageError, match="2 images"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.npy", "b.tif", "b.jpg"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9])
def test_a_file_cut_short_is_named(tmp_path, name, share):
    path = tmp_path / name
    if path.suffix == ".npy":
        np.save(path, DEEP)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, DEEP, compression="zlib" if name[0] == "b" else None)
    else:
        png(path, RGB)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputFileError, match=name) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200), st.sampled_from(["x.tif", "x.png", "x.npy", "x.bmp"]), st.booleans())
def test_rubbish_is_never_a_crash(tmp_path_factory, junk, name, headed):
    heads = {"x.tif": b"II*\0\x08\0\0\0", "x.png": b"\x89PNG\r\n\x1a\n", "x.npy": b"\x93NUMPY\x01\0", "x.bmp": b"BM"}
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes((heads[name] if headed else b"") + junk)
    with pytest.raises((InputFileError, ImageError)):
        read_image(path)


@pytest.mark.parametrize("read", [read_image, open_volume])
def test_archives_of_arrays_are_named(tmp_path, read):
    """A .npz that was renamed, or the beginning of one."""
    path = tmp_path / "a.npy"
    np.savez(tmp_path / "a.npz", image=GRAY)
    for content in ((tmp_path / "a.npz").read_bytes(), b"PK\3\4"):
        path.write_bytes(content)
        with pytest.raises(InputFileError, match=r"a\.npy: is a \.npz archive; save the array"):
            read(path)


def test_pickles_are_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputFileError, match=r"a\.npy"):
        read_image(tmp_path / "a.npy")


def test_missing_unknown_and_folder_are_told_apart(tmp_path):
    with pytest.raises(InputFileError, match="no such file"):
        read_image(tmp_path / "a.tif")
    (tmp_path / "a.czi").write_bytes(b"")
    with pytest.raises(InputFileError, match=r"'\.czi'.*give TIFF"):
        read_image(tmp_path / "a.czi")
    with pytest.raises(InputFileError, match="is a folder"):
        read_image(tmp_path)


# Labels


def test_labels_of_any_honest_kind_are_read(tmp_path):
    numbers = GRAY % 4
    tifffile.imwrite(tmp_path / "f.tif", numbers.astype(np.float32))
    np.testing.assert_array_equal(read_labels(tmp_path / "f.tif"), numbers)
    assert read_labels(tmp_path / "f.tif").dtype.kind == "u"
    np.save(tmp_path / "b.npy", numbers > 1)
    np.testing.assert_array_equal(read_labels(tmp_path / "b.npy"), (numbers > 1).astype(np.uint8))
    np.testing.assert_array_equal(read_labels(png(tmp_path / "g.png", np.dstack([numbers] * 3))), numbers)
    opaque = np.dstack([numbers] * 3 + [np.full_like(numbers, 255)])
    np.testing.assert_array_equal(read_labels(png(tmp_path / "a.png", opaque)), numbers)


def test_labels_that_are_none_are_refused(tmp_path):
    np.save(tmp_path / "f.npy", np.full((3, 3), 0.5))
    with pytest.raises(ImageError, match=r"f\.npy: holds 0\.5"):
        read_labels(tmp_path / "f.npy")
    np.save(tmp_path / "n.npy", np.full((3, 3), np.nan))
    with pytest.raises(ImageError, match="holds nan"):
        read_labels(tmp_path / "n.npy")
    np.save(tmp_path / "m.npy", np.full((3, 3), -2))
    with pytest.raises(ImageError, match="label -2"):
        read_labels(tmp_path / "m.npy")
    with pytest.raises(ImageError, match="color picture"):
        read_labels(png(tmp_path / "c.png", RGB))


def test_the_three_modes_read_the_same_numbers_differently():
    numbers = np.array([[0, 1, 2, 3]], np.uint16)
    assert labels_from_image(numbers, "binary").tolist() == [[0, 1, 1, 1]]
    assert labels_from_image(numbers, "classes").tolist() == [[0, 1, 2, 3]]
    assert labels_from_image(numbers, "scribbles").tolist() == [[IGNORE, 0, 1, 2]]
    assert labels_from_image(numbers, "scribbles").dtype == np.uint8


def test_255_and_instance_numbers_are_one_class_in_binary():
    assert labels_from_image(np.array([[0, 255, 300]], np.uint16)).tolist() == [[0, 1, 1]]


def test_a_number_that_is_no_class_is_named():
    with pytest.raises(ImageError, match=r"mask\.png: holds the label 3, but there are 2 classes"):
        labels_from_image(np.array([[0, 3]], np.uint8), "classes", 2, "mask.png")
    with pytest.raises(ImageError, match="label 255"):
        labels_from_image(np.array([[0, 255]], np.uint8), "classes")
    with pytest.raises(ImageError, match="label 4"):
        labels_from_image(np.array([[0, 4]], np.uint8), "scribbles", 2)
    with pytest.raises(SettingsError, match="'paint'"):
        labels_from_image(np.array([[0]], np.uint8), "paint")


# Pairs


@pytest.fixture
def folders(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    return tmp_path / "images", tmp_path / "labels"


def test_files_are_paired_by_stem_whatever_their_kind(folders):
    images, labels = folders
    for name in ("b.tif", "a.png", "c.ome.tif", "notes.txt", ".hidden.png"):
        (images / name).touch()
    for name in ("a_mask.tif", "b.png", "c-labels.png"):
        (labels / name).touch()
    found = [(i.name, m.name) for i, m in pair_files(*folders)]
    assert found == [("a.png", "a_mask.tif"), ("b.tif", "b.png"), ("c.ome.tif", "c-labels.png")]


def test_one_folder_may_hold_images_and_their_labels(folders):
    for name in ("a.png", "a_mask.png", "b.png"):
        (folders[0] / name).touch()
    assert [(i.name, m.name) for i, m in pair_files(folders[0], folders[0])] == [("a.png", "a_mask.png")]


@pytest.mark.parametrize(
    ("value", "said"), [(1e12, "label 1e\\+12; labels end at 4294967295"), (-3, "label -3; labels start")]
)
def test_a_float_label_beyond_its_limits_is_named(tmp_path, value, said):
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0, 1], [2, value]], np.float32))
    with pytest.raises(ImageError, match=said):
        read_labels(tmp_path / "a.tif")


def test_images_without_labels_are_left_out_and_counted(folders, caplog):
    for name in ("a.png", "b.png", "c.png"):
        (folders[0] / name).touch()
    (folders[1] / "b.png").touch()
    assert [i.name for i, _ in pair_files(*folders)] == ["b.png"]
    assert "2 of 3 images" in caplog.text


def test_labels_without_an_image_are_listed_once(folders):
    (folders[0] / "a.png").touch()
    for i in range(7):
        (folders[1] / f"x{i}.png").touch()
    with pytest.raises(InputFileError, match=r"7 of 7 label files.*x0\.png.*x4\.png, \.\.\.;"):
        pair_files(*folders)


def test_what_does_not_pair_is_said(folders, tmp_path):
    with pytest.raises(InputFileError, match="no label image"):
        pair_files(*folders)
    with pytest.raises(InputFileError, match="no such file or folder"):
        pair_files(folders[0], tmp_path / "nowhere")
    (tmp_path / "m.png").touch()
    with pytest.raises(InputFileError, match="two folders or two files"):
        pair_files(folders[0], tmp_path / "m.png")
    for name in ("a.png", "a.tif"):
        (folders[0] / name).touch()
    (folders[1] / "a.png").touch()
    with pytest.raises(InputFileError, match="same stem"):
        pair_files(*folders)
    (folders[0] / "a.tif").unlink()
    (folders[1] / "a_mask.png").touch()
    with pytest.raises(InputFileError, match="more than one label"):
        pair_files(*folders)


# Annotated slices


def test_folders_become_slices(folders):
    png(folders[0] / "a.png", GRAY)
    png(folders[1] / "a_mask.png", (GRAY > 99).astype(np.uint8) * 255)
    support = load_support(*folders)
    (one,) = support.slices
    assert not support.planes_of_one_volume
    np.testing.assert_array_equal(one.image, GRAY)
    np.testing.assert_array_equal(one.labels, GRAY > 99)
    assert one.source == "a.png"


@pytest.fixture
def stack_pair(tmp_path):
    numbers = np.zeros(STACK.shape, np.uint16)
    numbers[1, :5], numbers[3, 5:9] = 7, 300
    tifffile.imwrite(tmp_path / "image.tif", STACK)
    tifffile.imwrite(tmp_path / "truth.tif", numbers)
    return tmp_path / "image.tif", tmp_path / "truth.tif"


def test_all_labeled_planes_of_a_stack_are_taken(stack_pair):
    support = load_support(*stack_pair)
    slices = support.slices
    assert support.planes_of_one_volume
    assert [s.source for s in slices] == ["image.tif plane 1", "image.tif plane 3"]
    np.testing.assert_array_equal(slices[1].image, STACK[3])
    assert slices[1].labels.sum() == 4 * 30


def test_named_planes_are_taken_once_in_their_order(stack_pair):
    slices = load_support(*stack_pair, planes=[3, 0, 3]).slices
    assert [s.source for s in slices] == ["image.tif plane 3", "image.tif plane 0"]


def test_a_plane_outside_the_stack_is_named(stack_pair):
    for plane in (5, -1):
        with pytest.raises(SettingsError, match=f"plane {plane} is outside image.tif, whose planes are 0 to 4"):
            load_support(*stack_pair, planes=[0, plane])


def test_npy_stacks_are_understood_as_such(tmp_path):
    np.save(tmp_path / "i.npy", STACK[:, :, :9])
    np.save(tmp_path / "l.npy", STACK[:, :, :9] > 30000)
    assert len(load_support(tmp_path / "i.npy", tmp_path / "l.npy")) == 5


def test_one_plane_of_labels_belongs_to_the_plane_that_is_said(stack_pair, tmp_path):
    png(tmp_path / "one.png", (GRAY > 99).astype(np.uint8))
    (one,) = load_support(stack_pair[0], tmp_path / "one.png", planes=[2]).slices
    np.testing.assert_array_equal(one.image, STACK[2])
    with pytest.raises(SettingsError, match="which one"):
        load_support(stack_pair[0], tmp_path / "one.png")


def test_supports_that_do_not_fit_are_refused(stack_pair, tmp_path, folders):
    tifffile.imwrite(tmp_path / "short.tif", STACK[:2])
    with pytest.raises(ImageError, match="has 2 planes"):
        load_support(stack_pair[0], tmp_path / "short.tif")
    tifffile.imwrite(tmp_path / "empty.tif", STACK * 0)
    with pytest.raises(SupportSetError, match="no plane has a label"):
        load_support(stack_pair[0], tmp_path / "empty.tif")
    png(tmp_path / "a.png", GRAY)
    with pytest.raises(SettingsError, match="single plane"):
        load_support(tmp_path / "a.png", tmp_path / "a.png", planes=[0])
    png(folders[0] / "a.png", GRAY)
    png(folders[1] / "a.png", GRAY[:9])
    with pytest.raises(ImageError, match="20 x 30"):
        load_support(*folders)
    with pytest.raises(SettingsError, match="is a folder"):
        load_support(*folders, planes=[0])


# Writing


@settings(deadline=None, max_examples=25)
@given(hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=3, min_side=2, max_side=6)))
def test_labels_come_back_as_they_were_written(tmp_path_factory, labels):
    path = tmp_path_factory.getbasetemp() / "labels.tif"
    write_labels(path, labels)
    back = read_label_stack(path) if labels.ndim == 3 else read_labels(path)
    np.testing.assert_array_equal(back, labels)
    assert back.dtype == (np.uint8 if labels.max() <= 255 else np.uint16)


def test_png_labels_come_back(tmp_path):
    for labels in (GRAY, DEEP):
        write_labels(tmp_path / "a.png", labels.astype(np.int64))
        np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), labels)


def test_floats_come_back_with_their_axes(tmp_path):
    probabilities = RNG.random((3, 20, 30)).astype(np.float32)
    write_float_tiff(tmp_path / "p.tif", probabilities)
    np.testing.assert_array_equal(read_image(tmp_path / "p.tif"), probabilities.transpose(1, 2, 0))
    write_float_tiff(tmp_path / "u.tif", probabilities, axes="ZYX")
    np.testing.assert_array_equal(read_stack(tmp_path / "u.tif"), probabilities)
    write_float_tiff(tmp_path / "v.tif", np.stack([probabilities] * 4))
    assert read_stack(tmp_path / "v.tif").shape == (4, 20, 30, 3)


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(ImageError, match="label 70000"):
        write_labels(tmp_path / "a.tif", np.full((3, 3), 70000))
    with pytest.raises(ImageError, match="label -1"):
        write_labels(tmp_path / "a.tif", np.full((3, 3), -1))
    with pytest.raises(ImageError, match="float"):
        write_labels(tmp_path / "a.tif", np.zeros((3, 3)))
    with pytest.raises(OutputError, match="one plane"):
        write_labels(tmp_path / "a.png", STACK)
    with pytest.raises(OutputError, match=r"'\.jpg'"):
        write_labels(tmp_path / "a.jpg", GRAY)
    with pytest.raises(OutputError, match="no folder"):
        write_labels(tmp_path / "nowhere" / "a.tif", GRAY)
    with pytest.raises(OutputError, match="is a folder"):
        write_labels(make_folder(tmp_path / "d.tif"), GRAY)
    with pytest.raises(ImageError, match="axes"):
        write_float_tiff(tmp_path / "a.tif", np.zeros((3, 3)), axes="ZYX")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.tif"]


def make_folder(path):
    path.mkdir()
    return path


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    write_labels(tmp_path / "a.tif", GRAY)
    before = (tmp_path / "a.tif").read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.tifffile, "imwrite", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        write_labels(tmp_path / "a.tif", DEEP)
    assert (tmp_path / "a.tif").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_a_real_full_device_is_told(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")

    def fill():
        with atomic_path(tmp_path / "a.bin") as temporary:
            temporary.touch()
            with open("/dev/full", "wb") as file:
                file.write(b"x" * 100_000)

    with pytest.raises(OutputError, match="No space left"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")

    def interrupted():
        with atomic_path(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_writing_through_a_link_changes_what_it_stands_for(tmp_path):
    (tmp_path / "real.bin").write_bytes(b"old")
    (tmp_path / "link.bin").symlink_to(tmp_path / "real.bin")
    with atomic_path(tmp_path / "link.bin") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "link.bin").is_symlink()
    assert (tmp_path / "real.bin").read_bytes() == b"new"


# Real files


def test_real_nuclei_pair_up(shared):
    images, labels = shared / "data" / "dsb2018" / "images", shared / "data" / "dsb2018" / "labels"
    if not images.is_dir():
        pytest.skip("needs ../shared/data/dsb2018")
    pairs = pair_files(images, labels)
    assert len(pairs) > 600
    image, label = read_image(pairs[0][0]), read_labels(pairs[0][1])
    assert image.shape[:2] == label.shape


def test_a_real_stack_gives_slices(shared):
    folder = shared / "data" / "vnc"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/vnc")
    slices = load_support(folder / "raw.tif", folder / "mitochondria.tif", planes=[0, 10]).slices
    assert [s.image.shape for s in slices] == [(1024, 1024)] * 2
    assert 0 < slices[0].labels.mean() < 0.5


def test_a_stack_is_written_in_its_own_type(tmp_path):
    stack = np.arange(-60, 60, dtype=np.int16).reshape(3, 5, 8)
    write_stack(tmp_path / "ct.tif", stack)
    found = tifffile.imread(tmp_path / "ct.tif")
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, stack)


@pytest.mark.parametrize(
    ("dtype", "written"), [(bool, "uint8"), ("int16", "uint16"), ("uint32", "uint32"), ("int64", "uint32")]
)
def test_labels_of_a_volume_are_written_plane_by_plane_with_their_voxel_size(tmp_path, dtype, written):
    labels = (np.arange(3 * 40 * 50).reshape(3, 40, 50) % 300).astype(dtype)
    path = tmp_path / "labels.ome.tif"
    write_label_stack(path, iter(labels), labels.shape, labels.dtype, scale=(0.5, 0.1, 0.2), unit="micrometer")
    assert tifffile.imread(path).dtype == written
    np.testing.assert_array_equal(tifffile.imread(path), labels)
    volume = open_volume(path)
    assert (volume.scale, volume.unit) == ((0.5, 0.1, 0.2), "micrometer")


def test_labels_that_a_tiff_cannot_hold_leave_the_earlier_file(tmp_path):
    path = tmp_path / "labels.tif"
    path.write_bytes(b"mine")
    planes = np.zeros((2, 8, 8), np.int64)
    for wrong in (-1, 2**32):
        planes[1, 2, 3] = wrong
        with pytest.raises(ImageError, match=f"holds the label {wrong}"):
            write_label_stack(path, planes, planes.shape, planes.dtype)
    with pytest.raises(ImageError, match="integers"):
        write_label_stack(path, planes.astype(float), planes.shape, np.dtype(float))
    with pytest.raises(OutputError, match=r"\.tif"):
        write_label_stack(tmp_path / "labels.png", planes, planes.shape, planes.dtype)
    assert path.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["labels.tif"]
