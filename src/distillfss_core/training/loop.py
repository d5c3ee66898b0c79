"""The training loop: episodes of stored crops, AdamW, a moving average of the weights, and the best state."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distillfss_core.nn.decoder import resize_like
from distillfss_core.nn.device import seeded
from distillfss_core.nn.features import CoarseMaps, FeaturePyramid, merge_classes, strongest
from distillfss_core.nn.head import FewShotHead
from distillfss_core.nn.losses import (
    coarse_loss,
    distillation_loss,
    focal_loss,
    joint_loss,
    map_loss,
    segmentation_loss,
)
from distillfss_core.nn.teachers.protocol import hide_absent
from distillfss_core.settings import DistillSettings
from distillfss_core.training.crops import CropSampler, FeatureCache
from distillfss_core.training.episodes import Episode, draw_episode
from distillfss_core.types import IGNORE, TrainStep

PATIENCE = 5  # looks at the validation slice that found it worse than the best, then training stops
NOISE = 0.02  # by how much IoU on a single slice must fall to say that more training harms
REFRESH = 4  # steps between two fresh crops
UNLABELED_RATE = 0.5  # of the learning rate, where a trained student goes on with images without labels
TRAIN_KEYS = 256  # support keys a stage in a training step; another draw in every step


@dataclass(frozen=True)
class Roles:
    """Roles of teacher and student in a stage of the training.

    "refine" trains the teacher alone, "joint" both, "distill" the student from a fixed teacher, and "direct" the
    student from the labels. In "distill" the published loss reads no labels, the default loss reads them too.
    """

    teacher: bool
    student: bool
    truth: bool = True

    @property
    def uses_teacher(self) -> bool:
        """Whether a step needs the teacher: it learns, or the student learns from it."""
        return self.teacher or not self.truth


STAGES = {
    "refine": Roles(teacher=True, student=False),
    "joint": Roles(teacher=True, student=True),
    "distill": Roles(teacher=False, student=True, truth=False),
    "direct": Roles(teacher=False, student=True),
}


@dataclass(frozen=True, eq=False)
class ValidationCrops:
    """Plain crops of the validation slice: features, labels and evidence (if there is any) of each."""

    features: list[FeaturePyramid]
    labels: list[Int[Tensor, "b h w"]]
    evidence: list[Float[Tensor, "b k hg wg"] | None]


@dataclass(frozen=True, eq=False)
class UnlabeledCrops:
    """Crops of images without labels, with the labels that an ensemble gives them."""

    cache: FeatureCache
    sampler: CropSampler

    def loss(self, head: FewShotHead, count: int, rng: np.random.Generator) -> Float[Tensor, ""]:
        """Loss of the student on a draw of the crops."""
        chosen = [int(i) for i in rng.choice(len(self.cache), min(count, len(self.cache)), replace=False)]
        logits = merge_classes(head.student_logits(self.cache.pyramid(chosen))).float()
        logits = _with_evidence(logits, self.cache.evidence(chosen))
        return segmentation_loss(logits, self.cache.labels(chosen).long())


def iter_fit(
    head: FewShotHead,
    stage: str,
    cache: FeatureCache,
    sampler: CropSampler,
    settings: DistillSettings,
    steps: int,
    validation: ValidationCrops | None,
    best: Best,
    fixed_decoder: nn.Module | None = None,
    unlabeled: UnlabeledCrops | None = None,
) -> Iterator[TrainStep]:
    """Train ``head`` in place for ``steps`` steps; ``best`` always holds the best weights so far.

    Parameters
    ----------
    fixed_decoder : module, optional
        Decoder of the fixed teacher in the stage "distill".
    unlabeled : UnlabeledCrops, optional
        Crops that the student learns from as well, at half the rate. Steps are then called "unlabeled".
    """
    roles = STAGES[stage]
    rng = np.random.default_rng([settings.seed, len(STAGES) if unlabeled else list(STAGES).index(stage)])
    trained = [p for p in _trained(head, roles) if p.requires_grad]
    rate = settings.learning_rate * (UNLABELED_RATE if unlabeled else 1)
    fused = cache.device.kind != "mps"  # one call for all weights, not several for each
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=settings.weight_decay, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i, steps))
    every = max(10, steps // 12)
    head.train()
    if not roles.teacher:
        for module in head.teacher.own_modules:
            module.eval()  # a fixed teacher has no dropout
    for step in range(steps):
        _refresh(cache, sampler, rng, step)
        if unlabeled is not None:
            _refresh(unlabeled.cache, unlabeled.sampler, rng, step)
        episode = draw_episode(
            cache.slices(),
            [v.box for v in cache.crops],
            rng,
            queries=settings.queries,
            shots=settings.shots,
            walk=step,
        )
        optimizer.zero_grad(set_to_none=True)
        with cache.device.reproducible():
            with seeded(int(rng.integers(2**31))), cache.device.autocast():
                losses = episode_losses(head, roles, cache, episode, settings, fixed_decoder, rng.random())
                if unlabeled is not None:
                    losses["unlabeled"] = unlabeled.loss(head, settings.queries, rng)
            torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        best.follow(head)
        metrics: dict[str, float] = {}
        last = step + 1 == steps
        if validation is not None and ((step + 1) % every == 0 or last):
            metrics["iou"] = best.judge(validation, cache)
        values = {name: float(value.detach()) for name, value in losses.items()}
        yield TrainStep(step + 1, steps, values, metrics, "unlabeled" if unlabeled else stage)
        if validation is not None and best.waited >= PATIENCE:
            break
    best.restore(head)
    head.eval()


def episode_losses(
    head: FewShotHead,
    roles: Roles,
    cache: FeatureCache,
    episode: Episode,
    settings: DistillSettings,
    fixed_decoder: nn.Module | None = None,
    offset: float = 0.0,
) -> dict[str, Float[Tensor, ""]]:
    """Loss terms of one episode; their sum is what is minimized.

    ``offset`` (0..1) selects the support's keys that are kept where there are more than `TRAIN_KEYS`.

    Teacher and student ride through the shared decoder together, as if they were twice as many classes: what the
    decoder computes from the query alone is computed once.
    """
    query, labels = cache.pyramid(episode.query), cache.labels(episode.query).long()
    k = head.classes
    teacher_maps = student_maps = own = None
    support = cache.support(episode.support, k) if roles.uses_teacher else None
    present = torch.ones(k, dtype=torch.bool, device=labels.device)
    if support is not None:
        with torch.set_grad_enabled(roles.teacher):
            budget = None if head.teacher.max_keys is None else TRAIN_KEYS
            keys = head.teacher.encode(support, max_keys=budget, offset=offset)
            teacher_maps, own = head.teacher.outputs(query, keys)
            present = keys.present
    if roles.student:
        student_maps = head.student(query)

    if roles.teacher and teacher_maps is not None and student_maps is not None:
        both = CoarseMaps(*(torch.cat([t, s], 1) for t, s in zip(teacher_maps, student_maps, strict=True)))
        decoded = head.decoder(both, query)
        teacher_logits, student_logits = decoded[:, :k], decoded[:, k:]
    else:
        teacher_logits = student_logits = None
        if own is not None and roles.student:
            teacher_logits = own
        elif teacher_maps is not None:
            with torch.set_grad_enabled(roles.teacher):
                teacher_logits = (fixed_decoder or head.decoder)(teacher_maps, query)
        if student_maps is not None:
            student_logits = head.decoder(student_maps, query)

    visible = _hide_labels(labels, present)
    if teacher_logits is not None:
        teacher_logits = merge_classes(hide_absent(teacher_logits, present)).float()
    if student_logits is not None:
        student_logits = _with_evidence(merge_classes(student_logits).float(), cache.evidence(episode.query))
    out = _Outputs(teacher_logits, student_logits, teacher_maps, student_maps, labels, visible, present)
    mask = {}
    if own is not None and roles.teacher:
        mask = {"mask": segmentation_loss(merge_classes(hide_absent(own, present)).float(), visible)}
    if settings.loss == "published":
        return _published_terms(roles, out) | mask
    aligned = None
    if roles.teacher and support is not None and teacher_logits is not None:
        aligned = head.teacher.alignment(query, strongest(teacher_logits), support)
    return _balanced_terms(roles, out) | mask | ({} if aligned is None else {"alignment": 0.3 * aligned})


def _with_evidence(
    logits: Float[Tensor, "b k1 h w"], evidence: Float[Tensor, "b k hg wg"] | None
) -> Float[Tensor, "b k1 h w"]:
    """Merged logits, with the evidence for each class added to its own."""
    if evidence is None:
        return logits
    return torch.cat([logits[:, :1], logits[:, 1:] + resize_like(evidence, logits)], 1)


@dataclass(frozen=True, eq=False)
class _Outputs:
    """Outputs of teacher and student for the queries of an episode; None for the one that takes no part.

    ``k1`` is k + 1. ``visible`` are the labels without the classes that the support does not show; ``present`` marks
    those that it shows.
    """

    teacher_logits: Float[Tensor, "b k1 h w"] | None
    student_logits: Float[Tensor, "b k1 h w"] | None
    teacher_maps: CoarseMaps | None
    student_maps: CoarseMaps | None
    labels: Int[Tensor, "b h w"]
    visible: Int[Tensor, "b h w"]
    present: Bool[Tensor, " k"]

    def coarse_loss(self) -> Float[Tensor, ""] | None:
        """Between the maps of both, for the classes that the support shows."""
        if self.teacher_maps is None or self.student_maps is None or not bool(self.present.any()):
            return None
        fixed = CoarseMaps(*(m.detach()[:, self.present] for m in self.teacher_maps))
        return coarse_loss(CoarseMaps(*(m[:, self.present] for m in self.student_maps)), fixed)


def _published_terms(roles: Roles, out: _Outputs) -> dict[str, Float[Tensor, ""]]:
    """The loss of the paper: one term."""
    if out.teacher_logits is not None and out.student_logits is not None:
        coarse = out.coarse_loss()
        zero = out.teacher_logits.new_zeros(()) if coarse is None else coarse
        if roles.truth:
            return {"joint": joint_loss(out.teacher_logits, out.student_logits, zero, out.visible)}
        return {"distill": distillation_loss(out.teacher_logits, out.student_logits, zero)}
    if out.teacher_logits is not None:
        return {"teacher": focal_loss(out.teacher_logits, out.visible)}
    assert out.student_logits is not None
    return {"student": focal_loss(out.student_logits, out.labels)}


def _balanced_terms(roles: Roles, out: _Outputs) -> dict[str, Float[Tensor, ""]]:
    """Cross-entropy and Dice of both, the teacher's attention, and what the student learns from the teacher."""
    terms: dict[str, Tensor] = {}
    if roles.teacher and out.teacher_logits is not None:
        terms["teacher"] = segmentation_loss(out.teacher_logits, out.visible)
        assert out.teacher_maps is not None
        terms["attention"] = 0.3 * map_loss(out.teacher_maps, out.visible, out.present)
    if out.student_logits is not None:
        terms["student"] = segmentation_loss(out.student_logits, out.labels)
        if not roles.truth:
            assert out.teacher_logits is not None
            ce = F.cross_entropy(out.student_logits, out.teacher_logits.softmax(1), reduction="none")
            is_shown = (out.visible != IGNORE) | (out.labels == IGNORE)  # where the support shows what the truth holds
            terms["answer"] = (ce * is_shown).sum() / is_shown.sum().clamp_min(1)
    coarse = out.coarse_loss()
    if coarse is not None:
        terms["coarse"] = coarse
    return terms


class Best:
    """A moving average of the trained weights, and the latest average that did well on the validation slice.

    An average does well if its IoU is within `NOISE` of the best. One slice stands for little of the others, so among
    states that it cannot distinguish the one that learned longer is better. Without a validation slice the latest
    average is the best.
    """

    def __init__(self, head: FewShotHead, decay: float = 0.98) -> None:
        self.decay: float = decay
        self.steps: int = 0
        self.average: FewShotHead = copy.deepcopy(head).eval().requires_grad_(False)
        self.state: dict[str, Tensor] | None = None
        self.iou: float = -math.inf  # the best so far
        self.score: float | None = None  # of the state that is kept
        self.waited: int = 0
        self.best_step: int = 0

    @torch.no_grad()
    def follow(self, head: FewShotHead) -> None:
        """Move the average towards the weights of ``head``, by one step."""
        self.steps += 1
        keep = min(self.decay, self.steps / (self.steps + 9))
        new = dict(head.named_parameters())
        for name, old in self.average.named_parameters():
            old.lerp_(new[name], 1 - keep)

    def judge(self, validation: ValidationCrops, cache: FeatureCache) -> float:
        """IoU of the average on the validation crops; remembers the latest that did well."""
        iou = validation_iou(self.average, validation, cache)
        self.waited += 1
        if iou > self.iou - NOISE:
            self.iou, self.score, self.waited, self.best_step = max(self.iou, iou), iou, 0, self.steps
            self.state = {name: value.clone() for name, value in self.average.state_dict().items()}
        return iou

    def go_on(self, head: FewShotHead) -> None:
        """Let the average begin again at the weights of ``head``, the best so far, and be patient again."""
        self.average.load_state_dict(head.state_dict())
        self.waited = 0

    def restore(self, head: FewShotHead) -> None:
        """Put the best weights so far into ``head``."""
        head.load_state_dict(self.state if self.state is not None else self.average.state_dict())


@torch.no_grad()
def validation_iou(head: FewShotHead, validation: ValidationCrops, cache: FeatureCache) -> float:
    """Foreground IoU of the student, pooled over the validation crops, mean over the classes they hold."""
    k = head.classes
    overlap, union = torch.zeros(k), torch.zeros(k)
    for features, labels, evidence in zip(validation.features, validation.labels, validation.evidence, strict=True):
        with cache.device.autocast():
            logits = _with_evidence(merge_classes(head.student_logits(features)), evidence)
            labels_predicted = strongest(logits)
        annotated = labels != IGNORE
        for c in range(1, k + 1):
            a, b = (labels_predicted == c) & annotated, (labels == c) & annotated
            overlap[c - 1] += float((a & b).sum())
            union[c - 1] += float((a | b).sum())
    held = union > 0
    return float((overlap[held] / union[held]).mean()) if bool(held.any()) else 1.0


def _trained(head: FewShotHead, roles: Roles) -> list[nn.Parameter]:
    parts: list[nn.Module] = [head.decoder]
    if roles.teacher:
        parts += head.teacher.own_modules
    if roles.student:
        parts.append(head.student)
    return [p for part in parts for p in part.parameters()]


def _refresh(cache: FeatureCache, sampler: CropSampler, rng: np.random.Generator, step: int) -> None:
    """Put a fresh crop in place of an old one now and then."""
    if step % REFRESH == 0:
        index = int(rng.integers(len(cache)))
        cache.replace(index, sampler.cut(cache.crops[index].slice, rng))


def _hide_labels(labels: Int[Tensor, "b h w"], present: Bool[Tensor, " k"]) -> Int[Tensor, "b h w"]:
    """Pixels of classes that the support does not show teach the teacher nothing."""
    for missing in torch.nonzero(~present).flatten().tolist():
        labels = labels.where(labels != missing + 1, IGNORE)
    return labels


def _rate(step: int, total: int) -> float:
    """Ten steps of warm-up, then a cosine to a hundredth."""
    warm = min(1.0, (step + 1) / 10)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0))))
