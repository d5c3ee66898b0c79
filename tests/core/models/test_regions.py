"""A part of a plane has the labels of the whole, bit for bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import zarr

from distillfss_core.models import segmenter
from distillfss_core.models.segmenter import TILE
from distillfss_core.models.student import StudentModel
from distillfss_core.models.tiling import Tile, split_axis
from distillfss_core.nn.backbones import SPECS
from distillfss_core.nn.device import Device
from distillfss_core.segmentation.lazy import segment_lazy
from distillfss_core.segmentation.to_zarr import segment_to_zarr
from distillfss_core.training import distill
from distillfss_core.types import sample_step
from distillfss_core.volumes.volume import open_volume
from pictures import blobs

pytestmark = pytest.mark.slow

PLANE = blobs(3, 300).image


@pytest.fixture(scope="module")
def blending(support, tiny) -> StudentModel:
    forms = {"student": "published", "decoder": "published", "teacher": "published"}
    model = distill(support, replace(tiny, head="none", **forms))
    model.halo = 64
    return model


@pytest.mark.parametrize("kind", ["plain_student", "blending"])
@pytest.mark.parametrize(
    "region", [((0, 300), (0, 300)), ((0, 96), (96, 192)), ((37, 250), (95, 97)), ((299, 300), (0, 1))]
)
def test_a_region_is_that_of_the_whole(request, kind, region):
    model = request.getfixturevalue(kind)
    assert model.local == (kind == "plain_student")
    whole = model.predict(PLANE, tile=96)
    asked = []

    def read(y, x):
        asked.append((y, x))
        return PLANE[y, x]

    limits = model.preprocess.limits(PLANE)
    (y0, y1), (x0, x1) = region
    part = model.predict_region(read, PLANE.shape, region, limits, tile=96)
    assert np.array_equal(part, whole.probabilities[:, y0:y1, x0:x1])
    labels = model.region_labels(read, PLANE.shape, region, limits, tile=96)
    assert np.array_equal(labels, whole.labels[y0:y1, x0:x1])
    if region == ((0, 96), (96, 192)) and model.local:
        assert asked == [(slice(0, 128), slice(64, 224))] * 2  # the one tile, with its halo


@pytest.fixture
def sized(plain_student):
    """The student with another halo and precision, and without a computation."""

    def make(halo: int, precision: str = "float32", zoom: str = "1") -> StudentModel:
        model = copy.copy(plain_student)
        model.halo, model.device = halo, Device("cpu", precision)
        model.preprocess = replace(model.preprocess, zoom=zoom)
        return model

    return make


@pytest.mark.parametrize("zoom", ["1/2", "1", "2"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("shape", [(700, 900), (1040, 1392), (2304, 2304), (500, 9000), (4096, 5000)])
def test_the_best_tile_computes_no_more_pixels_and_needs_no_more_memory(sized, shape, precision, zoom):
    model = sized(128, precision, zoom)
    area = {side: [tile.area for tile in model.tiles(shape, tile=side)] for side in (TILE, model.best_tile(shape))}
    largest = max(tile.area for tile in model.tiles((99999, 99999), tile=TILE))
    best = area[model.best_tile(shape)]
    assert sum(best) <= sum(area[TILE])
    assert max(best) <= largest * (2 if precision == "int8" else 1)
    assert [tile.area for tile in model.tiles(shape)] == best


def test_planes_a_little_larger_than_a_tile_are_one_tile(sized):
    assert [len(sized(128).tiles((side, side))) for side in (1024, 1280, 1312, 2304, 2336)] == [1, 1, 4, 4, 9]
    assert len(sized(128, "int8").tiles((1792, 1792))) == 1
    assert sized(128, "int8").best_tile((9999, 9999)) > sized(128).best_tile((9999, 9999)) == TILE


def test_a_backbone_that_needs_less_memory_has_larger_tiles(sized):
    narrow = sized(128)
    narrow.backbone = copy.copy(narrow.backbone)
    narrow.backbone.spec = SPECS["lite0_compact"]
    assert [len(model.tiles((2048, 2048))) for model in (sized(128), narrow)] == [4, 1]
    assert max(tile.area for tile in narrow.tiles((9999, 9999))) <= 2.6 * 1280**2


def test_windows_of_one_size_may_be_larger_where_the_engine_needs_less_memory_for_them(sized, monkeypatch):
    plain = sized(128)
    monkeypatch.setattr(StudentModel, "repeated_pixels", 2.6)
    model = sized(128)

    def counted(shape, planes):
        tile = model.best_tile(shape, planes)
        tiles = model.repeating(shape, tile, planes).tiles(shape, tile=tile)
        return len(tiles), max(tile.area for tile in tiles)

    assert counted((2048, 2048), 8) == (1, 2048**2)
    assert counted((2048, 2048), 7) == (4, 1152**2)  # too few to make an engine ready
    assert counted((4096, 4096), 100) == (9, 1632**2)
    assert counted((900, 1000), 100) == (1, 900 * 1000)
    assert not model.repeats((900, 1000), TILE, 100)  # so small that its memory does not count
    largest = max(tile.area for tile in plain.tiles((99999, 99999), tile=TILE))
    for shape in ((1200, 1600), (3000, 3000), (5000, 9000), (20000, 20000)):
        assert counted(shape, 50)[1] <= 2.6 * largest
    assert model.repeating((2048, 2048), 2048, 7) is model
    assert plain.tiles((3000, 3000)) == model.tiles((3000, 3000))


def test_parts_of_a_volume_with_windows_of_one_size_have_the_labels_of_the_whole(plain_student, tmp_path, monkeypatch):
    monkeypatch.setattr(StudentModel, "repeated_pixels", 2.6)
    monkeypatch.setattr(segmenter, "TILE", 64)
    monkeypatch.setattr(segmenter, "_MORE", 9)
    stack = np.stack([np.roll(PLANE, 40 * z, 1) for z in range(3)])
    zarr.save_array(tmp_path / "stack.zarr", stack)
    sizes = []
    compute = StudentModel._window

    def recorded(self, window):
        sizes.append(tuple(-(-side // self.step) for side in window.shape[-2:]))
        return compute(self, window)

    monkeypatch.setattr(StudentModel, "_window", recorded)
    volume = open_volume(tmp_path / "stack.zarr")
    segment_to_zarr(volume, plain_student, tmp_path / "labels.ome.zarr", tile=96)
    assert len(sizes) == 3 * 16
    assert len(set(sizes)) == 1
    labels = zarr.open_array(tmp_path / "labels.ome.zarr" / "0", mode="r")[:]
    part = segment_lazy(volume, plain_student, tile=96)[1:3, 37:250, 95:197].compute()
    np.testing.assert_array_equal(part, labels[1:3, 37:250, 95:197])
    whole = plain_student.predict_labels(PLANE, tile=10**6)
    assert (labels[0] == whole).mean() > 0.999


def test_tiles_stay_as_they_are_on_a_gpu_and_where_they_are_blended(sized, blending):
    on_gpu = sized(128)
    on_gpu.device = Device("cuda", "bfloat16")
    sides = [model.best_tile((1280, 1280)) for model in (sized(128), on_gpu, blending)]
    assert sides == [1280, TILE, TILE]


def test_planes_that_are_one_tile_are_segmented_as_in_several(plain_student, tmp_path):
    plane = np.tile(blobs(3, 260).image, (4, 5))[:1030, :1080]
    whole = plain_student.predict_labels(plane)
    assert len(plain_student.tiles(plane.shape)) == 1 < len(plain_student.tiles(plane.shape, tile=TILE))
    assert (whole == plain_student.predict_labels(plane, tile=TILE)).mean() > 0.999
    volume = open_volume(plane[None])
    assert np.array_equal(segment_lazy(volume, plain_student)[0, 1000:1030, 500:700].compute(), whole[1000:, 500:700])
    segment_to_zarr(volume, plain_student, tmp_path / "new.zarr")
    assert np.array_equal(zarr.open_array(tmp_path / "new.zarr" / "0", mode="r")[0], whole)
    part = ((0, 1), (0, 1030), (0, 100))
    segment_to_zarr(volume, plain_student, tmp_path / "old.zarr", region=part, tile=TILE)
    segment_to_zarr(volume, plain_student, tmp_path / "old.zarr", resume=True)  # in the tiles it was begun with
    assert np.array_equal(
        zarr.open_array(tmp_path / "old.zarr" / "0", mode="r")[0], plain_student.predict_labels(plane, tile=TILE)
    )


@pytest.mark.parametrize("shape", [(40, 50), (1500, 1100), (1, 3_000_000), (1500, 1100, 3)])
def test_limits_from_every_nth_pixel_are_those_of_the_plane(plain_student, shape):
    plane = np.random.default_rng(0).integers(0, 60_000, shape, dtype=np.uint16)
    prepared = replace(plain_student.preprocess, scope="image", channels=3 if len(shape) == 3 else 1)
    step = sample_step(shape[:2])
    assert prepared.sample_limits(plane[::step, ::step]) == prepared.limits(plane)


def test_the_digest_is_that_of_what_decides_the_answer(plain_student, tmp_path):
    plain_student.save(tmp_path / "m.safetensors")
    again = StudentModel.load(tmp_path / "m.safetensors", device="cpu")
    assert again.digest() == plain_student.digest()
    again.halo = 96
    assert again.digest() != plain_student.digest()


def test_a_region_of_a_huge_plane_is_found_without_a_look_at_all_tiles(plain_student, monkeypatch):
    made = []
    monkeypatch.setattr(segmenter, "Tile", lambda y, x: (made.append((y, x)), Tile(y, x))[1])
    shape, region = (10**6, 10**6), ((512_000, 514_048), (0, 1024))
    tiles = plain_student.tiles(shape, tile=TILE, region=region)
    assert len(made) == len(tiles) <= 8
    rows = split_axis(shape[0], TILE, plain_student.halo, plain_student.step)
    assert [t.y for t in tiles] == [s for s in rows if s.inner[0] < 514_048 and s.inner[1] > 512_000]
    assert {t.x.inner for t in tiles} == {(0, tiles[0].x.inner[1])}
    (y0, y1), (x0, x1) = plain_student.reach(shape, region, tile=TILE)
    assert (x0, x1) == (0, tiles[0].x.outer[1])
    assert (y0, y1) == (tiles[0].y.outer[0], tiles[-1].y.outer[1])
