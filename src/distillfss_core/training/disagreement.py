"""Choose planes to annotate next: those on which two models of the annotated slices disagree."""

from __future__ import annotations

from collections.abc import Collection, Generator
from dataclasses import replace

import numpy as np

from distillfss_core.settings import DistillSettings, parse_zoom
from distillfss_core.support.slice_selection import check_count, suggest_planes
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.distillation import iter_distill, iter_unrefined_teacher
from distillfss_core.types import Array, TrainStep, as_run
from distillfss_core.volumes.volume import Volume

LOOKED_AT = 24
"""Planes that are segmented by both models, at most."""
_WINDOW = 512  # pixels of the middle of a plane


@as_run
def iter_disputed_planes(
    volume: Volume,
    support: SupportSet,
    count: int,
    *,
    taken: Collection[int] = (),
    settings: DistillSettings | None = None,
) -> Generator[TrainStep, None, list[int]]:
    """Choose planes on which a probe and the teacher as it comes disagree; a `Run` whose result are plane numbers.

    Both learn from the support. Disagreement is the mean Jensen-Shannon divergence of their probabilities [1]_, in the
    middle 512 x 512 pixels of at most `LOOKED_AT` planes, evenly spread.

    Parameters
    ----------
    volume : Volume
    support : SupportSet
        The slices annotated so far.
    count : int
        How many to choose, at least 1; fewer are returned where fewer were looked at.
    taken : collection of int
        Planes that are annotated already; they are not chosen.
    settings : DistillSettings, optional
        Backbone, head, normalization, seed, device and precision count. The zoom "auto" is 1.

    Yields
    ------
    TrainStep
        Stages of the preparation of both models, then "looking", a step a plane.

    Raises
    ------
    SupportSetError
        If ``count`` is not 1 to the number of planes.
    InputFileError
        If a plane cannot be read.
    SettingsError, WeightsUnavailableError

    References
    ----------
    .. [1] McCallum and Nigam, "Employing EM and Pool-Based Active Learning for Text Classification", ICML 1998: a
       committee's disagreement as a divergence from its mean.
    """
    planes = volume.shape[0]
    check_count(count, planes)
    settings = settings or DistillSettings()
    if settings.zoom == "auto":
        settings = replace(settings, zoom=parse_zoom("1"))
    probing = iter_distill(support, replace(settings, method="probe"))
    yield from probing
    probe = probing.result(measure_halo=False)
    teacher = yield from iter_unrefined_teacher(support, settings)
    free = [z for z in range(planes) if z not in taken]
    looked_at = [free[i] for i in suggest_planes(len(free), min(len(free), LOOKED_AT))] if free else []
    dispute: dict[int, float] = {}
    for index, z in enumerate(looked_at, 1):
        plane = volume.plane(z, _WINDOW)
        dispute[z] = divergence(*(model.predict(plane).probabilities for model in (probe, teacher)))
        yield TrainStep(index, len(looked_at), stage="looking")
    return sorted(sorted(dispute, key=lambda z: -dispute[z])[:count])


def divergence(p: Array, q: Array) -> float:
    """Mean Jensen-Shannon divergence of probabilities "k y x", in nats: 0 where they agree, log 2 at most."""
    return float((entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).mean())


def entropy(p: Array) -> Array:
    """Of probabilities "k y x", at each pixel, in nats."""
    result: Array = -(p * np.log(np.clip(p, 1e-7, 1))).sum(0)
    return result
