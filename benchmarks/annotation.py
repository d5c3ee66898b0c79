"""Learning curves: IoU over the number of annotated planes, by the way in which the planes are chosen.

    python benchmarks/annotation.py run ../shared -o annotation.jsonl [--only ovule,nuclei] [--seeds 3]
    python benchmarks/annotation.py table annotation.jsonl
    python benchmarks/annotation.py plot annotation.jsonl -o annotation.png

Every row is appended as soon as it is measured, so a run that was cut off goes on. A seed draws ten planes of the stack
that are tested and never chosen, and the first plane. The ways then add planes until there are twelve:

- *even*: as `suggest_planes` does.
- *diverse*: as `suggest_diverse_planes` does.
- *least sure*: the planes with the largest mean entropy of a probe on those annotated so far.
- *disagreement*: the planes where that probe and the attention of the packaged head differ most (Jensen-Shannon).
- *spread disagreement*: medoids as in *diverse*, each plane weighing as much as its disagreement.

Planes are annotated densely. The model that is tested is the probe at zoom 1. Planes are cut to the middle 256 pixels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from figures import rows_of
from validation import Stack, levels, sample

from distillfss_core.metrics import Tally
from distillfss_core.models.segmenter import Segmenter
from distillfss_core.settings import DistillSettings, parse_zoom
from distillfss_core.support.slice_selection import choose_medoids, comparable, describe_plane, suggest_planes
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import distill, unrefined_teacher
from distillfss_core.training.disagreement import divergence, entropy
from distillfss_core.types import AnnotatedSlice, Array

SIZES = (1, 2, 4, 6, 8, 12)
SIDE, TESTS, CANDIDATES = 256, 10, 30
WAYS = ("even", "diverse", "least sure", "disagreement", "spread disagreement")
PROBE = DistillSettings(method="probe", zoom=parse_zoom("1"))
ATTENTION = DistillSettings(zoom=parse_zoom("1"))


def _middle(planes: Array) -> Array:
    y, x = ((max(0, n - SIDE) // 2) for n in planes.shape[1:3])
    return planes[:, y : y + SIDE, x : x + SIDE]


def _read(image: Path, labels: Path) -> Stack:
    return tifffile.imread(image), tifffile.imread(labels) > 0


def _gonuclear(shared: Path) -> Stack:
    folder = shared / "validation" / "gonuclear_1135"
    return _read(folder / "images/1135.tif", folder / "labels/1135.tif")


def _vnc(shared: Path) -> Stack:
    return _read(shared / "data/vnc/raw.tif", shared / "data/vnc/mitochondria.tif")


def _embryo(shared: Path) -> Stack:
    folder = shared / "data/embryo_nuclei"
    return _read(folder / "images/cell8.tif", folder / "labels/cell8.tif")


STACKS: dict[str, Callable[[Path], Stack]] = {
    "ovule": _gonuclear,
    "nuclei": lambda _: sample("nuclei", 5, planes=40),
    "mitochondria": lambda _: sample("mitochondria", 5, planes=40),
    "levels": lambda _: levels(5),
    "vnc": _vnc,
    "embryo": _embryo,
}


def slices_of(stack: Stack, seed: int) -> tuple[list[AnnotatedSlice], list[AnnotatedSlice], int]:
    """Planes that may be chosen, planes that are tested, and the first one chosen."""
    rng = np.random.default_rng([seed, 21])
    images, labels = (_middle(np.asarray(part)) for part in stack)
    slices = [
        AnnotatedSlice(a, b.astype(np.uint8), f"plane {z}") for z, (a, b) in enumerate(zip(images, labels, strict=True))
    ]
    tested = sorted(rng.choice(len(slices), min(TESTS, len(slices) // 3), replace=False).tolist())
    rest = [z for z in range(len(slices)) if z not in tested]
    rest = [rest[i] for i in suggest_planes(len(rest), min(CANDIDATES, len(rest)))]
    shown = [i for i, z in enumerate(rest) if slices[z].labels.any()]
    return [slices[z] for z in rest], [slices[z] for z in tested], int(rng.choice(shown))


def support_of(chosen: list[AnnotatedSlice]) -> SupportSet:
    names = tuple(f"class {v}" for v in range(1, max(int(s.labels.max()) for s in chosen) + 1))
    return SupportSet(chosen, names, planes_of_one_volume=True)


def doubts(way: str, support: SupportSet, images: list[Array], probe: Segmenter | None) -> Array:
    """How much each image is worth by ``way``."""
    assert probe is not None
    predicted = [probe.predict(image).probabilities for image in images]
    if way == "least sure":
        return np.array([entropy(p).mean() for p in predicted])
    teacher = unrefined_teacher(support, ATTENTION)
    others = [teacher.predict(image).probabilities for image in images]
    return np.array([divergence(p, q) for p, q in zip(predicted, others, strict=True)])


def choose(way: str, slices: list[AnnotatedSlice], chosen: list[int], count: int, probe: Segmenter | None) -> list[int]:
    """The planes annotated next, so that there are ``count``."""
    free, more = [i for i in range(len(slices)) if i not in chosen], count - len(chosen)
    if way == "even":
        order = [i for n in range(1, len(slices) + 1) for i in suggest_planes(len(slices), n)]
        return [i for i in dict.fromkeys(order) if i in free][:more]
    images = [s.image for s in slices]
    features = comparable(np.arange(len(slices), dtype=np.float32), [describe_plane(image) for image in images])
    if way == "diverse":
        return choose_medoids(features, more, free, chosen)
    worth = doubts(way, support_of([slices[i] for i in chosen]), images, probe)
    if way != "spread disagreement":
        return sorted(free, key=lambda i: -worth[i])[:more]
    distance = np.sqrt(((features[:, None] - features[None]) ** 2).sum(-1))
    nearest = distance[:, chosen].min(1)
    picked: list[int] = []
    for _ in range(min(more, len(free))):
        best = min(set(free) - set(picked), key=lambda i: float((worth * np.minimum(nearest, distance[i])).sum()))
        picked.append(best)
        nearest = np.minimum(nearest, distance[best])
    return picked


def curve(way: str, slices: list[AnnotatedSlice], tested: list[AnnotatedSlice], first: int) -> dict[int, float]:
    """IoU of the probe on the tested planes, by the number of annotated ones."""
    chosen, scores, probe = [first], {}, None
    classes = max(int(s.labels.max()) for s in slices)
    for count in (n for n in SIZES if n <= len(slices)):
        if count > 1:
            chosen += choose(way, slices, chosen, count, probe)
        probe = distill(support_of([slices[i] for i in chosen]), PROBE)
        tally = Tally(classes)
        for query in tested:
            tally.add(probe.predict_labels(query.image), query.labels)
        scores[count] = round(float(np.nanmean(tally.scores().pooled.iou)), 4)
    return scores


def run(shared: Path, out: Path, only: list[str], seeds: int) -> None:
    known = {(row["stack"], row["seed"], row["way"]) for row in rows_of(out)} if out.exists() else set()
    for seed in range(seeds):
        for name in only:
            slices, tested, first = slices_of(STACKS[name](shared), seed)
            for way in WAYS:
                if (name, seed, way) in known:
                    continue
                began = time.monotonic()
                row = {"stack": name, "seed": seed, "way": way, "iou": curve(way, slices, tested, first)}
                row["seconds"] = round(time.monotonic() - began, 1)
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


def curves(path: Path) -> dict[tuple[str, str], dict[int, float]]:
    """Mean IoU over the seeds, by stack, way and number of planes."""
    values: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows_of(path):
        for count, iou in row["iou"].items():
            values.setdefault((row["stack"], row["way"]), {}).setdefault(int(count), []).append(iou)
    return {key: {n: statistics.mean(v) for n, v in of_sizes.items()} for key, of_sizes in values.items()}


def table(path: Path) -> None:
    of = curves(path)
    print("| stack | way | " + " | ".join(map(str, SIZES)) + " | mean of 2 to 12 |")
    print("|---" * (3 + len(SIZES)) + "|")
    for (stack, way), scores in of.items():
        cells = [f"{scores[n]:.3f}" if n in scores else "" for n in SIZES]
        print(
            f"| {stack} | {way} | "
            + " | ".join(cells)
            + f" | {statistics.mean([v for n, v in scores.items() if n > 1]):.3f} |"
        )


def plot(path: Path, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    of = curves(path)
    stacks = list(dict.fromkeys(stack for stack, _ in of))
    figure, axes = plt.subplots(1, len(stacks), figsize=(3 * len(stacks), 3), layout="constrained", squeeze=False)
    for axis, stack in zip(axes[0], stacks, strict=True):
        for way in WAYS:
            if scores := of.get((stack, way)):
                axis.plot(list(scores), list(scores.values()), "o-", ms=3, label=way)
        axis.set(title=stack, xlabel="annotated planes", ylabel="pooled IoU")
    axes[0, -1].legend(fontsize=7)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("shared", type=Path, help="the folder with validation and data")
    runs.add_argument("-o", "--out", type=Path, default=Path("annotation.jsonl"))
    runs.add_argument("--only", default=",".join(STACKS))
    runs.add_argument("--seeds", type=int, default=3)
    commands.add_parser("table").add_argument("rows", type=Path)
    drawn = commands.add_parser("plot")
    drawn.add_argument("rows", type=Path)
    drawn.add_argument("-o", "--out", type=Path, default=Path("annotation.png"))
    options = parser.parse_args()
    if options.command == "run":
        run(options.shared, options.out, options.only.split(","), options.seeds)
    elif options.command == "plot":
        plot(options.rows, options.out)
    else:
        table(options.rows)


if __name__ == "__main__":
    main()
