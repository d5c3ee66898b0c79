"""The figures of the engines that run a student's network on the CPU, side by side in one run.

    python benchmarks/engines.py [--model STUDENT --image FILE] [--threads 2] [--runs 9] [--only network,tiles]
        [-o FILE]

*network* is the student's network alone on 512 x 512, and its backbone alone (the floor) by the same engine; *batch* is
the same on four such tiles at once, per tile; *tiles* is ``predict_labels`` of a 2048 x 2048 plane; *zarr* is
``segment_to_zarr`` of planes of that size, from zarr to zarr. All engines take their turns within each round. Medians
of time, and of the processors' seconds spent, which a busy machine disturbs less. *labels* compares what the engines
answer with what torch answers in float32: the share of pixels with another label, and IoU of the classes.

Without a model, one is distilled from generated nuclei; the plane is that image tiled to 2048 x 2048.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from distillfss_core import (
    AnnotatedSlice,
    DistillSettings,
    StudentModel,
    SupportSet,
    distill,
    evaluate,
    generate_sample,
    open_volume,
    read_image,
    segment_to_zarr,
)
from distillfss_core.errors import SettingsError
from distillfss_core.models.engines import Runner, StudentNetwork, choose_engine, describe_engine
from distillfss_core.nn.device import Device
from distillfss_core.types import Array

SIDE, PLANE = 512, 2048
FORMS = (
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("onnxruntime", "float32"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("onnxruntime", "int8"),
    ("openvino", "int8"),
)
WHAT = ("network", "batch", "tiles", "zarr", "labels")


class BackboneAlone(StudentNetwork):
    """The floor: every block of the backbone, nothing on top."""

    def forward(self, image: Tensor) -> Tensor:
        deepest: Tensor = self.backbone(image).stages[-1][-1]
        return deepest


def rows(model: StudentModel, plane: Array, what: tuple[str, ...], runs: int, planes: int) -> Iterator[dict[str, Any]]:
    """Measure; a row an engine, precision and quantity, with its ratio to torch in float32.

    Parameters
    ----------
    model : StudentModel
    plane : array (y, x) or (y, x, c)
    what : some of `WHAT`
    runs : int
        Rounds.
    planes : int
        Of the volume of *zarr*.
    """
    forms = [form for form in FORMS if _can_run(model, *form)]
    models = {form: _as(model, *form) for form in forms}
    for quantity in what:
        if quantity == "labels":
            yield from _labels(models, plane)
            continue
        with tempfile.TemporaryDirectory() as folder:
            jobs, megapixels = _jobs(quantity, models, plane, Path(folder), planes)
            for job in jobs.values():
                job()  # engines are made ready
            rounds = [{name: _cost(job) for name, job in jobs.items()} for _ in range(runs)]
        wall, work = ({name: statistics.median(r[name][k] for r in rounds) for name in jobs} for k in (0, 1))
        first = ("student", *FORMS[0])
        for name in jobs:
            part, engine, precision = name
            floor = ("backbone", engine, precision)
            yield {
                "what": quantity,
                "part": part,
                "engine": describe_engine(engine),
                "precision": precision,
                "ms": round(1e3 * wall[name], 1),
                "cpu_ms": round(1e3 * work[name], 1),
                "mp_per_s": round(megapixels / wall[name], 2),
                "faster_than_torch": round(wall[first] / wall[name], 2),
                "less_cpu_than_torch": round(work[first] / work[name], 2),
                **({"cpu_over_backbone": round(work[name] / work[floor], 2)} if floor in work else {}),
            }


def _can_run(model: StudentModel, engine: str, precision: str) -> bool:
    try:
        choose_engine(engine, Device("cpu", precision), model.network)
    except SettingsError:
        return False
    return True


def _as(model: StudentModel, engine: str, precision: str) -> StudentModel:
    return copy.copy(model).to("cpu", precision, engine)


def _jobs(
    quantity: str, models: dict[tuple[str, str], StudentModel], plane: Array, folder: Path, planes: int
) -> tuple[dict[tuple[str, str, str], Callable[[], object]], float]:
    """What to time, by part, engine and precision, and how many megapixels it is."""
    jobs: dict[tuple[str, str, str], Callable[[], object]] = {}
    if quantity in ("network", "batch"):
        count = 4 if quantity == "batch" else 1
        x = torch.rand(count, 3, SIDE, SIDE)
        for (engine, precision), model in models.items():
            for part, network in (
                ("student", model.network),
                ("backbone", BackboneAlone(model.backbone, model.head, inputs=model.network.inputs)),
            ):
                run = Runner(network, engine, Device("cpu", precision), model.samples)
                jobs[part, engine, precision] = lambda run=run: _infer(run, x)  # type: ignore[misc]
        return jobs, count * SIDE**2 / 1e6
    if quantity == "tiles":
        for form, model in models.items():
            jobs["student", *form] = lambda model=model: model.predict_labels(plane)  # type: ignore[misc]
        return jobs, plane.shape[0] * plane.shape[1] / 1e6
    stack = zarr.create_array(
        folder / "image.zarr", shape=(planes, *plane.shape[:2]), chunks=(1, PLANE // 2, PLANE // 2), dtype=plane.dtype
    )
    for z in range(planes):
        stack[z] = np.roll(plane, 64 * z, 0)
    volume = open_volume(folder / "image.zarr")
    for form, model in models.items():
        out = folder / f"{form[0]}-{form[1]}.ome.zarr"
        jobs["student", *form] = lambda model=model, out=out: segment_to_zarr(  # type: ignore[misc]
            volume, model, out, overwrite=True
        )
    return jobs, planes * plane.shape[0] * plane.shape[1] / 1e6


@torch.inference_mode()
def _infer(run: Runner, x: Tensor) -> Tensor:
    return run(x)


def _cost(job: Callable[[], object]) -> tuple[float, float]:
    """Seconds that went by, and that processors worked."""
    start, work = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - start, time.process_time() - work


def _labels(models: dict[tuple[str, str], StudentModel], plane: Array) -> Iterator[dict[str, Any]]:
    reference = models[FORMS[0]].predict(plane)
    for (engine, precision), model in models.items():
        predicted = model.predict(plane)
        scores = evaluate([(predicted.labels, reference.labels)], len(model.class_names))
        yield {
            "what": "labels",
            "engine": describe_engine(engine),
            "precision": precision,
            "differing": float((predicted.labels != reference.labels).mean()),
            "iou_with_torch": [round(float(v), 6) for v in scores.pooled.iou],
            "probability_differs_by": float(np.abs(predicted.probabilities - reference.probabilities).max()),
        }


def _nuclei_student() -> tuple[StudentModel, Array]:
    sample = generate_sample(planes=6, size=SIDE)
    slices = tuple(AnnotatedSlice(sample.image[z], (sample.labels[z] > 0).astype(np.uint8)) for z in (0, 2, 4))
    student = distill(SupportSet(slices, ("nucleus",)), DistillSettings(steps=60, zoom=Fraction(1), device="cpu"))
    return student, sample.image[5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--planes", type=int, default=4)
    parser.add_argument("--only", default=",".join(WHAT))
    parser.add_argument("-o", "--output", type=Path, help="file of rows to append to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model and args.image:
        model, image = StudentModel.load(args.model, device="cpu", engine="torch"), read_image(args.image)
    else:
        model, image = _nuclei_student()
    repeats = [-(-PLANE // n) for n in image.shape[:2]]
    plane = np.tile(image, (*repeats, *[1] * (image.ndim - 2)))[:PLANE, :PLANE]
    for row in rows(model, plane, tuple(args.only.split(",")), args.runs, args.planes):
        row |= {"threads": args.threads, "machine": platform.processor() or platform.machine()}
        print(json.dumps(row), flush=True)
        if args.output:
            with open(args.output, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
