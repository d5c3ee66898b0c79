"""Losses of backbone distillation side by side, decoupled from the task and joint with it.

    python benchmarks/backbones.py run ../shared -o backbones.jsonl [--teacher dinov2_small] [--student lcnet_050]
        [--student-weights random] [--steps 1000] [--ways qsd,mse] [--draws 5]
    python benchmarks/backbones.py table backbones.jsonl

Every row is appended as soon as it is measured, so a run that was cut off goes on. The images without labels are
fluorescence of the training part of DSB 2018. Five others of it, with labels, are the support of a draw. In each way a
backbone learns for as many steps on as many views:

- *start*: not at all.
- *mse*, *cwd*, *qsd*, *qsd+mask*: features of the teacher, without labels (decoupled).
- *task*: the labels of the support alone, by a linear head on strides 8, 16 and 32, which is dropped.
- *joint mse*, *joint qsd*: both at once; the losses are added.
- *teacher*: the teacher itself.

Then it is frozen, and a probe at zoom 1 learns from the support. It is tested on other images of three kinds: *same*
(fluorescence of the same set, not among the images without labels), *other set* (planes of ovules, confocal) and
*other modality* (stained tissue). Scores are pooled IoU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
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
from distillfss_core.models.preprocess import fit_preprocess
from distillfss_core.nn.backbone_file import save_backbone
from distillfss_core.nn.backbones import Backbone, DistillingBackbone, backbone_from_state, load_backbone
from distillfss_core.nn.device import choose_device, seeded
from distillfss_core.nn.token_losses import TokenLoss
from distillfss_core.settings import BackboneSettings, DistillSettings, parse_zoom
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import distill
from distillfss_core.training.backbone import DistilledBackbone, iter_features
from distillfss_core.training.backbone_teacher import TeacherTokens, last_map, load_teacher, stage_of
from distillfss_core.training.backbone_views import Views
from distillfss_core.training.crops import Augmentation, CropSampler
from distillfss_core.types import IGNORE, AnnotatedSlice, as_run, finish

WAYS = ("start", "mse", "cwd", "qsd", "qsd+mask", "task", "joint mse", "joint qsd", "teacher")
OF_THE_SUPPORT = ("task", "joint mse", "joint qsd")
"""Ways whose backbone depends on the draw."""
KINDS = ("same", "other set", "other modality")
UNLABELED, SHOTS, TESTS = 60, 5, 20
STRIDES, SIDE, BATCH = (8, 16, 32), 128, 16
LABELED = 4  # crops of the support in a step


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


def learned(way: str, support: SupportSet, views: Views, start: Backbone, settings: BackboneSettings) -> Backbone:
    """The backbone of a way, frozen."""
    teacher = load_teacher(settings.teacher)
    if way in ("start", "teacher"):
        return start if way == "start" else teacher
    device = choose_device("cpu")
    if way in OF_THE_SUPPORT:
        return _with_the_task(way.removeprefix("joint "), support, views, teacher, start, settings)
    loss, _, mask = way.partition("+")
    settings = replace(settings, loss=loss, mask_weight=1.0 if mask else 0.0)
    result: DistilledBackbone = finish(as_run(iter_features)(views, teacher, start, settings, device))
    return result.backbone


def _with_the_task(
    loss: str, support: SupportSet, views: Views, teacher: Backbone, start: Backbone, settings: BackboneSettings
) -> Backbone:
    """A backbone that learns the labels of the support, and the teacher's features unless ``loss`` is "task"."""
    tokens = TeacherTokens(teacher, views, STRIDES, choose_device("cpu"), settings.cache_mb << 20)
    student = DistillingBackbone(start)
    channels = {stride: student.spec.channels[stage_of(student.spec, stride) or 0] for stride in STRIDES}
    with seeded(settings.seed):
        head = nn.Conv2d(sum(channels.values()), 2, 1)
        losses = [TokenLoss(loss, c, tokens.channels(s)) for s, c in channels.items() if loss != "task"]
    modules = nn.ModuleList([student, head, *losses]).train()
    optimizer = torch.optim.AdamW(modules.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps, 1e-5)
    sampler = CropSampler(support, fit_preprocess([s.image for s in support.slices]), settings.size, Augmentation())
    if losses:
        deque(tokens.fit(), maxlen=0)
    rng = np.random.default_rng(settings.seed)
    for _ in range(settings.steps):
        crops = [sampler.cut(int(index), rng) for index in rng.integers(len(support), size=LABELED)]
        maps = _maps(student, torch.stack([crop.image for crop in crops]))
        finest = maps[0].shape[-2:]
        logits = head(torch.cat([F.interpolate(x, finest, mode="bilinear") for x in maps], 1))
        labels = torch.stack([crop.labels for crop in crops]).long()
        total = F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode="bilinear"), labels, ignore_index=IGNORE)
        if losses:
            images, features = tokens.batch(rng.integers(len(views), size=settings.batch).tolist())
            each = [f(x, features[s]) for f, x, s in zip(losses, _maps(student, images), STRIDES, strict=True)]
            total = total + torch.stack(each).mean()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        schedule.step()
    return backbone_from_state(student.spec.name, {name: x.detach() for name, x in student.state().items()}, "joint")


def _maps(student: DistillingBackbone, images: Tensor) -> list[Tensor]:
    pyramid = student(images)
    return [last_map(pyramid, student.spec, stride) for stride in STRIDES]


def scores(backbone: Backbone, support: SupportSet, tests: dict[str, list[AnnotatedSlice]]) -> dict[str, float]:
    """Pooled IoU of a probe on the frozen backbone, by the kind of image."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "backbone.safetensors"
        save_backbone(file, backbone, {})
        settings = DistillSettings(
            backbone=backbone.spec.name, weights=str(file), method="probe", head="none", zoom=parse_zoom("1")
        )
        probe = distill(support, settings)
    result = {}
    for name, queries in tests.items():
        tally = Tally(1)
        for query in queries:
            tally.add(probe.predict_labels(query.image), query.labels)
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
        backbone, seconds = None, 0.0
        for draw, support in enumerate(given.supports):
            if (settings.student, settings.teacher, way, draw) in known:
                continue
            if backbone is None or way in OF_THE_SUPPORT:
                began = time.perf_counter()
                backbone = learned(way, support, views, start, settings)
                seconds = time.perf_counter() - began
            row: dict[str, Any] = {"student": settings.student, "teacher": settings.teacher, "way": way, "draw": draw}
            row |= {
                "steps": settings.steps,
                "seconds": round(seconds, 1),
                "iou": scores(backbone, support, given.tests),
            }
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def table(path: Path) -> None:
    """A line a way: mean and standard deviation over the draws, and the seconds that the backbone learned."""
    rows = list(rows_of(path))
    print("| student | teacher | way | " + " | ".join(KINDS) + " | s |")
    print("|---" * (4 + len(KINDS)) + "|")
    for key in dict.fromkeys((row["student"], row["teacher"], row["way"]) for row in rows):
        own = [row for row in rows if (row["student"], row["teacher"], row["way"]) == key]
        cells = []
        for name in KINDS:
            values = [row["iou"][name] for row in own]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}")
        seconds = statistics.median(row["seconds"] for row in own)
        print(f"| {' | '.join(key)} | {' | '.join(cells)} | {seconds:.0f} |")


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
