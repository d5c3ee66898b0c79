"""From a support set to a student: DistillFSS (joint), two-stage, direct; and TransferFSS (refine).

Source: DistillFSS, arXiv 2512.05613.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import torch
from jaxtyping import UInt8

from distillfss_core.errors import NoStudentYetError, SettingsError, SupportSetError
from distillfss_core.models.card import thumbnails
from distillfss_core.models.fewshot import FewShotModel
from distillfss_core.models.preprocess import Preprocess, fit_preprocess, parse_zoom
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.backbones import Backbone, load_backbone
from distillfss_core.nn.decoder import SlimDecoder
from distillfss_core.nn.device import Device, choose_device, seeded
from distillfss_core.nn.features import EncodedSupport, cat_pyramids
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.pretrained import HeadWeights, load_head, packaged_head
from distillfss_core.nn.teachers import PrototypeTeacher, Teacher, VotingTeacher
from distillfss_core.settings import DistillSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.crops import PLAIN, Augmentation, Crop, CropSampler, FeatureCache
from distillfss_core.training.loop import Best, ValidationCrops, iter_fit
from distillfss_core.training.student_init import start_from_attention
from distillfss_core.training.zoom import choose_zoom
from distillfss_core.types import IGNORE, Array, TrainStep, evenly

AUTO_VALIDATION = 8  # slices from which on one is the validation slice by default
AUTO_STEPS = (300, 16)  # for up to five slices, and for each one more
FEWER_STEPS = (150, 16)  # from a meta-trained head, where what will be segmented differs from the slices
AUTO_POLARITY = 0.3  # separate images may be bright on dark and dark on bright
AGAIN = 5  # a warm start takes a fifth of the steps
INIT_CROPS = 24  # stored crops that tell a student what its teacher attends to
SAMPLES, SAMPLE_SIDE = 8, 96  # parts of the support that a student keeps, and their side in pixels after zooming
SUPPORT_CROPS = 80  # plain crops of all slices together, from which a teacher answers


class DistillRun(Iterator[TrainStep]):
    """A training under way: iterate it for progress, ask `result` for the best student so far.

    Stopping early (leaving the loop, Ctrl-C, `close`) loses nothing: the result is that of the best step so far.

    Parameters
    ----------
    support : SupportSet
    settings : DistillSettings
    init_from : StudentModel, optional
        Warm start: go on from this student's weights, in its form, on its backbone, with its zoom and intensity
        ("refine again"). Its classes must be the support's.
    teacher_only : bool
        TransferFSS: refine the teacher and distill nothing.
    """

    def __init__(
        self,
        support: SupportSet,
        settings: DistillSettings,
        init_from: StudentModel | None = None,
        *,
        teacher_only: bool = False,
    ) -> None:
        if init_from is not None:
            init_from, settings = _prepare_start(init_from, support, settings)
        self.support, self.settings = support, settings
        self.device = choose_device(settings.device, settings.precision)
        self._began = time.perf_counter()
        self._validation_index = None if teacher_only else _validation_index(settings, support)
        self._weights: HeadWeights | None = None
        if init_from:
            self.backbone = copy.deepcopy(init_from.backbone)
        else:
            self.backbone, self._weights = _load_start(settings)
        self.backbone.to(self.device.torch)
        self._slices = [i for i in range(len(support)) if i != self._validation_index]
        is_trained = init_from is not None or (self._weights is not None and settings.method != "direct")
        few = is_trained and not support.planes_of_one_volume
        self._steps = settings.steps or auto_steps(len(self._slices), few=few, again=init_from is not None)
        crops = min(settings.crops, self._steps * settings.queries)
        self._cache = FeatureCache(self.backbone, self.device, memory=settings.cache_mb << 20, limit=crops)
        head = (
            copy.deepcopy(init_from.head) if init_from else _new_head(settings, self.backbone, support, self._weights)
        )
        self.head = head.requires_grad_(True).eval()
        self.head.to(self.device.torch)
        judge = self.head.teacher if self._weights else None
        self.preprocess, self.zoom_scores = (
            (init_from.preprocess, {}) if init_from else _fit_preprocess(support, settings, self._cache, judge)
        )
        self._sampler = CropSampler(support, self.preprocess, settings.crop_size, augmentation(settings, support))
        self._best = Best(self.head)
        self._pixel_size = support.pixel_size or (init_from.pixel_size if init_from else None)
        self._refined: FewShotHead | None = None
        self._stage_began, self._steps_done, self._finished = 0, 0, False
        self._has_student = not teacher_only and settings.method != "two-stage"
        self._generator = self._run(init_from, teacher_only)

    def __iter__(self) -> DistillRun:
        return self

    def __next__(self) -> TrainStep:
        step = next(self._generator)
        self._steps_done += 1
        return step

    def close(self) -> None:
        """Stop training; `result` keeps its answer."""
        self._generator.close()

    def _run(self, init_from: StudentModel | None, teacher_only: bool) -> Generator[TrainStep, None, None]:
        validation = self._validation_crops()
        self._cache.fill(self._sampler, self._slices, np.random.default_rng(self.settings.seed))
        if isinstance(self.head.decoder, SlimDecoder) and init_from is None and self._weights is None:
            self.head.decoder.fit_norms(self._cache.pyramid(range(min(len(self._cache), 32))))
        stages = (
            ["refine"]
            if teacher_only
            else {"two-stage": ["refine", "distill"]}.get(self.settings.method, [self.settings.method])
        )
        fixed = None
        for stage in stages:
            if stage == "distill":
                self._refined, self._has_student = self._best_head(), True
                self._stage_began = self._steps_done
                fixed = self._refined.decoder
            if stage in ("joint", "distill") and init_from is None:
                crops = evenly(len(self._cache), INIT_CROPS)
                start_from_attention(self.head, self._cache.support(crops, self.support.classes))
            self._best = Best(self.head)
            judge = validation if stage != "refine" else None
            yield from iter_fit(
                self.head, stage, self._cache, self._sampler, self.settings, self._steps, judge, self._best, fixed
            )
        self._finished = True

    def _validation_crops(self) -> ValidationCrops | None:
        if self._validation_index is None:
            return None
        crops = self._sampler.grid(self._validation_index, 8)
        features = [self._cache.encode([v]) for v in crops]
        return ValidationCrops(features, [v.labels[None].long().to(self.device.torch) for v in crops])

    def _best_head(self) -> FewShotHead:
        head = copy.deepcopy(self._best.average)
        self._best.restore(head)
        return head.eval()

    def result(self) -> StudentModel:
        """The best student so far, with its card. Its halo is measured once the training has ended, and wide before.

        Raises
        ------
        NoStudentYetError
            While the teacher is still being refined (two-stage), or if nothing but a teacher was asked for.
        """
        if not self._has_student:
            raise NoStudentYetError(
                f"there is no student after {self._steps_done} steps: until now only the teacher was refined; "
                "let it go on, or use method joint, which has a student from the first step"
            )
        card = {
            "method": self.settings.method,
            "head": self._weights.name if self._weights else None,
            "steps": self._steps_done,
            "best_step": self._stage_began + (self._best.best_step or self._best.steps),
            "validation_slice": self._validation_index,
            "validation_iou": self._best.score,
            "zoom_scores": self.zoom_scores,
            "seconds": round(time.perf_counter() - self._began, 1),
            "device": str(self.device),
            "settings": asdict(self.settings),
            "support": [s.source for s in self.support.slices],
            "support_shares": [round(float(s), 6) for s in self.support.shares()],
        }
        model = StudentModel(
            self.backbone,
            self._best_head(),
            self.preprocess,
            self.support.class_names,
            pixel_size=self._pixel_size,
            training=card,
            thumbnails=thumbnails(self.support),
            samples=_samples(self._sampler, len(self.support)),
            device=self.device,
        )
        if self._finished:
            model.fit_halo(_busiest_part(self.support, model.halo_side))
        return model.to(self.device.name)  # as its file will be run; the halo does not hang on the processor

    def teacher(self) -> FewShotModel:
        """The teacher with its best weights so far, told by the whole support set."""
        head = self._refined or self._best_head()
        return _tell(head.teacher, self.backbone, self.preprocess, self.support, self.settings, self.device)


def iter_distill(
    support: SupportSet, settings: DistillSettings | None = None, *, init_from: StudentModel | None = None
) -> DistillRun:
    """Distill, step by step: iterate the run for `TrainStep`, then ask it for its ``result()``."""
    return DistillRun(support, settings or DistillSettings(), init_from)


def distill(
    support: SupportSet, settings: DistillSettings | None = None, *, init_from: StudentModel | None = None
) -> StudentModel:
    """Make a student from a support set.

    Parameters
    ----------
    support : SupportSet
    settings : DistillSettings, optional
    init_from : StudentModel, optional
        Warm start from an existing student, with new or corrected slices.

    Returns
    -------
    StudentModel
        It needs no support images.

    Raises
    ------
    SettingsError, WeightsUnavailableError
    """
    run = iter_distill(support, settings, init_from=init_from)
    for _ in run:
        pass
    return run.result()


def iter_refine(support: SupportSet, settings: DistillSettings | None = None) -> DistillRun:
    """TransferFSS, step by step: refine the teacher on the support set; ask the run for its ``teacher()``."""
    return DistillRun(support, settings or DistillSettings(), teacher_only=True)


def refine(support: SupportSet, settings: DistillSettings | None = None) -> FewShotModel:
    """TransferFSS: a teacher refined on the support set, ready to predict."""
    run = iter_refine(support, settings)
    for _ in run:
        pass
    return run.teacher()


def unrefined_teacher(
    support: SupportSet, settings: DistillSettings | None = None, *, kind: str = "dcama", voting: bool = False
) -> FewShotModel:
    """A teacher that answers at once: DCAMA as its weights come, or prototypes (kind "prototype").

    With ``voting`` every support crop answers for itself and the surest one counts; otherwise all crops stand in one
    attention.
    """
    settings = settings or DistillSettings()
    device = choose_device(settings.device, settings.precision)
    backbone, weights = _load_start(settings)
    cache = FeatureCache(backbone.to(device.torch), device, memory=1, limit=1)
    own = _new_head(settings, backbone, support, weights).to(device.torch).eval().teacher
    preprocess, _ = _fit_preprocess(support, settings, cache, own if weights else None)
    teacher: Teacher = own if kind == "dcama" else PrototypeTeacher()
    if voting:
        teacher = VotingTeacher(teacher)
    return _tell(teacher, backbone, preprocess, support, settings, device)


def _tell(
    teacher: Teacher,
    backbone: Backbone,
    preprocess: Preprocess,
    support: SupportSet,
    settings: DistillSettings,
    device: Device,
) -> FewShotModel:
    sampler = CropSampler(support, preprocess, settings.crop_size, PLAIN)
    cache = FeatureCache(backbone, device, memory=1, limit=1)
    crops = [v for i in range(len(support)) for v in sampler.grid(i, max(1, SUPPORT_CROPS // len(support)))]
    with torch.no_grad(), device.autocast():
        keys = teacher.encode(_encode(crops, cache, support.classes))
    return FewShotModel(backbone, teacher, keys, preprocess, support.class_names, device=device)


def _encode(crops: list[Crop], cache: FeatureCache, classes: int) -> EncodedSupport:
    labels = torch.stack([v.labels for v in crops]).to(cache.device.torch)
    features = cat_pyramids([cache.encode([crop]) for crop in crops])
    return EncodedSupport.of(features, labels, classes)


def _samples(sampler: CropSampler, slices: int) -> UInt8[Array, "n 3 s s"]:
    """Small parts of the slices as the network is shown them, 255 for 1.0."""
    small = sampler.with_size(SAMPLE_SIDE)
    chosen = evenly(slices, SAMPLES)
    crops = [v for i in chosen for v in small.grid(i, SAMPLES // len(chosen))]
    return (torch.stack([v.image for v in crops]) * 255).round().to(torch.uint8).numpy()


def _validation_index(settings: DistillSettings, support: SupportSet) -> int | None:
    """The validation slice; of its own accord none that alone shows a class, or the background."""
    if settings.validation_slice == "none" or (settings.validation_slice == "auto" and len(support) < AUTO_VALIDATION):
        return None
    alone = support.shown_once()
    if settings.validation_slice == "auto":
        from_the_middle = sorted(range(len(support)), key=lambda i: abs(i - len(support) // 2))
        return next((i for i in from_the_middle if not alone[i].any()), None)
    index = int(settings.validation_slice)
    if not index < len(support) or len(support) == 1:
        raise SettingsError(
            f"validation_slice is {index}, but there are {len(support)} slices; at least one must remain"
        )
    if alone[index].any():
        what = ("background", *map(repr, support.class_names))[int(alone[index].argmax())]
        raise SettingsError(
            f"validation_slice is {index}, but no other slice shows {what} ({support.slices[index].source}); give "
            "another, or none"
        )
    return index


def _fit_preprocess(
    support: SupportSet, settings: DistillSettings, cache: FeatureCache, judge: Teacher | None
) -> tuple[Preprocess, dict[str, float]]:
    scope = settings.normalization.removeprefix("per-")
    if scope == "auto":
        scope = "volume" if support.planes_of_one_volume else "image"
    images = [s.image for s in support.slices]
    if settings.zoom != "auto":
        return fit_preprocess(images, scope=scope, zoom=parse_zoom(settings.zoom)), {}
    preprocess = fit_preprocess(images, scope=scope)
    zoom, scores = choose_zoom(support, preprocess, cache, settings.seed, judge)
    return replace(preprocess, zoom=str(zoom)), scores


def augmentation(settings: DistillSettings, support: SupportSet) -> Augmentation:
    """How crops of a support set are varied where the settings leave it open."""
    if settings.invert_prob != "auto":
        return Augmentation(polarity=float(settings.invert_prob))
    one_kind = support.planes_of_one_volume or support.classes > 1  # classes may differ by being bright or dark
    return Augmentation(polarity=0.0 if one_kind else AUTO_POLARITY)


def auto_steps(slices: int, *, few: bool = False, again: bool = False) -> int:
    """Steps of a stage for so many slices, fewer for a warm start.

    With ``few`` a meta-trained head unlearns less of what the slices do not show: right for separate pictures, while
    planes of one volume show what is to come.
    """
    first, each = FEWER_STEPS if few else AUTO_STEPS
    steps = first + each * max(0, slices - 5)
    return steps // AGAIN if again else steps


def _new_head(
    settings: DistillSettings, backbone: Backbone, support: SupportSet, weights: HeadWeights | None
) -> FewShotHead:
    form = HeadForm(settings.student, settings.decoder, settings.teacher, settings.width)
    with seeded(settings.seed):
        head = FewShotHead(backbone.spec, support.classes, form)
    if weights is not None:
        weights.put_into(head)
    return head


def _load_start(settings: DistillSettings) -> tuple[Backbone, HeadWeights | None]:
    """The backbone and the meta-trained weights to start from.

    Those of the package are taken only where they fit; a file must fit, and brings the backbone that it was trained
    with.
    """
    if settings.head not in ("auto", "none"):
        weights = load_head(settings.head)
        return _backbone_of(weights, settings) or load_backbone(settings.backbone, settings.weights), weights
    is_default = settings.head == "auto" and (settings.decoder, settings.teacher) == ("default", "default")
    head_weights = packaged_head(settings.backbone) if is_default else None
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


def _prepare_start(
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
    preprocess, form = init_from.preprocess, init_from.head.form
    settings = replace(
        settings, backbone=init_from.backbone.spec.name, zoom=preprocess.zoom, normalization=f"per-{preprocess.scope}"
    )
    return init_from, replace(settings, **form.to_json())


def _busiest_part(support: SupportSet, side: int) -> Array:
    """Of all slices the part of that side, or less, that holds most foreground: where the halo is measured."""

    def parts() -> Iterator[tuple[int, Array]]:
        for labeled in support.slices:
            objects = (labeled.labels > 0) & (labeled.labels < IGNORE)
            rows, columns = (
                sorted({min(start, max(0, n - side)) for start in range(0, n, side)}) for n in objects.shape
            )
            for y, x in product(rows, columns):
                window = slice(y, y + side), slice(x, x + side)
                yield int(objects[window].sum()), labeled.image[window]

    return max(parts(), key=lambda part: part[0])[1]
