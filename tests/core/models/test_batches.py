"""Many planes at once give the labels of each plane alone."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from distillfss_core import distill
from distillfss_core.models.batches import PlaneBatches, likeliest_class
from distillfss_core.models.student import StudentModel
from distillfss_core.segmentation.lazy import VolumeSegmenter
from distillfss_core.support.support_set import SupportSet
from distillfss_core.volumes.volume import open_volume
from pictures import blobs

TILE = 96


def batched(model: StudentModel, stack: np.ndarray, region, pixels: int, tile: int = TILE) -> np.ndarray:
    """Labels of a region of all planes, ``pixels`` at a time."""
    (y0, y1), (x0, x1) = region
    labels = np.full((len(stack), y1 - y0, x1 - x0), 99, np.uint8)
    batches = PlaneBatches(model._margins, model.preprocess, model.device, step=model.step, pixels=pixels)
    limits = [model.preprocess.limits(model.preprocess.as_channels(plane)) for plane in stack]
    for where in model.tiles(stack.shape[1:3], tile=tile):
        (ya, yb), (xa, xb) = where.y.inner, where.x.inner
        top, bottom, left, right = max(ya, y0), min(yb, y1), max(xa, x0), min(xb, x1)
        if top < bottom and left < right:
            crop = (
                slice(top - where.outer[0].start, bottom - where.outer[0].start),
                slice(left - where.outer[1].start, right - where.outer[1].start),
            )
            windows = model.preprocess.stack_channels(stack[(slice(None), *where.outer)])
            out = labels[:, top - y0 : bottom - y0, left - x0 : right - x0]
            assert batches.label(windows, crop, limits, out)
    batches.finish()
    return labels


@pytest.fixture(scope="module", params=["gray", "zoomed", "color", "two classes"])
def case(request, tiny) -> tuple[StudentModel, np.ndarray]:
    """A student and a stack of five planes that it was made for."""
    classes = 2 if request.param == "two classes" else 1
    slices = [blobs(seed, 150, classes) for seed in range(6)]
    if request.param == "color":
        slices = [replace(s, image=np.stack([s.image, s.image // 2, 255 - s.image], -1)) for s in slices]
    names = ("bright", "dark")[:classes]
    settings = replace(tiny, steps=30, crops=12, zoom=Fraction(2 if request.param == "zoomed" else 1))
    model = distill(SupportSet(tuple(slices[:2]), names), settings)
    model.halo = 32
    return model.to("cpu", "float32", "torch"), np.stack([s.image for s in slices[1:]])


@pytest.mark.parametrize("planes", [1, 2, 5])
def test_planes_at_once_have_the_labels_of_planes_alone(case, planes):
    model, stack = case
    region = ((0, 150), (0, 150))
    window = (TILE + 2 * model.halo) ** 2
    found = batched(model, stack, region, pixels=planes * window)
    alone = np.stack([model.predict_labels(plane, tile=TILE) for plane in stack])
    assert (found == alone).mean() >= 0.9999
    assert 0 < (alone > 0).mean() < 1


def test_a_region_has_the_labels_of_the_whole(case):
    model, stack = case
    whole = batched(model, stack, ((0, 150), (0, 150)), pixels=1 << 17)
    assert np.array_equal(batched(model, stack, ((40, 120), (97, 150)), pixels=1 << 17), whole[:, 40:120, 97:150])


def test_labels_do_not_depend_on_the_number_of_planes(case):
    """A batch is filled up, so that the device computes the same whatever is beside a plane."""
    model, stack = case
    region, network, shapes = ((0, 150), (0, 150)), model._margins, set()
    model._margins = lambda x: (shapes.add(tuple(x.shape)), network(x))[1]
    try:
        all_of_them = batched(model, stack, region, pixels=3 * 2**16)
        computed = shapes.copy()
        one = batched(model, stack[2:3], region, pixels=3 * 2**16)
    finally:
        del model._margins
    assert np.array_equal(all_of_them[2:3], one)
    assert shapes == computed


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, ">u2", np.float32, np.float64, np.uint32])
def test_any_dtype_goes_up_to_the_device(plain_student, dtype):
    stack = np.stack([blobs(seed, 96).image for seed in range(2)]).astype(dtype)
    model = plain_student.with_engine("torch")
    alone = np.stack([model.predict_labels(plane, tile=TILE) for plane in stack])
    assert (batched(model, stack, ((0, 96), (0, 96)), pixels=1 << 17) == alone).mean() >= 0.9999


def test_out_of_memory_goes_on_with_fewer_planes(plain_student, monkeypatch, caplog):
    model = plain_student.with_engine("torch")
    network, most = model._margins, []

    def short_of_memory(x):
        most.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return network(x)

    monkeypatch.setattr(model, "_margins", short_of_memory)
    stack = np.stack([blobs(seed, 96).image for seed in range(7)])
    found = batched(model, stack, ((0, 96), (0, 96)), pixels=4 * 96 * 96)
    assert most == [4, 2, 2, 2, 2]
    assert "going on with 2 planes at a time" in caplog.text
    monkeypatch.undo()
    assert (found == np.stack([model.predict_labels(plane) for plane in stack])).mean() >= 0.9999


def test_a_volume_takes_batches_where_the_device_wants_them(plain_student, monkeypatch, caplog):
    """And goes on plane by plane in smaller tiles where a single window is too large."""
    model = plain_student.with_engine("torch")
    stack = np.stack([blobs(seed, 200).image for seed in range(3)])
    segmenter = VolumeSegmenter(open_volume(stack), model, tile=TILE)
    region = ((10, 190), (0, 200))
    pixels = segmenter.read(slice(0, 3), region)
    alone = segmenter.stack_labels(range(3), region, pixels)
    monkeypatch.setattr(type(model), "batched", True)
    assert (segmenter.stack_labels(range(3), region, pixels) == alone).mean() >= 0.9999
    network = model._margins

    def short_of_memory(x):
        if x.shape[2] * x.shape[3] > 128 * 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return network(x)

    monkeypatch.setattr(model, "_margins", short_of_memory)
    found = segmenter.stack_labels(range(3), region, pixels)
    assert (found == alone).mean() >= 0.999
    assert "going on with tiles of" in caplog.text


def test_a_pixel_that_is_not_finite_names_its_plane(plain_student, monkeypatch):
    monkeypatch.setattr(type(plain_student), "batched", True)
    stack = np.ones((3, 96, 96), np.float32)
    segmenter = VolumeSegmenter(open_volume(stack), plain_student, tile=TILE)
    region = ((0, 96), (0, 96))
    pixels = segmenter.read(slice(0, 3), region).copy()
    pixels[1, 5, 5] = np.nan
    with pytest.raises(Exception, match="plane 1: 1 of 9216 pixels are NaN"):
        segmenter.stack_labels(range(3), region, pixels)


def test_the_likeliest_class_is_background_where_no_margin_is_positive():
    margins = torch.tensor([[[[-1.0, 2.0, 1.0]], [[-2.0, 1.0, 3.0]]]])
    assert likeliest_class(margins).tolist() == [[[0, 1, 2]]]
    assert likeliest_class(margins[:, :1]).tolist() == [[[0, 1, 1]]]
