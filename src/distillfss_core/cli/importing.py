"""distillfss import: a published checkpoint as a head or a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distillfss_core.cli.console import FINE, add_common, format_mb, list_classes, print_json
from distillfss_core.cli.options import add_overwrite, check_model_file, parse_names


def add_import(commands: Any) -> None:
    """Add the command ``distillfss import`` to the subparsers of the program."""
    parser = commands.add_parser(
        "import",
        help="make a head or a model from a published checkpoint of DCAMA or DistillFSS",
        description="Make a head from a published checkpoint of DCAMA, or a model from one of DistillFSS. Nothing in "
        "the checkpoint is run, and every tensor must fit.",
    )
    parser.usage = f"{parser.prog} FILE -o OUT [options]"
    parser.add_argument("file", type=Path, metavar="FILE", help="state dict of torch (.pt, .pth), or .safetensors")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="head or model file to write")
    parser.add_argument(
        "--classes", type=parse_names, metavar="NAME,NAME,...", help="names of the classes of a model (class 1, ...)"
    )
    parser.add_argument(
        "--weights", metavar="TEXT", help="backbone weights in place of those in FILE: hub, or another file"
    )
    add_overwrite(parser)
    add_common(parser, _import)


def _import(args: argparse.Namespace) -> int:
    reads = [args.file, *([Path(args.weights)] if args.weights else [])]
    check_model_file(args.output, reads, overwrite=args.overwrite)

    from distillfss_core.importing import import_checkpoint
    from distillfss_core.models.card import STUDENT_FILE

    card = import_checkpoint(args.file, args.output, classes=args.classes, weights=args.weights)
    if args.json:
        print_json({"written": str(args.output), **card})
        return FINE
    if card["format"] == STUDENT_FILE.name:
        what = f"model, {list_classes(card['classes'])}"
    else:
        what = f"head; use it with distill --head {args.output}"
    print(f"{args.output}: {format_mb(card['bytes'])}, {card['backbone']['name']}, {what}")
    return FINE
