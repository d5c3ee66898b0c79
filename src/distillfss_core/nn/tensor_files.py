"""Files of tensors that other programs wrote, read without running anything in them, and matched name by name."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distillfss_core.errors import ModelFileError
from distillfss_core.nn.checkpoint import kind_of

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_TRAINING = (
    *("args", "config", "epoch", "iteration", "step", "global_step", "loss", "best_loss", "miou", "best_miou"),
    *("optimizer", "optimizer_state_dict", "scheduler", "scheduler_state_dict", "lr_scheduler", "scaler", "rng_state"),
)
_UNREADABLE = (
    SafetensorError,
    struct.error,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The flat dictionary of tensors in a file: safetensors, or a state dict of ``torch.save``.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, of this package, or holds objects other than tensors.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from error
    if start[8:] == b"{" and not start.startswith(b"PK"):
        if (kind := kind_of(path) or "").startswith("distillfss-"):
            raise ModelFileError(f"{path}: a file of this package already ({kind}); it needs no import")
        with _one_line(path):
            return dict(load_file(path))
    with _one_line(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of pickles that torch did not write
        content = torch.load(path, map_location="cpu", weights_only=True)
    return _tensors_in(content, path)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Errors of reading as one line."""
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise ModelFileError(
                f"{path}: holds objects other than tensors ({found[1]}), which could run code and are not loaded; give "
                "a file of its state_dict() alone"
            ) from error
        raise ModelFileError(f"{path}: no checkpoint of torch or safetensors, or damaged; download it again") from error
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise ModelFileError(
            f"{path}: no checkpoint of torch or safetensors, or damaged ({reason}); download it again"
        ) from error


def _tensors_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict, alone or as an entry beside the state of a training."""
    if not isinstance(content, Mapping) or not content:
        raise ModelFileError(f"{path}: holds a {type(content).__name__}, no dictionary of tensors; give a state dict")
    wrapped = [key for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    if len(wrapped) > 1:
        raise ModelFileError(f"{path}: holds several state dicts ({', '.join(wrapped)}); give a file with one of them")
    if wrapped:
        unknown = [key for key in content if key != wrapped[0] and key not in _TRAINING]
        if unknown:
            raise ModelFileError(f"{path}: entry {unknown[0]!r} beside {wrapped[0]!r} is not known; remove it first")
        content = content[wrapped[0]]
    for key, value in content.items():
        is_plain = (
            isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_quantized)
        )
        if not isinstance(key, str) or not is_plain:
            raise ModelFileError(f"{path}: entry {key!r} is no plain tensor; give a state dict")
    return dict(content)


def match_tensors(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], wanted: Mapping[str, Tensor], prefix: str, source: str
) -> dict[str, Tensor]:
    """The tensors under the names that they have here, in float32.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Of the file, without ``prefix``.
    names : mapping of str to str
        For each name here, the name in ``tensors``.
    wanted : mapping of str to Tensor
        Gives the shapes, under the names here; their values are not read.
    prefix, source : str
        For messages.

    Raises
    ------
    ModelFileError
        If a tensor is missing, unknown, of another shape or not finite; one line with the name of the first one.
    """
    places = set(names.values())
    for key in tensors:
        if key not in places:
            raise ModelFileError(f"{source}: tensor {prefix + key!r} has no place in this network; give another file")
    matched = {}
    for name, key in names.items():
        shape = tuple(wanted[name].shape)
        if key not in tensors:
            raise ModelFileError(f"{source}: tensor {prefix + key!r} of shape {shape} is missing; give another file")
        value = tensors[key]
        if tuple(value.shape) != shape:
            raise ModelFileError(
                f"{source}: tensor {prefix + key!r} has shape {tuple(value.shape)}, expected {shape}; give another file"
            )
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise ModelFileError(f"{source}: tensor {prefix + key!r} holds values that are no finite floating numbers")
        matched[name] = value.float()
    return matched
