"""Distill a backbone without labels: the first stage of generalizable knowledge distillation (GKD) [1]_.

A small backbone learns the features of a large one on images alone. Its head is trained afterwards, while it is frozen.

References
----------
.. [1] Lv et al., "Generalizable Knowledge Distillation from Vision Foundation Models for Semantic Segmentation",
   CVPR 2026, arXiv:2603.02554.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillfss_core.errors import SettingsError
from distillfss_core.nn.backbone_file import save_backbone
from distillfss_core.nn.backbones import (
    Backbone,
    BackboneSpec,
    DistillingBackbone,
    backbone_from_state,
    backbone_spec,
    load_backbone,
)
from distillfss_core.nn.backbones.pruning import pruned_tensors
from distillfss_core.nn.backbones.trunks import create_net
from distillfss_core.nn.backbones.weights import PRUNED
from distillfss_core.nn.checkpoint import FileKind, under
from distillfss_core.nn.device import Device, choose_device, seeded
from distillfss_core.nn.token_losses import TokenLoss, mask_images
from distillfss_core.settings import BackboneSettings
from distillfss_core.training.backbone_teacher import Maps, TeacherTokens, last_map, load_teacher, stage_of
from distillfss_core.training.backbone_views import Image, Views
from distillfss_core.training.resumable import ResumableTraining
from distillfss_core.types import TrainStep, as_run, finish

CHECKPOINT_FILE = FileKind("distillfss-backbone-training", "checkpoint of a backbone distillation", 1)


@dataclass(frozen=True, eq=False)
class DistilledBackbone:
    """A backbone that was distilled.

    Parameters
    ----------
    backbone : Backbone
        Frozen, on the CPU.
    card : dict
        How it was made, JSON-able: ``backbone``, ``teacher``, ``start``, ``losses``, ``images``, ``sources`` (name,
        images, digest), ``steps``, ``seconds`` and ``settings``.
    """

    backbone: Backbone
    card: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write it as a file that ``load_backbone(name, path)`` and ``distill --weights`` read.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        save_backbone(path, self.backbone, self.card)


@as_run
def iter_distill_backbone(
    images: Sequence[Image], settings: BackboneSettings | None = None, *, checkpoint: str | Path | None = None
) -> Generator[TrainStep, None, DistilledBackbone]:
    """Distill a backbone without labels; a `Run` of steps whose result is a `DistilledBackbone`.

    With a checkpoint, a training that was stopped or killed goes on where it was, and reaches the same weights bit for
    bit (on one machine's CPU).

    Parameters
    ----------
    images : sequence of array, Volume or path
        Arrays are planes "y x" or "y x c" of any dtype. Every plane of a volume is an image. A folder stands for the
        images in it, in its folder ``images``, or in the folders ``images`` of its folders.
    settings : BackboneSettings, optional
    checkpoint : path, optional
        File that gets the state every minute and when the run is closed; it is read first where it exists.

    Yields
    ------
    TrainStep
        Stages "images" and "teacher" prepare, "distill" trains. Losses: ``features``, and ``mask`` of the masked pass.

    Raises
    ------
    SettingsError
        If teacher or student do not exist or do not fit, or the checkpoint is of another training.
    InputFileError, ImageError
        If there are no images, or one cannot be read.
    WeightsUnavailableError, ModelFileError
        If weights are not installed, cannot be downloaded or read.

    References
    ----------
    Lv et al., arXiv:2603.02554, first stage, domain-agnostic.
    """
    settings = settings or BackboneSettings()
    strides = [int(stride) for stride in settings.strides.split(",")]
    spec = backbone_spec(settings.student)
    _check_strides(spec, strides)
    views = Views(images, settings.size, settings.views, settings.seed)
    try:
        for done, total in views.scan():
            yield TrainStep(done, total, stage="images")
        device = choose_device(settings.device, settings.precision)
        teacher = load_teacher(settings.teacher, settings.teacher_weights)
        path = Path(checkpoint) if checkpoint else None
        return (yield from iter_features(views, teacher, _load_student(settings, teacher), settings, device, path))
    finally:
        views.close()


def iter_features(
    views: Views,
    teacher: Backbone,
    start: Backbone,
    settings: BackboneSettings,
    device: Device,
    checkpoint: Path | None = None,
) -> Generator[TrainStep, None, DistilledBackbone]:
    """Have a backbone learn the features of another one; yields steps of the stages "teacher" and "distill".

    Parameters
    ----------
    views : Views
        Scanned.
    start : Backbone
        What the student starts from; it stays as it is.
    settings : BackboneSettings
        Those of teacher and student are not looked at.

    Raises
    ------
    SettingsError
        If the student has no map of one of the strides, or the checkpoint is of another training.
    """
    strides = [int(stride) for stride in settings.strides.split(",")]
    _check_strides(start.spec, strides)
    tokens = TeacherTokens(teacher.to(device.torch), views, strides, device, settings.cache_mb << 20)
    if settings.loss == "direct":
        _check_channels(start.spec, tokens)
    training = _Training(settings, tokens, start, device, checkpoint)
    if not training.restore():
        for done, total in tokens.fit():
            yield TrainStep(done, total, stage="teacher")
    with device.reproducible():
        yield from training.steps()
    return training.result()


def distill_backbone(
    images: Sequence[Image], settings: BackboneSettings | None = None, *, checkpoint: str | Path | None = None
) -> DistilledBackbone:
    """Distill a backbone without labels: `iter_distill_backbone` to its end.

    Raises
    ------
    SettingsError, InputFileError, ImageError, WeightsUnavailableError, ModelFileError
        As `iter_distill_backbone` does.
    """
    return finish(iter_distill_backbone(images, settings, checkpoint=checkpoint))


class _Training(ResumableTraining):
    """Student and projections of a training."""

    def __init__(
        self,
        settings: BackboneSettings,
        tokens: TeacherTokens,
        start: Backbone,
        device: Device,
        checkpoint: Path | None,
    ) -> None:
        super().__init__(CHECKPOINT_FILE, settings, checkpoint)
        self.settings: BackboneSettings = settings
        self.tokens: TeacherTokens = tokens
        self.device: Device = device
        self.start: str = start.weights
        self.student: DistillingBackbone = DistillingBackbone(start).to(device.torch)
        passes = ["features", "mask"] if settings.mask_weight else ["features"]
        with seeded(settings.seed):
            modules = {
                f"{name}_{stride}": TokenLoss(
                    settings.loss,
                    self.student.spec.channels[stage_of(self.student.spec, stride) or 0],
                    tokens.channels(stride),
                    settings.temperature,
                )
                for name in passes
                for stride in tokens.strides
                if settings.loss != "direct"
            }
        self.projections: nn.ModuleDict = nn.ModuleDict(modules).to(device.torch)
        self.begin({"student": self.student, "losses": self.projections})

    def train(self) -> dict[str, float]:
        """One step on both passes."""
        images, teacher = self.tokens.batch(self.indices(len(self.tokens.views), self.step))
        self.student.train()
        with self.device.autocast():
            losses = {"features": self._loss("features", images, teacher)}
            if self.settings.mask_weight:
                with self.student.statistics_kept():
                    losses["mask"] = self._loss("mask", self._masked(images), teacher)
        total = losses["features"]
        if "mask" in losses:
            total = total + self.settings.mask_weight * losses["mask"]
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in losses.items()}

    def _loss(self, name: str, images: Tensor, teacher: Maps) -> Tensor:
        """Mean of the losses of all strides."""
        pyramid = self.student(images)
        maps = {stride: last_map(pyramid, self.student.spec, stride) for stride in self.tokens.strides}
        if self.settings.loss == "direct":
            each = [F.mse_loss(self.tokens.standardized(s, x), teacher[s]) for s, x in maps.items()]
        else:
            each = [self.projections[f"{name}_{s}"](x, teacher[s]) for s, x in maps.items()]
        return torch.stack(each).mean()

    def _masked(self, images: Tensor) -> Tensor:
        """The batch with blocks of its first half masked, as large as a cell of the coarsest map."""
        grid = images.shape[-1] // max(16, *self.tokens.strides)
        rng = np.random.default_rng([self.settings.seed, 2, self.step])
        masked = np.zeros((len(images), grid * grid), bool)
        for row in masked[: len(images) // 2]:
            row[rng.permutation(grid * grid)[: round(self.settings.mask_fraction * grid * grid)]] = True
        blocks = torch.from_numpy(masked.reshape(-1, grid, grid)).to(images.device)
        return mask_images(images, blocks, self.student.get_buffer("mean"))

    def result(self) -> DistilledBackbone:
        """The frozen student and its card."""
        state = {name: value.detach().cpu() for name, value in self.student.state().items()}
        teacher = self.tokens.backbone
        backbone = backbone_from_state(self.student.spec.name, state, f"distilled:{teacher.spec.name}")
        spec = backbone.spec
        card = {
            "backbone": {
                "name": spec.name,
                "weights": backbone.weights,
                "license": f"teacher {teacher.spec.license}, start {_start_license(spec, self.start)}",
                "digest": backbone.digest(),
            },
            "start": self.start,
            "teacher": self._teacher(),
            "losses": self.losses(),
            "images": self.tokens.views.images,
            "sources": self.tokens.views.sources(),
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "device": str(self.device),
            "torch": torch.__version__,
            "settings": asdict(self.settings),
        }
        return DistilledBackbone(backbone, card)

    def _teacher(self) -> dict[str, str]:
        teacher = self.tokens.backbone
        return {"name": teacher.spec.name, "weights": teacher.weights, "digest": teacher.digest()}

    def provenance(self) -> dict[str, tuple[Any, str]]:
        """Teacher and images."""
        sources = self.tokens.views.sources()
        return {"teacher": (self._teacher(), "another teacher"), "sources": (sources, "other images")}

    def more_tensors(self) -> dict[str, Tensor]:
        """The scale of the teacher's channels."""
        return {f"norms.{name}": value for name, value in self.tokens.norms().items()}

    def restore_more(self, tensors: Mapping[str, Tensor]) -> None:
        """Take that scale from a checkpoint."""
        self.tokens.restore(under("norms.", tensors))


def _check_strides(spec: BackboneSpec, strides: Sequence[int]) -> None:
    missing = [stride for stride in strides if stage_of(spec, stride) is None]
    if missing:
        raise SettingsError(f"student {spec.name} has no map of stride {missing[0]}; give strides 16")


def _check_channels(spec: BackboneSpec, tokens: TeacherTokens) -> None:
    teacher = tokens.backbone.spec
    for stride in tokens.strides:
        own = spec.channels[stage_of(spec, stride) or 0]
        if own != tokens.channels(stride):
            raise SettingsError(
                f"loss is 'direct', but at stride {stride} student {spec.name} has {own} channels and teacher "
                f"{teacher.name} {tokens.channels(stride)}; give loss qsd"
            )


def _load_student(settings: BackboneSettings, teacher: Backbone) -> Backbone:
    """The backbone that the student starts from."""
    weights, spec = settings.student_weights, backbone_spec(settings.student)
    if weights == "auto" and spec.pruned_from == teacher.spec.name:
        pruned = pruned_tensors(teacher.state(), create_net(spec))
        return backbone_from_state(spec.name, pruned, f"{PRUNED}{teacher.weights}")
    if weights == "auto":
        weights = "random" if spec.package is None else "packaged"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has random weights.*", category=UserWarning)
        return load_backbone(settings.student, weights, seed=settings.seed)


def _start_license(spec: BackboneSpec, weights: str) -> str:
    return "random" if weights.startswith("random:") else spec.license
