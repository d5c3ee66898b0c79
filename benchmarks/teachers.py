"""Teachers side by side: IoU with 1, 5 and 10 annotated images, on tasks of sets that none was trained on.

    python benchmarks/teachers.py run ../shared/train packaged NAME=HEAD.safetensors ... -o teachers.jsonl [--seeds 5]
    python benchmarks/teachers.py table teachers.jsonl
    python benchmarks/teachers.py picture packaged NAME=HEAD.safetensors ... -o docs/images/teachers.png

The picture has the coarse maps of each teacher on a generated stack, and the answer of a probe.

Every head segments the same query of the same task from the same images, refined by nothing. Those that share a
backbone are also joined in pairs, by the mean of their probabilities. A row is a seed of 60 tasks of 192 pixels. Rows
that the file has are not computed again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from figures import rows_of

from distillfss_core.metatraining.episodes import held_out_task
from distillfss_core.metatraining.real import RealSource
from distillfss_core.metatraining.run import sources
from distillfss_core.nn.backbones import Backbone, load_backbone
from distillfss_core.nn.features import EncodedSupport, merge_classes
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.pretrained import load_head, packaged_head
from distillfss_core.nn.teachers import PrototypeTeacher
from distillfss_core.nn.teachers.protocol import Teacher
from distillfss_core.samples import generate_sample
from distillfss_core.settings import DistillSettings, parse_zoom
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import distill
from distillfss_core.types import IGNORE, AnnotatedSlice, Array

HELD_OUT = ("tnbc_nuclei", "axon_myelin_em", "brain_tumour_brisc", "vessels_fives", "solar_panels_aerial", "wbc_krd")
SHOTS, TASKS, SIDE = (1, 5, 10), 60, 192
STAGES = ("stride 8", "stride 16", "stride 32")
FIRST_SEED = 100  # no seed of a training, so tasks by which its length was chosen are not these


def load(name: str) -> tuple[Backbone, Teacher]:
    """Backbone and teacher of a head file, or of the packaged head."""
    weights = packaged_head("efficientnet_lite0") if name == "packaged" else load_head(name)
    assert weights is not None
    backbone = weights.trained_backbone() or load_backbone(weights.backbone_name)
    form = HeadForm("default", "default", **{"uino_reader": "pool", **weights.form}, width=weights.width)
    head = FewShotHead(backbone.spec, 1, form)
    weights.put_into(head)
    return backbone, head.teacher.eval()


@torch.no_grad()
def scores(
    source: RealSource, teachers: dict[str, tuple[Backbone, Teacher]], seed: int
) -> dict[str, list[list[float]]]:
    """IoU of each teacher and pair: one list a task, of one number for each of `SHOTS`."""
    rows: dict[str, list[list[float]]] = {}
    for number in range(TASKS):
        task = held_out_task(source, number, n_images=max(SHOTS) + 1, size=SIDE, seed=seed)
        order = sorted(range(len(task)), key=lambda i: not (task.labels[i] == 1).any())
        query, others = order[0], order[1:]
        images = torch.from_numpy(task.images).movedim(-1, 1) / 255.0
        features = {backbone.digest(): backbone(images).lean() for backbone, _ in teachers.values()}
        predicted: dict[str, list[torch.Tensor]] = {}
        for name, (backbone, teacher) in teachers.items():
            own = features[backbone.digest()]
            for shots in SHOTS:
                support = torch.tensor(others[:shots])
                keys = teacher.encode(EncodedSupport.of(own[support], torch.from_numpy(task.labels[others[:shots]]), 1))
                logits = merge_classes(teacher(own[torch.tensor([query])], keys).logits)
                predicted.setdefault(name, []).append(logits[0].softmax(0))
        for one, other in itertools.combinations(teachers, 2):
            if teachers[one][0].digest() == teachers[other][0].digest():
                predicted[f"{one} + {other}"] = [a + b for a, b in zip(predicted[one], predicted[other], strict=True)]
        for name, chances in predicted.items():
            rows.setdefault(name, []).append([iou(p.argmax(0).numpy(), task.labels[query]) for p in chances])
    return rows


def iou(labels: Array, truth: Array) -> float:
    seen = truth != IGNORE
    union = int((((labels == 1) | (truth == 1)) & seen).sum())
    return float(((labels == 1) & (truth == 1) & seen).sum()) / union if union else 1.0


def run(folder: Path, names: list[str], out: Path, seeds: int) -> None:
    teachers = loaded(names)
    _, source = sources([folder], HELD_OUT)
    assert source is not None
    known = {(row["teacher"], row["seed"]) for row in rows_of(out)} if out.exists() else set()
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        if all((name, seed) in known for name in teachers):
            continue
        began = time.monotonic()
        for name, of_tasks in scores(source, teachers, seed).items():
            if (name, seed) not in known:
                row = {"teacher": name, "seed": seed, "iou": np.mean(of_tasks, 0).round(4).tolist()}
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, f"{time.monotonic() - began:.0f} s", flush=True)


def table(path: Path) -> None:
    """Means over the seeds, and their standard deviation."""
    of: dict[str, list[list[float]]] = {}
    for row in rows_of(path):
        of.setdefault(row["teacher"], []).append(row["iou"])
    print("| teacher | " + " | ".join(f"{n} shots" for n in SHOTS) + " |")
    print("|---" * (1 + len(SHOTS)) + "|")
    for name, rows in of.items():
        cells = [f"{statistics.mean(c):.3f} ± {statistics.stdev(c):.3f}" for c in zip(*rows, strict=True)]
        print(f"| {name} | " + " | ".join(cells) + " |")


@torch.no_grad()
def picture(names: list[str], out: Path) -> None:
    """A plane of a generated stack, its truth, and what each teacher sees in it by four other planes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = generate_sample("mitochondria", planes=9, size=256, seed=3)
    query, shown = 4, [0, 2, 6, 8]
    slices = [AnnotatedSlice(made.image[z], (made.labels[z] > 0).astype(np.uint8)) for z in shown]
    support = SupportSet(slices, ("mitochondrion",), planes_of_one_volume=True)
    probe = distill(support, DistillSettings(method="probe", zoom=parse_zoom("1")))
    image = made.image[query]
    low, high = np.percentile(made.image, (0.5, 99.5))
    gray = np.clip((made.image - low) / (high - low), 0, 1).astype(np.float32)
    planes = torch.from_numpy(gray[[*shown, query]])[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(np.stack([s.labels for s in slices]))
    teachers = loaded(names)
    panels: list[tuple[str, Array, str]] = [("image", image, "gray"), ("truth", made.labels[query] > 0, "gray")]
    for name, (backbone, teacher) in teachers.items():
        features = backbone(planes).lean()
        keys = teacher.encode(EncodedSupport.of(features[:-1], labels, 1))
        maps = teacher(features[-1:], keys).coarse
        panels += [
            (f"{name}\n{stage}", m[0, 0].mean(0).numpy(), "viridis") for stage, m in zip(STAGES, maps, strict=True)
        ]
    panels.append(("probe", probe.predict(image).probabilities[1], "viridis"))
    columns = 1 + len(teachers)
    figure, axes = plt.subplots(3, columns, figsize=(2.2 * columns, 7), layout="constrained")
    order = [panels[0], panels[1], panels[-1], *panels[2:-1]]
    for axis, (title, values, colors) in zip(axes.T.flat, order, strict=True):
        axis.imshow(values, cmap=colors, **({"vmin": 0, "vmax": 1} if colors == "viridis" else {}))
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    figure.savefig(out, dpi=110)


def loaded(names: list[str]) -> dict[str, tuple[Backbone, Teacher]]:
    """Backbones and teachers by name, with the prototypes that need no head."""
    pairs = [name.rpartition("=") for name in names]
    teachers = {(label or file): load(file) for label, _, file in pairs}
    backbone, _ = next(iter(teachers.values()))
    return teachers | {"prototypes without parameters": (backbone, PrototypeTeacher())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("folder", type=Path, help="the folder of sets")
    runs.add_argument("heads", nargs="+", help="packaged, FILE or NAME=FILE")
    runs.add_argument("-o", "--out", type=Path, default=Path("teachers.jsonl"))
    runs.add_argument("--seeds", type=int, default=5)
    commands.add_parser("table").add_argument("rows", type=Path)
    drawn = commands.add_parser("picture")
    drawn.add_argument("heads", nargs="+", help="packaged, FILE or NAME=FILE")
    drawn.add_argument("-o", "--out", type=Path, default=Path("teachers.png"))
    options = parser.parse_args()
    if options.command == "run":
        run(options.folder, options.heads, options.out, options.seeds)
    elif options.command == "table":
        table(options.rows)
    else:
        picture(options.heads, options.out)


if __name__ == "__main__":
    main()
