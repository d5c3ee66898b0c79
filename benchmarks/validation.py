"""The benchmark on which recipes are chosen: real sets that nothing shipped was trained on, and generated stacks.

    python benchmarks/validation.py run ../shared -o validation.jsonl [--only skin,levels] [--draws 3] [--models ...]
    python benchmarks/validation.py table validation.jsonl
    python benchmarks/validation.py plot validation.jsonl -o validation.png

Every row is appended as soon as it is measured, so a run that was cut off goes on. Models and scores are those of
``figures.py``. Five slices are the support. Of images, at most ten others are tested; of volumes, ten planes of another
volume.

- *tnbc*, *axon*, *brain*, *vessels*, *solar*, *wbc*: the six sets that the training of the packaged head left out.
- *dsb*: the training part of the Data Science Bowl 2018.
- *skin*, *tiles*, *sandstone*, *ovule*: dermatoscopy, magnetic tiles, micro-CT of rock, and confocal nuclei of plants.
- *nuclei*, *nuclei-scribbled*, *mitochondria*: generated stacks of the package.
- *levels*: three phases that differ by their gray level only, in large uniform regions.
- *place*: two classes that differ only by the side of the object that they are on.
- *nested*: a shell and its core.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
from figures import MODELS, Task, accuracy, rows_of
from scipy.ndimage import gaussian_filter

from distillfss_core.bench.datasets import SETS as PUBLISHED_SETS
from distillfss_core.bench.supports import scribble
from distillfss_core.io.images import read_image
from distillfss_core.io.labels import pair_files, read_labels
from distillfss_core.samples import generate_sample
from distillfss_core.support.support_set import SupportSet
from distillfss_core.types import AnnotatedSlice, Array, evenly

SHOTS, TESTS = 5, 10
DEFAULT_MODELS = ("student distilled", "teacher as is", "prototype", "random forest", "probe")

Stack = tuple[Array, Array]
"""Image and labels, both (z, y, x)."""


@dataclass(frozen=True)
class ValidationSet:
    """A set: makes the task of a draw from the folder of the material."""

    name: str
    task: Callable[[Path, int], Task]


# -- images ----------------------------------------------------------------------------------------------


def pictures(folder: str, classes: int, one_volume: bool, name: str, shared: Path, draw: int) -> Task:
    """Five pictures that show an object, drawn at random, and others."""
    pairs = pair_files(shared / folder / "images", shared / folder / "labels")
    order = [int(i) for i in np.random.default_rng(draw).permutation(len(pairs))]
    slices = {i: _read_pair(*pairs[i], classes) for i in order}
    shown = [i for i in order if slices[i].labels.any()][:SHOTS]
    rest = sorted(set(order) - set(shown))
    support = [slices[i] for i in shown]
    queries = [slices[rest[i]] for i in evenly(len(rest), min(TESTS, len(rest)))]
    return _task(name, draw, support, queries, classes, one_volume=one_volume)


def _read_pair(image: Path, labels: Path, classes: int) -> AnnotatedSlice:
    values = np.asarray(read_labels(labels))
    return AnnotatedSlice(read_image(image), (values > 0 if classes == 1 else values).astype(np.uint8), image.stem)


def dsb(shared: Path, draw: int) -> Task:
    """Support and queries from the training part; it is of many kinds, so more of it is tested."""
    items = PUBLISHED_SETS["nucleus"].open(shared / "data" / "dsb2018").training
    order = np.random.default_rng(draw).permutation(len(items))
    slices = [items[int(i)].read() for i in order[: SHOTS + 3 * TESTS]]
    return _task("dsb", draw, slices[:SHOTS], slices[SHOTS:], 1)


# -- volumes ---------------------------------------------------------------------------------------------


def ovule(shared: Path, draw: int) -> Task:
    """Learn from one ovule and be tested on another."""

    def stack(name: str) -> Stack:
        folder = shared / "validation" / "gonuclear_1135"
        return tifffile.imread(folder / f"images/{name}.tif"), tifffile.imread(folder / f"labels/{name}.tif") > 0

    return planes("ovule", draw, stack("1135"), stack("1136"), 1)


def generated(name: str, make: Callable[[int], Stack], classes: int, _: Path, draw: int) -> Task:
    """Learn from one stack and be tested on another of the same kind."""
    return planes(name, draw, make(draw), make(draw + 100), classes, scribbled=name.endswith("scribbled"))


def planes(name: str, draw: int, seen: Stack, other: Stack, classes: int, *, scribbled: bool = False) -> Task:
    """Five planes of one stack, one from each fifth, and planes of another."""
    slices, tested = (
        [AnnotatedSlice(image, truth.astype(np.uint8), f"plane {z}") for z, (image, truth) in enumerate(planes_of)]
        for planes_of in (zip(*seen, strict=True), zip(*other, strict=True))
    )
    places = (np.arange(SHOTS) + np.random.default_rng([draw, 7]).uniform(0.2, 0.8, SHOTS)) / SHOTS
    support = [slices[int(place * len(slices))] for place in places]
    if scribbled:
        support = [scribble(s, np.random.default_rng([draw, i])) for i, s in enumerate(support)]
    queries = [tested[i] for i in evenly(len(tested), min(TESTS, len(tested)))]
    return _task(name, draw, support, queries, classes, one_volume=True)


def sample(kind: str, seed: int, planes: int = 12) -> Stack:
    """A stack of the package."""
    made = generate_sample(kind, planes=planes, size=384, seed=seed)
    return made.image, made.labels > 0


def levels(seed: int) -> Stack:
    """Four phases that only their gray level tells apart; the darkest is background."""
    rng = np.random.default_rng([seed, 11])
    shape = (12, 320, 320)
    labels = np.zeros(shape, np.uint8)
    for value, size, share in ((1, 14, 0.4), (2, 18, 0.4), (3, 12, 0.25)):
        field = gaussian_filter(rng.standard_normal(shape), (2, size, size))
        labels[(field > np.quantile(field, 1 - share)) & (labels == 0)] = value
    gray = gaussian_filter(np.array([60.0, 95.0, 130.0, 165.0])[labels], (0, 1, 1))
    noise = gaussian_filter(rng.standard_normal(shape), (0, 0.7, 0.7)) * 14
    return _as_bytes(gray + np.linspace(-6, 6, shape[2]) + noise), labels


def place(seed: int) -> Stack:
    """Discs whose left half is one class and whose right half is the other."""
    rng = np.random.default_rng([seed, 12])
    shape = (12, 256, 256)
    gray, labels = np.full(shape, 40.0), np.zeros(shape, np.uint8)
    rows, columns = np.mgrid[: shape[1], : shape[2]]
    for z in range(shape[0]):
        for y, x, radius in rng.integers((30, 30, 14), (226, 226, 26), (7, 3)):
            disc = np.hypot(rows - y, columns - x) < radius
            gray[z][disc] = 140
            labels[z][disc] = np.where(columns[disc] < x, 1, 2)
    return _as_bytes(gaussian_filter(gray, (0, 1, 1)) + rng.standard_normal(shape) * 12), labels


def nested(seed: int) -> Stack:
    """Bright shells, each with a dark core off its center."""
    rng = np.random.default_rng([seed, 13])
    shape = (12, 256, 256)
    gray, labels = np.full(shape, 90.0), np.zeros(shape, np.uint8)
    rows, columns = np.mgrid[: shape[1], : shape[2]]
    for z in range(shape[0]):
        for y, x, radius in rng.integers((20, 20, 12), (236, 236, 28), (9, 3)):
            for value, bright, size, shift in ((1, 130, 1.0, 0.0), (2, 80, 0.45, 0.2)):
                disc = np.hypot(rows - y - shift * radius, columns - x) < size * radius
                gray[z][disc] = bright
                labels[z][disc] = value
    return _as_bytes(gaussian_filter(gray, (0, 1.5, 1.5)) + rng.standard_normal(shape) * 10), labels


def _as_bytes(gray: Array) -> Array:
    return np.clip(gray, 0, 255).astype(np.uint8)


def _task(
    name: str,
    draw: int,
    support: list[AnnotatedSlice],
    queries: list[AnnotatedSlice],
    classes: int,
    *,
    one_volume: bool = False,
) -> Task:
    names = tuple(f"class {value}" for value in range(1, classes + 1))
    return Task(name, draw, SupportSet(support, names, planes_of_one_volume=one_volume), queries, None)


def _pictures(name: str, folder: str, classes: int = 1, *, one_volume: bool = False) -> ValidationSet:
    return ValidationSet(name, partial(pictures, folder, classes, one_volume, name))


def _generated(name: str, make: Callable[[int], Stack], classes: int = 1) -> ValidationSet:
    return ValidationSet(name, partial(generated, name, make, classes))


SETS = (
    _pictures("tnbc", "train/tnbc_nuclei"),
    _pictures("axon", "train/axon_myelin_em", 2),
    _pictures("brain", "train/brain_tumour_brisc"),
    _pictures("vessels", "train/vessels_fives"),
    _pictures("solar", "train/solar_panels_aerial"),
    _pictures("wbc", "train/wbc_krd"),
    ValidationSet("dsb", dsb),
    _pictures("skin", "validation/skin_ham10000"),
    _pictures("tiles", "validation/magnetic_tile_defects"),
    _pictures("sandstone", "validation/sandstone_microct", 3, one_volume=True),
    ValidationSet("ovule", ovule),
    _generated("nuclei", partial(sample, "nuclei")),
    _generated("nuclei-scribbled", partial(sample, "nuclei")),
    _generated("mitochondria", partial(sample, "mitochondria")),
    _generated("levels", levels, 3),
    _generated("place", place, 2),
    _generated("nested", nested, 2),
)


def tasks(shared: Path, only: set[str], draws: int) -> Iterator[Task]:
    """The first draw of all sets, then the second, so that a run that is cut off has seen every set."""
    for draw in range(draws):
        for entry in SETS:
            if entry.name in only:
                yield entry.task(shared, draw)


# -- what the rows show ----------------------------------------------------------------------------------


def means(path: Path) -> dict[str, dict[str, float]]:
    """Pooled IoU, mean over classes and draws, by model and set."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows_of(path):
        values.setdefault(row["model"], {}).setdefault(row["task"], []).append(row["pooled"])
    return {model: {name: statistics.mean(v) for name, v in of_sets.items()} for model, of_sets in values.items()}


def table(path: Path) -> None:
    """A line a set, a column a model, the mean over the sets that all models have, and how well that was expected."""
    scores = means(path)
    shared = [s.name for s in SETS if all(s.name in of_sets for of_sets in scores.values())]
    print("| set | " + " | ".join(scores) + " |")
    print("|---" * (1 + len(scores)) + "|")
    for entry in SETS:
        cells = [f"{of_sets[entry.name]:.3f}" if entry.name in of_sets else "" for of_sets in scores.values()]
        if any(cells):
            print(f"| {entry.name} | " + " | ".join(cells) + " |")
    if shared:
        cells = [f"{statistics.mean(of_sets[name] for name in shared):.3f}" for of_sets in scores.values()]
        print(f"| mean of {len(shared)} | " + " | ".join(cells) + " |")
    if off := [row["pooled"] - row["expected"] for row in rows_of(path) if "expected" in row]:
        absolute, squared = statistics.mean(map(abs, off)), statistics.mean(value**2 for value in off)
        print(f"\nmeasured - expected IoU, {len(off)} students: mean {statistics.mean(off):+.3f}, ", end="")
        print(f"mean absolute {absolute:.3f}, root of the mean square {squared**0.5:.3f}")


def plot(path: Path, out: Path) -> None:
    """A row a set, a dot a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores = means(path)
    names = [s.name for s in SETS if any(s.name in of_sets for of_sets in scores.values())]
    figure, axes = plt.subplots(figsize=(7, 1 + 0.3 * len(names)), layout="constrained")
    for model, of_sets in scores.items():
        held = [name for name in names if name in of_sets]
        axes.plot([of_sets[name] for name in held], [names.index(name) for name in held], "o", label=model)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="pooled IoU")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("shared", type=Path, help="the folder with train, validation and data")
    run.add_argument("-o", "--out", type=Path, default=Path("validation.jsonl"))
    run.add_argument("--only", default=",".join(s.name for s in SETS))
    run.add_argument("--models", default=",".join(DEFAULT_MODELS))
    run.add_argument("--draws", type=int, default=3)
    run.add_argument("--head", default="auto", help="what to start from: auto, none or a head file")
    commands.add_parser("table").add_argument("rows", type=Path)
    drawn = commands.add_parser("plot")
    drawn.add_argument("rows", type=Path)
    drawn.add_argument("-o", "--out", type=Path, default=Path("validation.png"))
    options = parser.parse_args()
    if options.command == "run":
        wanted, only = set(options.models.split(",")), set(options.only.split(","))
        if unknown := (wanted - set(MODELS)) | (only - {s.name for s in SETS}):
            parser.error(f"unknown models or sets {sorted(unknown)}")
        accuracy(tasks(options.shared, only, options.draws), options.out, wanted, options.head)
    elif options.command == "plot":
        plot(options.rows, options.out)
    else:
        table(options.rows)


if __name__ == "__main__":
    main()
