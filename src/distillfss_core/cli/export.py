"""distillfss export: a student for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distillfss_core.cli.console import FINE, add_common, format_mb, print_json
from distillfss_core.cli.options import add_overwrite, option_flag, parse_pixel_size
from distillfss_core.errors import OutputError, SettingsError

# export


_FORMATS = {"onnx": ".onnx", "bioimageio": ".zip"}


def add_export(commands: Any) -> None:
    """Add the command ``distillfss export`` to the subparsers of the program."""
    parser = commands.add_parser(
        "export",
        help="write a model for other programs: ONNX, or a BioImage.IO package",
        description="Write a model for other programs: as ONNX (any batch, any size), or as a BioImage.IO model "
        "package, which is tested before it is kept.",
    )
    parser.usage = f"{parser.prog} MODEL -o OUT [options]"
    parser.add_argument("model", type=Path, metavar="MODEL", help="from distillfss distill")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".onnx or .zip")
    parser.add_argument("--format", choices=tuple(_FORMATS), help="default: what the name of OUT says")
    parser.add_argument("--pixel-size", type=parse_pixel_size, metavar="Y,X", help="micrometers of a pixel, if another")
    parser.add_argument("--weights", default="auto", help="backbone weights, if the model was saved without (auto)")
    add_overwrite(parser)
    group = parser.add_argument_group("of a BioImage.IO package")
    group.add_argument("--author", action="append", metavar="NAME", help="needed; may be given again")
    group.add_argument("--name", metavar="TEXT", help="of the model (default: its classes)")
    group.add_argument("--description", metavar="TEXT", help="one or two sentences")
    group.add_argument("--license", metavar="SPDX", help="of the model, e.g. MIT (default: CC-BY-4.0)")
    add_common(parser, _export)


def _export(args: argparse.Namespace) -> int:
    from distillfss_core.io.writing import check_output, check_replaceable

    by_suffix = {suffix: name for name, suffix in _FORMATS.items()}
    kind = by_suffix.get(args.output.suffix.lower())
    if kind is None or args.format not in (None, kind):
        wanted = _FORMATS.get(args.format, ".onnx or .zip (BioImage.IO)")
        raise OutputError(f"cannot write {args.output}: end its name in {wanted}")
    details = {name: getattr(args, name) for name in ("name", "description", "license") if getattr(args, name)}
    if kind == "onnx" and (details or args.author):
        raise SettingsError(
            f"{option_flag(next(iter(details), 'author'))} is for BioImage.IO packages; end OUT in .zip"
        )
    check_output(args.output)
    check_replaceable([args.output], [args.model, Path(args.weights)], overwrite=args.overwrite)

    from distillfss_core.export.bioimageio import export_bioimageio
    from distillfss_core.export.onnx import export_onnx
    from distillfss_core.models.student import StudentModel

    model = StudentModel.load(args.model, device="cpu", weights=args.weights, engine="torch")
    if args.pixel_size:
        model = model.at_pixel_size(args.pixel_size)
    if kind == "onnx":
        export_onnx(model, args.output)
    else:
        export_bioimageio(model, args.output, authors=args.author or (), **details)
    size = args.output.stat().st_size
    if args.json:
        print_json({"written": str(args.output), "format": kind, "bytes": size, "multiple": model.step})
    else:
        print(f"{args.output}: {format_mb(size)}, sides multiples of {model.step}, tested")
    return FINE
