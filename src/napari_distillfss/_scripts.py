"""The steps of a session as shell commands and as Python lines that run without napari."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from napari_distillfss._annotations import UNLABELED_IMAGES
from napari_distillfss._session import Session

NO_FILE = "VOLUME.ome.zarr"
_NO_FILE_NOTE = f"# the volume is in napari only: save it as a file, and put its name in place of {NO_FILE}"


def command_line(session: Session) -> str:
    """Commands of `distillfss` that repeat the steps of the session, beside the files that exist."""
    lines = []
    model = _name(_repeated_model(session))
    if session.training is not None:
        support = session.training.support or Path("SUPPORT")
        words = ["distillfss", "distill", str(support / "images"), str(support / "labels"), "-o", model]
        words += ["--same-volume", "--scribbles", "--classes", ",".join(session.training.classes)]
        pixel = session.training.pixel_size
        words += ["--pixel-size", f"{pixel[0]},{pixel[1]}"] if pixel else []
        words += ["--init-from", str(session.training.start)] if session.training.start else []
        unlabeled = _unlabeled_of(support)
        words += ["--unlabeled", str(unlabeled)] if unlabeled else []
        for name, value in session.training.settings.items():
            words += [f"--{name.replace('_', '-')}", "none" if value is None else str(value)]
        lines.append(shlex.join(words))
    if session.applied is not None and not session.applied.is_earlier:
        done = session.applied
        words = ["distillfss", "segment", _source(session), "-m", _name(_applied_model(session)), "-o"]
        words += [str(free_name(done.out))]
        words += ["--mode", done.mode]
        words += ["--tta"] if done.tta else []
        words += ["--region", ",".join(f"{a}:{b}" for a, b in done.region)] if done.region else []
        for name, value in _opening(session).items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        lines += [_NO_FILE_NOTE] if _source(session) == NO_FILE else []
        lines.append(shlex.join([*words, "--resume"]))
    if session.counted is not None and session.applied is not None:
        count = session.counted
        words = ["distillfss", "instances", str(_counted_labels(session)), "-o", str(free_name(count.out))]
        words += ["--table", str(free_name(count.table))]
        names = {"method": "--method", "radius": "--radius", "min_voxels": "--min-voxels", "class_id": "--class-id"}
        words += [
            w for name, option in names.items() if name in count.options for w in (option, str(count.options[name]))
        ]
        if _is_measured(session):
            words += ["--image", _source(session)]
            options = {"level": "image-level", "replace_nan": "replace-nan"}
            words += [w for k, v in _opening(session).items() for w in (f"--{options.get(k, k)}", str(v))]
        lines.append(shlex.join(words))
    return "\n".join(lines)


def python_lines(session: Session) -> str:
    """Python lines that repeat the steps of the session, beside the files that exist."""
    lines = []
    model = _name(_repeated_model(session))
    names = ["StudentModel"]
    if session.training is not None:
        names += ["DistillSettings", "distill", "load_support"]
        pixel = session.training.pixel_size
        start, support = session.training.start, session.training.support or Path("SUPPORT")
        settings, unlabeled = dict(session.training.settings), _unlabeled_of(support)
        names += ["load_unlabeled"] if unlabeled else []
        lines += [
            f"# the model of the session is {_name(session.model_path)}; these lines train it again",
            f"support = load_support({str(support / 'images')!r}, {str(support / 'labels')!r},",
            f"                       classes={list(session.training.classes)!r}, scribbles=True, pixel_size={pixel!r},",
            "                       same_volume=True)",
            f"model = distill(support, DistillSettings.from_json({settings!r})"
            + (f", init_from=StudentModel.load({str(start)!r})" if start else "")
            + (f", unlabeled=load_unlabeled({str(unlabeled)!r}, support))" if unlabeled else ")"),
            f"model.save({model!r})",
        ]
    else:
        lines.append(f"model = StudentModel.load({model!r})")
    if session.applied is not None and not session.applied.is_earlier:
        done = session.applied
        names += ["open_volume", "segment_to_zarr"]
        opening = "".join(f", {k}={v!r}" for k, v in _opening(session).items())
        lines += [_NO_FILE_NOTE] if _source(session) == NO_FILE else []
        if done.model != session.model_path:
            lines.append(f"model = StudentModel.load({_name(done.model)!r})")
        lines += [
            f"with open_volume({_source(session)!r}{opening}) as volume:",
            f"    segment_to_zarr(volume, model{'.with_tta()' if done.tta else ''}, {str(free_name(done.out))!r}, "
            f"region={done.region!r}, mode={done.mode!r}, resume=True)",
        ]
    if session.counted is not None and session.applied is not None:
        count = session.counted
        names += ["label_instances", "open_volume"]
        options = "".join(f", {k}={v!r}" for k, v in count.options.items())
        if _is_measured(session):
            opening = "".join(f", {k}={v!r}" for k, v in _opening(session).items())
            options += f", image=open_volume({_source(session)!r}{opening})"
        lines.append(
            f"label_instances(open_volume({str(_counted_labels(session))!r}), {str(free_name(count.out))!r}, "
            f"table={str(free_name(count.table))!r}{options})"
        )
    return "\n".join([f"from distillfss_core import {', '.join(sorted(set(names)))}", "", *lines])


def _unlabeled_of(support: Path) -> Path | None:
    """Folder of the images without labels that a student learned from."""
    folder = support / UNLABELED_IMAGES
    return folder if folder.is_dir() else None


def free_name(path: Path) -> Path:
    """The path, or where it exists one beside it: "labels-again.ome.zarr"."""
    stem, dot, suffixes = path.name.partition(".")
    number, free = 1, path
    while free.exists():
        free = path.with_name(f"{stem}-again{number if number > 1 else ''}{dot}{suffixes}")
        number += 1
    return free


def _repeated_model(session: Session) -> Path | None:
    """File of the student in the script: another one where the script trains it again."""
    path = session.model_path
    return path if path is None or session.training is None else free_name(path)


def _applied_model(session: Session) -> Path | None:
    done = session.applied
    is_present = done is None or done.model == session.model_path
    return _repeated_model(session) if is_present or done is None else done.model


def _counted_labels(session: Session) -> Path:
    """Labels whose objects the script counts: those it writes, or those written before the session."""
    done = session.applied
    assert done is not None  # what was counted was applied
    return done.out if done.is_earlier else free_name(done.out)


def _name(model: Path | None) -> str:
    return str(model or "MODEL.safetensors")


def _is_measured(session: Session) -> bool:
    """Whether the image's mean over each object was measured and can be measured again."""
    volume = session.applied.volume.volume if session.applied else None
    return volume is not None and volume.location is not None and volume.ndim == 3


def _source(session: Session) -> str:
    volume = session.applied.volume.volume if session.applied else None
    return volume.location or NO_FILE if volume is not None else NO_FILE


def _opening(session: Session) -> dict[str, Any]:
    chosen = session.applied.volume.opening if session.applied else {}
    return {name: value for name, value in chosen.items() if value is not None and not (name == "level" and not value)}
