"""Damaged inputs for all readers: what comes of each, in a process of its own with limits of time and memory.

    python benchmarks/fuzz_readers.py --cases 1000 --seed 1 --results fuzz.jsonl

A sound input of a random format is damaged (cut short, bits flipped, parts removed, metadata changed, absurd sizes) and
read by a random route. The results are lines of JSON; a run that was stopped goes on after the last one. The table
counts the outcomes of each format. An outcome of the last four columns is a defect, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from PIL import Image

from distillfss_core.errors import DistillFSSError
from distillfss_core.io.images import read_stack
from distillfss_core.io.labels import load_pair, read_label_stack
from distillfss_core.volumes.volume import open_volume

OUTCOMES = ("error", "warning", "equal", "as stated", "silent", "traceback", "hang", "memory")
DEFECTS = OUTCOMES[4:]
SECONDS, BYTES = 20, 2 << 30
SHAPE = (6, 40, 48)
MANY_FILES = ("pngs", "tiffs", "set", "dicom")
IMAGES = ("tiff", "tiles", "lzw", "imagej", "ome", "big", "pages", "set", "png", "npy")
PARTS = ("cut", "remove", "empty")  # damages that take something away, so that less than the truth is a defect
OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def truth() -> np.ndarray:
    """Small numbers from 1, so that zeros are seen: noise with squares that are brighter by 110."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 2, (SHAPE[0], SHAPE[1] // 8, SHAPE[2] // 8)).repeat(8, 1).repeat(8, 2)
    return (rng.integers(1, 90, SHAPE) + 110 * squares).astype(np.uint16)


# sound inputs


def write_sound(folder: Path) -> dict[str, Path]:
    """An input of each format that can be written here, all with the same voxels (a picture has the first plane)."""
    data = truth()
    paths = {}
    gray: dict[str, Any] = {"photometric": "minisblack"}
    kinds: dict[str, dict[str, Any]] = {
        "tiff": {},
        "tiles": {"tile": (16, 16), "compression": "zlib"},
        "lzw": {"rowsperstrip": 7, "compression": "lzw"},
        "imagej": {"imagej": True, "metadata": {"axes": "ZYX"}},
        "ome": {"ome": True, "metadata": {"axes": "ZYX"}},
        "big": {"bigtiff": True},
    }
    for kind, options in kinds.items():
        paths[kind] = folder / f"{kind}.tif"
        tifffile.imwrite(paths[kind], data, **gray, **options)
    paths["pages"] = folder / "pages.tif"
    with tifffile.TiffWriter(paths["pages"]) as file:
        for plane in data:
            file.write(plane, metadata=None, contiguous=False, compression="zlib", **gray)
    paths["set"] = _write_set(folder / "set", data)
    paths["png"] = folder / "plane.png"
    Image.fromarray(data[0].astype(np.uint8)).save(paths["png"])
    paths["npy"] = folder / "a.npy"
    np.save(paths["npy"], data)
    for kind, suffix in (("pngs", "png"), ("tiffs", "tif")):
        paths[kind] = folder / kind
        paths[kind].mkdir()
        for z, plane in enumerate(data):
            if suffix == "png":
                Image.fromarray(plane.astype(np.uint8)).save(paths[kind] / f"z{z}.png")
            else:
                tifffile.imwrite(paths[kind] / f"z{z}.tif", plane, **gray)
    for kind, options in (("zarr2", {"zarr_format": 2}), ("zarr3", {}), ("shards", {"shards": (2, 32, 32)})):
        paths[kind] = folder / f"{kind}.zarr"
        zarr.create_array(paths[kind], shape=SHAPE, chunks=(1, 16, 16), dtype="u2", **options)[:] = data
    paths["ome-zarr"] = _write_ome_zarr(folder / "a.ome.zarr", data)
    return paths | _write_medical(folder, data)


def _write_set(folder: Path, data: np.ndarray) -> Path:
    folder.mkdir()
    names = ["a.ome.tif", "b.ome.tif"]
    planes = "".join(
        f'<TiffData FirstZ="{z}" IFD="{z % 3}" PlaneCount="1"><UUID FileName="{names[z // 3]}">urn:{z // 3}</UUID>'
        "</TiffData>"
        for z in range(len(data))
    )
    for k, name in enumerate(names):
        text = (
            f'<OME xmlns="{OME}" UUID="urn:{k}"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" '
            f'Type="uint16" SizeX="{SHAPE[2]}" SizeY="{SHAPE[1]}" SizeZ="{SHAPE[0]}" SizeC="1" SizeT="1">{planes}'
            "</Pixels></Image></OME>"
        )
        with tifffile.TiffWriter(folder / name, ome=False) as file:
            for z in range(3):
                file.write(
                    data[3 * k + z],
                    description=None if z else text,
                    metadata=None,
                    contiguous=False,
                    photometric="minisblack",
                )
    return folder


def _write_ome_zarr(path: Path, data: np.ndarray) -> Path:
    group = zarr.open_group(path, mode="w")
    group.create_array("0", shape=data.shape, chunks=(2, 32, 32), dtype="u2")[:] = data
    transformations: Any = [{"type": "scale", "scale": [2.0, 0.5, 0.5]}]
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [
            {
                "axes": [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"],
                "datasets": [{"path": "0", "coordinateTransformations": transformations}],
            }
        ],
    }
    return path


def _write_medical(folder: Path, data: np.ndarray) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    try:
        import mrcfile
        import nibabel
        import pydicom
    except ImportError:
        return paths
    paths["mrc"] = folder / "a.mrc"
    with mrcfile.new(paths["mrc"]) as file:
        file.set_data(data)
    for kind in ("nii", "nii.gz"):
        paths[kind] = folder / f"a.{kind}"
        volume: Any = nibabel.Nifti1Image(data.transpose(), np.eye(4))  # type: ignore[no-untyped-call]
        nibabel.save(volume, paths[kind])
    paths["dicom"] = folder / "dicom"
    paths["dicom"].mkdir()
    for z, plane in enumerate(data):
        header = pydicom.dataset.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.UID(f"1.2.{z + 1}")
        header.SeriesInstanceUID = "1.2.9"
        header.Rows, header.Columns = plane.shape
        header.BitsAllocated = header.BitsStored = 16
        header.HighBit, header.PixelRepresentation, header.SamplesPerPixel = 15, 0, 1
        header.PhotometricInterpretation = "MONOCHROME2"
        header.PixelSpacing, header.SliceThickness = [0.7, 0.6], 9.0
        header.ImageOrientationPatient, header.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2.5 * z]
        header.PixelData = plane.astype("<u2").tobytes()
        header.save_as(paths["dicom"] / f"{z}.dcm", enforce_file_format=True)
    return paths


# damages


def _a_file(path: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(f for f in path.rglob("*") if f.is_file())) if path.is_dir() else path


def _cut(path: Path, rng: random.Random) -> None:
    file = _a_file(path, rng)
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def _empty(path: Path, rng: random.Random) -> None:
    _a_file(path, rng).write_bytes(b"")


def _remove(path: Path, rng: random.Random) -> None:
    if path.is_dir():
        _a_file(path, rng).unlink()
    else:
        _cut(path, rng)


def _flip(path: Path, rng: random.Random, end: int | None = None) -> None:
    file = _a_file(path, rng)
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(min(end or len(data), len(data)))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _flip_head(path: Path, rng: random.Random) -> None:
    _flip(path, rng, 400)


def _scramble(path: Path, rng: random.Random) -> None:
    file = _a_file(path, rng)
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    length = min(rng.randrange(1, 200), len(data) - start)
    data[start : start + length] = rng.choice((bytes(length), rng.randbytes(length)))
    file.write_bytes(data)


def _number(path: Path, rng: random.Random) -> None:
    """Change a number in the metadata: JSON, XML or ImageJ's text; or two bytes of a binary header."""
    texts = [path, *path.rglob("*")] if path.is_dir() else [path]
    files = [
        f for f in texts if f.is_file() and (f.name.startswith((".z", "zarr.json")) or f.suffix in (".tif", ".npy"))
    ]
    if not files:
        _flip_head(path, rng)
        return
    file = rng.choice(sorted(files))
    data = file.read_bytes()
    text = data if b"zarr" in data[:400] or file.name.startswith(".z") else data[:3000]
    numbers = list(re.finditer(rb"(?<=[=\" \[(,:])\d+", text))
    if not numbers:
        _flip_head(path, rng)
        return
    match = rng.choice(numbers)
    value = rng.choice((b"0", b"1", b"7", b"99999", b"99999999999", b"-3"))
    if file.suffix != ".json" and not file.name.startswith(".z"):  # the length of the text stays
        value = value[: len(match[0])].rjust(len(match[0]), b"0")
    file.write_bytes(data[: match.start()] + value + data[match.end() :])


def _tag(path: Path, rng: random.Random) -> None:
    """Change a tag of a page of a TIFF."""
    file = _a_file(path, rng)
    try:
        with tifffile.TiffFile(file, mode="r+") as opened:
            page: Any = rng.choice(list(opened.pages))
            tag = rng.choice(list(page.tags.values()))
            value = rng.choice((0, 1, 3, 16, 65535))
            tag.overwrite([value] * tag.count if tag.count > 1 and not isinstance(tag.value, str) else value)
    except Exception:  # noqa: BLE001 - not every tag takes every value
        _flip_head(path, rng)


def _absurd(path: Path, rng: random.Random) -> None:
    """State an absurd size."""
    large = rng.choice((10**6, 10**9, 2**31, 99_999_999_999))
    metadata = [f for f in (path / "zarr.json", path / ".zarray", path / "0" / "zarr.json") if f.is_file()]
    if metadata and (metadata[-1].name == ".zarray" or b"shape" in metadata[-1].read_bytes()):
        content = json.loads(metadata[-1].read_text())
        content["shape"][rng.randrange(3)] = large
        metadata[-1].write_text(json.dumps(content))
    elif path.suffix == ".npy":
        data = path.read_bytes()
        path.write_bytes(data.replace(b"(6, 40, 48)", b"(6, 4%d8)" % 0 if rng.random() < 0.2 else b"(6,9999999)"[:11]))
    elif path.suffix == ".tif":
        with tifffile.TiffFile(path, mode="r+") as opened:
            name = rng.choice(("ImageLength", "ImageWidth"))
            opened.pages.first.tags[name].overwrite(min(large, 60000), dtype=tifffile.DATATYPE.LONG)
    else:
        _flip_head(path, rng)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "cut": _cut,
    "empty": _empty,
    "remove": _remove,
    "flip": _flip,
    "flip head": _flip_head,
    "scramble": _scramble,
    "number": _number,
    "tag": _tag,
    "absurd": _absurd,
}


# routes


def _as_support(path: Path) -> np.ndarray:
    slices, _ = load_pair(path, path, None, "binary", None)
    return np.stack([s.image for s in slices])


def _as_volume(path: Path) -> np.ndarray:
    with open_volume(path) as volume:
        if int(np.prod(volume.shape, dtype=object)) > 1 << 24:  # read as a run does: piece by piece
            return np.stack([volume.read(slice(z, z + 1), slice(0, 64), slice(0, 64))[0] for z in range(2)])
        return volume.read()


ROUTES: dict[str, Callable[[Path], np.ndarray]] = {
    "image": read_stack,
    "labels": read_label_stack,
    "support": _as_support,
    "volume": _as_volume,
}


def reference(kind: str, path: Path) -> np.ndarray | None:
    """What the format's own reader gives; None where it fails, or does not read so much as a stack."""
    try:
        if path.suffix == ".tif":
            return np.asarray(tifffile.imread(path))
        if kind == "png":
            return np.asarray(Image.open(path))
        if kind == "npy":
            return np.asarray(np.load(path, allow_pickle=False))
        if kind in ("zarr2", "zarr3", "shards", "ome-zarr"):
            return np.asarray(zarr.open_array(path / "0" if kind == "ome-zarr" else path, mode="r")[:])
        return _reference_of_many(kind, path)
    except Exception:  # noqa: BLE001 - other libraries raise what they like
        return None


def _reference_of_many(kind: str, path: Path) -> np.ndarray | None:
    if kind == "set":
        return np.asarray(tifffile.imread(path / "a.ome.tif"))
    if kind in ("pngs", "tiffs"):
        read = Image.open if kind == "pngs" else tifffile.imread
        return np.stack([np.asarray(read(f)) for f in sorted(path.iterdir())])
    if kind == "mrc":
        import mrcfile

        return np.asarray(mrcfile.read(path))
    if kind in ("nii", "nii.gz"):
        import nibabel

        image: Any = nibabel.load(path)
        return np.asarray(image.dataobj).transpose()
    import pydicom

    headers = [pydicom.dcmread(f) for f in sorted(path.iterdir())]
    headers.sort(key=lambda h: float(h.ImagePositionPatient[2]))
    return np.stack([h.pixel_array for h in headers])


def same(result: np.ndarray, expected: np.ndarray | None) -> bool:
    """Whether the voxels are the same, where they lie and in number; axes of length one do not count."""
    if expected is None:
        return False
    a, b = np.squeeze(result), np.squeeze(expected)
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f" and b.dtype.kind == "f"))


def judge(kind: str, damage: str, path: Path, result: np.ndarray, warned: bool) -> str:
    """The outcome of a damaged input that was read."""
    data = truth()
    whole = data[:1] if kind == "png" else data
    if same(result, whole):
        return "equal"
    if warned:
        return "warning"
    shorter = kind in ("pngs", "tiffs", "dicom") and any(same(result, part) for part in (whole[1:], whole[:-1]))
    if shorter:  # the first or the last of files that do not state how many they are
        return "as stated"
    if damage not in PARTS and same(result, reference(kind, path)):
        return "as stated"
    return "silent"


# cases


class _Warned(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def run_case(sound: dict[str, Path], seed: int, number: int, folder: Path) -> dict[str, Any]:
    """Damage a copy of an input and read it, in a process of its own."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice(sorted(sound))
    routes = [r for r in ROUTES if r == "volume" or kind in IMAGES]
    route, damage = rng.choice(routes), rng.choice(sorted(DAMAGES))
    copy = folder / sound[kind].name
    (shutil.copytree if sound[kind].is_dir() else shutil.copy)(sound[kind], copy)
    DAMAGES[damage](copy, rng)
    case = {"number": number, "kind": kind, "damage": damage, "route": route}
    return case | in_process(lambda: _outcome(kind, damage, route, copy))


def _outcome(kind: str, damage: str, route: str, path: Path) -> dict[str, Any]:
    warned = _Warned()
    logging.getLogger("distillfss_core").addHandler(warned)
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    target = path / "a.ome.tif" if kind == "set" and route != "volume" else path
    try:
        result = ROUTES[route](target)
    except DistillFSSError as error:
        text = str(error)
        return {"outcome": "error" if "\n" not in text and path.name in text else "traceback", "detail": text}
    except MemoryError:
        return {"outcome": "memory", "detail": traceback.format_exc()}
    except BaseException:  # noqa: BLE001 - this is what is looked for
        return {"outcome": "traceback", "detail": traceback.format_exc()}
    outcome = judge(
        kind, damage, target if kind == "set" and route != "volume" else path, result, bool(warned.messages)
    )
    return {"outcome": outcome, "detail": "; ".join(warned.messages) or str(result.shape)}


def in_process(work: Callable[[], dict[str, Any]], seconds: int = SECONDS) -> dict[str, Any]:
    """The result of a function in a copy of this process, with limits.

    The seconds are those of the processor; on a busy machine ten times as many may pass.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10 * seconds)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os.write(writing, json.dumps(work()).encode()[-60000:])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU):
        return {"outcome": "hang", "detail": f"more than {seconds} s"}
    if not text:
        return {"outcome": "memory", "detail": f"status {status}"}
    result: dict[str, Any] = json.loads(text)
    return result


Case = Callable[[dict[str, Path], int, int, Path], dict[str, Any]]
"""Damages one of the sound inputs by seed and number in a folder; the outcome."""


def run_cases(
    cases: int, seed: int, results: Path, run: Case = run_case, prepare: Callable[[Path], None] | None = None
) -> list[dict[str, Any]]:
    """Run those cases that the results do not hold yet; all there are.

    ``prepare`` adds to the folder of the sound inputs what the cases need.
    """
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    have = {case["number"] for case in done if case["seed"] == seed}
    with tempfile.TemporaryDirectory() as folder, open(results, "a", encoding="utf-8") as file:
        (Path(folder) / "sound").mkdir()
        made = in_process(lambda: {k: str(p) for k, p in write_sound(Path(folder) / "sound").items()})
        sound = {kind: Path(path) for kind, path in made.items()}  # zarr's thread does not survive a fork
        if prepare is not None:
            prepare(Path(folder) / "sound")
        for number in range(cases):
            if number in have:
                continue
            place = Path(folder) / str(number)
            place.mkdir()
            case = {"seed": seed, **run(sound, seed, number, place)}
            shutil.rmtree(place, ignore_errors=True)
            file.write(json.dumps(case) + "\n")
            file.flush()
            done.append(case)
    return [case for case in done if case["seed"] == seed and case["number"] < cases]


def table_of(done: list[dict[str, Any]]) -> str:
    """Counts of the outcomes of each format, and of all."""
    counts = Counter((case["kind"], case["outcome"]) for case in done)
    kinds = sorted({case["kind"] for case in done})
    lines = [f"{'format':10}" + "".join(f"{o:>11}" for o in OUTCOMES)]
    lines += [f"{kind:10}" + "".join(f"{counts[kind, o]:11}" for o in OUTCOMES) for kind in kinds]
    total = Counter(case["outcome"] for case in done)
    return "\n".join([*lines, f"{'all':10}" + "".join(f"{total[o]:11}" for o in OUTCOMES)])


def parse_arguments(description: str | None, cases: int, results: str) -> argparse.Namespace:
    """The options of a run, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=cases)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path(results))
    return parser.parse_args()


def report(done: list[dict[str, Any]]) -> int:
    """Print the table and all defects; the exit code."""
    print(table_of(done))
    defects = [case for case in done if case["outcome"] in DEFECTS]
    for case in defects:
        last = case["detail"].strip().splitlines()[-1:]
        print(f"case {case['number']}: {case['kind']}, {case['damage']}, {case['route']}: {case['outcome']} {last}")
    return 1 if defects else 0


def main() -> int:
    args = parse_arguments(__doc__, 1000, "fuzz.jsonl")
    return report(run_cases(args.cases, args.seed, args.results))


if __name__ == "__main__":
    sys.exit(main())
