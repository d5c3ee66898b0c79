"""What commands have in common: options, progress, warnings, tables. Nothing heavy is imported."""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from distillfss_core.cli.stopping import check_stopped
from distillfss_core.errors import ConsensusWarning, ImageError, IntensityWarning, printable
from distillfss_core.types import describe_step

if TYPE_CHECKING:
    from tqdm import tqdm

    from distillfss_core.types import TrainStep


FINE, ERROR, USAGE, INTERRUPTED = 0, 1, 2, 130
_BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"  # the steps are in the description
_OF_LABELS = (IntensityWarning, ConsensusWarning)


def add_common(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], *, threads: bool = True
) -> None:
    """Add ``--json`` and, unless the command computes nothing with torch, ``--threads``.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Of one command.
    run : callable
        Carries out the command: takes the parsed arguments and returns the exit code.
    threads : bool
        Whether the command has ``--threads``.
    """
    parser.add_argument("--json", action="store_true", help="print JSON")
    if threads:
        parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")
    parser.set_defaults(run=run)


def positive(text: str) -> int:
    """The whole number from 1 in a text; the type of an option.

    Raises
    ------
    argparse.ArgumentTypeError
        If the text is anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


class _Warnings(logging.Handler):
    """Writes the core's warnings, a line each, without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        _write_warning(record.getMessage())


def _write_warning(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"distillfss: warning: {one_line(text)}", file=sys.stderr)


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Show warnings of the core while a command runs.

    What tifffile says of a damaged file is left to our own error about it.
    """
    added = [
        (logging.getLogger("distillfss_core"), _Warnings(logging.WARNING)),
        (logging.getLogger("tifffile"), logging.NullHandler()),
    ]
    for logger, handler in added:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            for category in _OF_LABELS:
                warnings.simplefilter("always", category)
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            yield
    finally:
        for logger, handler in added:
            logger.removeHandler(handler)


def _show_warning(
    usual: Callable[..., object], message: Warning | str, category: type[Warning], *place: Any, **options: Any
) -> None:
    """Warnings about labels in a line like others of the core; warnings of libraries as usual."""
    if issubclass(category, _OF_LABELS):
        _write_warning(str(message))
    else:
        usual(message, category, *place, **options)


@contextmanager
def progress(what: str, total: int | None = None, unit: str = "step") -> Iterator[tqdm[NoReturn]]:
    """A bar on stderr where that is a terminal, else nothing."""
    from tqdm import tqdm

    with tqdm(desc=what, total=total, unit=unit, leave=False, disable=None, file=sys.stderr) as bar:
        yield bar


def fail(error: Exception | str) -> int:
    """Print an error as one line on stderr; returns the exit code of an error, 1."""
    say(f"error: {error}")
    return ERROR


def say(text: str) -> None:
    """Print one line on stderr, after the name of the program. A terminal that was closed is no error."""
    with suppress(OSError):  # of a terminal that was closed
        print(f"distillfss: {one_line(text)}", file=sys.stderr)


def one_line(text: str) -> str:
    """The text in one line, with what has no printable form as escapes."""
    return " ".join(printable(text).split())


def show_any_name() -> None:
    """Write what a terminal or a file cannot show as escapes, where Python would end with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout, with null for NaN."""
    print(json.dumps(_without_nan(value), indent=2, allow_nan=False))


def _without_nan(value: Any) -> Any:
    """The value with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
    """Columns of text; the first ``left`` lean left, the others right."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
    for row in (headers, *rows):
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


def cell(value: float) -> str:
    """A score for a table: three decimals, or "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.3f}"


# files


@contextmanager
def source_named(source: str) -> Iterator[None]:
    """Begin the message of an `ImageError` with the file it is about."""
    try:
        yield
    except ImageError as error:
        raise type(error)(f"{source}: {str(error).removeprefix('image: ')}") from error


# what is printed


def show_step(bar: tqdm[NoReturn], step: TrainStep) -> None:
    """Move a bar to the present step of a training, under a phrase for what it is doing.

    Raises
    ------
    KeyboardInterrupt
        If a signal has stopped the command.
    """
    check_stopped()
    if bar.disable:
        return
    bar.bar_format = _BAR
    bar.set_description(describe_step(step), refresh=False)
    if bar.total != step.total or step.index < bar.n:  # another stage
        bar.reset(step.total)
    if "iou" in step.metrics:
        bar.set_postfix(iou=f"{step.metrics['iou']:.3f}", refresh=False)
    bar.update(step.index - bar.n)


def format_mb(size: int) -> str:
    """A number of bytes in megabytes of 10^6 bytes: "6.2 MB"."""
    return f"{size / 1e6:.1f} MB"


def list_classes(names: Sequence[str]) -> str:
    """How many classes there are, and their names: "2 classes (nucleus, debris)"."""
    return f"{len(names)} class{'es' if len(names) > 1 else ''} ({', '.join(names)})"
