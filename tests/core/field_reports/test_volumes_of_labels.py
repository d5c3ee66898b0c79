"""Labels that are volumes: compared with the truth, and learned from."""

import json
import logging

import numpy as np
import pytest
import tifffile
from PIL import Image

from distillfss_core import InputFileError, SettingsError, iter_segment, load_support, open_volume
from distillfss_core.cli.console import ERROR, FINE
from distillfss_core.cli.main import main
from distillfss_core.io.labels import pair_files
from distillfss_core.support import label_volumes
from medical_files import save_dicom, save_mrc, save_nifti
from volumes import noise, write_ome_zarr

pytest.importorskip("mrcfile", reason="needs mrcfile: pip install mrcfile")
pytest.importorskip("nibabel", reason="needs nibabel: pip install nibabel")
pytest.importorskip("pydicom", reason="needs pydicom: pip install pydicom")

SHAPE = (5, 40, 36)
TRUTH = (noise(SHAPE, "u1", 1) > 120).astype(np.uint8)
PREDICTED = (noise(SHAPE, "u1", 2) > 120).astype(np.uint8)


def save_tiff(path, array):
    tifffile.imwrite(path, array, photometric="minisblack", metadata={"axes": "ZYX"})
    return path


def save_zarr(path, array, **options):
    return write_ome_zarr(path, array, **options)


WRITERS = {
    "a.ome.zarr": save_zarr,
    "a.nii.gz": save_nifti,
    "a.nii": save_nifti,
    "a.mrc": lambda path, array: save_mrc(path, array.astype(np.int8)),
    "dicom": save_dicom,
    "a.tif": save_tiff,
    "a.npy": lambda path, array: np.save(path, array) or path,
}


def iou(predicted, truth):
    return ((predicted > 0) & (truth > 0)).sum() / ((predicted > 0) | (truth > 0)).sum()


def scores(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == FINE, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def error(capsys, *arguments):
    assert main([*map(str, arguments)]) == ERROR
    return capsys.readouterr().err


@pytest.mark.parametrize("predicted", WRITERS)
@pytest.mark.parametrize("true", ["a.ome.zarr", "a.tif", "a.nii.gz"])
def test_labels_of_any_format_are_compared(tmp_path, capsys, predicted, true):
    """A user segments to OME-Zarr, or has masks in NIfTI, MRC or DICOM, and compares them with the truth."""
    for side in ("p", "t"):
        (tmp_path / side).mkdir()
    first = WRITERS[predicted](tmp_path / "p" / predicted, PREDICTED)
    second = WRITERS[true](tmp_path / "t" / true, TRUTH)
    both = scores(capsys, "evaluate", first, second)
    assert both["iou"] == pytest.approx(iou(PREDICTED, TRUTH))
    each = [measures["object"]["iou"] for measures in both["images"].values()]
    assert each == pytest.approx([iou(p, t) for p, t in zip(PREDICTED, TRUTH, strict=True)])


@pytest.mark.parametrize("kind", ["a.ome.zarr", "a.nii.gz", "a.tif"])
def test_planes_and_regions_are_chosen(tmp_path, capsys, kind):
    """A user has corrected a few planes, or a region, and compares these only."""
    first = WRITERS[kind](tmp_path / kind, PREDICTED)
    second = save_tiff(tmp_path / "t.tif", TRUTH)
    planes = scores(capsys, "evaluate", first, second, "--planes", "1,3")
    assert planes["iou"] == pytest.approx(iou(PREDICTED[[1, 3]], TRUTH[[1, 3]]))
    assert len(planes["images"]) == 2
    box = np.s_[1:4, 5:31, 8:20]
    region = scores(capsys, "evaluate", first, second, "--region", "1:4,5:31,8:20")
    assert region["iou"] == pytest.approx(iou(PREDICTED[box], TRUTH[box]))
    assert len(region["images"]) == 3
    assert "plane 5 is outside" in error(capsys, "evaluate", first, second, "--planes", "5")
    assert "region z 1:9 is empty or outside" in error(capsys, "evaluate", first, second, "--region", "1:9")


@pytest.mark.parametrize("piece", [1, 300, 3000])
def test_labels_larger_than_memory_are_read_in_pieces(tmp_path, capsys, monkeypatch, piece):
    """A user compares volumes of a hundred gigabytes on a laptop."""
    first = save_zarr(tmp_path / "a.zarr", PREDICTED, chunks=(2, 8, 36), levels=1)
    second = save_zarr(tmp_path / "b.zarr", TRUTH, chunks=(1, 5, 12), levels=1)
    sizes = []
    read = label_volumes.Volume.read

    def measured(self, *spans):
        block = read(self, *spans)
        sizes.append(block.size)
        return block

    monkeypatch.setattr(label_volumes, "_PIECE", piece)
    monkeypatch.setattr(label_volumes.Volume, "read", measured)
    both = scores(capsys, "evaluate", first, second)
    assert both["iou"] == pytest.approx(iou(PREDICTED, TRUTH))
    assert max(sizes) <= max(piece, 8 * 36)  # a row of chunks is the least that is read
    assert sum(sizes) == 2 * PREDICTED.size


def test_labels_are_compared_at_the_level_of_the_other_side(tmp_path, capsys):
    """A user has segmented level 1 of a pyramid; the truth is a pyramid of the finest level."""
    coarse = save_zarr(tmp_path / "p.zarr", PREDICTED[:, ::2, ::2], levels=1)
    truth = save_zarr(tmp_path / "t.zarr", TRUTH, levels=2)
    expected = iou(PREDICTED[:, ::2, ::2], TRUTH[:, ::2, ::2])
    assert scores(capsys, "evaluate", coarse, truth)["iou"] == pytest.approx(expected)
    line = error(capsys, "evaluate", truth, coarse)
    assert "5 x 20 x 18 voxels" in line
    assert "5 x 40 x 36" in line
    assert "choose level 1" in line
    assert scores(capsys, "evaluate", truth, coarse, "--level", "1")["iou"] == pytest.approx(expected)


def test_a_time_point_of_both_is_compared(tmp_path, capsys):
    """A user compares one time point of a series, where the truth is of that time point only."""
    series = np.stack([TRUTH, PREDICTED])
    first = save_zarr(tmp_path / "p.zarr", series, axes="tzyx", levels=1)
    second = save_nifti(tmp_path / "t.nii.gz", TRUTH)
    assert scores(capsys, "evaluate", first, second, "--time", "1")["iou"] == pytest.approx(iou(PREDICTED, TRUTH))
    assert scores(capsys, "evaluate", first, second, "--time", "0")["iou"] == 1
    assert "has 2 time points; choose one" in error(capsys, "evaluate", first, second)


def test_folders_of_volumes_are_paired_by_stem(tmp_path, capsys):
    """A user has a folder of labels from batch, and one of NIfTI masks from another tool."""
    for side in ("p", "t"):
        (tmp_path / side).mkdir()
    save_zarr(tmp_path / "p" / "one.ome.zarr", PREDICTED)
    save_zarr(tmp_path / "p" / "two.ome.zarr", TRUTH)
    (tmp_path / "p" / "report.csv").write_text("volume\n")
    save_nifti(tmp_path / "t" / "one.nii.gz", TRUTH)
    save_tiff(tmp_path / "t" / "two_mask.tif", TRUTH)
    both = scores(capsys, "evaluate", tmp_path / "p", tmp_path / "t")
    names = [f"{stem}.ome.zarr plane {z}" for stem in ("one", "two") for z in range(5)]
    assert list(both["images"]) == names
    assert both["iou"] == pytest.approx(iou(np.stack([PREDICTED, TRUTH]), np.stack([TRUTH, TRUTH])))


def test_a_folder_of_planes_goes_with_one_volume_of_labels(tmp_path, capsys):
    """A user has planes as PNG files, and their labels as one stack."""
    (tmp_path / "planes").mkdir()
    for z, plane in enumerate(TRUTH):
        Image.fromarray(plane).save(tmp_path / "planes" / f"{z}.png")
    truth = save_tiff(tmp_path / "t.tif", PREDICTED)
    assert scores(capsys, "evaluate", tmp_path / "planes", truth)["iou"] == pytest.approx(iou(PREDICTED, TRUTH))


def test_classes_and_scribbles_of_volumes(tmp_path, capsys):
    """A user has several classes, and a truth of scribbles that leaves most voxels out."""
    classes = noise(SHAPE, "u1", 3) % 3
    truth = noise(SHAPE, "u1", 4) % 4
    first = save_zarr(tmp_path / "p.zarr", classes, levels=1)
    second = save_nifti(tmp_path / "t.nii", truth)
    measured = scores(capsys, "evaluate", first, second, "--classes", "a,b", "--scribbles")["pooled"]
    for k, name in ((1, "a"), (2, "b")):
        seen = truth > 0
        expected = iou((classes == k)[seen], (truth == k + 1)[seen])
        assert measured[name]["iou"] == pytest.approx(expected)
    assert "holds the label 3" in error(capsys, "evaluate", first, second, "--classes", "a,b")


def test_fractions_are_no_labels(tmp_path, capsys):
    """A user gives probabilities in MRC where labels are wanted."""
    first = save_mrc(tmp_path / "p.mrc", np.full(SHAPE, 0.25, np.float32))
    assert "p.mrc plane 0: holds 0.25" in error(capsys, "evaluate", first, save_tiff(tmp_path / "t.tif", TRUTH))


def test_an_image_that_holds_labels_is_not_taken_for_them(tmp_path, capsys):
    """A user gives the OME-Zarr image instead of the labels inside it."""
    image = save_zarr(tmp_path / "image.zarr", noise(SHAPE))
    save_zarr(image / "labels" / "nuclei", TRUTH)
    truth = save_tiff(tmp_path / "t.tif", TRUTH)
    assert "is an image that holds labels (nuclei); give" in error(capsys, "evaluate", image, truth)
    assert scores(capsys, "evaluate", image / "labels" / "nuclei", truth)["iou"] == 1


def test_labels_of_a_part_are_compared_with_a_warning(tmp_path, capsys, plain_student):
    """A user has segmented a region, and compares the whole with the truth."""
    image = noise((3, 64, 64), "u1")
    run = iter_segment(
        open_volume(image), plain_student, tmp_path / "p.ome.zarr", region=[(0, 2), (None, None), (0, 48)]
    )
    list(run)
    truth = save_tiff(tmp_path / "t.tif", noise((3, 64, 64), "u1", 1) % 2)
    assert main(["evaluate", str(tmp_path / "p.ome.zarr"), str(truth)]) == FINE
    assert "only z 0:2, y 0:64, x 0:48 is finished (50% of the voxels)" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "p.ome.zarr"), str(truth), "--region", "0:2,:,0:48"]) == FINE
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flipped", [False, True])
def test_a_nifti_that_is_flipped_against_its_dicom_series_is_warned_of(tmp_path, capsys, flipped):
    """A user compares NIfTI labels with a DICOM series: converters often turn the rows around."""
    from pydicom import dcmread

    folder = save_dicom(tmp_path / "dicom", TRUTH)
    for z in range(len(TRUTH)):
        plane = dcmread(folder / f"{z}.dcm")
        plane.ImageOrientationPatient, plane.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, float(z)]
        plane.save_as(folder / f"{z}.dcm", enforce_file_format=True)
    affine = np.diag([-1.0, 1.0 if flipped else -1.0, 1.0, 1.0])  # x to the left, y to the back, z up, but flipped
    labels = save_nifti(tmp_path / "l.nii.gz", TRUTH[:, ::-1] if flipped else TRUTH, affine)
    assert open_volume(folder).directions == "SPL"
    assert open_volume(folder).along("x").directions == "LSP"
    assert open_volume(labels).directions == ("SAL" if flipped else "SPL")
    assert main(["evaluate", str(labels), str(folder)]) == FINE
    line = capsys.readouterr().err
    assert (f"its axes z, y, x point to S, P, L, those of {labels} to S, A, L" in line) == flipped
    assert bool(line) == flipped


# learning


@pytest.mark.parametrize("kind", WRITERS)
def test_slices_of_volumes_are_those_of_arrays(tmp_path, kind):
    """A user learns from a volume and its labels in a format that is no image file."""
    image = noise(SHAPE, "u1", 5)
    labels = TRUTH * np.array([0, 1, 0, 1, 0], np.uint8)[:, None, None]
    for side in ("i", "l"):
        (tmp_path / side).mkdir()
    image_path = WRITERS[kind](tmp_path / "i" / kind, image // 2)
    label_path = WRITERS[kind](tmp_path / "l" / kind, labels)
    support = load_support(image_path, label_path)
    assert support.planes_of_one_volume
    assert [s.source.rpartition(" ")[2] for s in support.slices] == ["1", "3"]
    for annotated, z in zip(support.slices, (1, 3), strict=True):
        np.testing.assert_array_equal(annotated.image, image[z] // 2)
        np.testing.assert_array_equal(annotated.labels, TRUTH[z])
    (one,) = load_support(image_path, label_path, planes=[3], region=[(None, None), (4, 30), (None, 20)]).slices
    np.testing.assert_array_equal(one.image, image[3, 4:30, :20] // 2)
    np.testing.assert_array_equal(one.labels, TRUTH[3, 4:30, :20])


def test_a_channel_and_a_level_of_a_volume_are_learned_from(tmp_path, capsys):
    """A user learns from one channel of an OME-Zarr at half resolution, whose labels are a pyramid too."""
    image = noise((2, *SHAPE), "u2", 6)
    image_path = save_zarr(tmp_path / "i.zarr", image, axes="czyx", channels=("405", "488"))
    labels = save_zarr(tmp_path / "l.zarr", TRUTH)
    with pytest.raises(SettingsError, match=r"has 2 channels \(405, 488\); choose one"):
        load_support(image_path, labels)
    support = load_support(image_path, labels, channel=1, level=1, planes=[2])
    np.testing.assert_array_equal(support.slices[0].image, image[1, 2, ::2, ::2])
    np.testing.assert_array_equal(support.slices[0].labels, TRUTH[2, ::2, ::2])
    model = tmp_path / "m.safetensors"
    few = ["--steps=2", "--crops=2", "--queries=1", "--shots=1", "--crop-size=32", "--zoom=1", "--device=cpu"]
    command = ["distill", image_path, labels, "--channel", "488", "--planes", "0,2", "-o", model, *few, "--json"]
    assert main([*map(str, command)]) == FINE
    assert json.loads(capsys.readouterr().out)["training"]["support"] == ["i.zarr plane 0", "i.zarr plane 2"]


def test_labels_of_one_plane_belong_to_the_plane_that_is_given(tmp_path):
    """A user has labeled one plane of a large volume, and saved it as a picture."""
    image = save_zarr(tmp_path / "i.zarr", noise(SHAPE))
    Image.fromarray(TRUTH[2]).save(tmp_path / "l.png")
    (one,) = load_support(image, tmp_path / "l.png", planes=[2]).slices
    np.testing.assert_array_equal(one.image, noise(SHAPE)[2])
    np.testing.assert_array_equal(one.labels, TRUTH[2])
    with pytest.raises(SettingsError, match="say with planes which one it belongs to"):
        load_support(image, tmp_path / "l.png")


def test_slices_beyond_the_memory_are_refused(tmp_path, monkeypatch):
    """A user gives a volume that is labeled in all its planes, and larger than the memory."""
    image, labels = save_zarr(tmp_path / "i.zarr", noise(SHAPE)), save_zarr(tmp_path / "l.zarr", TRUTH)
    monkeypatch.setattr(label_volumes, "memory_limit", lambda: 3 * 40 * 36 * 3)
    with pytest.raises(SettingsError, match=r"5 planes with labels take .* choose some with planes, or a region"):
        load_support(image, labels)
    assert len(load_support(image, labels, planes=[0, 1, 4])) == 3


def test_folders_of_volumes_are_learned_from(tmp_path):
    """A user has a folder of NIfTI images and one of their masks."""
    for name in ("i", "l"):
        (tmp_path / name).mkdir()
    for k, stem in enumerate(("one", "two")):
        save_nifti(tmp_path / "i" / f"{stem}.nii.gz", noise(SHAPE, "u1", k))
        save_nifti(tmp_path / "l" / f"{stem}_seg.nii.gz", TRUTH)
    support = load_support(tmp_path / "i", tmp_path / "l", classes=["cell"])
    assert len(support) == 10
    assert not support.planes_of_one_volume
    np.testing.assert_array_equal(support.slices[7].image, noise(SHAPE, "u1", 1)[2])


# labels of other programs


def cellpose_file(path):
    np.save(path, {"masks": TRUTH[0], "filename": "a.png"}, allow_pickle=True)
    return path


def test_a_pickled_file_of_cellpose_is_refused_and_named(tmp_path, capsys):
    """A user gives the _seg.npy of Cellpose as labels, as an image and as a volume."""
    Image.fromarray(TRUTH[0]).save(tmp_path / "a.png")
    pickled = cellpose_file(tmp_path / "a_seg.npy")
    out = tmp_path / "o.ome.zarr"
    for command in (
        ["evaluate", pickled, tmp_path / "a.png"],
        ["evaluate", pickled, tmp_path / "a.png", "--region", "0:1"],
        ["distill", tmp_path / "a.png", pickled, "-o", tmp_path / "m.safetensors"],
        ["instances", pickled, "-o", out],
    ):
        line = error(capsys, *command)
        assert "a_seg.npy: holds pickled Python objects" in line
        assert "save the masks as TIFF or PNG" in line
    assert not out.exists()


def test_what_a_pickle_would_run_is_not_run(tmp_path):
    """A user opens a file from elsewhere that would run a program."""

    class Bad:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    np.save(tmp_path / "a_seg.npy", np.array([Bad()], object), allow_pickle=True)
    with pytest.raises(InputFileError, match="pickled"):
        open_volume(tmp_path / "a_seg.npy")
    assert not (tmp_path / "ran").exists()


def test_masks_of_cellpose_and_ilastik_are_paired_with_their_images(tmp_path, caplog):
    """A user has the results beside the images, as Cellpose and ilastik write them."""
    for name in ("a.png", "a_cp_masks.png", "b.png", "b_Simple Segmentation.tif", "c.png", "c_Object Identities.png"):
        Image.fromarray(TRUTH[0]).save(tmp_path / name)
    cellpose_file(tmp_path / "a_seg.npy")
    with caplog.at_level(logging.WARNING):
        pairs = [(i.name, m.name) for i, m in pair_files(tmp_path, tmp_path)]
    assert pairs == [
        ("a.png", "a_cp_masks.png"),
        ("b.png", "b_Simple Segmentation.tif"),
        ("c.png", "c_Object Identities.png"),
    ]
    assert "1 pickled label file(s) beside others are left out: a_seg.npy" in caplog.text


def test_labels_that_count_from_1_are_warned_of(tmp_path, capsys):
    """A user compares a Simple Segmentation of ilastik, whose background is 1, with the truth."""
    truth = save_tiff(tmp_path / "t.tif", TRUTH)
    for kind in ("a.tif", "a.ome.zarr"):
        exported = WRITERS[kind](tmp_path / kind, PREDICTED + 1)
        assert main(["evaluate", str(exported), str(truth)]) == FINE
        line = capsys.readouterr().err
        assert "no pixel of the prediction is background (0); if its labels count from 1, as those of ilastik" in line
    assert main(["evaluate", str(truth), str(truth)]) == FINE
    assert capsys.readouterr().err == ""


def test_a_mask_of_imagej_with_an_inverted_table_keeps_its_numbers(tmp_path, capsys):
    """A user saves a mask from ImageJ, which shows 255 as black."""
    tifffile.imwrite(tmp_path / "p.tif", TRUTH[0] * 255, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "t.tif", TRUTH[0], photometric="minisblack")
    assert scores(capsys, "evaluate", tmp_path / "p.tif", tmp_path / "t.tif")["iou"] == 1
    assert scores(capsys, "evaluate", tmp_path / "p.tif", tmp_path / "t.tif", "--region", ":,:,:")["iou"] == 1
