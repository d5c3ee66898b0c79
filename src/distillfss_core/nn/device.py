"""Devices and the precisions that they compute in."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from distillfss_core.errors import SettingsError
from distillfss_core.process import may_change_process

PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8")
Dtype = torch.dtype
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Device:
    """A torch device and the precision to compute in.

    Parameters
    ----------
    name : str
        "cpu", "cuda", "cuda:1", "mps", ...
    precision : str
        "float32", "bfloat16", "float16" (GPUs alone), or "int8" (students on the CPU alone).
    """

    name: str
    precision: str = "float32"

    @property
    def torch(self) -> torch.device:
        """The device as torch names it."""
        return torch.device(self.name)

    @property
    def kind(self) -> str:
        """Type of the device: "cpu", "cuda" or "mps"."""
        return self.torch.type

    @property
    def dtype(self) -> Dtype:
        """Of the features: float32, or the half precision that is computed in."""
        return _HALVES.get(self.precision, torch.float32)

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which convolutions and attention run in the chosen precision; weights stay in float32."""
        if self.dtype != torch.float32:
            return torch.autocast(self.kind, dtype=self.dtype)
        return contextlib.nullcontext()

    def upload(self, tensor: Tensor) -> Tensor:
        """Copy a tensor of the CPU to the device; on CUDA from pinned memory, without waiting for the copy."""
        if self.kind == "cuda":
            return tensor.pin_memory().to(self.torch, non_blocking=True)
        return tensor.to(self.torch)

    @contextlib.contextmanager
    def reproducible(self) -> Iterator[None]:
        """Inside, CUDA takes deterministic algorithms where it has them: same seed, same weights on one device."""
        if self.kind != "cuda":
            yield
            return
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    def __str__(self) -> str:
        return self.name if self.precision == "float32" else f"{self.name} ({self.precision})"


def choose_device(name: str = "auto", precision: str = "auto") -> Device:
    """Turn "auto" into what this machine has: CUDA, then MPS, then the CPU.

    ``precision="auto"`` is bfloat16 on CUDA devices that have it and float32 elsewhere.

    Raises
    ------
    SettingsError
        If the device named is not on this machine, or does not compute in that precision.

    Examples
    --------
    >>> choose_device("cpu").precision
    'float32'
    """
    if precision not in PRECISIONS:
        raise SettingsError(f"precision {precision!r} is unknown; choose one of: {', '.join(PRECISIONS)}")
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cpu" if precision == "int8" else best
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise SettingsError(f"device {name!r} is unknown; choose auto, cpu, cuda, cuda:N or mps") from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available()
        and (torch.device(name).index or 0) < (torch.cuda.device_count() if torch.cuda.is_available() else 0),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(kind, False):
        raise SettingsError(f"device {name!r} is not on this machine; choose auto or cpu")
    if precision == "int8" and kind != "cpu":
        raise SettingsError(f"precision int8 is for the CPU, not for {name}; choose device cpu, or bfloat16")
    if precision == "float16" and kind == "cpu":
        raise SettingsError("precision float16 is for GPUs, not for the CPU; choose bfloat16, or float32")
    if precision == "auto":
        precision = "bfloat16" if kind == "cuda" and _has_bfloat16(name) else "float32"
    return Device(name, precision)


def sums_bytes_exactly() -> bool:
    """Whether the processor sums products of eight-bit integers without clipping: x86 does with VNNI only."""
    return not _is_x86() or _processor_has("avx512_vnni", "avx_vnni")


def multiplies_bfloat16() -> bool:
    """Whether the processor is an x86 that multiplies bfloat16 itself, and so about twice as fast as float32."""
    return _is_x86() and _processor_has("avx512_bf16", "amx_bf16")


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _processor_has(*any_of: str) -> bool:
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot say
    return any(able.get(name) for name in any_of)


def leave_a_core_free() -> None:
    """Compute on one core fewer than there are, or on as few as were chosen before: so a window stays alive.

    Nothing is done where settings of the process must not be changed (`may_change_process`).
    """
    if may_change_process():
        torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 2) - 1)))


def _has_bfloat16(name: str) -> bool:
    with torch.cuda.device(name):
        result: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return result


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device (not the whole machine) ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


def release_memory(device: Device) -> None:
    """Return the memory that torch keeps for later to the device."""
    if device.kind == "cuda":
        torch.cuda.empty_cache()
    elif device.kind == "mps":
        torch.mps.empty_cache()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generators start at ``seed`` inside, and go on as before outside."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield
