"""The card and the thumbnails in the file of a student."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distillfss_core.errors import ModelFileError
from distillfss_core.nn.checkpoint import FileKind, read_card_file
from distillfss_core.nn.head import HeadForm
from distillfss_core.support.support_set import SupportSet
from distillfss_core.types import evenly

STUDENT_FILE = FileKind("distillfss-student", "DistillFSS student", 3)
THUMBNAIL = 96

EXPECTED_ERROR = 0.15
"""Root of the mean squared difference of expected and measured IoU, over draws of ``benchmarks/validation.py``."""


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """Small images of the support: ``images`` "n t t" uint8 and ``labels`` "n t t" uint8."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]


_OLDER_KEYS = {"left_out_slice": "validation_slice", "left_out_iou": "validation_iou"}


def upgrade_card(card: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """The card of an older file in the words of today; that of a new one as it is.

    Parameters
    ----------
    card : mapping
    source : str or path
        For error messages.

    Raises
    ------
    ModelFileError
        If parts of it are missing or not possible.
    """
    try:
        training = {_OLDER_KEYS.get(name, name): value for name, value in card["training"].items()}
        probe = {"alone": True, "bound": None, **card["probe"]} if card.get("probe") else None
        head = HeadForm.from_json(card["head"]).to_json()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ModelFileError(f"{source}: its card is damaged ({reason}); take another copy, or train again") from error
    bad = [name for name, value in (probe or {}).items() if name in _OF_PROBE and not _OF_PROBE[name](value)]
    if probe and bad:
        raise ModelFileError(
            f"{source}: its card is damaged: {bad[0]} {probe[bad[0]]!r} of its probe is not possible; take another "
            "copy, or train again"
        )
    return {**card, "probe": probe, "head": head, "training": training}


def _is_bound(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (is_number and 0 < value < math.inf)


_OF_PROBE: Mapping[str, Callable[[Any], bool]] = {
    "inputs": lambda value: value in (1, 3),
    "alone": lambda value: isinstance(value, bool),
    "bound": _is_bound,
}
"""What the values of a probe must be."""


def describe_expectation(training: Mapping[str, Any]) -> str | None:
    """A phrase with the IoU to expect on new slices, or with the reason why none is to be expected.

    Such as "IoU 0.71 ± 0.15 expected on new slices of these kinds" or "no IoU to expect, as it learned from one slice".

    Parameters
    ----------
    training : mapping
        Of the card of a student.

    Returns
    -------
    str or None
        None for an older file, which states neither.
    """
    if (value := training.get("expected_iou")) is not None:
        return f"IoU {value:.2f} ± {EXPECTED_ERROR} expected on new slices of these kinds"
    reason = training.get("no_expectation")
    return None if reason is None else f"no IoU to expect, as {reason}"


def describe_specialization(training: Mapping[str, Any]) -> str | None:
    """A phrase that says whether a specialized backbone was kept; None where none was made.

    Parameters
    ----------
    training : mapping
        Of the card of a student.
    """
    made = training.get("specialization")
    if made is None:
        return None
    kept = "backbone specialized" if made["kept"] else "specialized backbone dropped"
    return f"{kept} (IoU on held-out slices {made['iou_before']:.3f} before, {made['iou_after']:.3f} after)"


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of a student file, without loading the model (its tensors are not checked).

    Raises
    ------
    ModelFileError
        As `StudentModel.load` does.
    """
    card, _, header = read_card_file(path, STUDENT_FILE, tensors=False)
    return upgrade_card(card, path) | {
        "backbone_inside": header.get("backbone") == "true",
        "bytes": Path(path).stat().st_size,
    }


def read_thumbnails(path: str | Path) -> Thumbnails | None:
    """The support thumbnails of a student file, if it has any."""
    _, tensors, _ = read_card_file(path, STUDENT_FILE)
    if "thumbnails.images" not in tensors:
        return None
    return Thumbnails(tensors["thumbnails.images"].numpy(), tensors["thumbnails.labels"].numpy())


def thumbnails(support: SupportSet, limit: int = 16) -> Thumbnails:
    """Small images of up to ``limit`` slices, evenly chosen: image stretched to its own range, labels by nearest."""
    chosen = [support.slices[i] for i in evenly(len(support), limit)]
    images, labels = [], []
    for labeled in chosen:
        h, w = labeled.labels.shape
        rows = ((np.arange(THUMBNAIL) + 0.5) * h / THUMBNAIL).astype(int)
        columns = ((np.arange(THUMBNAIL) + 0.5) * w / THUMBNAIL).astype(int)
        small = labeled.image[rows][:, columns].astype(np.float32)
        small = small.mean(-1) if small.ndim == 3 else small
        low, high = np.percentile(small, (1, 99))
        images.append((np.clip((small - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8))
        labels.append(labeled.labels[rows][:, columns])
    return Thumbnails(np.stack(images), np.stack(labels))
