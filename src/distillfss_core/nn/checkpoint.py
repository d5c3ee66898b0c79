"""Tensors and a card in one safetensors file.

A file is written whole or not at all. A damaged file is refused with an error of one line.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from distillfss_core.errors import ModelFileError
from distillfss_core.io.writing import atomic_path


@dataclass(frozen=True)
class FileKind:
    """A kind of file: its name inside the file, its name for users, and the newest version that is read."""

    name: str
    called: str
    version: int


def write_card_file(
    path: str | Path, kind: FileKind, card: Mapping[str, Any], tensors: Mapping[str, Tensor], **header: str
) -> None:
    """Write one safetensors file; ``card`` must be JSON-able, ``header`` goes beside it.

    Raises
    ------
    OutputError
        If it cannot be written; a file that was there before stays as it was.
    """
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps({"format": kind.name, "format_version": kind.version} | dict(card))
    metadata = {"format": kind.name, "card": text, "card_digest": _digest_text(text), "digest": digest_tensors(held)}
    payload = save(held, metadata=metadata | header)
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(payload)


def training_tensors(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors of named modules, and of the optimizer's state, from which `restore_training` goes on."""
    tensors = {f"{part}.{n}": value for part, module in modules.items() for n, value in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{n}": value for n, value in state.items()}
    return tensors


def restore_training(
    modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put what `training_tensors` gave into the same modules and optimizer. Other tensors may be among it.

    Raises
    ------
    RuntimeError, ValueError
        If a tensor does not fit.
    """
    for part, module in modules.items():
        module.load_state_dict(under(f"{part}.", tensors))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in (under("optimizer.", tensors) or under("optimiser.", tensors)).items():  # older files
        number, _, what = name.partition(".")
        state.setdefault(int(number), {})[what] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def kind_of(path: str | Path) -> str | None:
    """Which kind of card file this is, if it is one at all; nothing is checked."""
    return header_of(path).get("format")


def header_of(path: str | Path) -> dict[str, str]:
    """The texts in the header of a safetensors file, unchecked; empty where it is no such file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, struct.error):
        return {}


def read_card_file(
    path: str | Path, kind: FileKind, *, tensors: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Card, tensors (none without ``tensors``: then they are not checked either) and the whole header.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, truncated, newer than this program or of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors_read = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: there is no such file") from error
    except (SafetensorError, OSError, struct.error) as error:
        raise ModelFileError(
            f"{path}: not a readable safetensors file ({error}); it is damaged, truncated or of another kind"
        ) from error
    if header.get("format") != kind.name or "card" not in header:
        raise ModelFileError(f"{path}: a safetensors file, but no {kind.called}")
    if _digest_text(header["card"]) != header.get("card_digest"):
        raise ModelFileError(f"{path}: its card does not match its checksum; the file is damaged")
    try:
        card = json.loads(header["card"])
        version = int(card["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path}: its card is damaged") from error
    if version > kind.version:
        raise ModelFileError(
            f"{path}: format version {version} is newer than this program reads ({kind.version}); "
            "upgrade napari-distillfss"
        )
    if tensors and digest_tensors(tensors_read) != header.get("digest"):
        raise ModelFileError(f"{path}: its contents do not match their checksum; the file is damaged")
    return card, tensors_read, header


def _digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
