"""Distill a backbone without labels: the first stage of generalizable knowledge distillation (GKD) [1]_.

A small backbone learns the features of a large one on images alone. Its head is trained afterwards, while it is frozen.

References
----------
.. [1] Lv et al., "Generalizable Knowledge Distillation from Vision Foundation Models for Semantic Segmentation",
   CVPR 2026, arXiv:2603.02554.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distillfss_core.errors import ModelFileError, SettingsError
from distillfss_core.nn.backbone_file import save_backbone
from distillfss_core.nn.backbones import (
    Backbone,
    BackboneSpec,
    DistillingBackbone,
    backbone_from_state,
    backbone_spec,
    load_backbone,
)
from distillfss_core.nn.checkpoint import (
    FileKind,
    read_card_file,
    restore_training,
    training_tensors,
    under,
    write_card_file,
)
from distillfss_core.nn.device import Device, choose_device, seeded
from distillfss_core.nn.token_losses import TokenLoss, mask_images
from distillfss_core.settings import BackboneSettings
from distillfss_core.training.backbone_teacher import Maps, TeacherTokens, last_map, load_teacher, stage_of
from distillfss_core.training.backbone_views import Image, Views
from distillfss_core.types import TrainStep, as_run, finish

CHECKPOINT_FILE = FileKind("distillfss-backbone-training", "checkpoint of a backbone distillation", 1)

KEEP_EVERY = 60.0  # seconds between two checkpoints
LAST_RATE = 1e-5
MEAN_OF = 50  # steps of which the card holds the mean loss
MAY_CHANGE = {"cache_mb", "device", "precision"}
"""Settings that a training may go on with another value of."""


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
        teacher = load_teacher(settings.teacher, settings.teacher_weights).to(device.torch)
        tokens = TeacherTokens(teacher, views, strides, device, settings.cache_mb << 20)
        training = _Training(settings, tokens, device, Path(checkpoint) if checkpoint else None)
        if not training.restore():
            for done, total in tokens.fit():
                yield TrainStep(done, total, stage="teacher")
        with device.reproducible():
            yield from training.steps()
        return training.result()
    finally:
        views.close()


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


class _Training:
    """Student, projections and optimizer of a training, and their state in a checkpoint."""

    def __init__(
        self, settings: BackboneSettings, tokens: TeacherTokens, device: Device, checkpoint: Path | None
    ) -> None:
        self.settings: BackboneSettings = settings
        self.tokens: TeacherTokens = tokens
        self.device: Device = device
        self.checkpoint: Path | None = checkpoint
        start = _load_student(settings)
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
            }
        self.losses: nn.ModuleDict = nn.ModuleDict(modules).to(device.torch)
        self._kept: dict[str, nn.Module] = {"student": self.student, "losses": self.losses}
        parameters = [p for module in self._kept.values() for p in module.parameters()]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.step: int = 0
        self.seconds: float = 0.0
        self.history: list[dict[str, float]] = []

    def steps(self) -> Generator[TrainStep, None, None]:
        """Train to the last step; what is interrupted within a step is not kept."""
        saved = began = time.monotonic()
        whole = True
        try:
            while self.step < self.settings.steps:
                whole = False
                losses = self._train()
                self.step += 1
                self.history = [*self.history[1 - MEAN_OF :], losses]
                now = time.monotonic()
                self.seconds, began = self.seconds + now - began, now
                whole = True
                if now - saved > KEEP_EVERY:
                    self.keep()
                    saved = now
                yield TrainStep(self.step, self.settings.steps, losses, stage="distill")
                began = time.monotonic()
        finally:
            if whole:
                self.keep()

    def _train(self) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = _rate(self.settings.learning_rate, self.step, self.settings.steps)
        images, teacher = self.tokens.batch(self._indices())
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
        spec = self.student.spec
        each = [self.losses[f"{name}_{s}"](last_map(pyramid, spec, s), teacher[s]) for s in self.tokens.strides]
        return torch.stack(each).mean()

    def _indices(self) -> list[int]:
        """Views of this step: every view once in an epoch, in an order that follows from the seed."""
        count, batch = len(self.tokens.views), self.settings.batch
        places = range(self.step * batch, (self.step + 1) * batch)
        orders = {
            epoch: np.random.default_rng([self.settings.seed, 1, epoch]).permutation(count)
            for epoch in {place // count for place in places}
        }
        return [int(orders[place // count][place % count]) for place in places]

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
        spec, names = backbone.spec, sorted({name for losses in self.history for name in losses})
        card = {
            "backbone": {
                "name": spec.name,
                "weights": backbone.weights,
                "license": f"teacher {teacher.spec.license}, start {_start_license(spec, self.start)}",
                "digest": backbone.digest(),
            },
            "start": self.start,
            "teacher": self._teacher(),
            "losses": {name: float(np.mean([losses[name] for losses in self.history])) for name in names},
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

    def keep(self) -> None:
        """Write the state, if there is a file for it."""
        if self.checkpoint is None:
            return
        tensors = training_tensors(self._kept, self.optimizer)
        tensors |= {f"norms.{name}": value for name, value in self.tokens.norms().items()}
        card = {"step": self.step, "seconds": self.seconds, "history": self.history, "start": self.start}
        card |= {"settings": asdict(self.settings), "teacher": self._teacher(), "sources": self.tokens.views.sources()}
        write_card_file(self.checkpoint, CHECKPOINT_FILE, card, tensors)

    def restore(self) -> bool:
        """Go on from the checkpoint, if there is one; whether there was."""
        path = self.checkpoint
        if path is None or not path.exists():
            return False
        card, tensors, _ = read_card_file(path, CHECKPOINT_FILE)
        self._check_same(path, card)
        try:
            restore_training(self._kept, self.optimizer, tensors)
            self.tokens.restore(under("norms.", tensors))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ModelFileError(f"{path}: its tensors do not fit ({str(error).splitlines()[0]})") from error
        self.step, self.seconds, self.history = card["step"], card["seconds"], card["history"]
        return True

    def _check_same(self, path: Path, card: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings, another teacher or other images."""
        now = asdict(self.settings)
        for setting in fields(BackboneSettings):
            then = card["settings"].get(setting.name, setting.default)
            if setting.name not in MAY_CHANGE and then != now[setting.name]:
                raise SettingsError(
                    f"{path} was made with {setting.name} {then!r}, now it is {now[setting.name]!r}; "
                    "give the same settings to go on, or remove the file to start anew"
                )
        for name, value in (("teacher", self._teacher()), ("sources", self.tokens.views.sources())):
            if card[name] != value:
                what = {"teacher": "another teacher", "sources": "other images"}[name]
                raise SettingsError(f"{path} was made with {what}; give the same, or remove the file to start anew")


def _check_strides(spec: BackboneSpec, strides: Sequence[int]) -> None:
    missing = [stride for stride in strides if stage_of(spec, stride) is None]
    if missing:
        raise SettingsError(f"student {spec.name} has no map of stride {missing[0]}; give strides 16")


def _load_student(settings: BackboneSettings) -> Backbone:
    """The backbone that the student starts from."""
    weights = settings.student_weights
    if weights == "auto":
        weights = "random" if backbone_spec(settings.student).package is None else "packaged"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has random weights.*", category=UserWarning)
        return load_backbone(settings.student, weights, seed=settings.seed)


def _start_license(spec: BackboneSpec, weights: str) -> str:
    return "random" if weights.startswith("random:") else spec.license


def _rate(first: float, step: int, steps: int) -> float:
    """A cosine from the first rate to the last."""
    last = min(LAST_RATE, first)
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2
