"""Distill the adapter of teacher uino from SAM, without labels: hierarchical distillation of UINO-FSS [1]_.

A small network learns to make SAM's embedding of an image from early features of the backbone. SAM is not needed
afterwards.

References
----------
.. [1] Zhuo, Tang, Xue, Ding, Ji, Shen, "UINO-FSS: Unifying Representation Learning and Few-shot Segmentation via
   Hierarchical Distillation and Mamba-HyperCorrelation", arXiv:2504.15669, 2025.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.nn.adapter_file import save_adapter
from distillfss_core.nn.backbones import SPECS, Backbone, load_backbone
from distillfss_core.nn.checkpoint import FileKind
from distillfss_core.nn.device import Device, choose_device, seeded
from distillfss_core.nn.sam import WIDTH, read_sam
from distillfss_core.nn.teachers.uino import BottleneckAdapter, early_features, early_stage, uino_heads
from distillfss_core.settings import AdapterSettings
from distillfss_core.training.backbone_teacher import load_teacher, token_size
from distillfss_core.training.backbone_views import Image, Views
from distillfss_core.training.resumable import ResumableTraining
from distillfss_core.training.sam_embeddings import SamEmbeddings
from distillfss_core.types import TrainStep, as_run, finish

CHECKPOINT_FILE = FileKind("distillfss-adapter-training", "checkpoint of an adapter distillation", 1)


@dataclass(frozen=True, eq=False)
class DistilledAdapter:
    """An adapter that was distilled.

    Parameters
    ----------
    adapter : nn.Module
        On the CPU; maps early features "b c h w" to an embedding "b 256 h w".
    card : dict
        How it was made, JSON-able: ``backbone``, ``sam`` (name, file, digest), ``width``, ``losses``, ``images``,
        ``sources`` (name, images, digest), ``steps``, ``seconds`` and ``settings``.
    """

    adapter: BottleneckAdapter
    card: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write it as a file that ``pretrain --teacher uino --adapter FILE`` reads.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        save_adapter(path, self.adapter, self.card)


@as_run
def iter_distill_adapter(
    images: Sequence[Image],
    sam: str | Path,
    settings: AdapterSettings | None = None,
    *,
    cache: str | Path | None = None,
    checkpoint: str | Path | None = None,
) -> Generator[TrainStep, None, DistilledAdapter]:
    """Distill the adapter of teacher uino from SAM; a `Run` of steps whose result is a `DistilledAdapter`.

    With a checkpoint, a training that was stopped or killed goes on where it was, and reaches the same weights bit for
    bit (on one machine's CPU).

    Parameters
    ----------
    images : sequence of array, Volume or path
        As for `iter_distill_backbone`.
    sam : path
        A checkpoint of SAM (ViT-B, ViT-L, ViT-H) or MobileSAM. Nothing in it is run.
    settings : AdapterSettings, optional
    cache : path, optional
        Folder of SAM's embeddings, which other trainings on the same views take too; by default a temporary one.
    checkpoint : path, optional
        File that gets the state every minute and when the run is closed; it is read first where it exists.

    Yields
    ------
    TrainStep
        Stages "images" and "embed" prepare, "distill" trains. Loss: ``embedding``, the mean squared error.

    Raises
    ------
    SettingsError
        If the backbone does not exist, or the checkpoint is of another training.
    InputFileError, ImageError
        If there are no images, or one cannot be read.
    WeightsUnavailableError, ModelFileError
        If SAM or weights of the backbone are missing, or cannot be read.
    OutputError
        If an embedding cannot be written.

    References
    ----------
    Zhuo et al., arXiv:2504.15669, hierarchical distillation.
    """
    settings = settings or AdapterSettings()
    views = Views(images, _sizes(settings)[-1], settings.views, settings.seed)
    with ExitStack() as stack:
        stack.callback(views.close)
        for done, total in views.scan():
            yield TrainStep(done, total, stage="images")
        device = choose_device(settings.device, settings.precision)
        folder = Path(cache or stack.enter_context(tempfile.TemporaryDirectory()))
        encoder = read_sam(sam).to(device.torch)
        embeddings = SamEmbeddings(encoder, views, device, folder, settings.cache_mb * 10**6)
        training = _Training(settings, embeddings, device, Path(checkpoint) if checkpoint else None)
        if not training.restore():
            training.keep()
        for done, total in embeddings.prepare(training.needed()):
            yield TrainStep(done, total, stage="embed")
        with device.reproducible():
            yield from training.steps()
        return training.result()


def distill_adapter(
    images: Sequence[Image],
    sam: str | Path,
    settings: AdapterSettings | None = None,
    *,
    cache: str | Path | None = None,
    checkpoint: str | Path | None = None,
) -> DistilledAdapter:
    """Distill the adapter of teacher uino from SAM: `iter_distill_adapter` to its end.

    Raises
    ------
    SettingsError, InputFileError, ImageError, WeightsUnavailableError, ModelFileError, OutputError
        As `iter_distill_adapter` does.
    """
    return finish(iter_distill_adapter(images, sam, settings, cache=cache, checkpoint=checkpoint))


class _Training(ResumableTraining):
    """The adapter of a training, on its frozen backbone."""

    def __init__(
        self, settings: AdapterSettings, embeddings: SamEmbeddings, device: Device, checkpoint: Path | None
    ) -> None:
        super().__init__(CHECKPOINT_FILE, settings, checkpoint)
        self.settings: AdapterSettings = settings
        self.embeddings: SamEmbeddings = embeddings
        self.device: Device = device
        self.backbone: Backbone = _load_backbone(settings).to(device.torch)
        self.stage: int = early_stage(self.backbone.spec)
        channels = self.backbone.spec.channels[self.stage]
        with seeded(settings.seed):
            adapter = BottleneckAdapter(channels, WIDTH, uino_heads(WIDTH))
        self.adapter: BottleneckAdapter = adapter.to(device.torch)
        self.begin({"adapter": self.adapter})

    def needed(self) -> list[int]:
        """Views of the steps that are left, in the order of their use."""
        count = len(self.embeddings.views)
        steps = range(self.step, self.settings.steps)
        return list(dict.fromkeys(index for step in steps for index in self.indices(count, step)))

    def size(self, step: int) -> int:
        """Side in pixels at which the backbone sees the views of a step."""
        sizes = _sizes(self.settings)
        return sizes[step * len(sizes) // self.settings.steps]

    def train(self) -> dict[str, float]:
        """One step at the size of its turn."""
        images, target = self.embeddings.batch(self.indices(len(self.embeddings.views), self.step))
        with self.device.autocast():
            found = self.embed(images, self.size(self.step))
        loss = F.mse_loss(F.interpolate(found.float(), target.shape[-2:], mode="bilinear"), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return {"embedding": float(loss.detach())}

    def embed(self, images: Float[Tensor, "b 3 s s"], size: int) -> Float[Tensor, "b 256 h w"]:
        """The adapter's embedding of images that the backbone sees at a size."""
        side = token_size(size, self.backbone.spec)
        seen = F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)
        embedding: Float[Tensor, "b 256 h w"] = self.adapter(early_features(self.backbone(seen), self.stage))
        return embedding

    def result(self) -> DistilledAdapter:
        """The adapter and its card."""
        spec = self.backbone.spec
        card = {
            "backbone": self._backbone() | {"license": self.backbone.license},
            "sam": self.embeddings.origin,
            "width": WIDTH,
            "losses": self.losses(),
            "images": self.embeddings.views.images,
            "sources": self.embeddings.views.sources(),
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "device": str(self.device),
            "torch": torch.__version__,
            "settings": asdict(self.settings) | {"backbone": spec.name},
        }
        return DistilledAdapter(self.adapter.cpu().eval(), card)

    def _backbone(self) -> dict[str, str]:
        backbone = self.backbone
        return {"name": backbone.spec.name, "weights": backbone.weights, "digest": backbone.digest()}

    def provenance(self) -> dict[str, tuple[Any, str]]:
        """Backbone, SAM and images."""
        sources = self.embeddings.views.sources()
        return {
            "backbone": (self._backbone(), "another backbone"),
            "sam": (self.embeddings.origin["digest"], "another SAM"),
            "sources": (sources, "other images"),
        }


def _sizes(settings: AdapterSettings) -> list[int]:
    return [int(size) for size in settings.sizes.split(",")]


def _load_backbone(settings: AdapterSettings) -> Backbone:
    """The backbone of that name, or that of a file (a distilled backbone, or a head with its own)."""
    if settings.backbone in SPECS:
        return load_backbone(settings.backbone, settings.weights)
    return load_teacher(settings.backbone, settings.weights)
