"""Figures as lines of JSON, stored as they are measured, each with its machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distillfss_core.errors import InputFileError, OutputError
from distillfss_core.io.writing import append_line, error_reason

Row = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """Machine of a measurement; figures of two machines do not go into one table."""

    cpu: str
    cores: int
    threads: int
    device: str
    torch: str

    def __str__(self) -> str:
        on = "" if self.device == "cpu" else f", {self.device}"
        return f"{self.cpu}{on}, {self.cores} cores seen, {self.threads} threads, torch {self.torch}"

    def to_json(self) -> Row:
        """Fields by name, as JSON stores them."""
        return asdict(self)


def this_machine(device: str = "cpu", threads: int | None = None) -> Machine:
    """The machine that this runs on; ``device`` is torch's name of where it computes."""
    import torch

    if device.startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    return Machine(_cpu(), os.cpu_count() or 1, threads or torch.get_num_threads(), device, torch.__version__)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Rows:
    """A file of rows that grows line by line, so that the next run resumes a killed one.

    Parameters
    ----------
    path : path
        The folder is there.
    machine : Machine
        Stands in every row that is added.

    Raises
    ------
    InputFileError
        If rows of another machine are in the file, or it is no file of rows.
    OutputError
        If it cannot be written.
    """

    def __init__(self, path: Path, machine: Machine) -> None:
        self.path: Path = path
        self.machine: Machine = machine
        try:
            self._file = path.open("a+b", buffering=0)
            self._file.seek(0)
            whole = self._file.read().rpartition(b"\n")[0]
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error_reason(error)}") from error
        try:
            self._rows: list[Row] = [json.loads(line) for line in whole.splitlines()]
            others = [row["machine"] for row in self._rows if row["machine"] != machine.to_json()]
        except (ValueError, KeyError, TypeError) as error:
            raise InputFileError(f"{path}: holds lines that are no figures; give another folder with -o") from error
        if others:
            was = Machine(**others[0])
            raise InputFileError(f"{path}: its figures are of {was}; this is {machine}; give another folder with -o")
        try:
            self._file.truncate(len(whole) + 1 if whole else 0)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error_reason(error)}") from error

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def find(self, key: Mapping[str, Any]) -> Row | None:
        """The row that has all these values."""
        return next((row for row in self._rows if all(row.get(k) == v for k, v in key.items())), None)

    def add(self, row: Row) -> Row:
        """Write a row and force it to disk."""
        row = row | {"machine": self._machine}
        append_line(self._file, json.dumps(row).encode() + b"\n", self.path)
        self._rows.append(row)
        return row

    def close(self) -> None:
        """Close the file; rows can be read but not added afterwards."""
        self._file.close()

    @cached_property
    def _machine(self) -> Row:
        return self.machine.to_json()
