"""Meta-trained few-shot heads as files: the attention and the decoder, without a student, with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillfss_core.cardfile import FileKind, read_card_file, write_card_file
from distillfss_core.errors import ModelFileError
from distillfss_core.head import FewShotHead
from distillfss_core.teachers import DcamaTeacher

HEAD_FILE = FileKind("distillfss-head", "meta-trained DistillFSS head", 1)

PACKAGED = {"efficientnet_lite0": "efficientnet_lite0.safetensors"}
"""Heads in this package, by backbone."""


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """What a head learnt from many tasks.

    Parameters
    ----------
    card : dict
        ``backbone`` (name, weights, digest), ``width``, how it was trained, on which data under which licences.
    tensors : dict of str to Tensor
        Of a `DcamaTeacher` with `SlimDecoder`, under their names in it; float32.
    source : str
        Where it was read from, for messages and training records.
    """

    card: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    source: str

    @property
    def name(self) -> str:
        return str(self.card.get("name", self.source))

    @property
    def width(self) -> int:
        return int(self.card["width"])

    @property
    def backbone_digest(self) -> str:
        return str(self.card["backbone"]["digest"])

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
                f"{self.source}: it was trained on {self.card['backbone']['name']} with width {self.card['width']} "
                f"and does not fit this head ({str(error).splitlines()[-1].strip()})"
            ) from error


def save_head(path: str | Path, teacher: DcamaTeacher, card: Mapping[str, Any]) -> None:
    """Write a teacher's weights in half precision.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    write_card_file(path, HEAD_FILE, card, {name: value.half() for name, value in teacher.state_dict().items()})


def load_head(path: str | Path) -> HeadWeights:
    """Read a head.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, truncated, newer than this program or of another kind.
    """
    card, tensors, _ = read_card_file(path, HEAD_FILE)
    return HeadWeights(card, {name: value.to(torch.float32) for name, value in tensors.items()}, Path(path).name)


def read_head_card(path: str | Path) -> dict[str, Any]:
    """The card of a head file and its size, without its tensors.

    Raises
    ------
    ModelFileError
        As `load_head` does.
    """
    card, _, _ = read_card_file(path, HEAD_FILE, tensors=False)
    return card | {"bytes": Path(path).stat().st_size}


def packaged_head(backbone: str) -> HeadWeights | None:
    """The head that comes with this package for a backbone, if there is one."""
    if backbone not in PACKAGED:
        return None
    with as_file(files("distillfss_core") / "weights" / PACKAGED[backbone]) as path:
        return load_head(path)
