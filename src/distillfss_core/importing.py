"""Published checkpoints become head files and students of this package."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distillfss_core.errors import SettingsError
from distillfss_core.models.card import read_card
from distillfss_core.models.preprocess import Limits, Preprocess
from distillfss_core.models.student import StudentModel
from distillfss_core.nn.backbones import Backbone, load_backbone
from distillfss_core.nn.device import choose_device
from distillfss_core.nn.head import FewShotHead
from distillfss_core.nn.pretrained import read_head_card, write_head
from distillfss_core.nn.published import PUBLISHED_FORM, PublishedCheckpoint, read_published
from distillfss_core.support.support_set import check_class_names

_RGB = Preprocess(
    channels=3,
    mix=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    scope="volume",
    fitted=Limits((0.0,) * 3, (255.0,) * 3),
    together=True,
)
"""Color images of eight bits become 0..1, as in the published code."""


def import_checkpoint(
    path: str | Path,
    output: str | Path,
    *,
    classes: Sequence[str] | None = None,
    weights: str | Path | None = None,
) -> dict[str, Any]:
    """Turn a published checkpoint into a file of this package.

    A checkpoint of DCAMA [1]_ becomes a head file for ``DistillSettings(head=...)``. The file selects the published
    forms. A checkpoint of DistillFSS [2]_ becomes a student for `StudentModel.load`. Weights are kept as they are, in
    single precision.

    Parameters
    ----------
    path : path
        safetensors, or a state dict of ``torch.save``. Nothing in it is run.
    output : path
        File to write; one that is there is replaced.
    classes : sequence of str, optional
        Names of the classes of a student; by default "object", or "class 1", "class 2", ...
    weights : str or path, optional
        Backbone weights, as for `load_backbone`, in place of those in the checkpoint. By default those are taken; where
        there are none, those of the hub, which a student needs at once and a head when it is used.

    Returns
    -------
    dict
        The card of the written file; ``card["format"]`` is "distillfss-head" or "distillfss-student".

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, of another kind, or a tensor does not fit.
    SettingsError
        If there is another number of classes.
    SupportSetError
        If their names are not possible.
    WeightsUnavailableError
        If the backbone's weights are needed and cannot be had.
    OutputError
        If the file cannot be written.

    References
    ----------
    .. [1] Shi, Wei, Zhang, Lu, Ning, Chen, Ma, Zheng, "Dense Cross-Query-and-Support Attention Weighted Mask
       Aggregation for Few-Shot Segmentation", ECCV 2022.
    .. [2] De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano, "DistillFSS: Synthesizing Few-Shot Knowledge into a
       Lightweight Segmentation Model", arXiv:2512.05613, 2025.
    """
    path = Path(path)
    checkpoint = read_published(path, with_backbone=weights is None)
    names = _class_names(checkpoint, classes, path)
    origin = {"file": path.name, "sha256": _sha256(path), "layout": checkpoint.layout, "fold": _fold(path.name)}
    backbone = checkpoint.backbone
    if backbone is None and (checkpoint.classes or weights is not None):
        backbone = load_backbone(checkpoint.spec.name, weights or "auto")
    if not checkpoint.classes:
        card = _head_card(checkpoint, backbone, origin)
        write_head(output, card, checkpoint.teacher, backbone.state() if backbone else {})
        return read_head_card(output)
    assert backbone is not None
    head = FewShotHead(checkpoint.spec, checkpoint.classes, PUBLISHED_FORM)
    head.teacher.load_state_dict(checkpoint.teacher)
    head.student.load_state_dict(checkpoint.students)
    device = choose_device("cpu", "float32")
    StudentModel(backbone, head, _RGB, names, device=device, engine="torch", training={"imported": origin}).save(output)
    return read_card(output)


def _class_names(checkpoint: PublishedCheckpoint, classes: Sequence[str] | None, path: Path) -> tuple[str, ...]:
    count = checkpoint.classes
    if classes is None:
        return ("object",) if count == 1 else tuple(f"class {number}" for number in range(1, count + 1))
    if len(classes) != count:
        what = f"{path} has {count}" if count else f"{path} is a head of DCAMA, which has none"
        raise SettingsError(f"{len(classes)} classes are named, but {what}; give as many names, or none")
    return check_class_names(classes)


def _head_card(checkpoint: PublishedCheckpoint, backbone: Backbone | None, origin: dict[str, Any]) -> dict[str, Any]:
    spec = checkpoint.spec
    return {
        "name": Path(origin["file"]).stem,
        "backbone": {
            "name": spec.name,
            "weights": backbone.weights if backbone else f"hub:{spec.hub_id}",
            "license": backbone.license if backbone else spec.license,
            "digest": backbone.digest() if backbone else None,
        },
        "width": PUBLISHED_FORM.width,
        "preset": "published",
        "parameters": sum(value.numel() for value in checkpoint.teacher.values()),
        "imported": origin,
        "data": [],
        "held_out": [],
        "scores": {},
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fold(name: str) -> int | None:
    """The fold of PASCAL-5i that the name of a file states."""
    match = re.search(r"fold[_-]?(\d)", name)
    return int(match[1]) if match else None
