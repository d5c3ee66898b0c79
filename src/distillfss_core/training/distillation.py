"""Distillation of a support set into a student (DistillFSS), and refinement of a teacher (TransferFSS) [1]_.

A student is distilled jointly with its teacher, in two stages, or directly from the labels; or it is a probe.

References
----------
.. [1] De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano, "DistillFSS: Synthesizing Few-Shot Knowledge into a
   Lightweight Segmentation Model", arXiv:2512.05613, 2025.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn

from distillfss_core.errors import NoStudentYetError, SettingsError
from distillfss_core.models.card import thumbnails
from distillfss_core.models.fewshot import FewShotModel
from distillfss_core.models.preprocess import Preprocess
from distillfss_core.models.segmenter import Segmenter
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.backbones import Backbone, load_backbone
from distillfss_core.nn.decoder import SlimDecoder
from distillfss_core.nn.device import Device, choose_device
from distillfss_core.nn.features import EncodedSupport, cat_pyramids
from distillfss_core.nn.head import FewShotHead
from distillfss_core.nn.probe import Probe
from distillfss_core.nn.teachers import PrototypeTeacher, Teacher, VotingTeacher
from distillfss_core.settings import DistillSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.crops import PLAIN, Crop, CropSampler, FeatureCache
from distillfss_core.training.loop import Best, ValidationCrops, iter_fit
from distillfss_core.training.preparation import Prepared, iter_prepare, match_head, match_start
from distillfss_core.training.probe import WORTHLESS, CrossFit, ProbePoints, fit_probe, iter_cross_fit, iter_points
from distillfss_core.training.specialization import check_specialize, iter_specialize
from distillfss_core.training.student_init import start_from_attention
from distillfss_core.training.unlabeled import (
    CROPS,
    check_unlabeled,
    iter_foundation,
    iter_segment_images,
    iter_unlabeled_crops,
)
from distillfss_core.types import IGNORE, Array, TrainStep, UnlabeledImage, as_run, evenly, finish

log: logging.Logger = logging.getLogger(__name__)

AUTO_VALIDATION = 8  # slices from which on one is the validation slice by default
AUTO_STEPS = (300, 16)  # for up to five slices, and for each one more
FEWER_STEPS = (150, 16)  # from a meta-trained head, where what will be segmented differs from the slices
AGAIN = 5  # a warm start takes a fifth of the steps
INIT_CROPS = 24  # stored crops that tell a student what its teacher attends to
DENSE = 0.5  # share of annotated pixels from which on a slice is more than strokes
SAMPLES, SAMPLE_SIDE = 8, 96  # parts of the support that a student keeps, and their side in pixels after zooming
SUPPORT_CROPS = 80  # plain crops of all slices together, from which a teacher answers


class DistillRun(Iterator[TrainStep]):
    """A training that runs step by step; `result` returns the best student so far.

    The first steps prepare the training (their stages are in `PREPARATION`). Nothing is loaded or computed before them,
    but the card of a head file is read. Stopping early (Ctrl-C, `close`, the end of a ``with`` block) loses nothing:
    the result is that of the best step so far.

    Parameters
    ----------
    support : SupportSet
    settings : DistillSettings
    init_from : StudentModel, optional
        Warm start: go on from this student's weights, in its form, on its backbone, with its zoom and intensity
        ("refine again"). Its classes must be the support's.
    teacher_only : bool
        TransferFSS: refine the teacher and distill nothing.
    unlabeled : sequence of array, shape (y, x) or (y, x, c), or of UnlabeledImage
        Images without labels, of which up to 12 are used at the end. Method probe uses none.
    """

    def __init__(
        self,
        support: SupportSet,
        settings: DistillSettings,
        init_from: StudentModel | None = None,
        *,
        teacher_only: bool = False,
        unlabeled: Sequence[Array | UnlabeledImage] = (),
    ) -> None:
        if settings.foundation != "none" and settings.method == "probe":
            log.warning("foundation %s is not used: method probe learns from the slices alone", settings.foundation)
        if init_from is not None:
            init_from, settings = match_start(init_from, support, settings)
        else:
            settings = match_head(settings)
        check_specialize(settings)
        self.support: SupportSet = support
        self.settings: DistillSettings = settings
        self.device: Device = choose_device(settings.device, settings.precision)
        self._init_from, self._teacher_only = init_from, teacher_only
        self._unlabeled = unlabeled
        self._began = time.perf_counter()
        self._validation_index = None if teacher_only else _validation_index(settings, support)
        self._slices = [i for i in range(len(support)) if i != self._validation_index]
        self._pixel_size = support.pixel_size or (init_from.pixel_size if init_from else None)
        self._ready: Prepared | None = None
        self._best: Best | None = None
        self._refined: FewShotHead | None = None
        self._stage_began, self._steps_done, self._finished = 0, 0, False
        self._has_student = not teacher_only and settings.method not in ("two-stage", "probe")
        self._probe: Probe | None = None
        self._fit: CrossFit | None = None
        self._probe_card: dict[str, float | None] = {}
        self._unlabeled_card: dict[str, Any] = {}
        self._specialization: dict[str, Any] = {}
        self._generator = self._run()

    def __iter__(self) -> DistillRun:
        return self

    def __next__(self) -> TrainStep:
        return next(self._generator)

    def close(self) -> None:
        """Stop training; `result` keeps the best student so far."""
        self._generator.close()

    def __enter__(self) -> DistillRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def backbone(self) -> Backbone:
        """The backbone of the run; it is loaded if it was not yet."""
        return self._prepared()[0].backbone

    @property
    def preprocess(self) -> Preprocess:
        """The zoom and intensity limits of the run; they are chosen if they were not yet."""
        return self._prepared()[0].preprocess

    def _prepared(self) -> tuple[Prepared, Best]:
        """Iterate to the end of the stages "load", "zoom", "orientation" and "compare"."""
        while self._ready is None or self._best is None:
            if next(self._generator, None) is None:
                raise NoStudentYetError("the run was closed before its backbone was loaded; start another run")
        return self._ready, self._best

    def _run(self) -> Generator[TrainStep, None, None]:
        settings, init_from = self.settings, self._init_from
        ready = yield from iter_prepare(self.support, settings, self.device, init_from)
        unlabeled = check_unlabeled(self._unlabeled, ready.preprocess)
        if settings.specialize:
            ready, self._specialization = yield from iter_specialize(
                ready, self.support, unlabeled, settings, self.device
            )
            unlabeled = unlabeled if settings.foundation != "none" else []
        self._ready, self._best = ready, Best(ready.head)
        if settings.method == "probe" and not self._teacher_only:
            points = yield from self._iter_points(ready)
            self._probe = fit_probe(points, alone=True).to(self.device.torch)
            self._has_student = self._finished = True
            yield TrainStep(1, 1, stage="fit")
            return
        uses_foundation = bool(unlabeled) and settings.foundation != "none"
        foundation = load_backbone(settings.foundation) if uses_foundation else None
        is_trained = init_from is not None or (ready.weights is not None and settings.method != "direct")
        few = is_trained and not self.support.planes_of_one_volume
        steps = settings.steps or auto_steps(len(self._slices), few=few, again=init_from is not None)
        cache = ready.cache
        if settings.probe == "auto" and not self._teacher_only:
            yield from self._iter_evidence(ready)
        validation = self._validation_crops(ready)
        cache.limit = min(settings.crops, steps * settings.queries)
        yield from cache.iter_fill(ready.sampler, self._slices, np.random.default_rng(settings.seed))
        if isinstance(ready.head.decoder, SlimDecoder) and init_from is None and ready.weights is None:
            ready.head.decoder.fit_norms(cache.pyramid(range(min(len(cache), 32))))
        fixed = None
        for stage in self._stages():
            if stage == "distill":
                self._refined, self._has_student = self._best_head(), True
                self._stage_began = self._steps_done
                fixed = self._refined.decoder
            if stage in ("joint", "distill") and init_from is None:
                chosen = evenly(len(cache), INIT_CROPS)
                start_from_attention(ready.head, cache.support(chosen, self.support.classes))
            best = self._best = Best(ready.head)
            judge = validation if stage != "refine" else None
            for step in iter_fit(ready.head, stage, cache, ready.sampler, settings, steps, judge, best, fixed):
                self._steps_done += 1
                yield step
        if unlabeled and self._has_student:
            yield from self._iter_unlabeled(ready, unlabeled, foundation, stage, max(1, steps // 2), validation, fixed)
        self._finished = True

    def _iter_unlabeled(
        self,
        ready: Prepared,
        unlabeled: Sequence[UnlabeledImage],
        foundation: Backbone | None,
        stage: str,
        steps: int,
        validation: ValidationCrops | None,
        fixed: nn.Module | None,
    ) -> Generator[TrainStep, None, None]:
        """Segment the images without labels, and go on with these crops as well."""
        settings = self.settings
        models: list[Segmenter] = [self.result(measure_halo=False)]
        if foundation is not None:
            helper = yield from iter_foundation(
                foundation, self.support, self._slices, ready.preprocess, settings, self.device
            )
            self._unlabeled_card = {"foundation": foundation.spec.name, "foundation_weights": foundation.weights}
            models.append(helper)
        images = yield from iter_segment_images(unlabeled, models, settings.crop_size, settings.seed)
        memory = settings.cache_mb << 19
        cache = FeatureCache(ready.backbone, self.device, memory=memory, limit=min(CROPS, steps * settings.queries))
        crops = yield from iter_unlabeled_crops(
            images, ready.preprocess, cache, self._fit, ready.sampler.augmentation, settings
        )
        self._unlabeled_card["unlabeled"] = len(images.slices)
        _, best = self._prepared()
        best.go_on(ready.head)
        for step in iter_fit(
            ready.head, stage, ready.cache, ready.sampler, settings, steps, validation, best, fixed, crops
        ):
            self._steps_done += 1
            yield step

    def _iter_points(self, ready: Prepared) -> Generator[TrainStep, None, ProbePoints]:
        settings = self.settings
        return iter_points(self.support, self._slices, ready.preprocess, ready.cache, settings.crop_size, settings.seed)

    def _iter_evidence(self, ready: Prepared) -> Generator[TrainStep, None, None]:
        """Fit the probe whose margins are evidence for the student, if held-out slices show that it is worth it."""
        points = yield from self._iter_points(ready)
        fit = yield from iter_cross_fit(points, self.device)
        self._probe_card = {"probe_gain": round(fit.gain, 3), "probe_iou": fit.iou}
        if fit.gain >= WORTHLESS:
            self._fit, self._probe, ready.cache.evidence_of = fit, fit.whole, fit.evidence

    def _stages(self) -> list[str]:
        if self._teacher_only:
            return ["refine"]
        return ["refine", "distill"] if self.settings.method == "two-stage" else [self.settings.method]

    def _validation_crops(self, ready: Prepared) -> ValidationCrops | None:
        if self._validation_index is None:
            return None
        crops = ready.sampler.grid(self._validation_index, 8)
        features = [ready.cache.encode([crop]) for crop in crops]
        labels = [crop.labels[None].long().to(self.device.torch) for crop in crops]
        images = [self.device.upload(crop.image[None]) for crop in crops]
        probe = self._probe  # which has not seen the slice
        evidence = [probe(f, image) if probe else None for f, image in zip(features, images, strict=True)]
        return ValidationCrops(features, labels, evidence)

    def _best_head(self) -> FewShotHead:
        _, best = self._prepared()
        head = copy.deepcopy(best.average)
        best.restore(head)
        return head.eval()

    def result(self, *, measure_halo: bool = True) -> StudentModel:
        """The best student so far, with its card. Its halo is measured once the training has ended, and wide before.

        Parameters
        ----------
        measure_halo : bool
            False leaves the halo wide in any case, which takes no time.

        Raises
        ------
        NoStudentYetError
            While the teacher is still being refined (two-stage) or the probe fitted, or if the run trains only a
            teacher.
        """
        if not self._has_student:
            is_probe = self.settings.method == "probe" and not self._teacher_only
            reason = "the probe is not fitted yet" if is_probe else "until now only the teacher was refined"
            raise NoStudentYetError(
                f"there is no student after {self._steps_done} steps: {reason}; "
                "let it go on, or use method joint, which has a student from the first step"
            )
        ready, best = self._prepared()
        no_expectation = self._no_expectation()
        card = {
            "method": self.settings.method,
            "head": ready.weights.name if ready.weights else None,
            "steps": self._steps_done,
            "best_step": self._stage_began + (best.best_step or best.steps),
            "validation_slice": self._validation_index,
            "validation_iou": best.score,
            "zoom_scores": ready.zoom_scores,
            "orientation": ready.orientation,
            "orientation_scores": ready.orientation_scores,
            **self._probe_card,
            **self._unlabeled_card,
            **({"specialization": self._specialization} if self._specialization else {}),
            "expected_iou": self._expected_iou() if no_expectation is None else None,
            "no_expectation": no_expectation,
            "seconds": round(time.perf_counter() - self._began, 1),
            "device": str(self.device),
            "settings": self.settings.to_json(),
            "support": [s.source for s in self.support.slices],
            "support_shares": [round(float(s), 6) for s in self.support.shares()],
        }
        model = StudentModel(
            ready.backbone,
            self._best_head(),
            ready.preprocess,
            self.support.class_names,
            pixel_size=self._pixel_size,
            training=card,
            thumbnails=thumbnails(self.support),
            samples=_samples(ready.sampler, len(self.support)),
            device=self.device,
            probe=self._probe,
        )
        if self._finished and measure_halo:
            model.fit_halo(_busiest_part(self.support, model.halo_side))
        return model.to(self.device.name)  # as its file will be run; the halo does not hang on the processor

    def _expected_iou(self) -> float:
        """Best IoU on held-out slices of what the student learns from: teacher before the training, and probe."""
        ready, _ = self._prepared()
        return max(ready.zoom_scores[ready.preprocess.zoom], self._probe_card.get("probe_iou") or 0.0)

    def _no_expectation(self) -> str | None:
        """Why no IoU is expected; None where one is.

        Strokes leave out what is hard, and crops of a single slice are too much alike: nothing is expected from these,
        nor from a training that has not ended.
        """
        ready, _ = self._prepared()
        annotated = [float((s.labels != IGNORE).mean()) for s in self.support.slices]
        reasons = {
            "a probe is not measured": self.settings.method == "probe",
            "the training was stopped": not self._finished,
            "it learned from one slice": len(annotated) == 1,
            "slices with strokes are too easy to judge by": min(annotated) < DENSE,
            "it went on from another model": self._init_from is not None,
            "its zoom was given": not ready.zoom_scores,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def teacher(self) -> FewShotModel:
        """The teacher with its best weights so far, with the whole support set."""
        head = self._refined or self._best_head()
        return _show_support(head.teacher, self.backbone, self.preprocess, self.support, self.settings, self.device)


def iter_distill(
    support: SupportSet,
    settings: DistillSettings | None = None,
    *,
    init_from: StudentModel | None = None,
    unlabeled: Sequence[Array | UnlabeledImage] = (),
) -> DistillRun:
    """`distill`, step by step: iterate the run for `TrainStep`, then call its ``result()``."""
    return DistillRun(support, settings or DistillSettings(), init_from, unlabeled=unlabeled)


def distill(
    support: SupportSet,
    settings: DistillSettings | None = None,
    *,
    init_from: StudentModel | None = None,
    unlabeled: Sequence[Array | UnlabeledImage] = (),
) -> StudentModel:
    """Make a student from a support set.

    Parameters
    ----------
    support : SupportSet
    settings : DistillSettings, optional
    init_from : StudentModel, optional
        Warm start from an existing student, with new or corrected slices.
    unlabeled : sequence of array, shape (y, x) or (y, x, c), or of UnlabeledImage
        Images without labels, such as other planes of the volume (`load_unlabeled`). After the training, the student,
        and a probe on a foundation model if the settings name one, segment up to 12 of them. Then the student goes on
        for half of the steps again, and learns these labels too where the mean probability is 0.65 or more. Method
        probe uses none. With ``settings.specialize`` the backbone learns from them first, and no labels are made where
        the settings name no foundation model.

    Returns
    -------
    StudentModel
        It needs no support images.

    Raises
    ------
    SettingsError, WeightsUnavailableError
    """
    return finish(iter_distill(support, settings, init_from=init_from, unlabeled=unlabeled))


def iter_refine(support: SupportSet, settings: DistillSettings | None = None) -> DistillRun:
    """TransferFSS, step by step: refine the teacher on the support set; call ``teacher()`` of the run."""
    return DistillRun(support, settings or DistillSettings(), teacher_only=True)


def refine(support: SupportSet, settings: DistillSettings | None = None) -> FewShotModel:
    """TransferFSS: a teacher refined on the support set, ready to predict."""
    run = iter_refine(support, settings)
    for _ in run:
        pass
    return run.teacher()


@as_run
def iter_unrefined_teacher(
    support: SupportSet, settings: DistillSettings | None = None, *, kind: str = "dcama", voting: bool = False
) -> Generator[TrainStep, None, FewShotModel]:
    """`unrefined_teacher`, step by step: iterate the run for `TrainStep`, then call its ``result()``."""
    settings = match_head(settings or DistillSettings())
    device = choose_device(settings.device, settings.precision)
    ready = yield from iter_prepare(support, replace(settings, orientation="any"), device)
    teacher: Teacher = ready.head.teacher.eval() if kind == "dcama" else PrototypeTeacher()
    if voting:
        teacher = VotingTeacher(teacher)
    return _show_support(teacher, ready.backbone, ready.preprocess, support, settings, device)


def unrefined_teacher(
    support: SupportSet, settings: DistillSettings | None = None, *, kind: str = "dcama", voting: bool = False
) -> FewShotModel:
    """A teacher that is not refined: DCAMA with the weights of its head file, or prototypes (kind "prototype").

    With ``voting``, each support crop segments separately and the surest one counts; otherwise all crops share one
    attention.
    """
    return finish(iter_unrefined_teacher(support, settings, kind=kind, voting=voting))


def _show_support(
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
    if settings.method == "probe" and isinstance(settings.validation_slice, int):
        raise SettingsError(
            f"validation_slice is {settings.validation_slice}, but it chooses the best step, and method probe has no "
            "steps; leave it out, or choose another method"
        )
    if settings.method == "probe" or settings.validation_slice is None:
        return None
    if settings.validation_slice == "auto" and len(support) < AUTO_VALIDATION:
        return None
    alone = support.shown_once()
    if settings.validation_slice == "auto":
        from_the_middle = sorted(range(len(support)), key=lambda i: abs(i - len(support) // 2))
        return next((i for i in from_the_middle if not alone[i].any()), None)
    index = settings.validation_slice
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


def auto_steps(slices: int, *, few: bool = False, again: bool = False) -> int:
    """Steps of a stage for so many slices, fewer for a warm start.

    With ``few`` a meta-trained head unlearns less of what the slices do not show: right for separate pictures, while
    planes of one volume show what is to come.
    """
    first, each = FEWER_STEPS if few else AUTO_STEPS
    steps = first + each * max(0, slices - 5)
    return steps // AGAIN if again else steps


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
