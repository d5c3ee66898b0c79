"""Checkpoints of the published DCAMA [1]_ and DistillFSS [2]_, as tensors under the names of this package.

Nothing is guessed and nothing is run: files are safetensors or ``torch.load(weights_only=True)``. Every tensor of a
file has one place, every place gets one tensor, and what does not fit is named in the error.

References
----------
.. [1] Shi, Wei, Zhang, Lu, Ning, Chen, Ma, Zheng, "Dense Cross-Query-and-Support Attention Weighted Mask
   Aggregation for Few-Shot Segmentation", ECCV 2022.
.. [2] De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano, "DistillFSS: Synthesizing Few-Shot Knowledge into a
   Lightweight Segmentation Model", arXiv:2512.05613, 2025.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from distillfss_core.errors import ModelFileError, WeightsUnavailableError
from distillfss_core.nn.backbones import IMPORTED, SPECS, Backbone, BackboneSpec, backbone_from_tensors
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.teachers import position_encoding
from distillfss_core.nn.tensor_files import match_tensors, read_tensors
from distillfss_core.types import IGNORE

PUBLISHED_FORM = HeadForm("published", "published", "published", 32)
"""Of the heads in these files; the width is that of the default decoder and has no meaning here."""

BACKBONES: tuple[BackboneSpec, ...] = tuple(
    SPECS[name] for name in ("resnet50", "resnet101", "swin_base_384", "dinov3_large")
)
"""Backbones that heads were published for."""

_FIRST = "model.DCAMA_blocks.0.linears.0.weight"
_ENCODING = 1e-2  # float32 sines of positions up to 10,000 differ from exact ones by a thousandth


@dataclass(frozen=True, eq=False)
class PublishedCheckpoint:
    """What a published checkpoint holds.

    Parameters
    ----------
    spec : BackboneSpec
        Backbone that the head is for.
    teacher : dict of str to Tensor
        Attention and decoder, under their names in a `DcamaTeacher` with `PublishedDecoder`; float32.
    students : dict of str to Tensor
        Under their names in `ConvDist`, float32; empty for a checkpoint of DCAMA.
    classes : int
        Number of students, one a class; 0 for a checkpoint of DCAMA.
    backbone : Backbone, optional
        Made of the tensors in the file; None if it holds none.
    """

    spec: BackboneSpec
    teacher: dict[str, Tensor]
    students: dict[str, Tensor]
    classes: int
    backbone: Backbone | None

    @property
    def layout(self) -> str:
        """The method that the checkpoint belongs to: "DCAMA" or "DistillFSS"."""
        return "DistillFSS" if self.classes else "DCAMA"


def read_published(path: str | Path, *, with_backbone: bool = True) -> PublishedCheckpoint:
    """Read a published checkpoint.

    Parameters
    ----------
    path : path
        safetensors, or a state dict of ``torch.save``, alone or beside the state of its training.
    with_backbone : bool
        False leaves the backbone out, whatever names its tensors have.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, of another kind, holds objects other than tensors, or a tensor does not fit;
        one line with the name of the first one.
    """
    path = Path(path)
    weights = f"{IMPORTED}{path.name}"
    return map_published(read_tensors(path), str(path), weights=weights, with_backbone=with_backbone)


def map_published(
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    specs: Sequence[BackboneSpec] | None = None,
    weights: str = IMPORTED,
    with_backbone: bool = True,
) -> PublishedCheckpoint:
    """Give the tensors of a published checkpoint the names that they have here.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        ``model.*`` and ``feature_extractor.*``, in distilled checkpoints after ``teacher.`` and beside
        ``student.<class>.*``; all of them may begin with ``module.``.
    source : str
        For messages.
    specs : sequence of BackboneSpec, optional
        Backbones that the head may be for; by default `BACKBONES`.
    weights : str
        Source of the backbone, stored as ``Backbone.weights``.
    with_backbone : bool
        As for `read_published`.

    Raises
    ------
    ModelFileError
        As `read_published` does.
    """
    wrapper = "module." if any(key.startswith("module.") for key in tensors) else ""
    students = f"{wrapper}student."
    is_distilled = any(key.startswith(students) for key in tensors)
    inner = f"{wrapper}teacher." if is_distilled else wrapper
    prefixes = [f"{inner}model.", f"{inner}feature_extractor.", *([students] if is_distilled else [])]
    parts = _split(tensors, prefixes, source)
    head = parts[prefixes[0]]
    spec = _likely_spec(head, specs or BACKBONES, f"{inner}{_FIRST}", source)
    _take_encodings(head, spec, prefixes[0], source)
    classes = _count_classes(parts[students], students, source) if is_distilled else 0
    with torch.device("meta"):
        places = FewShotHead(spec, max(1, classes), PUBLISHED_FORM)
    wanted = places.teacher.state_dict()
    _refuse_support_skip(head, wanted, spec, prefixes[0], source)
    names = {name: name.removeprefix("decoder.") for name in wanted}
    teacher = match_tensors(head, names, wanted, prefixes[0], source)
    names = {name: name.removeprefix("classes.") for name in places.student.state_dict()} if is_distilled else {}
    matched = match_tensors(parts.get(students, {}), names, places.student.state_dict(), students, source)
    kept = parts[prefixes[1]] if with_backbone else {}
    backbone = _backbone(kept, spec, weights, f"{source}, {prefixes[1]}*")
    return PublishedCheckpoint(spec, teacher, matched, classes, backbone)


def _split(tensors: Mapping[str, Tensor], prefixes: Sequence[str], source: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part, without the prefix of the part."""
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for key, value in tensors.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if prefix is None:
            wanted = ", ".join(f"{p}*" for p in prefixes)
            raise ModelFileError(
                f"{source}: tensor {key!r} has no place in a checkpoint of {wanted}; give another file"
            )
        parts[prefix][key.removeprefix(prefix)] = value
    return parts


def _likely_spec(head: Mapping[str, Tensor], specs: Sequence[BackboneSpec], first: str, source: str) -> BackboneSpec:
    """The backbone whose channels and blocks most of the tensors have."""

    def size(key: str, axis: int) -> int:
        return head[key].shape[axis] if key in head and head[key].ndim > axis else 0

    channels = [size(f"DCAMA_blocks.{stage}.linears.0.weight", 0) for stage in range(3)]
    blocks = [size(f"conv{number}.0.weight", 1) for number in (3, 2, 1)]
    if not any(channels):
        raise ModelFileError(f"{source}: tensor {first!r} is missing; give a checkpoint of DCAMA or DistillFSS")

    def agreements(spec: BackboneSpec) -> int:
        wanted = (*spec.coarse_channels, *spec.coarse_blocks)
        return sum(a == b for a, b in zip((*channels, *blocks), wanted, strict=True))

    return max(specs, key=agreements)


def _take_encodings(head: dict[str, Tensor], spec: BackboneSpec, prefix: str, source: str) -> None:
    """Take the positional encodings out of a head, which are a formula here, once they agree with it."""
    for stage, channels in enumerate(spec.coarse_channels):
        key = f"pe.{stage}.pe"
        if key not in head:
            raise ModelFileError(
                f"{source}: tensor {prefix + key!r} of shape (1, length, {channels}) is missing; heads without "
                "positional encoding have no counterpart here"
            )
        code = head.pop(key)
        if code.ndim != 3 or code.shape[0] != 1 or code.shape[2] != channels:
            raise ModelFileError(
                f"{source}: tensor {prefix + key!r} has shape {tuple(code.shape)}, expected (1, length, {channels}); "
                "give another file"
            )
        if not _is_encoding(code[0]):
            raise ModelFileError(
                f"{source}: tensor {prefix + key!r} is no sinusoidal encoding of base 10000; heads with another one "
                "have no counterpart here"
            )


def _is_encoding(code: Float[Tensor, "length channels"]) -> bool:
    exact = position_encoding(code.shape[0], code.shape[1], code)
    return bool(torch.allclose(code.float(), exact.float(), rtol=0, atol=_ENCODING))


def _count_classes(students: Mapping[str, Tensor], prefix: str, source: str) -> int:
    numbers = set()
    for key in students:
        number = key.partition(".")[0]
        if not number.isdecimal() or int(number) >= IGNORE - 1:
            raise ModelFileError(
                f"{source}: tensor {prefix + key!r} has no place; expected {prefix}0.*, {prefix}1.*, ..."
            )
        numbers.add(int(number))
    return max(numbers) + 1


def _refuse_support_skip(
    head: Mapping[str, Tensor], wanted: Mapping[str, Tensor], spec: BackboneSpec, prefix: str, source: str
) -> None:
    key = "mixer1.0.weight"
    rows, columns, *kernel = wanted[f"decoder.{key}"].shape
    if key in head and tuple(head[key].shape) == (rows, columns + sum(spec.skip_channels[-2:]), *kernel):
        raise ModelFileError(
            f"{source}: tensor {prefix + key!r} has shape {tuple(head[key].shape)}, expected "
            f"{(rows, columns, *kernel)}: its decoder reads features of the support, which a student does not have; "
            "give a checkpoint without this skip connection"
        )


def _backbone(tensors: Mapping[str, Tensor], spec: BackboneSpec, weights: str, source: str) -> Backbone | None:
    if not tensors:
        return None
    try:
        backbone = backbone_from_tensors(spec.name, tensors, weights, source)
    except WeightsUnavailableError as error:
        raise ModelFileError(str(error)) from error
    for key, value in backbone.state().items():
        if not bool(torch.isfinite(value).all()):
            raise ModelFileError(f"{source}: tensor {key!r} holds values that are no finite floating numbers")
    return backbone
