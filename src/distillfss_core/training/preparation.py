"""Prepare a training: load the backbone and the head, fit the intensity limits, choose zoom and orientation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from distillfss_core.errors import IntensityWarning, SettingsError, SupportSetError
from distillfss_core.models.intensities import CHECKED
from distillfss_core.models.preprocess import Preprocess, fit_preprocess, sample_pixels
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.backbones import Backbone, load_backbone
from distillfss_core.nn.device import Device, seeded
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.pretrained import PACKAGED, HeadWeights, head_form, load_head, packaged_head, read_head_card
from distillfss_core.nn.teachers import Teacher
from distillfss_core.settings import FORMS, DistillSettings, parse_zoom
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.crops import Augmentation, CropSampler, FeatureCache
from distillfss_core.training.orientation import iter_orientation
from distillfss_core.training.zoom import iter_zoom
from distillfss_core.types import IGNORE, TrainStep

AUTO_POLARITY = 0.3  # separate images may be bright on dark and dark on bright


@dataclass(frozen=True, eq=False)
class Prepared:
    """The networks, preprocessing and crops with which a training starts.

    Parameters
    ----------
    backbone : Backbone
    weights : HeadWeights, optional
        Meta-trained weights that the head starts from.
    head : FewShotHead
        On the device, in evaluation mode, its parameters require gradients.
    judges : list of Teacher
        Meta-trained teachers that judge on held-out slices; none where the head has learned nothing yet.
    preprocess : Preprocess
    zoom_scores : dict
        Mean IoU of each zoom that was tried; empty where the settings fix the zoom.
    orientation : {"any", "fixed", "auto"}
        Whether crops are turned and mirrored; "auto" for a probe, which has no such crops.
    orientation_scores : dict
        Mean IoU in upright and turned crops; empty where nothing was to be chosen.
    cache : FeatureCache
        Empty.
    sampler : CropSampler
    """

    backbone: Backbone
    weights: HeadWeights | None
    head: FewShotHead
    judges: list[Teacher]
    preprocess: Preprocess
    zoom_scores: dict[str, float]
    orientation: str
    orientation_scores: dict[str, float]
    cache: FeatureCache
    sampler: CropSampler


def iter_prepare(
    support: SupportSet, settings: DistillSettings, device: Device, init_from: StudentModel | None = None
) -> Generator[TrainStep, None, Prepared]:
    """Prepare a training; yields the steps of the stages "load", "zoom" and "orientation".

    Parameters
    ----------
    init_from : StudentModel, optional
        Student of a warm start, as `match_start` returns it.

    Raises
    ------
    SettingsError, WeightsUnavailableError
    """
    weights: HeadWeights | None = None
    if init_from is not None:
        backbone, head = copy.deepcopy(init_from.backbone), copy.deepcopy(init_from.head)
    else:
        backbone, weights = load_start(settings)
        head = _new_head(settings, backbone, support, weights)
    backbone.to(device.torch)
    head = head.requires_grad_(True).eval()
    head.to(device.torch)
    cache = FeatureCache(backbone, device, memory=settings.cache_mb << 20, limit=settings.crops)
    judges = _judges(head, weights, backbone, support, settings, device)
    yield TrainStep(1, 1, stage="load")
    if init_from is not None:
        preprocess, scores = init_from.preprocess, dict[str, float]()
    else:
        preprocess, scores = yield from _iter_preprocess(support, settings, cache, judges)
    orientation, turned = settings.orientation, dict[str, float]()
    if init_from is not None and orientation == "auto":
        orientation = init_from.training.get("orientation", orientation)
    if orientation == "auto" and settings.method != "probe":  # a probe learns from plain crops
        orientation, turned = yield from iter_orientation(support, preprocess, cache, settings.seed)
    sampler = CropSampler(support, preprocess, settings.crop_size, augmentation(settings, support, orientation))
    return Prepared(backbone, weights, head, judges, preprocess, scores, orientation, turned, cache, sampler)


def match_start(
    init_from: StudentModel, support: SupportSet, settings: DistillSettings
) -> tuple[StudentModel, DistillSettings]:
    """The student to go on from at the support's pixel size, and the settings as the student decides them."""
    if init_from.class_names != tuple(support.class_names):
        raise SupportSetError(
            f"the student to start from knows the classes {list(init_from.class_names)}, the support set has "
            f"{list(support.class_names)}; give the same classes, or start afresh"
        )
    if init_from.pixel_size and support.pixel_size:
        init_from = init_from.at_pixel_size(support.pixel_size)
    preprocess, form = _match_preprocess(init_from.preprocess, support), init_from.head.form
    if preprocess != init_from.preprocess:
        init_from = copy.copy(init_from)
        init_from.preprocess = preprocess
    settings = replace(
        settings,
        backbone=init_from.backbone.spec.name,
        zoom=parse_zoom(preprocess.zoom),
        normalization=f"per-{preprocess.scope}",
        specialize=0,
    )
    return init_from, replace(settings, **form.to_json())


def match_head(settings: DistillSettings) -> DistillSettings:
    """The settings as the head file decides them, if they name one: its backbone, and the forms of its preset.

    Raises
    ------
    ModelFileError
        If it is missing, damaged or of another kind.
    """
    if settings.head in ("auto", "none"):
        return settings
    card = read_head_card(settings.head)
    if settings.backbone == DistillSettings().backbone:
        settings = replace(settings, backbone=str(card["backbone"]["name"]))
    form = DistillSettings.preset(str(card.get("preset", "default"))).changed()
    own = head_form(card)
    return replace(settings, **form | ({} if own["teacher"] in FORMS else own))


def _match_preprocess(start: Preprocess, support: SupportSet) -> Preprocess:
    """That of the student to go on from, with the limits of the support where its intensities are on another scale."""
    if start.intensities is None:
        return start
    sample = np.concatenate([sample_pixels(start.as_channels(s.image, s.source), CHECKED) for s in support.slices])
    preprocess, warning = start.matched_to(sample[None, :, None], "support", is_plane=len(support) == 1)
    if warning and preprocess == start and start.scope == "volume":
        warnings.warn(warning, IntensityWarning, stacklevel=4)
    return preprocess


def load_start(settings: DistillSettings) -> tuple[Backbone, HeadWeights | None]:
    """The backbone and the meta-trained weights to start from.

    Those of the package are taken only where they fit; a file must fit, and brings the backbone that it was trained
    with.
    """
    if settings.head not in ("auto", "none"):
        weights = load_head(settings.head)
        return _backbone_of(weights, settings) or load_backbone(settings.backbone, settings.weights), weights
    is_wanted = settings.head == "auto" and settings.decoder == "default"
    head_weights = packaged_head(settings.backbone, settings.teacher) if is_wanted else None
    if head_weights is None or head_weights.width != settings.width:
        return load_backbone(settings.backbone, settings.weights), None
    own = head_weights.trained_backbone() if settings.weights == "auto" else None
    backbone = own or load_backbone(settings.backbone, settings.weights)
    return backbone, head_weights if head_weights.backbone_digest == backbone.digest() else None


def _backbone_of(weights: HeadWeights, settings: DistillSettings) -> Backbone | None:
    """The backbone that was trained with the head, if any; other settings must not ask for another one."""
    backbone = weights.trained_backbone()
    if backbone is not None:
        for name, own in {"backbone": backbone.spec.name, "weights": "auto"}.items():
            chosen = getattr(settings, name)
            if chosen != own:
                raise SettingsError(
                    f"{name} is {chosen!r}, but head {weights.source} brings its own backbone; give {own!r}"
                )
    return backbone


def _new_head(
    settings: DistillSettings, backbone: Backbone, support: SupportSet, weights: HeadWeights | None
) -> FewShotHead:
    form = HeadForm(
        settings.student,
        settings.decoder,
        settings.teacher,
        settings.width,
        settings.uino_reader,
        settings.uino_width,
        settings.uino_decoder,
    )
    with seeded(settings.seed):
        head = FewShotHead(backbone.spec, support.classes, form)
    if weights is not None:
        weights.put_into(head)
    return head


def _judges(
    head: FewShotHead,
    weights: HeadWeights | None,
    backbone: Backbone,
    support: SupportSet,
    settings: DistillSettings,
    device: Device,
) -> list[Teacher]:
    """The meta-trained teacher of the head, and beside a packaged one the others that are packaged."""
    if weights is None or settings.method == "probe":
        return []
    judges: list[Teacher] = [head.teacher]
    for name, teacher in PACKAGED if settings.head == "auto" else ():
        other = packaged_head(name, teacher) if name == settings.backbone and teacher != settings.teacher else None
        if other is not None and other.backbone_digest == weights.backbone_digest:
            form = replace(settings, teacher=teacher)
            judges.append(_new_head(form, backbone, support, other).eval().to(device.torch).teacher)
    return judges


def _iter_preprocess(
    support: SupportSet, settings: DistillSettings, cache: FeatureCache, judges: Sequence[Teacher]
) -> Generator[TrainStep, None, tuple[Preprocess, dict[str, float]]]:
    """Fit the intensity limits and choose the zoom."""
    scope = settings.normalization.removeprefix("per-")
    if scope == "auto":
        scope = "volume" if support.planes_of_one_volume else "image"
    images = [s.image for s in support.slices]
    objects = [(s.labels > 0) & (s.labels != IGNORE) for s in support.slices]
    if settings.zoom != "auto":
        return fit_preprocess(images, scope=scope, zoom=settings.zoom, objects=objects), {}
    preprocess = fit_preprocess(images, scope=scope, objects=objects)
    zoom, scores = yield from iter_zoom(support, preprocess, cache, settings.seed, judges)
    return replace(preprocess, zoom=str(zoom)), scores


def augmentation(settings: DistillSettings, support: SupportSet, orientation: str) -> Augmentation:
    """How crops of a support set are varied where the settings leave it open."""
    polarity = settings.invert_prob
    if polarity == "auto":
        one_kind = support.planes_of_one_volume or support.classes > 1  # classes may differ by being bright or dark
        polarity = 0.0 if one_kind else AUTO_POLARITY
    return Augmentation(polarity=polarity, turn=orientation == "any")
