"""Tables of text as people write them: commas, semicolons or tabs, quotes, blanks, the encodings of spreadsheets."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from distillfss_core.errors import InputFileError

DELIMITERS = (",", ";", "\t", "|")
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # .xlsx and .ods, .xls
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Parameters
    ----------
    line : int
        Its (last) line in the file, from 1.
    cells : dict of str
        Cells that are not blank by the name of their column; cells beyond the header are left out.
    error : str
        Why the row does not fit the header, or "".
    """

    line: int
    cells: dict[str, str]
    error: str = ""


def read_table(path: Path, needed: str, columns: tuple[str, ...]) -> list[TableRow]:
    """Read a table with a header; rows without any text are left out.

    The delimiter is a comma, a semicolon, a tab or a bar. The text is UTF-8, UTF-16 with its mark, or Windows-1252.

    Parameters
    ----------
    path : Path
    needed : str
        A column that there must be.
    columns : tuple of str
        Lower-case names that are recognized in any case; other columns keep their spelling.

    Raises
    ------
    InputFileError
        If it is no such table, or two columns have one name.
    """
    lines = list(StringIO(_text_of(path), newline=""))
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.lower().startswith("sep=")), None)
    if first is None:
        raise InputFileError(f"{path}: is empty; name the columns in its first line, one of them {needed!r}")
    delimiter = _delimiter(lines[first], needed)
    if delimiter is None:
        raise InputFileError(
            f"{path}: has no column {needed!r}, its first line is {lines[first].strip()[:80]!r}; name the columns there"
        )
    reader = csv.reader(lines[first:], delimiter=delimiter, skipinitialspace=True)
    try:
        header = [_column(cell, columns) for cell in next(reader)]
        if twice := [name for name in header if name and header.count(name) > 1]:
            raise InputFileError(f"{path}: has two columns {twice[0]!r}; rename one")
        rows = [_row(cells, header, columns, first + reader.line_num) for cells in reader if any(map(str.strip, cells))]
    except csv.Error as error:
        raise InputFileError(f"{path}: cannot be read as a table ({error}); save it as CSV") from error
    if not rows:
        raise InputFileError(f"{path}: has no row below its columns {', '.join(filter(None, header))}; add some")
    return rows


def _text_of(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(1 << 16)
            if content.startswith(_WORKBOOKS):
                raise InputFileError(f"{path}: is a workbook of a spreadsheet program; save it as CSV")
            if b"\0" in content and not content.startswith(_UTF16):
                raise InputFileError(f"{path}: cannot be read as a table (it is no text); give a folder or a CSV file")
            content += file.read()
        return _decoded(content)
    except InputFileError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"{path}: cannot be read as a table ({error}); give a folder or a CSV file") from error


def _decoded(content: bytes) -> str:
    if content.startswith(_UTF16):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252")


def _delimiter(header: str, needed: str) -> str | None:
    """The delimiter that gives the header most columns, one of them the needed one."""
    columns: dict[str, int] = {}
    for delimiter in DELIMITERS:
        names = [c.strip().casefold() for c in next(csv.reader([header], delimiter=delimiter, skipinitialspace=True))]
        if needed in names:
            columns[delimiter] = len(names)
    return max(columns, key=lambda delimiter: columns[delimiter], default=None)


def _column(cell: str, columns: tuple[str, ...]) -> str:
    name = cell.strip()
    return name.casefold() if name.casefold() in columns else name


def _row(cells: list[str], header: list[str], columns: tuple[str, ...], line: int) -> TableRow:
    cells = [cell.strip() for cell in cells]
    named = {name: cell for name, cell in zip(header, cells, strict=False) if name and cell}
    unnamed = [cell for i, cell in enumerate(cells) if cell and not (i < len(header) and header[i])]
    last = max(i for i, name in enumerate(header) if name)
    error = ""
    if unnamed:
        error = f"has {unnamed[0]!r} in no column of the header ({len(cells)} cells, {last + 1} columns); quote it"
    elif len(cells) <= last:
        error = f"has {len(cells)} cells, but the header {last + 1} columns; leave cells blank, not out"
    elif broken := [name for name in columns if "\n" in named.get(name, "")]:
        error = f"has a line break in column {broken[0]}; close the quotes of its cell"
    return TableRow(line, named, error)
