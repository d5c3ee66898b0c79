"""Files of heads, meta-trained or imported: attention, decoder and a backbone of their own, but no student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from torch import Tensor

from distillfss_core.errors import ModelFileError, SettingsError, WeightsUnavailableError
from distillfss_core.nn.backbones import Backbone, BackboneSpec, backbone_from_state, load_backbone
from distillfss_core.nn.checkpoint import FileKind, read_card_file, write_card_file
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.teachers import LearnedTeacher

HEAD_FILE = FileKind("distillfss-head", "meta-trained DistillFSS head", 1)

PACKAGED = {
    ("efficientnet_lite0", "default"): "efficientnet_lite0.safetensors",
    ("efficientnet_lite0", "prototype"): "efficientnet_lite0_prototype.safetensors",
    ("lite0_compact", "default"): "lite0_compact.safetensors",
}
"""Heads in this package, by backbone and teacher. Those of a backbone share it, and the default one holds it."""


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """Weights that a head learned from many tasks.

    Parameters
    ----------
    card : dict
        ``backbone`` (name, weights, digest), ``width``, ``preset``, ``teacher``, how it was trained, on which data
        under which licenses.
    tensors : dict of str to Tensor
        Of a `LearnedTeacher` with the decoder of the preset, under their names in it; float32.
    backbone_tensors : dict of str to Tensor
        Of the backbone, under timm's names, where it was trained or imported too; else empty.
    source : str
        Where it was read from, for messages and training records.
    """

    card: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    backbone_tensors: Mapping[str, Tensor]
    source: str

    @property
    def name(self) -> str:
        """Name from the card; the source where the card has none."""
        return str(self.card.get("name", self.source))

    @property
    def width(self) -> int:
        """Channels of the decoder."""
        return int(self.card["width"])

    @property
    def preset(self) -> str:
        """Form of attention and decoder: "default", or "published" for an imported head."""
        return str(self.card.get("preset", "default"))

    @property
    def form(self) -> dict[str, Any]:
        """What the settings of a training must say of the teacher of this head."""
        return head_form(self.card)

    @property
    def backbone_name(self) -> str:
        """Name of the backbone, a key of ``SPECS``."""
        return str(self.card["backbone"]["name"])

    @property
    def backbone_digest(self) -> str:
        """SHA-256 (hex) of the backbone, as `Backbone.digest` gives it."""
        return str(self.card["backbone"]["digest"])

    def trained_backbone(self) -> Backbone | None:
        """The backbone that was trained with the head, frozen; None if it was frozen then too, and is not in the file.

        Raises
        ------
        ModelFileError
            If the tensors are not those of the backbone that the card names.
        """
        if not self.backbone_tensors:
            return None
        try:
            return backbone_from_state(self.backbone_name, self.backbone_tensors, self.card["backbone"]["weights"])
        except (SettingsError, WeightsUnavailableError) as error:
            raise ModelFileError(f"{self.source}: its backbone cannot be used ({error})") from error

    def fitted_to(self, spec: BackboneSpec) -> HeadWeights:
        """A start on another backbone with the same channels; its stages may have other numbers of blocks.

        The decoder's weights of a stage's maps are added, and shared equally by the maps there are. The backbone of
        this head is left out.
        """
        tensors = dict(self.tensors)
        for stage, count in zip(("fine", "mid", "deep"), spec.coarse_blocks, strict=True):
            name = f"decoder.{stage}.weight"
            tensors[name] = tensors[name].sum(1, keepdim=True).repeat(1, count, 1, 1) / count
        return replace(self, tensors=tensors, backbone_tensors={})

    def put_into(self, head: FewShotHead) -> None:
        """Start a head's teacher and decoder from these weights, whatever its number of classes.

        Raises
        ------
        ModelFileError
            If they are of another form than the head.
        """
        try:
            head.teacher.load_state_dict(dict(self.tensors))
        except RuntimeError as error:
            raise ModelFileError(
                f"{self.source}: it was trained on {self.backbone_name} with width {self.width} "
                f"and teacher {self.form['teacher']} "
                f"and does not fit this head ({str(error).splitlines()[-1].strip()})"
            ) from error

    def put_decoder_into(self, head: FewShotHead) -> None:
        """Start only the decoder from these weights, because the teacher of the head is another.

        Raises
        ------
        ModelFileError
            If the decoder is of another form than that of the head.
        """
        prefix = "decoder."
        own = {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}
        try:
            head.decoder.load_state_dict(own)
        except RuntimeError as error:
            raise ModelFileError(
                f"{self.source}: its decoder does not fit this head ({str(error).splitlines()[-1].strip()})"
            ) from error


def save_head(path: str | Path, teacher: LearnedTeacher, backbone: Backbone, card: Mapping[str, Any]) -> None:
    """Write a teacher's weights in half precision, and those of its backbone if they were trained with it.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    tensors = {name: value.half() for name, value in teacher.state_dict().items()}
    write_head(path, card, tensors, halved(backbone.state()) if backbone.trained else {})


def write_head(
    path: str | Path, card: Mapping[str, Any], tensors: Mapping[str, Tensor], backbone_tensors: Mapping[str, Tensor]
) -> None:
    """Write the parts of a `HeadWeights` as they are.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    backbone = {f"backbone.{name}": value for name, value in backbone_tensors.items()}
    write_card_file(path, HEAD_FILE, card, {**tensors, **backbone}, backbone=str(bool(backbone)).lower())


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kernels of a backbone in half precision.

    Vectors (biases, statistics of BatchNorm) stay as they are, since they may be tiny or huge.
    """
    return {name: value.half() if value.ndim > 1 else value for name, value in state.items()}


def load_head(path: str | Path) -> HeadWeights:
    """Read a head.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, truncated, newer than this program or of another kind.
    """
    card, tensors, _ = read_card_file(path, HEAD_FILE)
    backbone = {name: value.float() for name, value in tensors.items() if name.startswith("backbone.")}
    head = {name: value.float() for name, value in tensors.items() if name not in backbone}
    return HeadWeights(
        _upgraded(card),
        head,
        {name.removeprefix("backbone."): value for name, value in backbone.items()},
        Path(path).name,
    )


def head_form(card: Mapping[str, Any]) -> dict[str, Any]:
    """Of the card of a head: the settings ``teacher`` and, for teacher uino, those whose names begin with it."""
    teacher = str(card.get("teacher", card.get("preset", "default")))
    if teacher != "uino":
        return {"teacher": teacher}
    width, decoder = card.get("uino_width", HeadForm.uino_width), card.get("uino_decoder", HeadForm.uino_decoder)
    own = {"uino_reader": str(card["uino_reader"]), "uino_width": int(width), "uino_decoder": str(decoder)}
    return {"teacher": teacher, **own}


def _upgraded(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card of an older file in the words of today."""
    sets = {part: [_renamed(row) for row in card[part]] for part in ("data", "held_out") if part in card}
    return {**card, **sets}


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"license" if name == "licence" else name: value for name, value in row.items()}


def read_head_card(path: str | Path) -> dict[str, Any]:
    """The card of a head file, its size and whether it holds a backbone, without its tensors.

    Raises
    ------
    ModelFileError
        As `load_head` does.
    """
    card, _, header = read_card_file(path, HEAD_FILE, tensors=False)
    return _upgraded(card) | {"backbone_inside": header.get("backbone") == "true", "bytes": Path(path).stat().st_size}


def packaged_head(backbone: str, teacher: str = "default") -> HeadWeights | None:
    """The head that comes with this package for a backbone and a teacher, if there is one."""
    if (backbone, teacher) not in PACKAGED:
        return None
    with as_file(files("distillfss_core") / "weights" / PACKAGED[backbone, teacher]) as path:
        head = load_head(path)
    if head.backbone_tensors or (default := packaged_head(backbone)) is None:
        return head
    return replace(head, backbone_tensors=default.backbone_tensors)


def can_be_found_again(backbone: Backbone) -> bool:
    """Whether a file may leave these weights out: all but those that were trained with a head of somebody's own."""
    if not backbone.trained:
        return True
    weights = packaged_head(backbone.spec.name)
    return weights is not None and weights.backbone_digest == backbone.digest()


def find_backbone(name: str, digest: str, weights: str, source: str) -> Backbone:
    """The backbone that the file ``source`` names and does not hold: from ``weights``; auto: the packaged head's too.

    Raises
    ------
    ModelFileError
        If the weights are other than those of the card.
    SettingsError, WeightsUnavailableError
        As `load_backbone` does.
    """
    weights_file = packaged_head(name) if weights == "auto" else None
    if weights_file is not None and weights_file.backbone_digest == digest and (own := weights_file.trained_backbone()):
        return own
    backbone = load_backbone(name, weights)
    if backbone.digest() != digest:
        raise ModelFileError(
            f"{source}: it was made on other weights of {name} than those found ({weights}); "
            f"give weights with digest {digest[:12]}..."
        )
    return backbone
