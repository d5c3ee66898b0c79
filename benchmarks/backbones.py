"""Losses of backbone distillation side by side, decoupled from the task and joint with it.

    python benchmarks/backbones.py run ../shared -o backbones.jsonl [--teacher dinov2_small] [--student lcnet_050]
        [--student-weights random] [--steps 1000] [--ways qsd,mse] [--draws 5]
    python benchmarks/backbones.py table backbones.jsonl

Every row is appended as soon as it is measured, so a run that was cut off goes on. The images without labels are
fluorescence of the training part of DSB 2018. Five others of it, with labels, are the support of a draw. In each way a
backbone learns for as many steps on as many views:

- *start*: not at all.
- *mse*, *cwd*, *qsd*, *qsd+mask*: features of the teacher, without labels.
- *teacher*: not at all; the backbone is the teacher itself.

It is frozen then, and a linear head on its maps of strides 8, 16 and 32 learns the labels for as many steps again
(decoupled). In these ways both learn at once:

- *task*: the labels alone.
- *joint mse*, *joint qsd*: labels and features; the losses are added.

Backbone and head are tested on other images of three kinds: *same* (fluorescence of the same set, not among the images
without labels), *other set* (planes of ovules, confocal) and *other modality* (stained tissue). Scores are pooled IoU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from figures import kind, nuclei, rows_of
from torch import Tensor, nn
from validation import ovule

from distillfss_core.metrics import Tally
from distillfss_core.models.preprocess import Preprocess, fit_preprocess
from distillfss_core.nn.backbones import Backbone, DistillingBackbone, load_backbone
from distillfss_core.nn.device import choose_device, seeded
from distillfss_core.nn.token_losses import TokenLoss
from distillfss_core.settings import BackboneSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training.backbone import iter_features
from distillfss_core.training.backbone_teacher import TeacherTokens, last_map, load_teacher, stage_of, token_size
from distillfss_core.training.backbone_views import Views
from distillfss_core.training.crops import Augmentation, CropSampler
from distillfss_core.types import IGNORE, AnnotatedSlice, as_run, finish

WAYS = ("start", "mse", "cwd", "qsd", "qsd+mask", "teacher", "task", "joint mse", "joint qsd")
AT_ONCE = ("task", "joint mse", "joint qsd")
"""Ways in which backbone and head learn at once."""
KINDS = ("same", "other set", "other modality")
UNLABELED, SHOTS, TESTS = 60, 5, 20
STRIDES, SIDE, BATCH = (8, 16, 32), 128, 16
LABELED = 4  # crops of the support in a step
HEAD_RATE = 1e-2


@dataclass(frozen=True)
class Material:
    """Images without labels, supports by draw, and test images by kind."""

    unlabeled: list[AnnotatedSlice]
    supports: list[SupportSet]
    tests: dict[str, list[AnnotatedSlice]]


def material(shared: Path, draws: int) -> Material:
    """What all ways learn from and are tested on."""
    slices = [item.read() for item in nuclei(shared / "data")[0]]
    order = np.random.default_rng(0).permutation(len(slices))
    fluorescence, tissue = (
        [slices[i] for i in order if kind(slices[i]) == name] for name in ("fluorescence", "tissue")
    )
    tested, unlabeled, rest = np.split(np.arange(len(fluorescence)), (TESTS, TESTS + UNLABELED))
    supports = [np.random.default_rng([draw, 3]).choice(rest, SHOTS, replace=False) for draw in range(draws)]
    return Material(
        [fluorescence[i] for i in unlabeled],
        [SupportSet(tuple(fluorescence[i] for i in chosen)) for chosen in supports],
        {
            "same": [fluorescence[i] for i in tested],
            "other set": ovule(shared, 0).queries,
            "other modality": tissue[:TESTS],
        },
    )


class Segmenting(nn.Module):
    """A backbone, and a linear head on its standardized maps; of images in [0, 1] it gives logits "b 2 h w"."""

    def __init__(self, backbone: Backbone | DistillingBackbone, seed: int) -> None:
        super().__init__()
        self.backbone: Backbone | DistillingBackbone = backbone
        spec = backbone.spec
        self.strides: tuple[int, ...] = tuple(s for s in STRIDES if stage_of(spec, s) is not None)
        channels = [spec.channels[stage_of(spec, s) or 0] for s in self.strides]
        with seeded(seed):
            self.head: nn.Module = nn.Sequential(nn.BatchNorm2d(sum(channels)), nn.Conv2d(sum(channels), 2, 1))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the strides; a DINO has one of stride 16 only."""
        spec = self.backbone.spec
        if spec.family == "vit":
            size = [token_size(n + -n % 16, spec) for n in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        pyramid = self.backbone(images)
        return [last_map(pyramid, spec, stride) for stride in self.strides]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the two classes at the size of the images."""
        h, w = images.shape[-2:]
        padded = F.pad(images, (0, -w % STRIDES[-1], 0, -h % STRIDES[-1]), mode="replicate")  # cells of all maps agree
        maps = self.maps(padded)
        joined = torch.cat([F.interpolate(x, maps[0].shape[-2:], mode="bilinear") for x in maps], 1)
        return F.interpolate(self.head(joined), padded.shape[-2:], mode="bilinear")[..., :h, :w]


def learned(way: str, views: Views, start: Backbone, settings: BackboneSettings) -> Backbone:
    """The frozen backbone of a way that does not look at labels."""
    if way == "start":
        return start
    teacher = load_teacher(settings.teacher)
    if way == "teacher":
        return teacher
    loss, _, mask = way.partition("+")
    form = replace(settings, loss=loss, mask_weight=1.0 if mask else 0.0)
    return finish(as_run(iter_features)(views, teacher, start, form, choose_device("cpu"))).backbone


def train(
    model: Segmenting, sampler: CropSampler, settings: BackboneSettings, views: Views, loss: str | None = None
) -> None:
    """Have the head learn the support, and the backbone too if it can; with a loss also the teacher's features."""
    parts: list[nn.Module] = [model]
    losses: list[TokenLoss] = []
    if loss is not None:
        tokens = TeacherTokens(
            load_teacher(settings.teacher), views, STRIDES, choose_device("cpu"), settings.cache_mb << 20
        )
        deque(tokens.fit(), maxlen=0)
        spec = model.backbone.spec
        with seeded(settings.seed):
            losses = [TokenLoss(loss, spec.channels[stage_of(spec, s) or 0], tokens.channels(s)) for s in STRIDES]
        parts += losses
    own = list(model.head.parameters())
    learning = [p for part in parts for p in part.parameters() if p.requires_grad and all(p is not q for q in own)]
    groups = [{"params": own, "lr": HEAD_RATE}, {"params": learning, "lr": settings.learning_rate}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps, 1e-5)
    rng = np.random.default_rng(settings.seed)
    model.train()
    for _ in range(settings.steps):
        crops = [sampler.cut(int(index), rng) for index in rng.integers(SHOTS, size=LABELED)]
        logits = model(torch.stack([crop.image for crop in crops]))
        labels = torch.stack([crop.labels for crop in crops]).long()
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE)
        if losses:
            images, features = tokens.batch(rng.integers(len(views), size=BATCH).tolist())
            each = [f(x, features[s]) for f, x, s in zip(losses, model.maps(images), STRIDES, strict=True)]
            total = total + torch.stack(each).mean()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def scores(model: Segmenting, preprocess: Preprocess, tests: dict[str, list[AnnotatedSlice]]) -> dict[str, float]:
    """Pooled IoU by the kind of image."""
    result = {}
    for name, queries in tests.items():
        tally = Tally(1)
        for query in queries:
            pixels = preprocess.as_channels(query.image)
            image = preprocess.to_tensor(pixels, preprocess.limits(pixels))
            tally.add(model(image[None])[0].argmax(0).numpy().astype(np.uint8), query.labels)
        result[name] = round(float(tally.scores().pooled.iou[0]), 4)
    return result


def run(shared: Path, out: Path, ways: list[str], draws: int, settings: BackboneSettings) -> None:
    """Append a row for each way and draw that the file does not hold yet."""
    known = {(row["student"], row["teacher"], row["way"], row["draw"]) for row in rows_of(out)}
    given = material(shared, draws)
    views = Views([s.image for s in given.unlabeled], settings.size, settings.views, settings.seed)
    deque(views.scan(), maxlen=0)
    start = load_backbone(settings.student, settings.student_weights, seed=settings.seed)
    for way in ways:
        frozen = None
        for draw, support in enumerate(given.supports):
            if (settings.student, settings.teacher, way, draw) in known:
                continue
            preprocess = fit_preprocess([s.image for s in support.slices])
            sampler = CropSampler(support, preprocess, SIDE, Augmentation())
            began = time.perf_counter()
            if way in AT_ONCE:
                model = Segmenting(DistillingBackbone(start), settings.seed)
                train(model, sampler, settings, views, None if way == "task" else way.removeprefix("joint "))
            else:
                frozen = frozen or learned(way, views, start, settings)
                model = Segmenting(frozen, settings.seed)
                train(model, sampler, settings, views)
            row: dict[str, Any] = {"student": settings.student, "teacher": settings.teacher, "way": way, "draw": draw}
            row |= {"steps": settings.steps, "seconds": round(time.perf_counter() - began, 1)}
            row["iou"] = scores(model, preprocess, given.tests)
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def table(path: Path) -> None:
    """A line a way: mean and standard deviation of the IoU over the draws."""
    rows = list(rows_of(path))
    print("| student | teacher | way | " + " | ".join(KINDS) + " |")
    print("|---" * (3 + len(KINDS)) + "|")
    for key in dict.fromkeys((row["student"], row["teacher"], row["way"]) for row in rows):
        own = [row for row in rows if (row["student"], row["teacher"], row["way"]) == key]
        values = [[row["iou"][name] for row in own] for name in KINDS]
        cells = [f"{statistics.mean(v):.3f} ± {statistics.pstdev(v):.3f}" for v in values]
        print(f"| {' | '.join([*key, *cells])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("shared", type=Path, help="the folder with train, validation and data")
    runs.add_argument("-o", "--out", type=Path, default=Path("backbones.jsonl"))
    runs.add_argument("--teacher", default="dinov2_small")
    runs.add_argument("--student", default="lcnet_050")
    runs.add_argument("--student-weights", default="random")
    runs.add_argument("--steps", type=int, default=1000)
    runs.add_argument("--ways", default=",".join(WAYS))
    runs.add_argument("--draws", type=int, default=5)
    commands.add_parser("table").add_argument("rows", type=Path)
    options = parser.parse_args()
    if options.command == "table":
        table(options.rows)
        return
    ways = options.ways.split(",")
    if unknown := set(ways) - set(WAYS):
        parser.error(f"unknown ways {sorted(unknown)}")
    settings = BackboneSettings(
        teacher=options.teacher,
        student=options.student,
        student_weights=options.student_weights,
        steps=options.steps,
        size=SIDE,
        batch=BATCH,
        device="cpu",
    )
    run(options.shared, options.out, ways, options.draws, settings)


if __name__ == "__main__":
    main()
