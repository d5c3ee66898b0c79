"""Damaged inputs for the commands: what comes of each, in a process of its own with limits of time and memory.

    python benchmarks/fuzz_commands.py --cases 300 --seed 1 --results fuzz-commands.jsonl

Inputs and damages are those of fuzz_readers.py. A random command is run on each by the ``main`` of the command line.
Its result is compared with that of the sound input. An outcome of the last four columns is a defect: a result that
differs without a warning (unless the reader of the format itself gives such voxels), an error that is not one line with
the name of the input, a traceback, a hang, too much memory. The exit code is then 1.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import fuzz_readers
import numpy as np
import torch
import zarr
from fuzz_readers import DAMAGES, IMAGES, PARTS, in_process, reference, report, run_cases, truth

import distillfss_core.objects.instances
import distillfss_core.segmentation.batch
import distillfss_core.segmentation.to_zarr
import distillfss_core.support.label_volumes
import distillfss_core.training  # noqa: F401  (imported once, before the processes of the cases)
from distillfss_core import AnnotatedSlice, DistillSettings, SupportSet, distill, read_stack
from distillfss_core.cli.main import main as run_command

SECONDS = 20
ERRORS = "stderr.txt"
MODEL = "m.safetensors"
FILES_OF_PLANES = ("pngs", "tiffs", "dicom")
Result = dict[str, Any]


@dataclass(frozen=True)
class Route:
    """A command: its arguments for the damaged and the sound input and a folder to write to, and what it wrote.

    ``kinds`` are the formats that it takes; None is all of them.
    """

    arguments: Callable[[Path, Path, Path], list[str]]
    result: Callable[[Path, str], Result]
    kinds: tuple[str, ...] | None = None


def _lists(array: Any) -> Any:
    return np.asarray(array).tolist()


def _read_files(out: Path, text: str) -> Result:
    return {"planes": [plane for file in sorted(out.rglob("*.tif")) for plane in _lists(read_stack(file))]}


def _read_zarrs(out: Path, text: str) -> Result:
    return {"": [_lists(zarr.open_array(p / "0", mode="r")[...]) for p in sorted(out.glob("*.ome.zarr"))]}


def _read_batch(out: Path, text: str) -> Result:
    with open(out / "report.csv", newline="", encoding="utf-8") as file:
        rows = [{"status": row["status"], "warning": row.get("warning", "")} for row in csv.DictReader(file)]
    return _read_zarrs(out, text) | {"rows": rows}


def _read_objects(out: Path, text: str) -> Result:
    """Numbers and what is measured in voxels; the rest depends on the scale, whose numbers are damaged as well."""
    with open(out / "t.csv", newline="", encoding="utf-8") as file:
        rows = [
            {name: value for name, value in row.items() if name.startswith(("label", "voxels", "box", "mean"))}
            for row in csv.DictReader(file)
        ]
    return _read_zarrs(out, text) | {"table": rows}


def _read_scores(out: Path, text: str) -> Result:
    scores = json.loads(text)
    return {"pooled": scores["pooled"], "images": list(scores["images"].values())}


def _model(folder: Path) -> list[str]:
    return ["-m", str(folder / "sound" / MODEL), "--device", "cpu", "--engine", "torch", "--threads", "1"]


def _segment(path: Path, sound: Path, out: Path) -> list[str]:
    return ["segment", str(path), "-o", str(out if path.is_dir() else out / "o.tif"), *_model(out.parent.parent)]


def _segment_volume(path: Path, sound: Path, out: Path) -> list[str]:
    return ["segment", str(path), "-o", str(out / "o.ome.zarr"), *_model(out.parent.parent)]


def _batch(path: Path, sound: Path, out: Path) -> list[str]:
    np.save(path.parent / "other.npy", truth()[:2])  # a volume that is left out of the batch is seen beside it
    return ["batch", str(path.parent), "-o", str(out), *_model(out.parent.parent)]


def _instances(path: Path, sound: Path, out: Path) -> list[str]:
    return ["instances", str(path), "-o", str(out / "o.ome.zarr"), "--table", str(out / "t.csv")]


def _instances_image(path: Path, sound: Path, out: Path) -> list[str]:
    return [*_instances(sound, sound, out), "--image", str(path), "--class-id", "150"]


def _evaluate(path: Path, sound: Path, out: Path) -> list[str]:
    return ["evaluate", str(path), str(sound), "--json"]


def _evaluate_truth(path: Path, sound: Path, out: Path) -> list[str]:
    return ["evaluate", str(sound), str(path), "--json"]


ROUTES = {
    "segment": Route(_segment, _read_files, (*IMAGES, "pngs", "tiffs")),
    "segment volume": Route(_segment_volume, _read_zarrs),
    "batch": Route(_batch, _read_batch),
    "instances": Route(_instances, _read_objects),
    "instances image": Route(_instances_image, _read_objects),
    "evaluate": Route(_evaluate, _read_scores),
    "evaluate truth": Route(_evaluate_truth, _read_scores),
}


def make_model(folder: Path) -> None:
    """A student that has learned the bright squares."""

    def make() -> dict[str, Any]:
        torch.set_num_threads(1)
        data = truth()
        slices = [AnnotatedSlice(p, (_smooth(p) > 100).astype(np.uint8), f"plane {z}") for z, p in enumerate(data)]
        settings = DistillSettings(
            steps=30, zoom=Fraction(1), crop_size=64, queries=2, shots=2, crops=8, head="none", device="cpu"
        )
        distill(SupportSet(tuple(slices[::2]), ("square",)), settings).save(folder / MODEL)
        return {"model": MODEL}

    if in_process(make, 600).get("model") != MODEL:
        raise SystemExit("the student could not be made")


def _smooth(plane: np.ndarray) -> np.ndarray:
    """The mean of each square of 8 x 8 pixels, at every pixel of it."""
    y, x = plane.shape
    means = plane.reshape(y // 8, 8, x // 8, 8).mean((1, 3))
    return np.asarray(means.repeat(8, 0).repeat(8, 1))


def run_main(route: Route, path: Path, sound: Path, out: Path) -> dict[str, Any]:
    """Exit code, text of both streams and result of a command."""
    out.mkdir(parents=True)
    printed, file = io.StringIO(), out.with_name(f"{out.name}-{ERRORS}")
    with (
        open(file, "w", buffering=1) as errors,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(errors),
    ):
        code = run_command(route.arguments(path, sound, out))
    result = route.result(out, printed.getvalue()) if code == 0 or (out / "report.csv").is_file() else {}
    return {"code": code, "out": printed.getvalue(), "err": file.read_text(), "result": result}


def judge(path: Path, ran: dict[str, Any], expected: Callable[[], Result], stated: list[Callable[[], Result]]) -> str:
    """The outcome of a command on a damaged input; ``stated`` give results that the damaged file itself states."""
    text = ran["err"]
    if "Traceback" in text or "Traceback" in ran["out"]:
        return "traceback"
    errors = [line for line in text.splitlines() if "error:" in line]
    if ran["code"] != 0:
        is_one_line = len(errors) == 1 and errors[0].startswith("distillfss: error: ")
        return "error" if is_one_line and path.name in errors[0] else "traceback"
    if ran["result"] == expected():
        return "equal"
    if "warning:" in text:
        return "warning"
    return "as stated" if any(ran["result"] == other() for other in stated) else "silent"


def _target(kind: str, route: str, path: Path) -> Path:
    """What a command is given of an input: of a set of files its first, where files are read as images."""
    return path / "a.ome.tif" if kind == "set" and route == "segment" else path


def run_case(sound: dict[str, Path], seed: int, number: int, folder: Path) -> dict[str, Any]:
    """Damage a copy of an input and run a command on it, in a process of its own."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice(sorted(sound))
    names = [name for name, route in ROUTES.items() if route.kinds is None or kind in route.kinds]
    name, damage = rng.choice(names), rng.choice(sorted(DAMAGES))
    (folder / "in").mkdir()
    copy = folder / "in" / sound[kind].name
    (shutil.copytree if sound[kind].is_dir() else shutil.copy)(sound[kind], copy)
    DAMAGES[damage](copy, rng)
    case = {"number": number, "kind": kind, "damage": damage, "route": name}
    case |= in_process(lambda: _outcome(kind, damage, name, sound[kind], copy), SECONDS)
    errors = folder / f"out-{ERRORS}"
    if case["outcome"] == "hang" and errors.is_file() and "warning:" in errors.read_text():
        case |= {"outcome": "warning", "detail": errors.read_text()}  # a large volume, as it states, but announced
    return case


def _outcome(kind: str, damage: str, name: str, sound: Path, copy: Path) -> dict[str, Any]:
    route, folder = ROUTES[name], copy.parent.parent
    path, whole = _target(kind, name, copy), _target(kind, name, sound)
    torch.set_num_threads(1)
    try:
        ran = run_main(route, path, whole, folder / "out")
    except MemoryError:
        return {"outcome": "memory", "detail": traceback.format_exc()}
    except BaseException:  # noqa: BLE001 - this is what is looked for
        return {"outcome": "traceback", "detail": traceback.format_exc()}

    def result_of(array: np.ndarray | None, number: int) -> Result:
        """The result for a sound array in place of the input."""
        if array is None:
            return {"none": None}
        place = folder / f"array{number}" / f"{copy.name.partition('.')[0]}.npy"
        place.parent.mkdir()
        np.save(place, array)
        return dict(run_main(ROUTES[name], place, whole, folder / f"out{number}")["result"])

    def expected() -> Result:
        pristine = folder / "sound" / sound.name
        pristine.parent.mkdir()
        (shutil.copytree if sound.is_dir() else shutil.copy)(sound, pristine)
        return dict(run_main(route, _target(kind, name, pristine), whole, folder / "expected")["result"])

    stated: list[Callable[[], Result]] = []
    if damage not in PARTS:
        stated.append(lambda: result_of(reference(kind, path), 0))
    if kind in FILES_OF_PLANES:  # they do not state how many they are: the first or the last may be missing
        stated += [lambda: result_of(truth()[1:], 1), lambda: result_of(truth()[:-1], 2)]
    outcome = judge(copy, ran, expected, stated)
    return {"outcome": outcome, "detail": f"{ran['code']} {ran['err'].strip() or ran['out'].strip()}"[-2000:]}


def main() -> int:
    args = fuzz_readers.parse_arguments(__doc__, 300, "fuzz-commands.jsonl")
    return report(run_cases(args.cases, args.seed, args.results, run_case, make_model))


if __name__ == "__main__":
    sys.exit(main())
