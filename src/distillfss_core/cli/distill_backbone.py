"""distillfss distill-backbone: unlabeled images to a backbone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distillfss_core.cli.console import FINE, INTERRUPTED, add_common, format_mb, print_json
from distillfss_core.cli.options import add_overwrite, add_settings, given_settings
from distillfss_core.cli.resumable import add_unlabeled_images, follow
from distillfss_core.errors import OutputError
from distillfss_core.settings import BackboneSettings


def add_distill_backbone(commands: Any) -> None:
    """Add the command ``distillfss distill-backbone`` to the subparsers of the program."""
    parser = commands.add_parser(
        "distill-backbone",
        help="make a small backbone from a large one, on images without labels",
        description="Train a small backbone to give the features of a large one, on images without labels. It can be "
        "stopped at any moment (Ctrl-C, kill): the same command goes on where it was.",
    )
    parser.usage = f"{parser.prog} IMAGES ... -o BACKBONE [options]"
    add_unlabeled_images(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="BACKBONE", help="file to write, NAME.safetensors"
    )
    add_overwrite(parser)
    add_settings(parser, BackboneSettings, "backbone distillation")
    add_common(parser, _distill_backbone)


def _distill_backbone(args: argparse.Namespace) -> int:
    settings = BackboneSettings(**given_settings(args, BackboneSettings))
    from distillfss_core.io.writing import check_output, check_replaceable

    if args.output.suffix.lower() != ".safetensors":
        raise OutputError(f"cannot write {args.output}: a backbone is a safetensors file; end its name in .safetensors")
    check_output(args.output)
    reads = [*args.images, *(Path(text) for text in (settings.teacher, settings.teacher_weights))]
    check_replaceable([args.output], [*reads, Path(settings.student_weights)], overwrite=args.overwrite)

    from distillfss_core.training import backbone

    checkpoint = args.output.with_suffix(".checkpoint.safetensors")
    run = backbone.iter_distill_backbone(args.images, settings, checkpoint=checkpoint)
    if not follow(run, checkpoint):
        return INTERRUPTED
    distilled = run.result()
    distilled.save(args.output)
    checkpoint.unlink(missing_ok=True)
    _print_backbone(args, distilled.card)
    return FINE


def _print_backbone(args: argparse.Namespace, card: dict[str, Any]) -> None:
    size = args.output.stat().st_size
    if args.json:
        print_json({"file": str(args.output), "bytes": size, **card})
        return
    losses = ", ".join(f"{name} {value:.4f}" for name, value in card["losses"].items())
    print(f"{args.output}: {format_mb(size)}, {card['backbone']['name']} from {card['teacher']['name']}")
    print(f"{card['steps']} steps on {card['images']} images in {card['seconds']:.0f} s; losses {losses}")
