"""Teachers that are not refined, and the probe, mixed by weights that left-out slices choose.

    python benchmarks/mixture.py run ../shared [NAME=HEAD.safetensors ...] -o mixture.jsonl [--only skin,brain]
    python benchmarks/mixture.py table mixture.jsonl

The sets are those of ``validation.py``, at the zoom that a student would choose. Each support slice is segmented from
the others. The weights are the ones of `WEIGHTS` with the largest pooled IoU there. *Shrunk* is the mean of these
weights and of equal ones. Everything is computed again without each member. A row is a draw of a set, and a set that
the file has is not computed again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from figures import Task, rows_of
from validation import SETS, tasks

from distillfss_core.metrics import Tally
from distillfss_core.models.segmenter import Segmenter
from distillfss_core.settings import DistillSettings, parse_zoom
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import distill, unrefined_teacher
from distillfss_core.types import AnnotatedSlice, Array

WEIGHTS = (0.0, 1 / 3, 1.0)
ALL = "all members"

Member = Callable[[SupportSet, DistillSettings], Segmenter]
Weights = tuple[float, ...]


def members(heads: Sequence[str]) -> dict[str, Member]:
    """The members that need no file, and one for each head file."""

    def with_head(head: str, support: SupportSet, settings: DistillSettings) -> Segmenter:
        return unrefined_teacher(support, replace(settings, head=head))

    found: dict[str, Member] = {
        "attention": unrefined_teacher,
        "learned prototypes": lambda s, settings: unrefined_teacher(s, replace(settings, teacher="prototype")),
        "prototypes without parameters": partial(unrefined_teacher, kind="prototype"),
        "probe": lambda s, settings: distill(s, replace(settings, method="probe")),
    }
    for label, _, file in (name.rpartition("=") for name in heads):
        found[label or file] = partial(with_head, file)
    return found


class Answers:
    """Probabilities of every member on slices with labels, and the IoU of any mixture of them."""

    def __init__(self, classes: int) -> None:
        self.classes: int = classes
        self.slices: list[tuple[Array, Array]] = []

    def add(self, made: Sequence[Segmenter], slices: Sequence[AnnotatedSlice]) -> None:
        for each in slices:
            chances = [model.predict(each.image).probabilities.astype(np.float16) for model in made]
            self.slices.append((np.stack(chances), each.labels))

    def iou(self, weights: Sequence[float]) -> float:
        tally = Tally(self.classes)
        for chances, truth in self.slices:
            mixed = sum(w * c.astype(np.float32) for w, c in zip(weights, chances, strict=True) if w)
            tally.add(np.argmax(mixed, 0), truth)
        return tally.scores().iou


def measure(task: Task, made: dict[str, Member], zoom: Fraction) -> dict[str, Any]:
    """What each member, and each mixture of them, reaches on left-out slices and on the test images."""
    slices, count = task.support.slices, len(made)
    settings = DistillSettings(zoom=zoom)
    left_out, tests = Answers(task.support.classes), Answers(task.support.classes)
    for i, each in enumerate(slices):
        others = replace(task.support, slices=(*slices[:i], *slices[i + 1 :]))
        left_out.add([make(others, settings) for make in made.values()], [each])
    tests.add([make(task.support, settings) for make in made.values()], task.queries)

    # weights that are multiples of others would be measured twice
    grid = [w for w in itertools.product(WEIGHTS, repeat=count) if max(w) == 1]
    on_left_out, on_tests = ({w: answers.iou(w) for w in grid} for answers in (left_out, tests))
    alone = {name: tuple(float(i == k) for k in range(count)) for i, name in enumerate(made)}
    mixtures = {}
    for without in (None, *range(count)):
        allowed = [w for w in grid if without is None or w[without] == 0]
        chosen = max(allowed, key=on_left_out.__getitem__)
        equal = tuple(float(i != without) for i in range(count))
        shrunk = [c / sum(chosen) / 2 + e / sum(equal) / 2 for c, e in zip(chosen, equal, strict=True)]
        mixtures[ALL if without is None else f"without {list(made)[without]}"] = {
            "weights": [round(w, 2) for w in chosen],
            "equal": round(on_tests[equal], 4),
            "chosen": round(on_tests[chosen], 4),
            "shrunk": round(tests.iou(shrunk), 4),
            "bound": round(max(on_tests[w] for w in allowed), 4),
        }
    return {
        "left_out": {name: round(on_left_out[w], 4) for name, w in alone.items()},
        "tests": {name: round(on_tests[w], 4) for name, w in alone.items()},
        "mixtures": mixtures,
    }


def run(shared: Path, heads: Sequence[str], out: Path, only: set[str], draws: int) -> None:
    done = {(row["task"], row["draw"]) for row in rows_of(out)}
    for task in tasks(shared, only, draws):
        if (task.name, task.draw) not in done:
            zoom = unrefined_teacher(task.support).preprocess.zoom
            row = {"task": task.name, "draw": task.draw, "zoom": zoom} | measure(task, members(heads), parse_zoom(zoom))
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def table(path: Path) -> None:
    """Members and mixtures by set, the chosen weights, and the means without each member."""
    rows = rows_of(path)
    names, ways = list(rows[0]["tests"]), ("equal", "chosen", "shrunk", "bound")
    print("| | " + " | ".join(f"{row['task']} {row['draw']}" for row in rows) + " | mean |")
    print("|---" * (2 + len(rows)) + "|")
    lines = {name: [row["tests"][name] for row in rows] for name in names}
    lines["best member by left-out slices"] = [
        row["tests"][max(row["left_out"], key=row["left_out"].get)] for row in rows
    ]
    lines |= {way: [row["mixtures"][ALL][way] for row in rows] for way in ways}
    for label, values in lines.items():
        print(f"| {label} | " + " | ".join(f"{v:.3f}" for v in (*values, statistics.mean(values))) + " |")
    print("\n| weights | " + " | ".join(row["task"] for row in rows) + " |")
    print("|---" * (1 + len(rows)) + "|")
    for i, name in enumerate(names):
        print(f"| {name} | " + " | ".join(f"{row['mixtures'][ALL]['weights'][i]:g}" for row in rows) + " |")
    mixtures = list(rows[0]["mixtures"])
    print("\n| mean | " + " | ".join(mixtures) + " |")
    print("|---" * (1 + len(mixtures)) + "|")
    for way in ways:
        means = (statistics.mean(row["mixtures"][mixture][way] for row in rows) for mixture in mixtures)
        print(f"| {way} | " + " | ".join(f"{m:.3f}" for m in means) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("run")
    measured.add_argument("shared", type=Path, help="the folder with train, validation and data")
    measured.add_argument("heads", nargs="*", help="further members: NAME=HEAD.safetensors")
    measured.add_argument("-o", "--out", type=Path, default=Path("mixture.jsonl"))
    measured.add_argument("--only", default=",".join(s.name for s in SETS))
    measured.add_argument("--draws", type=int, default=1)
    commands.add_parser("table").add_argument("rows", type=Path)
    options = parser.parse_args()
    if options.command == "table":
        table(options.rows)
    else:
        run(options.shared, options.heads, options.out, set(options.only.split(",")), options.draws)


if __name__ == "__main__":
    main()
