"""Labels whose numbers are not those that were painted are refused or named."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from distillfss_core import ImageError, SettingsError, label_instances, load_support, open_volume, read_labels
from distillfss_core.cli.console import ERROR, FINE
from distillfss_core.cli.main import main
from distillfss_core.io.label_checks import is_lossy, warn_of_values
from distillfss_core.io.writing import write_labels
from pictures import blobs

PLANE = blobs(0, 128)
MASK = PLANE.labels.astype(np.uint8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """i.tif; l.jpg, its mask 0/255 as JPEG; p.tif, a perfect prediction; the current folder."""
    write_labels(tmp_path / "i.tif", PLANE.image)
    write_labels(tmp_path / "p.tif", MASK)
    Image.fromarray(MASK * 255).save(tmp_path / "l.jpg", quality=75)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["l.jpg", "l.jpeg", "l.png", "l.tif"])
def test_jpeg_labels_are_refused_whatever_their_name(here, name):
    """A mask was saved as JPEG, or as TIFF with JPEG compression; gray rings surround every object."""
    if name == "l.tif":
        tifffile.imwrite(name, MASK * 255, compression="jpeg")
    elif name != "l.jpg":
        Path(name).write_bytes(Path("l.jpg").read_bytes())
    for read in (read_labels, lambda path, **how: load_support("i.tif", path, **how).slices[0].labels):
        with pytest.raises(ImageError, match=rf"{name}: is compressed as JPEG.*--binary-threshold 128"):
            read(name)
        assert (read(name, binary_threshold=128) != MASK).mean() < 0.001


def test_commands_take_a_jpeg_for_the_mask_it_was(here, capsys):
    """Masks of a data set exist as JPEG only."""
    assert main(["evaluate", "p.tif", "l.jpg"]) == ERROR
    assert "l.jpg: is compressed as JPEG" in capsys.readouterr().err
    assert main(["evaluate", "p.tif", "l.jpg", "--binary-threshold=128", "--json"]) == FINE
    assert json.loads(capsys.readouterr().out)["iou"] > 0.995
    assert main(["instances", "l.jpg", "-o", "n.ome.zarr"]) == ERROR
    assert "l.jpg: is compressed as JPEG" in capsys.readouterr().err
    report = label_instances(open_volume("l.jpg"), here / "n.ome.zarr", binary_threshold=128)
    exact = label_instances(open_volume(MASK[None]), here / "exact.ome.zarr")
    assert report.objects == exact.objects > 1


def test_a_threshold_that_cannot_be_meant_is_refused(here, capsys):
    """The mask holds 0 and 1, or several classes."""
    with pytest.raises(ImageError, match="no pixel reaches the binary threshold 128, the largest is 1"):
        load_support("i.tif", "p.tif", binary_threshold=128)
    with pytest.raises(SettingsError, match="does not go with classes"):
        load_support("i.tif", "p.tif", classes=["a", "b"], binary_threshold=1)
    assert main(["evaluate", "p.tif", "p.tif", "--binary-threshold=1", "--scribbles"]) == ERROR
    assert "does not go with scribbles" in capsys.readouterr().err


def resized(mask: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(mask * 255).resize((100, 100), Image.Resampling.BILINEAR))


def from_jpeg(mask: np.ndarray) -> np.ndarray:
    Image.fromarray(mask * 255).save("again.jpg", quality=90)
    return np.asarray(Image.open("again.jpg"))


NUMBERED = np.kron(np.arange(36).reshape(6, 6), np.ones((20, 20))).astype(np.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (from_jpeg, "look like compression or anti-aliasing"),
        (resized, "look like compression or anti-aliasing"),
        (
            lambda mask: np.choose(mask + (NUMBERED > 20) * mask, [0, 85, 170]),
            "the values 85, 170, which look like the",
        ),
        (lambda mask: mask + 1, "values 1, 2 but no 0"),
        (lambda mask: mask, ""),
        (lambda mask: mask * 255, ""),
        (lambda mask: mask * NUMBERED[:1, :1] + NUMBERED, ""),
        (lambda mask: NUMBERED * 7, ""),
    ],
)
def test_values_that_nobody_painted_are_named(here, caplog, make, message):
    """A JPEG was saved as PNG, a mask was resized, classes were drawn in grays, or background is 1."""
    mask = np.zeros((120, 120), np.uint8)
    mask[10:60, 20:70] = mask[70:110, 40:100] = 1
    mask[np.hypot(*np.mgrid[-90:30, -20:100]) < 18] = 1
    labels = make(mask).astype(np.uint8)
    with caplog.at_level(logging.WARNING, "distillfss_core"):
        warn_of_values(labels, "l.png", "binary")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(message)
    assert all(line.startswith("l.png: holds") and message in line for line in lines)


def test_a_smoothed_mask_is_named_by_the_commands(here, capsys):
    """The mask was a JPEG once, and is a PNG now."""
    Image.fromarray(np.asarray(Image.open("l.jpg"))).save("l.png")
    assert main(["evaluate", "p.tif", "l.png", "--json"]) == FINE
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "warning: l.png: holds" in said.err
    assert json.loads(said.out)["iou"] < 0.9


def test_other_files_are_not_lossy(here):
    tifffile.imwrite("zlib.tif", MASK, compression="zlib")
    Path("none").write_bytes(b"")
    assert not any(is_lossy(Path(name)) for name in ("zlib.tif", "p.tif", "none"))
    assert is_lossy(here)
