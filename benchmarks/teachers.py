"""Teachers side by side: IoU with 1, 5 and 10 annotated images, on tasks of sets that none was trained on.

    python benchmarks/teachers.py ../shared/train packaged NAME=HEAD.safetensors ... -o teachers.jsonl [--seeds 5]
    python benchmarks/teachers.py table teachers.jsonl

Every head segments the same query of the same task from the same images, refined by nothing. Those that share a
backbone are also joined in pairs, by the mean of their probabilities. A row is a seed of 60 tasks of 192 pixels. Rows
that the file has are not computed again.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
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
from distillfss_core.types import IGNORE, Array

HELD_OUT = ("tnbc_nuclei", "axon_myelin_em", "brain_tumour_brisc", "vessels_fives", "solar_panels_aerial", "wbc_krd")
SHOTS, TASKS, SIDE = (1, 5, 10), 60, 192
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
    pairs = [name.rpartition("=") for name in names]
    teachers = {(label or file): load(file) for label, _, file in pairs}
    backbone, _ = next(iter(teachers.values()))
    teachers["prototypes without parameters"] = (backbone, PrototypeTeacher())
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


def main() -> None:
    if sys.argv[1:2] == ["table"]:
        table(Path(sys.argv[2]))
        return
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of sets")
    parser.add_argument("heads", nargs="+", help="packaged, FILE or NAME=FILE")
    parser.add_argument("-o", "--out", type=Path, default=Path("teachers.jsonl"))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    run(options.folder, options.heads, options.out, options.seeds)


if __name__ == "__main__":
    main()
