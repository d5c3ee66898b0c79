"""The figures on volumes: memory, throughput, kills, the first plane; all on generated volumes.

    python benchmarks/volumes.py make FOLDER --gb 1,8,32         volumes of linked chunks, and a model; little on disk
    python benchmarks/volumes.py memory FOLDER [--gb 1,8,32] [--megavoxels 256] [-o volumes.jsonl]
    python benchmarks/volumes.py throughput FOLDER [--planes 32] [--repeats 3]
    python benchmarks/volumes.py parts FOLDER [--planes 32] [--engine openvino] [--precision int8] [--threads 1]
    python benchmarks/volumes.py kills FOLDER [--runs 20]
    python benchmarks/volumes.py first FOLDER [--gb 32]

A volume has planes of 2048 x 2048 voxels, uint16, in chunks of (1, 1024, 1024), sixteen of which are real and the
others hard links to them: reading and decoding are as for any other, only the disk's cache is warmer.

*memory* is the peak resident size of a process that segments a volume to OME-Zarr; where the volume has more voxels
than ``--megavoxels``, it segments that many in eight runs of planes spread evenly over the depth (the row says so).
*throughput* is voxels a second from zarr to zarr, over those of ``predict_labels`` on the same planes in memory, in
turns, medians. *parts* are the seconds that each part of `segment_to_zarr` takes, by the clock and on the processors,
without those of parts inside it. The threads of the engine and of zarr, which decodes and encodes, count for the
network: all processor seconds that no other part took. *kills* are ended by SIGKILL at a random moment of an
uninterrupted run's time, started again, and compared byte for byte. *first* is the time from opening to the labels of
one tile and of a whole plane.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from distillfss_core import StudentModel, distill, generate_sample, open_volume, segment_lazy, segment_to_zarr
from distillfss_core.labelstore import store
from distillfss_core.labelstore.store import JOURNAL
from distillfss_core.models import segmenter
from distillfss_core.models.preprocess import Preprocess
from distillfss_core.models.segmenter import Segmenter
from distillfss_core.segmentation.lazy import VolumeSegmenter
from distillfss_core.settings import DistillSettings
from distillfss_core.support.support_set import SupportSet
from distillfss_core.types import AnnotatedSlice

SIDE, CHUNK = 2048, 1024
NETWORK = "network; zarr's threads"
REAL = 16  # chunks that are no links
RUNS = 8  # of planes, where a volume is too large to be segmented whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "memory", "throughput", "parts", "kills", "first", "segment"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=lambda text: [float(part) for part in text.split(",")], default=[1.0, 8.0, 32.0])
    parser.add_argument("--megavoxels", type=float, default=256)
    parser.add_argument("--planes", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="of segment")
    parser.add_argument("-o", "--output", type=Path, help="file of rows to append to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "segment":  # a process of its own, to be measured or killed
        print(json.dumps(segment(args.folder, args.gb[0], args.out, args.megavoxels)))
        return
    jobs = {"make": make, "memory": memory, "throughput": throughput, "parts": parts, "kills": kills, "first": first}
    for row in jobs[args.what](args):
        row |= {"what": args.what, "threads": args.threads, "machine": platform.processor() or platform.machine()}
        print(json.dumps(row), flush=True)
        if args.output:
            with open(args.output, "a") as file:
                file.write(json.dumps(row) + "\n")


def volume_path(folder: Path, gb: float) -> Path:
    return folder / f"volume_{gb:g}gb.ome.zarr"


def depth_of(gb: float) -> int:
    return max(1, round(gb * 1e9 / (SIDE * SIDE * 2)))


def load_model(folder: Path) -> StudentModel:
    return StudentModel.load(folder / "model.safetensors", device="cpu")


def make(args: argparse.Namespace) -> list[dict[str, Any]]:
    args.folder.mkdir(exist_ok=True)
    sample = generate_sample(planes=REAL, size=CHUNK)
    if not (args.folder / "model.safetensors").exists():
        slices = tuple(AnnotatedSlice(sample.image[z], (sample.labels[z] > 0).astype(np.uint8)) for z in (0, 5, 10))
        settings = DistillSettings(steps=60, zoom=Fraction(1), device="cpu")
        distill(SupportSet(slices, ("nucleus",)), settings).save(args.folder / "model.safetensors")
    rows = []
    for gb in args.gb:
        path, shape = volume_path(args.folder, gb), (depth_of(gb), SIDE, SIDE)
        shutil.rmtree(path, ignore_errors=True)
        group = zarr.open_group(path, mode="w", zarr_format=3)
        axes = [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
        scale = [{"type": "scale", "scale": [1.0, 0.25, 0.25]}]
        datasets = [{"path": "0", "coordinateTransformations": scale}]
        ome: Any = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
        group.attrs["ome"] = ome
        array: Any = group.create_array(
            "0", shape=shape, chunks=(1, CHUNK, CHUNK), dtype="uint16", dimension_names=list("zyx")
        )
        real: list[Path] = []
        for z, y, x in np.ndindex(shape[0], SIDE // CHUNK, SIDE // CHUNK):
            file = path / "0" / array.metadata.encode_chunk_key((z, y, x))
            if len(real) < REAL:
                box = (z, slice(y * CHUNK, (y + 1) * CHUNK), slice(x * CHUNK, (x + 1) * CHUNK))
                array[box] = sample.image[len(real)]
                real.append(file)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                os.link(real[(4 * z + 2 * y + x) % REAL], file)
        rows.append({"gb": gb, "shape": shape})
    return rows


def regions_of(depth: int, megavoxels: float) -> list[tuple[tuple[int, int], ...]]:
    """All planes, or runs of planes spread over the depth that hold so many voxels in all."""
    planes = round(megavoxels * 1e6 / SIDE**2)
    if planes >= depth:
        return [((0, depth), (0, SIDE), (0, SIDE))]
    each = max(1, planes // RUNS)
    starts = np.linspace(0, depth - each, RUNS).round().astype(int)
    return [((int(z), int(z) + each), (0, SIDE), (0, SIDE)) for z in starts]


def segment(folder: Path, gb: float, out: Path, megavoxels: float) -> dict[str, Any]:
    """Segment a volume, and say what it took."""
    model = load_model(folder)
    start = time.perf_counter()
    voxels = finished = 0
    with open_volume(volume_path(folder, gb)) as volume:
        regions = regions_of(volume.shape[0], megavoxels)
        for region in regions:
            finished += segment_to_zarr(volume, model, out, region=region, resume=True).finished
            voxels += int(np.prod([b - a for a, b in region]))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    whole = len(regions) == 1
    return {
        "gb": gb,
        "region": "whole" if whole else f"{RUNS} runs of planes spread over the depth",
        "megavoxels": voxels / 1e6,
        "seconds": round(seconds, 2),
        "peak_rss_gb": round(peak, 3),
        "found": finished,
    }


def start_segment(args: argparse.Namespace, gb: float, out: Path, megavoxels: float) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "segment", str(args.folder), "--gb", f"{gb:g}", "--out", str(out)]
    command += ["--megavoxels", str(megavoxels), "--threads", str(args.threads)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for gb in args.gb:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            process = start_segment(args, gb, Path(folder) / "out.zarr", args.megavoxels)
            text, _ = process.communicate()
            if process.returncode:
                raise SystemExit(f"segmenting {gb:g} GB ended with {process.returncode}")
            rows.append(json.loads(text))
    peaks = [row["peak_rss_gb"] for row in rows]
    return [row | {"spread": round(max(peaks) / min(peaks) - 1, 3)} for row in rows]


def throughput(args: argparse.Namespace) -> list[dict[str, Any]]:
    model = load_model(args.folder)
    pace: dict[str, list[float]] = {"memory": [], "zarr": []}
    with open_volume(volume_path(args.folder, args.gb[0])) as volume:
        count = min(args.planes, volume.shape[0])
        planes = volume.read(slice(0, count))
        region = ((0, count), (0, SIDE), (0, SIDE))
        model.predict_labels(planes[0])  # warm
        for _ in range(args.repeats):
            start = time.perf_counter()
            for plane in planes:
                model.predict_labels(plane)
            pace["memory"].append(planes.size / (time.perf_counter() - start) / 1e6)
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                start = time.perf_counter()
                segment_to_zarr(volume, model, Path(folder) / "out.zarr", region=region)
                pace["zarr"].append(planes.size / (time.perf_counter() - start) / 1e6)
    medians = {name: statistics.median(rates) for name, rates in pace.items()}
    return [
        {
            "planes": count,
            **{f"{name}_megavoxels_per_s": [round(p, 3) for p in rates] for name, rates in pace.items()},
            "ratio": round(medians["zarr"] / medians["memory"], 3),
        }
    ]


class Stopwatch:
    """Seconds of functions, by the clock and of their thread's processor time, without those of others inside them."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._own = threading.local()
        self._lock = threading.Lock()

    def watch(self, place: Any, name: str, part: str) -> None:
        """Replace a function or method by one that is timed."""
        function = getattr(place, name)

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            stack = self._own.__dict__.setdefault("stack", [])
            stack.append([0.0, 0.0])
            start = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **options)
            finally:
                spent = [time.perf_counter() - start[0], time.thread_time() - start[1]]
                inside = stack.pop()
                if stack:
                    stack[-1] = [a + b for a, b in zip(stack[-1], spent, strict=True)]
                with self._lock:
                    total = self.seconds.setdefault(part, [0.0, 0.0])
                    self.seconds[part] = [t + s - i for t, s, i in zip(total, spent, inside, strict=True)]

        setattr(place, name, timed)


def parts(args: argparse.Namespace) -> list[dict[str, Any]]:
    model = StudentModel.load(
        args.folder / "model.safetensors", device="cpu", engine=args.engine, precision=args.precision
    )
    watch = Stopwatch()
    for place, name, part in (
        (VolumeSegmenter, "read", "reading, limits"),
        (Preprocess, "to_tensor", "preprocessing"),
        (segmenter, "check_image", "preprocessing"),
        (Segmenter, "_network_input", "zoom, clip"),
        (StudentModel, "_margins", NETWORK),
        (Segmenter, "_window", "resizing of margins"),
        (segmenter, "_labels", "labels"),
        (store, "write_shard", "zarr: encoding, files"),
        (os, "fsync", "fsync"),
        (store, "_file_digest", "digest"),
        (store.LabelStore, "note", "journal"),
        (store.LabelStore, "coarsen", "pyramid: reading"),
        (store, "coarsen_labels", "pyramid: majority"),
    ):
        watch.watch(place, name, part)
    with (
        open_volume(volume_path(args.folder, args.gb[0])) as volume,
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
    ):
        count = min(args.planes, volume.shape[0])
        region = ((0, count), (0, SIDE), (0, SIDE))
        segment_to_zarr(volume, model, Path(folder) / "warm.zarr", region=((0, 1), *region[1:]))
        watch.seconds.clear()
        start = time.perf_counter(), time.process_time()
        segment_to_zarr(volume, model, Path(folder) / "out.zarr", region=region)
        wall, work = time.perf_counter() - start[0], time.process_time() - start[1]
    watch.seconds[NETWORK][1] += work - sum(seconds[1] for seconds in watch.seconds.values())
    megavoxels = count * SIDE**2 / 1e6
    rows: list[dict[str, Any]] = [{"part": "all", "wall_s": round(wall, 2), "cpu_s": round(work, 2)}]
    for part, (clock, processor) in sorted(watch.seconds.items(), key=lambda item: -item[1][1]):
        rows.append({"part": part, "wall_s": round(clock, 2), "cpu_s": round(processor, 2)})
        rows[-1]["share_of_cpu"] = round(processor / work, 3)
    about = {"engine": model.engine, "precision": model.device.precision, "halo": model.halo, "planes": count}
    return [row | about | {"megavoxels_per_s": round(megavoxels / wall, 2)} for row in rows]


def kills(args: argparse.Namespace) -> list[dict[str, Any]]:
    rng, gb = random.Random(args.seed), args.gb[0]
    identical, resumed = 0, []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        once = Path(name) / "once" / "out.zarr"
        once.parent.mkdir()
        start = time.perf_counter()
        start_segment(args, gb, once, args.megavoxels).communicate()
        whole = time.perf_counter() - start
        expected = files_of(once)
        for run in range(args.runs):
            out = Path(name) / f"run{run}" / "out.zarr"
            out.parent.mkdir()
            process = start_segment(args, gb, out, args.megavoxels)
            try:
                process.communicate(timeout=rng.uniform(0, whole))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
            text, _ = start_segment(args, gb, out, args.megavoxels).communicate()
            identical += files_of(out) == expected
            resumed.append(json.loads(text)["found"])  # shards of the finest level that were not computed again
            shutil.rmtree(out.parent)
    return [{"gb": gb, "seconds": round(whole, 1), "runs": args.runs, "identical": identical, "shards_found": resumed}]


def files_of(path: Path) -> dict[str, bytes]:
    files = (f for f in path.rglob("*") if f.is_file() and f.name != JOURNAL.name)
    return {str(f.relative_to(path)): f.read_bytes() for f in files}


def first(args: argparse.Namespace) -> list[dict[str, Any]]:
    model = load_model(args.folder)
    rows: list[dict[str, Any]] = []
    for gb in args.gb:
        start = time.perf_counter()
        with open_volume(volume_path(args.folder, gb)) as volume:
            labels = segment_lazy(volume, model)
            made = time.perf_counter()
            corner: Sequence[Any] = (labels.shape[0] // 2, slice(0, 1024), slice(0, 1024))
            labels[tuple(corner)].compute()
            tile = time.perf_counter()
            labels[labels.shape[0] // 2 + 1].compute()
            rows.append(
                {
                    "gb": gb,
                    "open_s": round(made - start, 3),
                    "first_1024_tile_s": round(tile - start, 3),
                    "next_whole_plane_s": round(time.perf_counter() - tile, 3),
                    "plane": SIDE,
                }
            )
    return rows


if __name__ == "__main__":
    main()
