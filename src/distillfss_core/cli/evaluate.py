"""distillfss evaluate: labels beside the truth."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillfss_core.cli.console import FINE, add_common, cell, print_json, print_table, progress, source_named
from distillfss_core.cli.options import add_label_options, parse_planes
from distillfss_core.errors import ImageError, SettingsError

if TYPE_CHECKING:
    from distillfss_core.metrics import Measures, Scores
    from distillfss_core.types import Array


MEASURES = ("iou", "dice", "precision", "recall")


# evaluate


def add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="compare label images with the truth",
        description="Compare label images with the truth: IoU, Dice, precision and recall of each class, for each "
        "image and over all pixels.",
    )
    parser.add_argument("predicted", type=Path, metavar="PREDICTED", help="a folder, a label image or a stack")
    parser.add_argument("truth", type=Path, metavar="TRUTH", help="the same; folders are paired by stem")
    parser.add_argument("--planes", type=parse_planes, metavar="Z,Z,...", help="compare these planes of a stack only")
    add_label_options(parser)
    add_common(parser, _evaluate, threads=False)


def _evaluate(args: argparse.Namespace) -> int:
    from distillfss_core.io.labels import pair_files
    from distillfss_core.metrics import Tally, evaluate

    names = tuple(args.classes) if args.classes else ("object",)
    tally = Tally(len(names))
    each: list[tuple[str, Scores]] = []
    with progress("comparing", unit="image") as bar:
        for predicted, truth in pair_files(args.predicted, args.truth):
            for name, prediction, real in _label_pairs(predicted, truth, args, len(names)):
                with source_named(name):
                    tally.add(prediction, real)
                    each.append((name, evaluate([(prediction, real)], len(names))))
                bar.update()
    scores = tally.scores()
    if args.json:
        images = {name: _measures_json(measures.pooled, names) for name, measures in each}
        print_json(
            {
                "images": images,
                "pooled": _measures_json(scores.pooled, names),
                "mean": _measures_json(scores.mean, names),
                "iou": scores.iou,
                "dice": scores.dice,
            }
        )
        return FINE
    print_table(
        ["image", "class", "IoU", "Dice", "precision", "recall"],
        [
            [name, label, *(cell(getattr(measures.pooled, m)[k]) for m in MEASURES)]
            for name, measures in each
            for k, label in enumerate(names)
        ],
        left=2,
    )
    print()
    print(scores.table(names))
    return FINE


def _label_pairs(
    predicted: Path, truth: Path, args: argparse.Namespace, n_classes: int
) -> Iterator[tuple[str, Array, Array]]:
    """Name, prediction and truth of each plane of two files."""
    from distillfss_core.io.labels import labels_from_image, read_label_stack

    predicted_planes, true_planes = read_label_stack(predicted), read_label_stack(truth)
    if len(predicted_planes) != len(true_planes):
        raise ImageError(
            f"{predicted.name} has {len(predicted_planes)} plane(s), {truth.name} has {len(true_planes)}; "
            "compare stacks of equal depth"
        )
    plain = "classes" if args.classes else "binary"
    for z in args.planes or range(len(predicted_planes)):
        if not z < len(predicted_planes):
            raise SettingsError(
                f"plane {z} is outside {predicted.name}, whose planes are 0 to {len(predicted_planes) - 1}"
            )
        plane = f" plane {z}" if len(predicted_planes) > 1 else ""
        yield (
            predicted.name + plane,
            labels_from_image(predicted_planes[z], plain, n_classes, predicted.name + plane),
            labels_from_image(true_planes[z], "scribbles" if args.scribbles else plain, n_classes, truth.name + plane),
        )


def _measures_json(measures: Measures, names: Sequence[str]) -> dict[str, dict[str, float]]:
    return {name: {m: float(getattr(measures, m)[k]) for m in MEASURES} for k, name in enumerate(names)}
