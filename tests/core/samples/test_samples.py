"""The generated stacks: repeatable, plausible, and no gift to a threshold."""

import hashlib

import numpy as np
import pytest

from distillfss_core.errors import SettingsError
from distillfss_core.samples import SampleStep, generate_sample, iter_generate_sample
from distillfss_core.settings import SAMPLES


@pytest.fixture(scope="module")
def samples():
    return {kind: generate_sample(kind, planes=6, size=256, seed=3) for kind in SAMPLES}


@pytest.fixture(params=SAMPLES)
def sample(request, samples):
    return samples[request.param]


def digest(sample) -> str:
    return hashlib.sha256(sample.image.tobytes() + sample.labels.tobytes()).hexdigest()


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_same_seed_gives_the_same_bytes(samples, kind):
    assert digest(generate_sample(kind, planes=6, size=256, seed=3)) == digest(samples[kind])
    assert digest(generate_sample(kind, planes=6, size=256, seed=4)) != digest(samples[kind])


@pytest.mark.parametrize(("kind", "dtype"), [("nuclei", "u2"), ("mitochondria", "u1"), ("nodules", "i2")])
def test_image_and_labels_are_of_one_shape(samples, kind, dtype):
    sample = samples[kind]
    assert sample.image.shape == sample.labels.shape == (6, 256, 256)
    assert (sample.image.dtype, sample.labels.dtype) == (np.dtype(dtype), np.uint16)
    assert sample.scale[0] > 2 * sample.scale[1] == 2 * sample.scale[2]


def test_objects_are_numbered_without_gaps_and_every_plane_has_some(sample):
    numbers = np.unique(sample.labels)
    assert (numbers == np.arange(len(numbers))).all()
    assert len(numbers) > 5
    assert (sample.labels > 0).any((1, 2)).all()


def test_most_of_a_plane_is_found_again_in_the_next(sample):
    """What is 3-D goes on from plane to plane: labels and image alike, by far more than two planes of chance."""
    here, next_ = sample.labels[:-1], sample.labels[1:]
    again = ((here == next_) & (here > 0)).sum() / (here > 0).sum()
    assert again > 0.5
    plane, neighbor, far = (sample.image[z][32:-32, 32:-32].astype(float).ravel() for z in (0, 1, 5))
    assert np.corrcoef(plane, neighbor)[0, 1] > max(0.2, np.corrcoef(plane, far)[0, 1])


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("nuclei", 0.1, 0.6), ("mitochondria", 0.02, 0.2), ("nodules", 0.001, 0.05)]
)
def test_objects_cover_what_is_usual(samples, kind, low, high):
    share = (samples[kind].labels > 0).mean((1, 2))
    assert ((share > low) & (share < high)).all()


@pytest.mark.parametrize(("kind", "best"), [("nuclei", 0.75), ("mitochondria", 0.6), ("nodules", 0.2)])
def test_no_threshold_solves_it(samples, kind, best):
    sample = samples[kind]
    truth = sample.labels > 0
    image = -sample.image.astype(int) if kind == "mitochondria" else sample.image
    guesses = [image > level for level in np.percentile(image, np.linspace(40, 99.5, 40))]
    iou = max((guess & truth).sum() / (guess | truth).sum() for guess in guesses)
    assert 0.01 < iou < best


def test_nuclei_and_nodules_are_brighter_mitochondria_darker(samples):
    for kind, sign in (("nuclei", 1), ("mitochondria", -1), ("nodules", 1)):
        image, truth = samples[kind].image, samples[kind].labels > 0
        assert sign * (np.median(image[truth]) - np.median(image[~truth])) > 0


def test_the_thorax_is_in_hounsfield_units():
    sample = generate_sample("nodules", planes=2)
    assert np.median(sample.image[:, :8]) == pytest.approx(-1000, abs=15)
    lung = sample.image[(sample.image > -950) & (sample.image < -700)]
    assert 0.1 < lung.size / sample.image.size < 0.4
    assert sample.image.max() > 300
    assert sample.unit == "millimeter"


@pytest.mark.parametrize("kind", SAMPLES)
def test_one_small_plane_will_do(kind):
    assert generate_sample(kind, planes=1, size=64).image.shape == (1, 64, 64)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"kind": "cats"}, "cats"), ({"planes": 0}, "planes is 0"), ({"size": 9}, "size is 9"), ({"seed": -1}, "seed")],
)
def test_what_cannot_be_generated_is_named(arguments, named):
    with pytest.raises(SettingsError, match=named):
        generate_sample(**arguments)


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_run_tells_how_much_is_drawn_and_makes_the_same(samples, kind):
    run = iter_generate_sample(kind, planes=6, size=256, seed=3)
    done = [step.index for step in run]
    assert done == sorted(done)
    assert (len(set(done)) > 12, done[-1]) == (True, 100)
    assert max(np.diff([0, *done])) <= 25
    assert SampleStep(1).total == 100
    assert digest(run.result()) == digest(samples[kind])


def test_a_run_of_what_cannot_be_generated_fails_at_once():
    with pytest.raises(SettingsError, match="cats"):
        iter_generate_sample("cats")
