"""A part of a plane has the labels of the whole, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distillfss_core.models.preprocess import sample_step
from distillfss_core.models.student import StudentModel
from distillfss_core.training import distill
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
