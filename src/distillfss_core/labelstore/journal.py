"""What a long run has finished: a file of lines that each prove themselves, added to as the work goes on."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillfss_core.errors import InputFileError, OutputError
from distillfss_core.io.writing import append_line, error_reason

if TYPE_CHECKING:
    from filelock import BaseFileLock

FORMAT = "distillfss-record"
VERSION = 1


class Journal:
    """A header that says what the run is, then a line for each piece of work that is done.

    A line is a CRC-32 and JSON. Lines are added and forced to disk one by one, so that after a kill or a power cut all
    but the last are whole; a last one that is not is left out and written over. While it is open no other process can
    open it.

    Parameters
    ----------
    path : path
        The folder is there.
    header : mapping, optional
        JSON-able; for a new journal. Of an old one, the header it has is read.

    Raises
    ------
    OutputError
        If it cannot be written, or another run has it open.
    InputFileError
        If there is an old one that is no journal, or of a newer program.
    """

    def __init__(self, path: Path, header: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._file, self._lock = _open(path, create=header is not None)
        try:
            self.header: dict[str, Any] = self._read(header)
        except BaseException:
            self.close()
            raise

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write a line and force it to disk.

        Raises
        ------
        OutputError
            If it cannot be written; what was there stays good.
        """
        append_line(self._file, _line(entry), self.path)
        self.entries.append(dict(entry))

    def close(self) -> None:
        """Close the file, and let other runs write there."""
        self._file.close()
        self._lock.release()

    def _read(self, header: Mapping[str, Any] | None) -> dict[str, Any]:
        content = self._file.readall()
        if header is not None and b"\n" not in content:  # new, or killed as it was
            self._file.seek(0)
            self._file.truncate()
            content = _line({"format": FORMAT, "version": VERSION, **header})
            append_line(self._file, content, self.path)
        good = 0
        lines = []
        for raw in content.splitlines(keepends=True):
            entry = _parse(raw)
            if entry is None:
                break
            lines.append(entry)
            good += len(raw)
        if not lines or lines[0].get("format") != FORMAT:
            raise InputFileError(f"{self.path}: is no journal of a run, or damaged; delete the output and begin anew")
        if lines[0].get("version") != VERSION:
            raise InputFileError(f"{self.path}: is a journal of another program version; go on with that version")
        self._file.seek(good)
        self._file.truncate()
        self.entries = lines[1:]
        return lines[0]


def read_header(path: Path) -> dict[str, Any]:
    """The header of a journal that may be open elsewhere; empty where there is none."""
    with suppress(OSError), open(path, "rb") as file:
        return _parse(file.readline()) or {}
    return {}


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(raw: bytes) -> dict[str, Any] | None:
    """The entry of a line; None if it is not whole."""
    if not raw.endswith(b"\n") or raw[8:9] != b" " or raw[:8] != b"%08x" % zlib.crc32(raw[9:-1]):
        return None
    entry = json.loads(raw[9:-1])
    return entry if isinstance(entry, dict) else None


def _open(path: Path, *, create: bool) -> tuple[FileIO, BaseFileLock]:
    """The file and its lock; a file that was removed or replaced before it was locked is closed."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | (os.O_CREAT if create else 0), 0o666)

    while True:
        try:
            file = FileIO(str(path), "r+", opener=opener)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error_reason(error)}") from error
        try:
            lock = _lock(path)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return file, lock
        except BaseException:
            file.close()
            raise
        file.close()
        lock.release()


def _lock(path: Path) -> BaseFileLock:
    """Lock the journal against other runs until the release or the end of the process, however it ends.

    The system locks a file beside the journal: on Windows nobody can read a file that is locked itself.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"{path}: another run is writing here; wait for it, or stop it") from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error_reason(error)}") from error
    return lock
