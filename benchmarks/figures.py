"""The figures on real data: accuracy and cost of teacher and student, beside controls.

    python benchmarks/figures.py accuracy ../shared/data -o figures.jsonl [--only nucleus5,vnc] [--draws 3]
        [--head none]
    python benchmarks/figures.py cost [-o figures.jsonl]
    python benchmarks/figures.py curve figures.jsonl -o docs/shots.png

Every row is appended as soon as it is known, and rows that the file holds already are not computed again, so that
a run that was cut off goes on. ``python benchmarks/figures.py table figures.jsonl`` prints the table. Beside the paper
and other tools, and speed: ``distillfss bench``, of which this uses the data set, the classifiers and the scores.

Protocols: *nucleus* draws its supports at random from the training part of DSB 2018 (ids sorted, scikit-learn's
train_test_split(test_size=0.2, random_state=42)) and pools the foreground IoU over all test images at 384 x 384;
*nucleus5* has 5 of them, *nucleus50* has 50; *fluorescence* and *tissue* restrict supports and queries to that kind;
*vnc* has planes 0, 5, 10, 14, 19 as support, *embryo* planes 12, 25, 38, and the other planes are tested. *lidc* learns
from the middle planes of 5 cubes and is tested on all planes of the other cubes, *polyps* and *road* learn from 5
pictures (road: of two classes, the mean of which is given). All but nucleus are scored at full size.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
import torch
from PIL import Image

from distillfss_core.bench.datasets import SETS, Item
from distillfss_core.bench.judge import at_side
from distillfss_core.bench.peers import RandomForest
from distillfss_core.io.images import read_image
from distillfss_core.io.labels import pair_files, read_labels
from distillfss_core.metrics import Tally
from distillfss_core.models.preprocess import fit_preprocess
from distillfss_core.models.segmenter import Segmenter
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.backbones import load_backbone
from distillfss_core.nn.device import choose_device
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.plotting import Panel, Row, draw_panels
from distillfss_core.process import peak_mb, reset_peak
from distillfss_core.samples import generate_sample
from distillfss_core.segmentation.modes import make_mode
from distillfss_core.settings import DistillSettings, parse_zoom
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import distill, iter_distill, iter_refine, unrefined_teacher
from distillfss_core.training.crops import Augmentation, CropSampler, FeatureCache
from distillfss_core.training.episodes import Episode
from distillfss_core.training.loop import STAGES, episode_losses
from distillfss_core.types import AnnotatedSlice, Array
from distillfss_core.volumes.volume import open_volume

PROTOCOL_SIDE = 384
SUPPORTS = 5
WORST_COLUMNS = 5
TISSUE_HUE = 8  # mean difference of red and blue from which on an image counts as stained tissue


Model = Segmenter | RandomForest


@dataclass(frozen=True)
class Task:
    """Slices to learn from and to be tested on."""

    name: str
    draw: int
    support: SupportSet
    queries: list[AnnotatedSlice]
    side: int | None  # scores are pooled at this size; None: at the image's own
    volumes: Sequence[list[AnnotatedSlice]] = ()  # the queries' volumes, whole, where their voxels are near to cubes


# -- data ------------------------------------------------------------------------------------------------


def nuclei(data: Path) -> tuple[list[Item], list[Item]]:
    """Training and test part of the Nucleus protocol."""
    split = SETS["nucleus"].open(data / "dsb2018")
    return list(split.training), list(split.test)


def kind(labeled: AnnotatedSlice) -> str:
    """ "tissue" (colors differ), "fluorescence" (mostly dark) or "brightfield"."""
    image = labeled.image.astype(float)
    if image.ndim == 3 and np.abs(image[..., 0] - image[..., 2]).mean() > TISSUE_HUE:
        return "tissue"
    gray = image.mean(-1) if image.ndim == 3 else image
    return "fluorescence" if np.median(gray) < 0.43 * 255 and gray.mean() < gray.max() / 2 else "brightfield"


def stack(data: Path, image: str, labels: str) -> list[AnnotatedSlice]:
    raw, truth = tifffile.imread(data / image), tifffile.imread(data / labels) > 0
    return [
        AnnotatedSlice(a, b.astype(np.uint8), f"plane {z}") for z, (a, b) in enumerate(zip(raw, truth, strict=True))
    ]


def tasks(data: Path, only: set[str], draws: int) -> Iterator[Task]:
    """The tasks asked for, made when their turn comes."""
    for name in sorted(only):
        if not (match := re.fullmatch(r"(nucleus|fluorescence|tissue)(\d+)", name)):
            continue
        training, test = nuclei(data)
        queries = [item.read() for item in test]
        what, shots = match[1], int(match[2])
        if what != "nucleus":
            training = [item for item in training if kind(item.read()) == what]
            queries = [q for q in queries if kind(q) == what]
        for draw in range(draws):
            chosen = np.random.default_rng(draw).choice(len(training), shots, replace=False)
            support = SupportSet(tuple(training[i].read() for i in chosen), ("nucleus",))
            yield Task(name, draw, support, queries, PROTOCOL_SIDE)
    for name, files, planes in (
        ("vnc", ("vnc/raw.tif", "vnc/mitochondria.tif"), (0, 5, 10, 14, 19)),
        ("embryo", ("embryo_nuclei/images/cell8.tif", "embryo_nuclei/labels/cell8.tif"), (12, 25, 38)),
    ):
        if name in only:
            slices = stack(data, *files)
            support = SupportSet(tuple(slices[z] for z in planes), ("object",), planes_of_one_volume=True)
            queries = [s for z, s in enumerate(slices) if z not in planes]
            yield Task(name, 0, support, queries, None, [slices] if name == "embryo" else ())
    for name, load, names in (
        ("lidc", partial(cubes, data), ("nodule",)),
        ("polyps", partial(pictures, data / "polyps_kvasir"), ("polyp",)),
        ("road", partial(pictures, data / "road_cracks_potholes"), ("crack", "pothole")),
    ):
        if name not in only:
            continue
        groups = load()
        for draw in range(draws):
            order = np.random.default_rng(draw).permutation(len(groups)).tolist()
            # every class must be in the support: the first that hold the last class come first
            firsts = [i for i in order if (groups[i][len(groups[i]) // 2].labels == len(names)).any()][:2]
            first = [*firsts, *(i for i in order if i not in firsts)][:SUPPORTS]
            middle = tuple(groups[i][len(groups[i]) // 2] for i in first)
            support = SupportSet(middle, names, planes_of_one_volume=name == "lidc")  # one intensity scale, as CT has
            tested = [groups[i] for i in order if i not in first]
            queries = [s for group in tested for s in group]
            yield Task(name, draw, support, queries, None, tested if name == "lidc" else ())


def cubes(data: Path) -> list[list[AnnotatedSlice]]:
    """CT cubes, each a list of its planes."""
    folder = data / "lidc_lung_nodules"
    files = sorted((folder / "images").iterdir())
    return [stack(folder, f"images/{f.name}", f"labels/{f.name}") for f in files]


def pictures(folder: Path) -> list[list[AnnotatedSlice]]:
    """Single pictures, each a list of one."""
    pairs = pair_files(folder / "images", folder / "labels")
    return [[AnnotatedSlice(read_image(i), read_labels(t).astype(np.uint8), i.stem)] for i, t in pairs]


# -- accuracy --------------------------------------------------------------------------------------------


def score(model: Model, task: Task, *, consensus: bool = False) -> dict[str, object]:
    """Pooled and mean IoU, by kind of image where there are several, and seconds a megapixel."""
    tallies: dict[str, Tally] = {}
    pixels, began = 0, time.perf_counter()
    predictions: Iterator[Array]
    if consensus:
        assert isinstance(model, Segmenter)
        predictions = _consensus(model, task)
    else:
        predictions = (model.predict_labels(q.image) for q in task.queries)
    for query, predicted in zip(task.queries, predictions, strict=True):
        pixels += predicted.size
        for group in {"all", kind(query)}:
            tallies.setdefault(group, Tally(task.support.classes)).add(
                at_side(predicted, task.side), at_side(query.labels, task.side)
            )
    seconds = time.perf_counter() - began
    scores = {group: tally.scores() for group, tally in tallies.items()}
    everything = scores.pop("all")
    return {
        "pooled": _over_classes(everything.pooled.iou),
        "mean": _over_classes(everything.mean.iou),
        "by_class": [round(float(v), 4) for v in everything.pooled.iou],
        "by_kind": {g: [_over_classes(s.pooled.iou), s.images] for g, s in sorted(scores.items())},
        "seconds_per_megapixel": round(seconds / pixels * 1e6, 3),
    }


def _consensus(model: Segmenter, task: Task) -> Iterator[Array]:
    """Labels of the queries as planes of volumes, each voxel seen from three directions (``--mode consensus``)."""
    queries = {id(query) for query in task.queries}
    for planes in task.volumes:
        cube = np.stack([plane.image for plane in planes])
        mode_labels = make_mode("consensus", open_volume(cube), model)
        z, y, x = ((0, n) for n in cube.shape)
        predicted = mode_labels.labels((z, y, x), mode_labels.read((z, y, x)))
        yield from (labels for plane, labels in zip(planes, predicted, strict=True) if id(plane) in queries)


def worst(data: Path, out: Path, name: str, draw: int, count: int) -> None:
    """Draw the test images on which the distilled student has the lowest IoU."""
    task = next(t for t in tasks(data, {name}, draw + 1) if t.draw == draw)
    model = distill(task.support)
    examples = []
    for query in task.queries:
        predicted, tally = model.predict_labels(query.image), Tally(task.support.classes)
        tally.add(predicted, query.labels)
        examples.append((_over_classes(tally.scores().pooled.iou), query, predicted))
    examples.sort(key=lambda entry: entry[0])
    rows: list[Row] = []
    for i in range(0, count, WORST_COLUMNS):
        part = examples[i : min(i + WORST_COLUMNS, count)]
        rows.append(Row("image", [Panel(q.image, caption=f"{kind(q)}, IoU {iou:.2f}") for iou, q, _ in part]))
        rows.append(Row("answer", [Panel(q.image, predicted, "errors", q.labels) for _, q, predicted in part]))
    draw_panels(rows, out, title=f"{name}, draw {draw}: the {count} worst of {len(examples)}", width=200)
    for iou, query, _ in examples[:count]:
        print(f"{query.source}: {kind(query)}, {query.image.shape[1]} x {query.image.shape[0]}, IoU {iou:.3f}")


def _over_classes(values: Sequence[float] | npt.NDArray[np.float64]) -> float:
    return round(float(np.nanmean(values)), 4)


def models(task: Task, wanted: set[str], head: str) -> Iterator[tuple[str, Callable[[], tuple[Model, float]]]]:
    """Name and maker of every model of a task; a maker gives the model and the seconds it took."""
    joint: list[object] = []
    settings = DistillSettings(head=head)

    def timed(make: Callable[[], Model]) -> Callable[[], tuple[Model, float]]:
        def run() -> tuple[Model, float]:
            began = time.perf_counter()
            model = make()
            return model, time.perf_counter() - began

        return run

    def student(**changes: object) -> Segmenter:
        run = iter_distill(task.support, replace(settings, **changes))  # type: ignore[arg-type]
        for _ in run:
            pass
        if not changes:
            joint.append(run)
        return run.result()

    def without_head() -> Segmenter:
        run = iter_distill(task.support, DistillSettings())
        zoom = parse_zoom(run.preprocess.zoom)
        steps = next(step.total for step in run if not step.is_preparation)
        run.close()
        return student(head="none", zoom=zoom, steps=steps)

    def refined() -> Segmenter:
        run = iter_refine(task.support, settings)
        for _ in run:
            pass
        return run.teacher()

    makers: dict[str, Callable[[], Model]] = {
        "student distilled": student,
        "teacher of the joint run": lambda: joint[0].teacher(),  # type: ignore[attr-defined]
        CONSENSUS: lambda: joint[0].result(),  # type: ignore[attr-defined]
        "student trained directly": lambda: student(method="direct"),
        "student with no head and all else equal": without_head,
        "teacher refined": refined,
        "teacher as is": lambda: unrefined_teacher(task.support, settings),
        "teacher on foreign masks": lambda: unrefined_teacher(with_foreign_masks(task.support), settings),
        "prototype": lambda: unrefined_teacher(task.support, settings, kind="prototype"),
        "student on a random backbone": lambda: student(weights="random", head="none"),
        "random forest": lambda: RandomForest(task.support),
        "probe": lambda: student(method="probe"),
    }
    for name, make in makers.items():
        if name in wanted and (name not in OF_THE_STUDENT or "student distilled" in wanted):
            yield name, timed(make)


CONSENSUS = "student by consensus"
OF_THE_STUDENT = ("teacher of the joint run", CONSENSUS)
MODELS = (
    "student distilled",
    "teacher of the joint run",
    CONSENSUS,
    "student trained directly",
    "student with no head and all else equal",
    "teacher refined",
    "teacher as is",
    "teacher on foreign masks",
    "prototype",
    "student on a random backbone",
    "random forest",
    "probe",
)


def with_foreign_masks(support: SupportSet) -> SupportSet:
    """The same images, each with the masks of another, turned upside down: they say nothing true."""
    slices = []
    for i, labeled in enumerate(support.slices):
        other = support.slices[(i + 1) % len(support)].labels[::-1, ::-1]
        size = labeled.labels.shape[::-1]
        labels = np.asarray(Image.fromarray(np.ascontiguousarray(other)).resize(size, Image.Resampling.NEAREST))
        slices.append(AnnotatedSlice(labeled.image, labels, labeled.source))
    return SupportSet(tuple(slices), support.class_names, None, support.planes_of_one_volume)


def accuracy(tasks: Iterable[Task], out: Path, wanted: set[str], head: str) -> None:
    """Append a row for each model of each task that the file does not hold yet."""
    done = {(r["task"], r["draw"], r["model"]) for r in rows_of(out) if r.get("head") == head}
    for task in tasks:
        missing = {m for m in wanted if (task.name, task.draw, m) not in done}
        if not task.volumes:
            missing.discard(CONSENSUS)
        if missing.intersection(OF_THE_STUDENT):
            missing.add("student distilled")
        for name, make in models(task, missing, head):
            reset_peak()
            model, seconds = make()
            row = {"task": task.name, "draw": task.draw, "model": name, "head": head, "zoom": model.preprocess.zoom}
            row |= score(model, task, consensus=name == CONSENSUS)
            if isinstance(model, StudentModel) and (expected := model.training.get("expected_iou")) is not None:
                row["expected"] = round(expected, 4)
            row |= {"seconds": round(seconds, 1), "peak_mb": round(peak_mb() or 0)}
            _append(out, row)


# -- cost ------------------------------------------------------------------------------------------------


def _median_ms(function: Callable[[], object], runs: int = 15) -> float:
    function()
    times = []
    for _ in range(runs):
        _wait()
        began = time.perf_counter()
        function()
        _wait()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cost(out: Path, backbone_name: str, side: int) -> None:
    """Training steps, cached and not, on views of ``view``."""
    device = choose_device("auto")
    backbone = load_backbone(backbone_name, "auto" if backbone_name.startswith("eff") else "random").to(device.torch)
    head = FewShotHead(backbone.spec, 1, HeadForm("default", "default", "default", 32)).to(device.torch)
    rng = np.random.default_rng(0)
    labels = np.kron(rng.random((5, side // 32, side // 32)) < 0.2, np.ones((1, 32, 32))).astype(np.uint8)

    # one walk over five slices, each query answered by the four others
    slices = [AnnotatedSlice(rng.integers(0, 255, (side, side), dtype=np.uint8), m) for m in labels]
    support = SupportSet(tuple(slices))
    sampler = CropSampler(support, fit_preprocess([s.image for s in slices]), side, Augmentation())
    cache = FeatureCache(backbone, device, memory=1 << 30, limit=5)
    crops = [sampler.cut(i, rng) for i in range(5)]
    for each in crops:
        cache.add(each)
    head.train()
    walk = [Episode((i,), tuple(j for j in range(5) if j != i)) for i in range(5)]
    settings = DistillSettings(backbone=backbone_name)

    def step(cached: bool) -> None:
        for episode in walk:
            if not cached:
                for i in (*episode.query, *episode.support):
                    cache.replace(i, crops[i])
            losses = episode_losses(head, STAGES["joint"], cache, episode, settings)
            torch.stack(list(losses.values())).sum().backward()

    cached, fresh = _median_ms(lambda: step(True), 5), _median_ms(lambda: step(False), 5)
    for name, ms in (("training step, cached", cached), ("training step, uncached", fresh)):
        row = {"task": "cost", "draw": 0, "model": f"{backbone_name}: {name}", "side": side, "ms": round(ms, 1)}
        _append(out, row | {"ratio_to_cached": round(ms / cached, 2)})


def five_slices(out: Path) -> None:
    """Five 1024 x 1024 slices to a student, in a process of its own."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import figures as c; c.five_slices_here()"
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    _append(out, {"task": "cost", "draw": 0, "model": "five 1024 x 1024 slices"} | json.loads(done.stdout))


def five_slices_here() -> None:
    sample = generate_sample(planes=6, size=1024)
    slices = [
        AnnotatedSlice(i, (t > 0).astype(np.uint8), f"plane {z}")
        for z, (i, t) in enumerate(zip(sample.image, sample.labels, strict=True))
    ]
    began = time.perf_counter()
    model = distill(SupportSet(tuple(slices[:5]), planes_of_one_volume=True), DistillSettings())
    seconds = time.perf_counter() - began
    tally = Tally(1)
    tally.add(model.predict_labels(slices[5].image), slices[5].labels)
    row = {"seconds": round(seconds, 1), "pooled": round(tally.scores().iou, 4), "zoom": model.preprocess.zoom}
    print(json.dumps(row | {"peak_mb": round(peak_mb() or 0)}))


# -- rows ------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, row: dict[str, Any]) -> None:
    row = row | {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def table(path: Path) -> None:
    """Mean and spread over the draws, a line a task and model."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows_of(path):
        if "pooled" in row and row["task"] != "cost":
            groups.setdefault((row["task"], row["model"], row["head"]), []).append(row)
    print(f"| {'task':13} | {'model':26} | head | draws | pooled IoU | mean IoU | by kind | seconds | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (task, model, head), rows in groups.items():
        pooled, mean = (statistics.mean(r[key] for r in rows) for key in ("pooled", "mean"))
        spread = max(r["pooled"] for r in rows) - min(r["pooled"] for r in rows)
        kinds = sorted({k for r in rows for k in r["by_kind"]})
        by_kind = ", ".join(f"{k} {statistics.mean(r['by_kind'][k][0] for r in rows):.3f}" for k in kinds)
        seconds, peak = statistics.median(r["seconds"] for r in rows), max(r["peak_mb"] for r in rows)
        print(
            f"| {task:13} | {model:26} | {head} | {len(rows)} | {pooled:.3f} ± {spread / 2:.3f} | {mean:.3f} "
            f"| {by_kind} | {seconds:.0f} | {peak} |"
        )
    for row in rows_of(path):
        if row["task"] == "cost":
            print({k: v for k, v in row.items() if k not in ("task", "draw", "torch", "machine")})


def curve(path: Path, out: Path, name: str = "nucleus") -> None:
    """Draw pooled IoU over the number of supports: every draw a dot, the means a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores: dict[str, dict[int, list[float]]] = {}
    for row in rows_of(path):
        if row.get("head") == "auto" and (match := re.fullmatch(rf"{name}(\d+)", row["task"])):
            scores.setdefault(row["model"], {}).setdefault(int(match[1]), []).append(row["pooled"])
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for model, shots in scores.items():
        if len(shots) < 2:
            continue
        counts = sorted(shots)
        (line,) = axes.plot(counts, [statistics.mean(shots[n]) for n in counts], label=model)
        for n in counts:
            axes.plot([n] * len(shots[n]), shots[n], ".", color=line.get_color())
    axes.set_xscale("log")
    ticks = sorted({n for shots in scores.values() for n in shots})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set(ylim=(0, 1), xlabel="annotated images", ylabel="pooled IoU on 133 test images")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("accuracy")
    measure.add_argument("data", type=Path)
    measure.add_argument("--only", default="nucleus5,vnc,embryo,fluorescence5,tissue5,nucleus50")
    measure.add_argument("--models", default=",".join(MODELS))
    measure.add_argument("--draws", type=int, default=3)
    measure.add_argument("--head", default="auto", help="what to start from: auto, none or a head file")
    costs = commands.add_parser("cost")
    costs.add_argument("--backbones", default="efficientnet_lite0,resnet50")
    costs.add_argument("--view", type=int, default=256, help="side of the views of a training step, a multiple of 32")
    for command in (measure, costs):
        command.add_argument("-o", "--out", type=Path, default=Path("figures.jsonl"))
    commands.add_parser("table").add_argument("out", type=Path)
    drawn = commands.add_parser("curve")
    drawn.add_argument("rows", type=Path)
    drawn.add_argument("-o", "--out", type=Path, default=Path("shots.png"))
    worst_of = commands.add_parser("worst")
    worst_of.add_argument("data", type=Path)
    worst_of.add_argument("--task", default="nucleus5")
    worst_of.add_argument("--draw", type=int, default=0)
    worst_of.add_argument("--count", type=int, default=10)
    worst_of.add_argument("-o", "--out", type=Path, default=Path("worst.png"))
    options = parser.parse_args()
    if options.command == "accuracy":
        wanted = set(options.models.split(","))
        if unknown := wanted - set(MODELS):
            parser.error(f"unknown models {sorted(unknown)}; choose from {', '.join(MODELS)}")
        chosen = tasks(options.data, set(options.only.split(",")), options.draws)
        accuracy(chosen, options.out, wanted, options.head)
    elif options.command == "cost":
        for name in options.backbones.split(","):
            cost(options.out, name, options.view)
        five_slices(options.out)
    elif options.command == "curve":
        curve(options.rows, options.out)
    elif options.command == "worst":
        worst(options.data, options.out, options.task, options.draw, options.count)
    else:
        table(options.out)


if __name__ == "__main__":
    main()
