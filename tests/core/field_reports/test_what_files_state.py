"""Files that state how they are to be read: axes, orientation, bits, places and scales are obeyed."""

from __future__ import annotations

import csv
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from distillfss_core.cli.main import main
from distillfss_core.io.images import read_image
from distillfss_core.io.labels import read_labels
from distillfss_core.objects.instances import label_instances
from distillfss_core.volumes.volume import open_volume
from volumes import write_ome_zarr

GRAY = np.arange(20 * 30).reshape(20, 30).astype(np.uint8)
CLASSES = np.zeros((20, 30), np.uint8)
CLASSES[3:9, 4:11], CLASSES[12:18, 14:29] = 1, 2


def shown(array: np.ndarray, orientation: int) -> np.ndarray:
    """What a viewer shows of stored rows and columns, by the table of the EXIF standard."""
    flip, turn = np.fliplr, np.rot90
    return {
        1: lambda a: a,
        2: flip,
        3: lambda a: turn(a, 2),
        4: np.flipud,
        5: lambda a: np.swapaxes(a, 0, 1),
        6: lambda a: turn(a, -1),
        7: lambda a: turn(np.swapaxes(a, 0, 1), 2),
        8: lambda a: turn(a, 1),
    }[orientation](array)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "16 bit"])
def test_a_photograph_that_is_to_be_turned(tmp_path, orientation, mode):
    """A camera on a microscope notes how it was held; labels are drawn on the picture as viewers show it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    if mode == "16 bit":
        import imagecodecs

        stored = np.dstack([GRAY.astype(np.uint16) * 256] * 3)
        stored[..., 1] //= 2
        data = imagecodecs.png_encode(stored)
        tiff = exif.tobytes().removeprefix(b"Exif\0\0")
        path.write_bytes(data[:33] + chunk(b"eXIf", tiff) + data[33:])
    else:
        picture = Image.fromarray(GRAY % 3 if mode == "P" else GRAY).convert(mode)
        picture.save(path, exif=exif)
        stored = np.asarray(picture.convert("RGB") if mode == "P" else picture)
    np.testing.assert_array_equal(read_image(path), shown(stored, orientation))
    with open_volume(path) as volume:
        np.testing.assert_array_equal(volume.plane(0), shown(stored, orientation))
    if mode == "P":
        np.testing.assert_array_equal(read_labels(path), shown(np.asarray(picture), orientation))


def test_a_jpeg_that_is_to_be_turned(tmp_path):
    """The same of a JPEG, whose pixels are not exact."""
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = np.add.outer(np.arange(40) * 4, np.arange(56)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", exif=exif, quality=95)
    difference = read_image(tmp_path / "a.jpg").astype(int) - shown(smooth, 6)
    assert difference.shape == (56, 40)
    assert np.abs(difference).max() <= 8


def test_the_orientation_of_a_tiff_is_named(tmp_path, caplog):
    """ImageJ and napari show a TIFF as it is stored; so it is read, and a line in the log states the orientation."""
    tags = [(274, 3, 1, 3, True)]
    tifffile.imwrite(tmp_path / "a.tif", GRAY, extratags=tags)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), GRAY)
    assert "states orientation 3" in caplog.text


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, numbers: np.ndarray, depth: int, palette: bool) -> Path:
    """A PNG of 1, 2, 4 or 8 bits a pixel, gray or with a palette."""
    height, width = numbers.shape
    bits = np.unpackbits(numbers[..., None], axis=2)[..., 8 - depth :].reshape(height, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))
    head = struct.pack(">IIBBBBB", width, height, depth, 3 if palette else 0, 0, 0, 0)
    colors = chunk(b"PLTE", bytes([0, 0, 0, 9, 9, 9, 200, 0, 7, 1, 2, 3][: 3 * 2**depth])) if palette else b""
    data = chunk(b"IHDR", head) + colors + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [False, True])
def test_labels_of_few_bits(tmp_path, depth, palette):
    """A labeling program writes classes 0, 1, 2 into a PNG of as few bits as they need."""
    classes = CLASSES & (2**depth - 1)
    path = write_png(tmp_path / "a.png", classes, depth, palette)
    np.testing.assert_array_equal(read_labels(path), classes)
    with open_volume(path, labels=True) as volume:
        np.testing.assert_array_equal(volume.read()[0], classes)
    (tmp_path / "planes").mkdir()
    for z in range(3):
        write_png(tmp_path / f"planes/{z}.png", np.roll(classes, z, 1), depth, palette)
    with open_volume(tmp_path / "planes", labels=True) as volume:
        np.testing.assert_array_equal(volume.read(), np.stack([np.roll(classes, z, 1) for z in range(3)]))
    image = read_image(path)
    if not palette:
        expected = classes.astype(bool) if depth == 1 else classes * (255 // (2**depth - 1))
        np.testing.assert_array_equal(image, expected)  # as viewers show it


def test_objects_of_a_class_in_png_planes(tmp_path, capsys):
    """Planes of labels as PNG of four bits are numbered by class."""
    (tmp_path / "planes").mkdir()
    for z in range(3):
        write_png(tmp_path / f"planes/{z}.png", CLASSES, 4, palette=False)
    arguments = ["instances", str(tmp_path / "planes"), "-o", str(tmp_path / "o.ome.zarr"), "--class-id", "2"]
    assert main([*arguments, "--table", str(tmp_path / "o.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "o.csv").read_text().splitlines()))
    assert [int(row["voxels"]) for row in rows] == [3 * 6 * 15]


@pytest.mark.parametrize("level", [0, 1])
def test_objects_of_labels_that_have_a_place(tmp_path, level):
    """Labels of a cut-out, or of a coarser level, do not begin where the world does."""
    labels = np.zeros((4, 32, 32), np.uint8)
    labels[1:3, 8:16, 20:28] = 1
    path = write_ome_zarr(tmp_path / "l.ome.zarr", labels, scale=(2.0, 0.5, 0.5))
    import zarr

    group = zarr.open_group(path, mode="r+")
    metadata = group.attrs["ome"]
    for k, dataset in enumerate(metadata["multiscales"][0]["datasets"]):
        shift = [100.0, 50.0 + 0.25 * k, 20.0 + 0.25 * k]
        dataset["coordinateTransformations"].append({"type": "translation", "translation": shift})
    group.attrs["ome"] = metadata
    with open_volume(path, level=level) as volume:
        label_instances(volume, tmp_path / "o.ome.zarr", table=tmp_path / "o.csv")
    (row,) = csv.DictReader((tmp_path / "o.csv").read_text().splitlines())
    fine = np.array([1.5 * 2 + 100, 11.5 * 0.5 + 50, 23.5 * 0.5 + 20])
    # Of the coarser level every second pixel was taken: its voxels are a quarter of a micrometer before their middles.
    expected = fine if level == 0 else [103, 50.25 + (4 + 7) / 2 * 1.0, 20.25 + (10 + 13) / 2 * 1.0]
    assert [float(row[f"centroid_{a}_um"]) for a in "zyx"] == pytest.approx(list(expected))
    assert [int(row[f"box_{a}0"]) for a in "zyx"] == ([1, 8, 20] if level == 0 else [1, 4, 10])
