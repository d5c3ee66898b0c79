"""The parts of `benchmarks/gpu.sh`: figures of one GPU, and a meta-training on it.

    python benchmarks/gpu.py prepare SHARED FOLDER         shrink images that the machine with the GPU needs
    python benchmarks/gpu.py note OUT WHAT TEXT            add a row of text to the table
    python benchmarks/gpu.py table OUT --until SECONDS     measure; rows are written as soon as they are known
    python benchmarks/gpu.py train OUT --until SECONDS     meta-train until then; a checkpoint every minute

SECONDS count from 1970, as those of ``date +%s``. Rates are medians of rounds after a warm-up, with the device
synchronized before the clock is read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from distillfss_core import __version__, generate_sample, open_volume, segment_to_zarr
from distillfss_core.io.images import read_image
from distillfss_core.io.labels import read_labels
from distillfss_core.metatraining.run import CHECKPOINT, HEAD, PretrainRun, sources
from distillfss_core.metrics import Tally
from distillfss_core.models.engines import Runner
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.device import choose_device, release_memory
from distillfss_core.segmentation.lazy import VolumeSegmenter
from distillfss_core.settings import SIZES, BackboneSettings, DistillSettings, PretrainSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.training import distill, iter_distill, refine, unrefined_teacher
from distillfss_core.training.backbone import iter_distill_backbone
from distillfss_core.types import AnnotatedSlice, Array

PREPARED = Path(os.environ.get("PREPARED", ".gpu"))
HELD_OUT = ("tnbc_nuclei", "axon_myelin_em", "brain_tumour_brisc", "vessels_fives", "solar_panels_aerial", "wbc_krd")
PART = 15 << 20  # bytes of a part of the checkpoint
EVERY = 60.0  # seconds between two checkpoints
TEST_IMAGES = 24
WIDEST = 256  # pixels of the images for meta-training

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is measured: all of it on a GPU, next to nothing in a dry run."""

    dry: bool

    def __call__(self, full: Any, dry: Any) -> Any:
        return dry if self.dry else full

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"


class Table:
    """Rows that are on disk as soon as they are known, as JSON and as markdown."""

    def __init__(self, out: Path) -> None:
        self.json, self.markdown = out / "gpu.json", out / "gpu.md"
        self.rows: list[Row] = json.loads(self.json.read_text())["rows"] if self.json.exists() else []

    def add(self, row: Row) -> None:
        """Put a row at the end, or in the place of the row of that name."""
        old = [i for i, other in enumerate(self.rows) if (other["what"], other["case"]) == (row["what"], row["case"])]
        if old:
            self.rows[old[0]] = row
        else:
            self.rows.append(row)
        _write(self.json, json.dumps({"machine": machine(), "rows": self.rows}, indent=1) + "\n")
        lines = ["| measured | case | result | aim | peak GPU memory |", "|---|---|---|---|---|"]
        lines += [f"| {r['what']} | {r['case']} | {r['result']} | {r['aim']} | {r['memory']} |" for r in self.rows]
        _write(self.markdown, machine() + "\n\n" + "\n".join(lines) + "\n")
        print(f"{row['what']}, {row['case']}: {row['result']}", flush=True)


def row(what: str, case: str, result: str, aim: str = "") -> Row:
    """A row, with the peak of the device's memory since the last one."""
    memory = ""
    if torch.cuda.is_available():
        memory = f"{torch.cuda.max_memory_allocated() / 1e6:,.0f} MB"
        torch.cuda.reset_peak_memory_stats()
    return {"what": what, "case": case, "result": result, "aim": aim, "memory": memory}


def machine() -> str:
    """Device, processor cores and versions, in a line."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    cuda = f", CUDA {torch.version.cuda}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}{cuda}, napari-distillfss {__version__}"


# -- figures


class Measured:
    """What is measured, each as a generator of rows."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.settings = DistillSettings(device=size.device, zoom=Fraction(1))

    @cached_property
    def support(self) -> SupportSet:
        """Five generated slices, 1024 x 1024 pixels."""
        side = self.size(1024, 128)
        sample = generate_sample(planes=6, size=side)
        planes = range(5)
        return SupportSet(
            tuple(
                AnnotatedSlice(sample.image[z], (sample.labels[z] > 0).astype(np.uint8), f"plane {z}") for z in planes
            ),
            ("nucleus",),
            planes_of_one_volume=True,
        )

    @cached_property
    def student(self) -> StudentModel:
        return distill(self.support, replace(self.settings, steps=self.size(60, 3), precision="float32"))

    @cached_property
    def fast(self) -> StudentModel:
        """The same on the compact backbone."""
        steps = self.size(60, 3)
        return distill(self.support, replace(self.settings, backbone=SIZES["fast"], steps=steps, precision="float32"))

    def by(self, precision: str, engine: str = "torch", *, fast: bool = False) -> StudentModel:
        """The student in another precision."""
        with tempfile.TemporaryDirectory() as folder:
            (self.fast if fast else self.student).save(Path(folder) / "student.safetensors")
            return StudentModel.load(
                Path(folder) / "student.safetensors", device=self.size.device, precision=precision, engine=engine
            )

    @property
    def precisions(self) -> list[str]:
        precisions: list[str] = self.size(["bfloat16", "float16", "float32"], ["bfloat16", "float32"])
        return precisions

    def network(self) -> Iterator[Row]:
        """Megapixels a second of the student's network at zoom 1, by precision and batch size."""
        for precision, batch in itertools.product(self.precisions, self.size((8, 1, 2, 4, 16), (1, 2))):
            yield self._network(self.by(precision), batch)
        for precision in self.precisions[:2]:
            yield self._network(self.by(precision, fast=True), self.size(8, 1))

    def compiled(self) -> Iterator[Row]:
        """The same, compiled; the first time takes a minute."""
        if self.size.dry:
            return
        for precision in self.precisions[:2]:
            for batch in (8, 1):
                yield self._network(self.by(precision, "torch-compiled"), batch)

    def _network(self, model: StudentModel, batch: int) -> Row:
        side = self.size(1024, 64)
        images = torch.rand(batch, 3, side, side, device=model.device.torch)
        run: Runner = model._run

        @torch.inference_mode()
        def once() -> None:
            run(images)

        began = time.perf_counter()
        once()
        synchronize()
        first = time.perf_counter() - began
        seconds = median_seconds(once, self.size(1.0, 0.05))
        text = f"{batch * side * side / 1e6 / seconds:,.1f} megapixels/s"
        if model.engine == "torch-compiled":
            text += f" ({first:.0f} s until the first)"
        case = f"{model.backbone.spec.name}, {model.engine}, {model.device.precision}, batch of {batch}"
        return row("network", case, text, "300 megapixels/s" if model.device.precision != "float32" else "")

    def volume(self) -> Iterator[Row]:
        """Megapixels a second of planes in memory, and from zarr to zarr."""
        side, planes, real = self.size(2048, 64), self.size(256, 6), self.size(8, 2)
        model = self.by("auto")
        sample = generate_sample(planes=real, size=side).image.astype(np.uint16)
        with tempfile.TemporaryDirectory() as folder:
            path = linked_volume(Path(folder) / "image.zarr", sample, planes)
            volume = open_volume(path)
            segmenter = VolumeSegmenter(open_volume(np.concatenate([sample] * 2)), model)
            region = ((0, side), (0, side))
            pixels = segmenter.read(slice(0, 2 * real), region)

            def in_memory() -> None:
                segmenter.stack_labels(range(2 * real), region, pixels)

            in_memory()
            seconds = median_seconds(in_memory, self.size(3.0, 0.05))
            memory = pixels.size / 1e6 / seconds
            yield row("planes in memory", f"{side} x {side}, {model.device.precision}", f"{memory:,.1f} megapixels/s")
            for number in range(self.size(2, 1)):
                began = time.perf_counter()
                segment_to_zarr(volume, model, Path(folder) / f"labels-{number}.ome.zarr")
                rate = volume.shape[0] * side * side / 1e6 / (time.perf_counter() - began)
                yield row(
                    "zarr to zarr",
                    f"{planes} planes of {side} x {side}, uint16, run {number + 1}",
                    f"{rate:,.1f} megapixels/s, {rate / memory:.0%} of in memory",
                    "80 %",
                )

    def training(self) -> Iterator[Row]:
        """Seconds from five slices to a student."""
        settings = replace(self.settings, zoom="auto") if not self.size.dry else replace(self.settings, steps=3)
        for number in range(self.size(2, 1)):
            began = time.perf_counter()
            model = distill(self.support, settings)
            seconds = time.perf_counter() - began
            steps = model.training["steps"]
            side = self.support.slices[0].labels.shape[0]
            yield row(
                "distill", f"5 slices of {side} x {side}, run {number + 1}", f"{seconds:.1f} s, {steps} steps", "8 s"
            )
        began = time.perf_counter()
        refine(self.support, replace(settings, steps=self.size(100, 3)))
        seconds = time.perf_counter() - began
        yield row("refine the teacher", f"{self.size(100, 3)} steps", f"{seconds:.1f} s")

    def teacher(self) -> Iterator[Row]:
        """Milliseconds of a plane by a teacher, by its shots."""
        side = self.size(1024, 128)
        for shots in self.size((1, 5, 10, 20), (1, 2)):
            slices = tuple(self.support.slices[i % 5] for i in range(shots))
            model = unrefined_teacher(SupportSet(slices, ("nucleus",)), self.settings)
            plane = self.support.slices[0].image

            def once(model: Any = model, plane: Array = plane) -> None:
                model.predict_labels(plane)

            once()
            seconds = median_seconds(once, self.size(1.0, 0.05))
            yield row("teacher", f"{shots} shots, {side} x {side}", f"{1000 * seconds:.1f} ms")

    def backbone(self) -> Iterator[Row]:
        """Milliseconds of a step of the distillation of a backbone, by its loss."""
        images = [item.image for item in self.support.slices]
        for loss in ("qsd", "direct"):
            steps = self.size(100, 2)
            settings = BackboneSettings(
                student=SIZES["fast"],
                loss=loss,
                steps=steps,
                views=self.size(16, 1),
                batch=self.size(16, 2),
                size=self.size(256, 64),
                device=self.size.device,
            )
            run = iter_distill_backbone(images, settings)
            next(step for step in run if step.stage == "distill")
            began = time.perf_counter()
            for _ in run:
                pass
            seconds = (time.perf_counter() - began) / (steps - 1)
            case = f"{loss}, {settings.batch} views of {settings.size}"
            yield row("distill a backbone", case, f"{1000 * seconds:.1f} ms")

    def accuracy(self) -> Iterator[Row]:
        """IoU of students distilled on the device, on images of nuclei."""
        folder = PREPARED / "nuclei"
        if not folder.is_dir():
            return
        support, test = (list(labeled(folder / part)) for part in ("support", "test"))
        for precision in self.size(("float32", "bfloat16"), ("float32",)):
            settings = replace(DistillSettings(), device=self.size.device, precision=precision, steps=self.size(0, 3))
            model = distill(SupportSet(tuple(support), ("nucleus",)), settings)
            tally = Tally(1)
            for item in test[: self.size(TEST_IMAGES, 1)]:
                tally.add(model.predict_labels(item.image), item.labels)
            yield row("accuracy", f"nucleus, 5 supports, {precision}", f"IoU {tally.scores().pooled.iou[0]:.3f}")

    def profile(self, path: Path) -> None:
        """Where the time of a training goes."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if not self.size.dry else [])]
        run = iter_distill(self.support, replace(self.settings, steps=self.size(40, 3)))
        next(step for step in run if not step.is_preparation)
        with profile(activities=activities) as profiled:
            for _ in range(self.size(15, 1)):
                next(run)
        run.close()
        averages = profiled.key_averages()
        keys = ["self_cpu_time_total", *(["self_cuda_time_total"] if not self.size.dry else [])]
        _write(path, "\n\n".join(averages.table(sort_by=key, row_limit=25) for key in keys))


def table(out: Path, until: float, size: Size) -> int:
    """Measure in the order of importance until the time is over; returns how many parts failed."""
    rows, measured, failed = Table(out), Measured(size), 0
    parts: list[Callable[[], Iterator[Row]]] = [
        measured.network,
        measured.training,
        measured.volume,
        measured.accuracy,
        measured.teacher,
        measured.backbone,
        measured.compiled,
    ]
    for part in parts:
        try:
            for entry in part():
                rows.add(entry)
                if time.time() > until:
                    rows.add(row("table", "cut off", f"no time was left after {entry['what']}"))
                    return failed
        except Exception:  # noqa: BLE001 - a part that fails must not cost the others
            failed += 1
            traceback.print_exc()
            last = traceback.format_exc().strip().splitlines()[-1][:120].replace("|", "/")
            rows.add(row(part.__name__, "failed", last))
        release_memory(choose_device(size.device))
    measured.profile(out / "profile.txt")
    return failed


# -- meta-training


def train(out: Path, until: float, size: Size) -> None:
    """Meta-train until the time is over, from the checkpoint or the head of an earlier run, or the packaged head."""
    rows = Table(out)
    folder = Path(tempfile.mkdtemp())
    join(PREPARED / "checkpoint", folder / CHECKPOINT)
    head = PREPARED / HEAD
    settings = PretrainSettings(
        init_from=str(head) if head.exists() else "packaged",
        backbone_lr_scale=0.1,
        steps=20_000,
        tasks=size(8, 1),
        size=size(256, 64),
        shots=size(10, 2),
        eval_every=size(1000, 10**6),
        eval_tasks=size(30, 1),
        workers=size(max(1, (os.cpu_count() or 2) - 1), 0),
        device=size.device,
    )
    sets = PREPARED / "train"
    real, held_out = sources([sets] if sets.is_dir() and not size.dry else [], HELD_OUT)
    run = PretrainRun(settings, folder, real=real, held_out=held_out)
    first, began, kept = run.step, time.monotonic(), time.monotonic()
    try:
        for step in run:
            over = time.time() > until or (size.dry and step.index >= first + 3)
            if time.monotonic() - kept > EVERY or over:
                seconds = time.monotonic() - began
                run.keep()
                shutil.copy(run.finish(), out / HEAD)
                split(folder / CHECKPOINT, out)
                rate = (step.index - first) / seconds
                loss = sum(step.losses.values())
                case = f"{settings.tasks} tasks of {settings.size} x {settings.size}, backbone learning"
                rows.add(row("meta-training", case, f"{rate:.2f} steps/s; step {step.index}, loss {loss:.3f}"))
                for line in run.history[-1:]:
                    print(json.dumps(line), flush=True)
                kept = time.monotonic()
            if over:
                break
    finally:
        run.close()
        shutil.rmtree(folder)


def split(path: Path, out: Path) -> None:
    """A file in parts, each whole or not there; parts of an older one go."""
    data = path.read_bytes()
    count = -(-len(data) // PART)
    for number in range(count):
        part = out / f"checkpoint.{number:02d}-of-{count:02d}"
        temporary = part.with_name("part.tmp")
        temporary.write_bytes(data[number * PART : (number + 1) * PART])
        temporary.replace(part)


def join(folder: Path, path: Path) -> None:
    """The file whose parts lie in the folder, if any do."""
    parts = sorted(folder.glob("checkpoint.*-of-*"))
    if not parts:
        return
    count = int(parts[0].name.rpartition("-")[2])
    if len(parts) != count:
        sys.exit(f"gpu: {folder} holds {len(parts)} of {count} parts of a checkpoint; put all of them there, or none")
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    print(f"going on from the checkpoint in {folder}", flush=True)


# -- what is prepared


def prepare(shared: Path, folder: Path) -> None:
    """Shrink the images for meta-training, and copy a few of nuclei."""
    from distillfss_core.bench.datasets import SETS

    for images in sorted((shared / "train").glob("*/images")):
        target = folder / "train" / images.parent.name
        (target / "images").mkdir(parents=True, exist_ok=True)
        (target / "labels").mkdir(exist_ok=True)
        shutil.copy(images.parent / "SOURCE.json", target)
        for path in sorted(images.iterdir()):
            with Image.open(path) as image:
                small = _shrunk(image.convert("L" if image.mode in ("L", "1", "I;16") else "RGB"), Image.Resampling.BOX)
                small.save(target / "images" / f"{path.stem}.jpg", quality=85)
        for path in sorted((images.parent / "labels").iterdir()):
            with Image.open(path) as labels:
                _shrunk(labels, Image.Resampling.NEAREST).save(target / "labels" / path.name)
    part = SETS["nucleus"].open(shared / "data" / "dsb2018")
    training, test = list(part.training), list(part.test)
    chosen = np.random.default_rng(0).choice(len(training), 5, replace=False)
    for name, items in (("support", [training[i] for i in chosen]), ("test", test[:TEST_IMAGES])):
        target = folder / "nuclei" / name
        target.mkdir(parents=True, exist_ok=True)
        for number, item in enumerate(items):
            data = item.read()
            Image.fromarray(data.image).save(target / f"{number:02d}_image.png")
            Image.fromarray(data.labels).save(target / f"{number:02d}_labels.png")


def labeled(folder: Path) -> Iterator[AnnotatedSlice]:
    """The pairs that `prepare` wrote."""
    for path in sorted(folder.glob("*_image.png")):
        image = read_image(path)
        labels = read_labels(path.with_name(path.name.replace("image", "labels")))
        yield AnnotatedSlice(image, labels, path.name)


def linked_volume(path: Path, planes: Array, depth: int) -> Path:
    """A zarr of ``depth`` planes, all but the first of which are hard links to the chunks of ``planes``."""
    import zarr

    side = min(1024, planes.shape[1])
    array = zarr.create_array(path, shape=(depth, *planes.shape[1:]), chunks=(1, side, side), dtype=planes.dtype)
    array[: len(planes)] = planes
    for z in range(len(planes), depth):
        shutil.copytree(path / "c" / str(z % len(planes)), path / "c" / str(z), copy_function=os.link)
    return path


def _shrunk(image: Image.Image, by: Image.Resampling) -> Image.Image:
    scale = min(1.0, WIDEST / max(image.size))
    return image.resize([max(1, round(n * scale)) for n in image.size], by) if scale < 1 else image


# -- time


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(once: Callable[[], None], least: float) -> float:
    """Median of at least five rounds that take ``least`` seconds together."""
    synchronize()
    rounds: list[float] = []
    while len(rounds) < 5 or sum(rounds) < least:
        began = time.perf_counter()
        once()
        synchronize()
        rounds.append(time.perf_counter() - began)
    return statistics.median(rounds)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "note", "table", "train"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--until", type=float, default=float("inf"))
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    size = Size(args.dry)
    if args.part == "prepare":
        prepare(args.folder, Path(args.rest[0]))
    elif args.part == "note":
        Table(args.folder).add(row(args.rest[0], "", args.rest[1].strip("= ")))
    elif args.part == "table":
        return table(args.folder, args.until, size)
    else:
        train(args.folder, args.until, size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
