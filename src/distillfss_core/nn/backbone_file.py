"""Files of distilled backbones: tensors under timm's names, and a card that names teacher, losses and images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillfss_core.errors import ModelFileError, SettingsError, WeightsUnavailableError
from distillfss_core.nn.backbones import Backbone, backbone_from_state
from distillfss_core.nn.backbones.weights import BACKBONE_FILE
from distillfss_core.nn.checkpoint import read_card_file, write_card_file


def save_backbone(path: str | Path, backbone: Backbone, card: Mapping[str, Any]) -> None:
    """Write a backbone as ``distill --backbone NAME --weights FILE`` reads it; float32.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    write_card_file(path, BACKBONE_FILE, card, backbone.state(), backbone=backbone.spec.name)


def load_backbone_file(path: str | Path) -> Backbone:
    """The frozen backbone of such a file.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, newer than this program or of another kind.
    """
    card, tensors, _ = read_card_file(path, BACKBONE_FILE)
    try:
        return backbone_from_state(str(card["backbone"]["name"]), tensors, f"file:{Path(path).name}")
    except (KeyError, TypeError, SettingsError, WeightsUnavailableError) as error:
        raise ModelFileError(f"{path}: its backbone cannot be used ({error})") from error


def read_backbone_card(path: str | Path) -> dict[str, Any]:
    """The card of a backbone file and its size, without the tensors.

    Raises
    ------
    ModelFileError
        As `load_backbone_file` does.
    """
    card, _, _ = read_card_file(path, BACKBONE_FILE, tensors=False)
    return card | {"backbone_inside": True, "bytes": Path(path).stat().st_size}
