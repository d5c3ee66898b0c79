"""Files of adapters that were distilled from SAM: the tensors of a `BottleneckAdapter`, and a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distillfss_core.errors import ModelFileError, SettingsError
from distillfss_core.nn.backbones import Backbone
from distillfss_core.nn.checkpoint import FileKind, read_card_file, write_card_file
from distillfss_core.nn.teachers.uino import BottleneckAdapter, UinoTeacher

ADAPTER_FILE = FileKind("distillfss-adapter", "adapter distilled from SAM", 1)


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """Weights of a distilled adapter.

    Parameters
    ----------
    card : dict
        ``backbone`` and ``sam`` (name, digest and source of each), ``width``, and how it was distilled.
    tensors : dict of str to Tensor
        Of a `BottleneckAdapter`, float32.
    source : str
        For messages.
    """

    card: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    source: str

    @property
    def origin(self) -> str:
        """From what it was distilled, for the card of a head."""
        sam = self.card["sam"]
        return f"distilled from SAM {sam['name']} ({sam['file']}, SHA-256 {sam['digest']})"

    def put_into(self, teacher: UinoTeacher, backbone: Backbone) -> None:
        """Give a teacher this adapter.

        Raises
        ------
        SettingsError
            If it was distilled on another backbone.
        ModelFileError
            If its tensors do not fit.
        """
        own = self.card["backbone"]
        if own["digest"] != backbone.digest():
            raise SettingsError(
                f"adapter {self.source} was distilled on {own['name']} with weights {own['weights']}, but the backbone "
                f"is {backbone.spec.name} with weights {backbone.weights}; give that one, or distill another adapter"
            )
        try:
            teacher.adapter.load_state_dict(dict(self.tensors))
        except RuntimeError as error:
            raise ModelFileError(
                f"{self.source}: does not fit this teacher ({str(error).splitlines()[-1].strip()})"
            ) from error


def save_adapter(path: str | Path, adapter: BottleneckAdapter, card: Mapping[str, Any]) -> None:
    """Write an adapter as ``pretrain --adapter FILE`` reads it; float32.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    write_card_file(path, ADAPTER_FILE, card, adapter.state_dict())


def load_adapter(path: str | Path) -> AdapterWeights:
    """The adapter of such a file.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, newer than this program or of another kind.
    """
    card, tensors, _ = read_card_file(path, ADAPTER_FILE)
    return AdapterWeights(card, tensors, Path(path).name)


def read_adapter_card(path: str | Path) -> dict[str, Any]:
    """The card of an adapter file and its size, without the tensors.

    Raises
    ------
    ModelFileError
        As `load_adapter` does.
    """
    card, _, _ = read_card_file(path, ADAPTER_FILE, tensors=False)
    return card | {"backbone_inside": False, "bytes": Path(path).stat().st_size}
