"""Commands are ended by a signal at a random moment and run again: nothing is lost, nothing half-written seems whole.

    python benchmarks/kills.py [FOLDER] [--kills 30] [--seed 0] [-o kills.jsonl]

*distill*, *segment* (to OME-Zarr and to TIFF), *batch* and *instances* run on a small generated stack, in shards of 64
voxels a side. Each runs once to its end. Then it is ended by SIGKILL, SIGTERM, SIGHUP or SIGINT, in turns, at a random
moment of that time. A row has what a user would look at:

- ``code``: the exit code; ``lost``: inputs that changed; ``broken``: results that cannot be read, or seem whole but are
  not; ``left``: hidden parts of results.
- ``again``: the exit code of the second run; ``equal``: whether its results are those of the run that was not ended.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from distillfss_core import StudentModel, generate_sample, write_labels
from distillfss_core.errors import DistillFSSError
from distillfss_core.labelstore.store import JOURNAL, finished_regions

SIDE = 64  # of a shard, in voxels
TALL = 16  # times that the truth is repeated in z, so that objects lie in several blocks
COMMAND = f"""
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where this program runs under nohup
signal.signal(signal.SIGINT, signal.default_int_handler)  # and in the background of a shell
from distillfss_core.labelstore import layout
layout._SIDE, layout._SHARD = {SIDE}, 2 * {SIDE} ** 2
from distillfss_core.cli.main import main
sys.exit(main())
"""  # with small shards, in a process that has imported nothing else
TRIES = 4  # where the run has ended before the signal comes
SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")
STOP_CODES = {"SIGTERM": 143, "SIGHUP": 129, "SIGINT": 130}
FEW = ["--planes=0,3", "--crops=8", "--queries=1", "--shots=1", "--crop-size=64", "--zoom=1", "--device=cpu"]


@dataclass(frozen=True)
class Case:
    """A command; what is given when it runs again; and the digest of its results, None while there are none."""

    name: str
    arguments: tuple[str, ...]
    again: tuple[str, ...]
    digest: Callable[[Path], str | None]


def digest_of(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:16]


def model_digest(folder: Path) -> str | None:
    """That of the weights; a model that is there can be read."""
    path = folder / "new.safetensors"
    if not path.exists():
        return None
    state = StudentModel.load(path, device="cpu").head.state_dict()
    return digest_of(*(tensor.numpy().tobytes() for tensor in state.values()))


def labels_digest(path: Path) -> str | None:
    """That of the files of labels in OME-Zarr, once their metadata state that they are finished."""
    if not path.exists() or not finished_regions(path):
        return None
    files = sorted(f for f in path.rglob("*") if f.is_file() and JOURNAL.parent.name not in f.parts)
    return digest_of(*(str(f.relative_to(path)).encode() + f.read_bytes() for f in files))


def stack_digest(folder: Path) -> str | None:
    path = folder / "out.tif"
    return digest_of(tifffile.imread(path).tobytes()) if path.exists() else None


def batch_digest(folder: Path) -> str | None:
    """That of all labels and of the report, once it has all volumes."""
    report = folder / "out" / "report.csv"
    if not report.exists():
        return None
    with open(report, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    digests = [labels_digest(folder / row["output"]) for row in rows if row["status"] == "done"]
    if None in digests:
        raise ValueError(f"{report} has a volume as done that is not finished")
    counts = [json.dumps({n: t for n, t in row.items() if n.startswith("voxels")}) for row in rows]
    return digest_of(*map(str.encode, map(str, digests)), *map(str.encode, counts)) if len(digests) == 2 else None


def instances_digest(folder: Path) -> str | None:
    labels, table = labels_digest(folder / "objects.ome.zarr"), folder / "objects.csv"
    return digest_of(labels.encode(), table.read_bytes()) if labels else None


CASES = (
    Case(
        "distill",
        ("distill", "stack.tif", "truth.tif", "-o", "new.safetensors", "--steps=15", *FEW),
        ("--overwrite",),
        model_digest,
    ),
    Case(
        "segment",
        ("segment", "stack.tif", "-m", "m.safetensors", "-o", "out.ome.zarr", "--device=cpu"),
        ("--resume",),
        lambda folder: labels_digest(folder / "out.ome.zarr"),
    ),
    Case(
        "segment-tiff",
        ("segment", "stack.tif", "-m", "m.safetensors", "-o", "out.tif", "--uncertainty", "--device=cpu"),
        ("--overwrite",),
        stack_digest,
    ),
    Case(
        "batch",
        ("batch", "table.csv", "-m", "m.safetensors", "-o", "out", "--device=cpu"),
        ("--resume",),
        batch_digest,
    ),
    Case(
        "instances",
        ("instances", "tall.tif", "-o", "objects.ome.zarr", "--table", "objects.csv"),
        ("--resume",),
        instances_digest,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where to work (default: a temporary folder)")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--planes", type=int, default=10)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="file of rows to append to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        source = Path(name) / "source"
        make(source, args.planes, args.size)
        rows = list(kill_all(source, args))
    print(json.dumps(summary(rows)))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all kills."""
    return {
        "kills": len(rows),
        "during_the_run": sum(row["code"] != 0 for row in rows),
        "lost": sum(bool(row["lost"]) for row in rows),
        "broken": sum(bool(row["broken"]) for row in rows),
        "wrong_codes": sum(row["code"] not in (0, row["expected"], -getattr(signal, row["signal"])) for row in rows),
        "left_by_sigkill": sum(len(row["left"]) for row in rows if row["signal"] == "SIGKILL"),
        "left_by_others": sum(len(row["left"]) for row in rows if row["signal"] != "SIGKILL"),
        "equal_after_the_second_run": sum(row["equal"] for row in rows),
    }


def make(folder: Path, planes: int, size: int) -> None:
    """A stack and its truth, a table of two volumes, a model, and something of the user's own."""
    folder.mkdir(parents=True)
    sample = generate_sample(planes=planes, size=size)
    write_labels(folder / "stack.tif", sample.image)
    write_labels(folder / "truth.tif", (sample.labels > 0).astype(np.uint8))
    write_labels(folder / "tall.tif", np.tile(sample.labels > 0, (TALL, 1, 1)))
    shutil.copy(folder / "stack.tif", folder / "other.tif")
    (folder / "table.csv").write_text("volume,output\nstack.tif,out/a.ome.zarr\nother.tif,out/b.ome.zarr\n")
    (folder / "notes.txt").write_text("mine")
    arguments = ("distill", "stack.tif", "truth.tif", "-o", "m.safetensors", "--steps=20", *FEW)
    start(folder, arguments).communicate()


def start(folder: Path, arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_all(source: Path, args: argparse.Namespace) -> Any:
    rng = random.Random(args.seed)
    cases = [case for case in CASES if case.name in args.cases.split(",")]
    whole = {case.name: run_whole(case, source) for case in cases}
    for number in range(args.kills):
        case = cases[number % len(cases)]
        name = SIGNALS[(number + number // len(SIGNALS)) % len(SIGNALS)]
        seconds, expected = whole[case.name]
        row: dict[str, Any] = {"code": 0}
        for _ in range(TRIES):
            row = kill_once(case, name, rng.uniform(0.2, 0.95) * seconds, source, expected)
            if row["code"]:
                break
            seconds = min(seconds, row["seconds"])  # it had ended before the signal came
        whole[case.name] = (seconds, expected)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if args.output:
            with open(args.output, "a") as file:
                file.write(json.dumps(row) + "\n")
        yield row


def run_whole(case: Case, source: Path) -> tuple[float, str]:
    """Seconds and digest of a run that is not ended."""
    folder = source.with_name(f"whole-{case.name}")
    shutil.copytree(source, folder)
    began = time.monotonic()
    code = start(folder, case.arguments).wait()
    digest = case.digest(folder)
    if code or digest is None:
        raise SystemExit(f"{case.name} ended with {code}")
    return time.monotonic() - began, digest


def kill_once(case: Case, name: str, seconds: float, source: Path, expected: str) -> dict[str, Any]:
    folder = source.with_name("killed")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    older = files_of(folder)
    process, began = start(folder, case.arguments), time.monotonic()
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(getattr(signal, name))
        code = process.wait()
    row: dict[str, Any] = {"case": case.name, "signal": name, "code": code}
    row["seconds"] = round(time.monotonic() - began, 2)
    digest = None
    row["expected"] = STOP_CODES.get(name, -signal.SIGKILL)
    row["lost"] = [path for path, digest in older.items() if files_of(folder).get(path) != digest]
    row["left"] = [path for path in files_of(folder) if is_part(path)]
    try:
        digest = case.digest(folder)
        is_whole = digest in (None, expected) or (case.name == "distill" and code != 0)  # the best so far
        row["broken"] = [] if is_whole else [f"taken for whole: {digest}, not {expected}"]
    except (DistillFSSError, OSError, ValueError) as error:
        row["broken"] = [f"{type(error).__name__} {error}"]
    if code == 0:
        return row | {"again": 0, "equal": digest == expected}
    row["again"] = start(folder, (*case.arguments, *case.again)).wait()
    row["equal"] = row["again"] == 0 and case.digest(folder) == expected
    row["left_in_the_end"] = [path for path in files_of(folder) if is_part(path)]
    return row


def files_of(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): digest_of(path.read_bytes()) for path in files}


def is_part(path: str) -> bool:
    """Whether a file is a part of a result that was never finished; journals are none."""
    parts = Path(path).parts
    return JOURNAL.parent.name not in parts and (parts[-1].startswith(".") or path.endswith(".partial"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
