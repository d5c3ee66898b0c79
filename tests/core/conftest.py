"""Small real trainings that several tests look at."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from distillfss_core.samples import generate_sample
from distillfss_core.settings import DistillSettings
from distillfss_core.support.support_set import SupportSet
from pictures import blobs

TINY = DistillSettings(steps=4, zoom=Fraction(1), crop_size=64, queries=2, shots=2, crops=8, device="cpu")


@pytest.fixture(scope="session")
def tiny() -> DistillSettings:
    """Settings of a training that takes a second."""
    return TINY


@pytest.fixture(scope="session")
def support() -> SupportSet:
    """Three slices of blobs, one class."""
    return SupportSet(tuple(blobs(i) for i in range(3)), ("blob",))


@pytest.fixture(scope="session")
def student(support: SupportSet, tiny: DistillSettings):
    """A student after four steps."""
    from distillfss_core.training import distill

    return distill(support, tiny)


@pytest.fixture(scope="session")
def plain_student(support: SupportSet, tiny: DistillSettings):
    """A student that started from no head file, with a small halo: for what is about regions and files."""
    from distillfss_core.training import distill

    model = distill(support, replace(tiny, head="none", steps=40))
    model.halo = 32
    return model


@pytest.fixture(scope="session")
def saved_model(plain_student, tmp_path_factory) -> Path:
    """The plain student's file, called m.safetensors."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    plain_student.save(path)
    return path


@pytest.fixture(scope="session")
def nuclei():
    """The generated nuclei stack, small."""
    return generate_sample(planes=6, size=448)
