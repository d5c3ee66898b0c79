"""distillfss distill-adapter: unlabeled images and a SAM to an adapter for teacher uino."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from distillfss_core.cli.console import FINE, INTERRUPTED, add_common, format_mb, print_json
from distillfss_core.cli.options import add_overwrite, add_settings, given_settings
from distillfss_core.cli.resumable import add_unlabeled_images, follow
from distillfss_core.errors import OutputError
from distillfss_core.settings import AdapterSettings


def add_distill_adapter(commands: Any) -> None:
    """Add the command ``distillfss distill-adapter`` to the subparsers of the program."""
    parser = commands.add_parser(
        "distill-adapter",
        help="distill an adapter for teacher uino from SAM, on images without labels",
        description="Train the adapter of teacher uino to give SAM's embedding, on images without labels. It can be "
        "stopped at any moment (Ctrl-C, kill): the same command goes on where it was.",
    )
    parser.usage = f"{parser.prog} IMAGES ... --sam FILE -o ADAPTER [options]"
    add_unlabeled_images(parser)
    parser.add_argument(
        "--sam", type=Path, required=True, metavar="FILE", help="checkpoint of SAM (ViT-B, ViT-L, ViT-H) or MobileSAM"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="ADAPTER", help="file to write, NAME.safetensors"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="folder that keeps SAM's embeddings for other trainings; by default one beside the output, which does not "
        "stay",
    )
    add_overwrite(parser)
    add_settings(parser, AdapterSettings, "adapter distillation")
    add_common(parser, _distill_adapter)


def _distill_adapter(args: argparse.Namespace) -> int:
    settings = AdapterSettings(**given_settings(args, AdapterSettings))
    from distillfss_core.io.writing import check_output, check_replaceable

    if args.output.suffix.lower() != ".safetensors":
        raise OutputError(f"cannot write {args.output}: an adapter is a safetensors file; end its name in .safetensors")
    check_output(args.output)
    reads = [*args.images, args.sam, Path(settings.backbone), Path(settings.weights)]
    check_replaceable([args.output], reads, overwrite=args.overwrite)

    from distillfss_core.training import adapter

    checkpoint = args.output.with_suffix(".checkpoint.safetensors")
    cache = args.cache or args.output.with_suffix(".embeddings")
    run = adapter.iter_distill_adapter(args.images, args.sam, settings, cache=cache, checkpoint=checkpoint)
    if not follow(run, checkpoint):
        return INTERRUPTED
    distilled = run.result()
    distilled.save(args.output)
    checkpoint.unlink(missing_ok=True)
    if args.cache is None:
        _remove_embeddings(cache)
    _print_adapter(args, distilled.card)
    return FINE


def _remove_embeddings(folder: Path) -> None:
    """Delete embeddings, and their folder if nothing else is in it."""
    from distillfss_core.training.sam_embeddings import embedding_files

    with suppress(OSError):
        for file in embedding_files(folder):
            file.unlink()
        folder.rmdir()


def _print_adapter(args: argparse.Namespace, card: dict[str, Any]) -> None:
    size = args.output.stat().st_size
    if args.json:
        print_json({"file": str(args.output), "bytes": size, **card})
        return
    print(f"{args.output}: {format_mb(size)}, {card['backbone']['name']} from SAM {card['sam']['name']}")
    loss = card["losses"]["embedding"]
    print(f"{card['steps']} steps on {card['images']} images in {card['seconds']:.0f} s; mean squared error {loss:.4f}")
