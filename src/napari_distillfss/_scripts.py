"""What was done, as commands and as Python: the very steps, to be run without napari."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

import distillfss_core as core
from napari_distillfss._annotations import Annotations
from napari_distillfss._session import Session

NO_FILE = "VOLUME.ome.zarr"
_NO_FILE_NOTE = f"# the volume is in napari only: save it as a file, and put its name in place of {NO_FILE}"


def write_support(volume: Any, annotations: Annotations, folder: Path) -> Path:
    """Write the enabled slices as images/plane_012.tif and labels/plane_012.tif (0 not labelled, 1 background).

    Raises
    ------
    core.OutputError
    """
    planes = [s.plane for s in annotations.slices() if s.enabled]
    write_planes(folder, {z: (volume.plane(z), annotations.plane(z)) for z in planes})
    return folder


def write_planes(folder: Path, planes: dict[int, tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """Images and labels by plane, in two folders; files of other planes that an earlier call left are removed."""
    written = []
    try:
        for name in ("images", "labels"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for old in (folder / name).glob("plane_*.tif"):
                old.unlink()
        for z, (image, labels) in planes.items():
            file = f"plane_{z:04d}.tif"
            kind = "rgb" if image.ndim == 3 and image.shape[-1] in (3, 4) else "minisblack"
            tifffile.imwrite(folder / "images" / file, image, photometric=kind)
            core.write_labels(folder / "labels" / file, labels)
            written += [str(folder / "images" / file), str(folder / "labels" / file)]
    except OSError as fault:
        raise core.OutputError(f"cannot write {folder}: {fault.strerror or fault}") from fault
    return written


def command_line(session: Session, support: Path) -> str:
    """The commands of `distillfss` that do what was done here."""
    lines = []
    model = str(session.model_path or "MODEL.safetensors")
    if session.training is not None:
        words = ["distillfss", "distill", str(support / "images"), str(support / "labels"), "-o", model]
        words += ["--scribbles", "--classes", ",".join(_names(session))]
        pixel = session.training.volume.pixel_size
        words += ["--pixel-size", f"{pixel[0]:g},{pixel[1]:g}"] if pixel else []
        words += ["--start", str(session.training.start)] if session.training.start else []
        for name, value in _settings(session).items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        lines.append(shlex.join(words))
    if session.applied is not None:
        done = session.applied
        words = ["distillfss", "segment", _source(session), "-m", model, "-o", str(done.out), "--mode", done.mode]
        words += ["--region", ",".join(f"{a}:{b}" for a, b in done.region)] if done.region else []
        for name, value in _opening(session).items():
            words += [f"--{name}", str(value)]
        lines += [_NO_FILE_NOTE] if _source(session) == NO_FILE else []
        lines.append(shlex.join([*words, "--resume"]))
    if session.counted is not None and session.applied is not None:
        count = session.counted
        words = ["distillfss", "instances", str(session.applied.out), "-o", str(count.out), "--table", str(count.table)]
        names = {"radius": "--watershed", "min_voxels": "--min-voxels", "value": "--value"}
        words += [w for name, option in names.items() if name in count.how for w in (option, str(count.how[name]))]
        if _is_measured(session):
            words += ["--image", _source(session)]
            words += [
                w for k, v in _opening(session).items() for w in (f"--{k.replace('level', 'image-level')}", str(v))
            ]
        lines.append(shlex.join(words))
    return "\n".join(lines)


def python_lines(session: Session, support: Path) -> str:
    """The same in Python."""
    lines = []
    model = str(session.model_path or "MODEL.safetensors")
    names = ["StudentModel"]
    if session.training is not None:
        names += ["DistillSettings", "distill", "load_support"]
        pixel = session.training.volume.pixel_size
        start = session.training.start
        settings = ", ".join(f"{k}={v!r}" for k, v in _settings(session).items())
        lines += [
            f"support = load_support({str(support / 'images')!r}, {str(support / 'labels')!r},",
            f"                       classes={_names(session)!r}, scribbles=True, pixel_size={pixel!r})",
            f"model = distill(support, DistillSettings({settings})"
            + (f", start=StudentModel.load({str(start)!r}))" if start else ")"),
            f"model.save({model!r})",
        ]
    else:
        lines.append(f"model = StudentModel.load({model!r})")
    if session.applied is not None:
        done = session.applied
        names += ["open_volume", "segment_to_zarr"]
        opening = "".join(f", {k}={v!r}" for k, v in _opening(session).items())
        lines += [_NO_FILE_NOTE] if _source(session) == NO_FILE else []
        lines += [
            f"with open_volume({_source(session)!r}{opening}) as volume:",
            f"    segment_to_zarr(volume, model, {str(done.out)!r}, region={done.region!r}, mode={done.mode!r})",
        ]
    if session.counted is not None and session.applied is not None:
        count = session.counted
        names += ["label_instances", "open_volume"]
        how = "".join(f", {k}={v!r}" for k, v in count.how.items())
        if _is_measured(session):
            opening = "".join(f", {k}={v!r}" for k, v in _opening(session).items())
            how += f", image=open_volume({_source(session)!r}{opening})"
        lines.append(
            f"label_instances(open_volume({str(session.applied.out)!r}), {str(count.out)!r}, "
            f"table={str(count.table)!r}{how})"
        )
    return "\n".join([f"from distillfss_core import {', '.join(sorted(set(names)))}", "", *lines])


def _settings(session: Session) -> dict[str, Any]:
    """Those that were changed, and what makes separate files count as planes of one stack."""
    assert session.training is not None
    given = dict(session.training.settings)
    if session.training.start is None and given.get("intensity", "auto") == "auto":
        given["intensity"] = "volume"
    if given.get("polarity", "auto") == "auto":
        given["polarity"] = "0"
    return given


def _is_measured(session: Session) -> bool:
    """Whether the image's mean over each object was measured, and can be again."""
    volume = session.applied.volume.volume if session.applied else None
    return volume is not None and volume.path is not None and volume.ndim == 3


def _names(session: Session) -> list[str]:
    return list(session.model.class_names)


def _source(session: Session) -> str:
    volume = session.applied.volume.volume if session.applied else None
    return str(volume.path) if volume is not None and volume.path else NO_FILE


def _opening(session: Session) -> dict[str, Any]:
    chosen = session.applied.volume.opening if session.applied else {}
    return {name: value for name, value in chosen.items() if value is not None and not (name == "level" and not value)}
