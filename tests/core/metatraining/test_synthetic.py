"""Generated tasks: pure, of every family, with an object to find; and the errors that pictures of them have."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from distillfss_core.errors import SettingsError
from distillfss_core.metatraining.gallery import gallery
from distillfss_core.metatraining.optics import MODES, Light, degrade, draw_light
from distillfss_core.metatraining.synthetic import FAMILIES, SMALLEST_SHARE, synthetic_task

pytestmark = pytest.mark.slow

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in the brightness (ITU-R BT.601)."""


def picture(seed: int = 0, size: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).random((size, size, 3), np.float32)


def shares(labels: np.ndarray) -> np.ndarray:
    return (labels == 1).mean((1, 2))


@pytest.mark.parametrize("seed", [0, 7, [3, 1, 4]])
def test_the_same_seed_gives_the_same_bytes(seed):
    one, two = (synthetic_task(seed, n_images=3, size=96) for _ in range(2))
    assert one.images.tobytes() == two.images.tobytes()
    assert one.labels.tobytes() == two.labels.tobytes()
    assert one.source == two.source


def test_different_seeds_give_different_tasks():
    images = {synthetic_task(seed, n_images=2, size=64).images.tobytes() for seed in range(12)}
    assert len(images) == 12


def test_views_of_a_task_differ():
    task = synthetic_task(5, n_images=4, size=64)
    assert len({image.tobytes() for image in task.images}) == 4


@pytest.mark.parametrize(("n_images", "size"), [(2, 64), (5, 160), (3, 256)])
def test_a_task_has_the_shapes_and_types_it_promises(n_images, size):
    task = synthetic_task(11, n_images=n_images, size=size)
    assert len(task) == n_images
    assert task.images.shape == (n_images, size, size, 3)
    assert task.labels.shape == (n_images, size, size)
    assert task.images.dtype == task.labels.dtype == np.uint8
    assert set(np.unique(task.labels)) <= {0, 1}
    assert task.source.removeprefix("synthetic/") in FAMILIES


def test_every_family_occurs():
    sources = {synthetic_task([2, seed], n_images=2, size=64).source for seed in range(30 * len(FAMILIES) // 4)}
    assert sources == {f"synthetic/{name}" for name in FAMILIES}


def test_shares_of_the_object_spread_broadly():
    found = np.concatenate([shares(synthetic_task([1, seed], n_images=4, size=64).labels) for seed in range(80)])
    assert (found == 0).mean() <= 1 / 8
    assert np.quantile(found, 0.2) < 0.05
    assert np.quantile(found, 0.9) > 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_paints_an_object_that_can_be_found(family):
    for seed in range(6):
        task = synthetic_task(seed, n_images=4, size=128, family=family)
        found = shares(task.labels)
        assert task.source == f"synthetic/{family}"
        assert (found >= SMALLEST_SHARE).mean() >= 0.5
        assert (found == 0).sum() <= 1
        assert (found < 0.9).all()
        assert (task.images.reshape(4, -1).std(1) > 2).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_object_has_an_edge_in_the_picture(family):
    """Gray, color or texture changes where the label does: the label lies on something that is there."""
    contrast = []
    for seed in range(8):
        task = synthetic_task([9, seed], n_images=2, size=128, family=family)
        for image, label in zip(task.images.astype(np.float32), task.labels == 1, strict=True):
            if 0.01 < label.mean() < 0.8:
                detail = [np.abs(image - np.roll(image, 1, axis)) for axis in (0, 1)]
                looks = np.concatenate([image, *detail], -1)
                inside, outside = looks[label], looks[~label]
                contrast.append(np.abs((inside.mean(0) - outside.mean(0)) / (outside.std(0) + 1)).max())
    assert np.median(contrast) > (0.08 if family == "camouflage" else 0.2)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"n_images": 1}, "n_images is 1"),
        ({"n_images": 65}, "n_images is 65"),
        ({"size": 32}, "size is 32"),
        ({"size": 100}, "size is 100"),
        ({"size": 1056}, "size is 1056"),
        ({"family": "ducks"}, "'ducks'.*particles"),
    ],
)
def test_settings_outside_their_limits_are_named(settings, match):
    with pytest.raises(SettingsError, match=match):
        synthetic_task(0, **settings)


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
def test_degrading_keeps_shape_type_and_range(strength):
    for seed in range(25):
        image = picture(seed)
        worn = degrade(image, np.random.default_rng(seed), strength=strength)
        assert worn.shape == image.shape
        assert worn.dtype == np.float32
        assert 0 <= worn.min() <= worn.max() <= 1


def test_degrading_at_strength_0_changes_nothing():
    image = picture()
    worn = degrade(image, np.random.default_rng(0), strength=0)
    np.testing.assert_array_equal(worn, image)
    assert worn is not image


def test_degrading_leaves_its_input_alone_and_gray_pictures_gray():
    gray = np.repeat(picture()[..., :1], 3, -1)
    before = gray.copy()
    for seed in range(25):
        worn = degrade(gray, np.random.default_rng(seed))
        np.testing.assert_array_equal(worn[..., 0], worn[..., 2])
    np.testing.assert_array_equal(gray, before)


def test_a_stronger_wear_changes_more():
    image = picture()
    small, large = (
        np.mean([np.abs(degrade(image, np.random.default_rng(i), strength=s) - image).mean() for i in range(30)])
        for s in (0.2, 1.2)
    )
    assert 0 < small < large


def test_hue_carries_no_luma():
    value = np.full((8, 8), 0.5, np.float32)
    light = Light(dyes=((0.1, -0.05), (-0.08, 0.1)))
    one, other = light.expose(value, np.zeros_like(value)), light.expose(value, np.ones_like(value))
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_allclose(one @ LUMA, other @ LUMA, atol=2e-3)


@pytest.mark.parametrize("mode", ["any", *MODES])
def test_views_of_a_light_share_its_polarity(mode):
    rng = np.random.default_rng(4)
    value = np.linspace(0.1, 0.9, 64, dtype=np.float32).reshape(8, 8)
    for _ in range(10):
        light = draw_light(rng, mode)
        for flip in (False, True):
            shown = light.varied(rng, flip=flip).expose(value, np.zeros_like(value)) @ LUMA
            assert (shown[-1, -1] > shown[0, 0]) == (light.inverted == flip)


def test_the_gallery_shows_a_row_a_family(tmp_path):
    path = tmp_path / "gallery.png"
    gallery(path, rows=["cells", "tubes"], tasks=1, tile=32, size=64)
    with Image.open(path) as sheet:
        assert sheet.width == 4 * 32
        assert sheet.height == 2 * (32 + 14)
