"""The generated stack: repeatable, plausible, and no gift to a threshold."""

import hashlib

import numpy as np
import pytest

from distillfss_core.errors import SettingsError
from distillfss_core.sample import generate_sample


@pytest.fixture(scope="module")
def sample():
    return generate_sample(planes=6, size=256, seed=3)


def digest(sample) -> str:
    return hashlib.sha256(sample.image.tobytes() + sample.labels.tobytes()).hexdigest()


def test_the_same_seed_gives_the_same_bytes(sample):
    assert digest(generate_sample(planes=6, size=256, seed=3)) == digest(sample)
    assert digest(generate_sample(planes=6, size=256, seed=4)) != digest(sample)


def test_image_and_labels_are_uint16_of_one_shape(sample):
    assert sample.image.shape == sample.labels.shape == (6, 256, 256)
    assert sample.image.dtype == sample.labels.dtype == np.uint16


def test_nuclei_are_numbered_without_gaps_and_every_plane_has_some(sample):
    numbers = np.unique(sample.labels)
    assert (numbers == np.arange(len(numbers))).all()
    assert len(numbers) > 20
    share = (sample.labels > 0).mean((1, 2))
    assert ((share > 0.1) & (share < 0.6)).all()


def test_nuclei_are_brighter_than_what_lies_between(sample):
    inside, outside = sample.image[sample.labels > 0], sample.image[sample.labels == 0]
    assert np.median(inside) > 1.3 * np.median(outside)


def test_a_threshold_does_not_solve_it(sample):
    filters = pytest.importorskip("skimage.filters", reason="needs scikit-image (extra 'dev')")
    truth = sample.labels > 0
    guess = np.stack([plane > filters.threshold_otsu(plane) for plane in sample.image])
    iou = (guess & truth).sum() / (guess | truth).sum()
    assert 0.4 < iou < 0.75


def test_one_small_plane_will_do():
    assert generate_sample(planes=1, size=64).image.shape == (1, 64, 64)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"kind": "cats"}, "cats"), ({"planes": 0}, "planes is 0"), ({"size": 9}, "size is 9"), ({"seed": -1}, "seed")],
)
def test_what_cannot_be_generated_is_named(arguments, named):
    with pytest.raises(SettingsError, match=named):
        generate_sample(**arguments)
