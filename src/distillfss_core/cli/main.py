"""The command distillfss: parse, call the core, print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from distillfss_core.cli.backbones import add_backbones
from distillfss_core.cli.batch import add_batch
from distillfss_core.cli.bench import add_bench
from distillfss_core.cli.console import (
    ERROR,
    FINE,
    INTERRUPTED,
    USAGE,
    fail,
    one_line,
    say,
    show_any_name,
    warnings_shown,
)
from distillfss_core.cli.demo import add_demo
from distillfss_core.cli.distill import add_distill
from distillfss_core.cli.distill_adapter import add_distill_adapter
from distillfss_core.cli.distill_backbone import add_distill_backbone
from distillfss_core.cli.evaluate import add_evaluate
from distillfss_core.cli.export import add_export
from distillfss_core.cli.importing import add_import
from distillfss_core.cli.info import add_info
from distillfss_core.cli.instances import add_instances
from distillfss_core.cli.pretrain import add_pretrain
from distillfss_core.cli.segment import add_segment
from distillfss_core.cli.stopping import is_stopped, stop_code, stop_on_signals
from distillfss_core.errors import DistillFSSError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        0 fine, 1 an expected error (one line on stderr said which), 2 wrong usage, 130 interrupted,
        143 and 129 stopped by SIGTERM and SIGHUP.
    """
    show_any_name()
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as end:  # argparse: --help, --version, or a usage error that it has told
        return int(end.code or 0)
    with stop_on_signals():
        try:
            code = _run(args)
        except KeyboardInterrupt:  # once more, while the first was reported
            code = INTERRUPTED
        except Exception:
            if not is_stopped():
                raise
            code = ERROR  # a library took the signal for an error of its own
        _flush()
        return stop_code() if is_stopped() and code != FINE else code


def _run(args: argparse.Namespace) -> int:
    """Run a command; its code, also where it ended with an error."""
    try:
        with warnings_shown():
            if getattr(args, "threads", None):
                import torch

                torch.set_num_threads(args.threads)
            code: int = args.run(args)
            sys.stdout.flush()
            return code
    except DistillFSSError as error:
        return fail(error)
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # "distillfss ... | head": the reader has seen enough
        return ERROR
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}")
    except MemoryError:
        return fail("the machine is out of memory; give smaller images, or fewer crops (--crops, --cache-mb)")
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return fail("the device is out of memory; lower --cache-mb, --crop-size or --queries, or use --device cpu")


def _flush() -> None:
    """Write what was printed; where the terminal or the reader is gone, Python would end with a code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``parse_args(...).run`` is the function that carries one out."""
    parser = _Parser(
        prog="distillfss",
        description="Few-shot segmentation for microscopy: label a few slices, distill a small model from them, "
        "segment the rest.",
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_distill(commands)
    add_segment(commands)
    add_batch(commands)
    add_instances(commands)
    add_export(commands)
    add_import(commands)
    add_evaluate(commands)
    add_info(commands)
    add_backbones(commands)
    add_demo(commands)
    add_pretrain(commands)
    add_distill_backbone(commands)
    add_distill_adapter(commands)
    add_bench(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; options are written in full."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"distillfss: error: {one_line(message)}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """Looks the version up only when asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from distillfss_core import __version__

        print(f"distillfss {__version__}")
        parser.exit()


def _is_out_of_memory(error: RuntimeError) -> bool:
    from distillfss_core.nn.device import out_of_memory

    return out_of_memory(error)


if __name__ == "__main__":
    sys.exit(main())
