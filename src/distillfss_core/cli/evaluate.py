"""distillfss evaluate: labels beside the truth."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillfss_core.cli.console import FINE, add_common, cell, print_json, print_table, progress, source_named
from distillfss_core.cli.options import add_label_options, add_volume_part, given_opening, parse_planes
from distillfss_core.errors import ImageError, SettingsError

if TYPE_CHECKING:
    from distillfss_core.metrics import Counts, Measures, Scores
    from distillfss_core.types import Array


MEASURES = ("iou", "dice", "precision", "recall")


# evaluate


def add_evaluate(commands: Any) -> None:
    """Add the command ``distillfss evaluate`` to the subparsers of the program."""
    parser = commands.add_parser(
        "evaluate",
        help="compare labels with the truth",
        description="Compare label images, stacks or volumes with the truth: IoU, Dice, precision and recall of each "
        "class, for each image or plane and over all pixels.",
    )
    parser.add_argument("predicted", type=Path, metavar="PREDICTED", help="a folder, an image, a stack or a volume")
    parser.add_argument("truth", type=Path, metavar="TRUTH", help="the same; folders are paired by stem")
    parser.add_argument("--planes", type=parse_planes, metavar="Z,Z,...", help="compare these planes of a stack only")
    add_label_options(parser)
    add_volume_part(parser.add_argument_group("volumes", "which part of both, as far as they have a choice"))
    add_common(parser, _evaluate, threads=False)


def _evaluate(args: argparse.Namespace) -> int:
    from distillfss_core.metrics import Tally
    from distillfss_core.support.label_volumes import pair_volumes

    names = tuple(args.classes) if args.classes else ("object",)
    tally = Tally(len(names))
    each: list[tuple[str, Scores]] = []
    with progress("comparing", unit="image") as bar:
        for predicted, truth in pair_volumes(args.predicted, args.truth):
            for name, counts in _count_planes(predicted, truth, args, len(names)):
                tally.add_counts(counts)
                combined = Tally(len(names))
                combined.add_counts(counts)
                each.append((name, combined.scores()))
                bar.update()
    scores = tally.scores()
    _warn_without_background(scores)
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


def _warn_without_background(scores: Scores) -> None:
    """Labels that count from 1 would be objects everywhere."""
    for side, axis in (("prediction", 0), ("truth", 1)):
        counts = scores.matrix.sum(axis)
        if not counts[0] and counts.sum():
            logging.getLogger(__name__).warning(
                "no pixel of the %s is background (0); if its labels count from 1, as those of ilastik do, set the "
                "background to 0 first",
                side,
            )


def _count_planes(
    predicted: Path, truth: Path, args: argparse.Namespace, n_classes: int
) -> Iterator[tuple[str, Counts]]:
    """Name of each plane of two files or volumes, and its pixels by true and predicted class."""
    from distillfss_core.io.labels import check_threshold
    from distillfss_core.metrics import confusion
    from distillfss_core.support.label_volumes import are_images, check_no_threshold, compare_volumes

    plain = "classes" if args.classes else "binary"
    modes = (plain, "scribbles" if args.scribbles else plain)
    check_threshold(modes[1], args.binary_threshold)
    opening = given_opening(args)
    if not are_images(predicted, truth) or opening or args.region:
        check_no_threshold(truth, args.binary_threshold)
        yield from compare_volumes(
            predicted,
            truth,
            planes=args.planes,
            modes=modes,
            n_classes=n_classes,
            region=args.region,
            opening=opening,
        )
        return
    options = {"threshold": args.binary_threshold, "in_folder": args.truth.is_dir()}
    for name, prediction, real in _label_pairs(predicted, truth, args.planes, modes, n_classes, **options):
        with source_named(name):
            yield name, confusion(prediction, real, n_classes)


def _label_pairs(
    predicted: Path,
    truth: Path,
    planes: Sequence[int] | None,
    modes: tuple[str, str],
    n_classes: int,
    *,
    threshold: float | None,
    in_folder: bool,
) -> Iterator[tuple[str, Array, Array]]:
    """Name, prediction and truth of each plane of two files; in a folder, of the planes that lie in these."""
    from distillfss_core.io.label_checks import is_lossy, warn_of_values
    from distillfss_core.io.labels import labels_from_image, read_label_stack

    true_planes = read_label_stack(truth, binary_threshold=threshold, own_planes=in_folder)
    own = threshold if is_lossy(predicted) else None  # labels of this program are numbers
    predicted_planes = read_label_stack(predicted, binary_threshold=own, own_planes=in_folder)
    warn_of_values(predicted_planes, predicted.name, modes[0])
    warn_of_values(true_planes, truth.name, modes[1])
    if len(predicted_planes) != len(true_planes):
        raise ImageError(
            f"{predicted.name} has {len(predicted_planes)} plane(s), {truth.name} has {len(true_planes)}; "
            "compare stacks of equal depth"
        )
    for z in planes or range(len(predicted_planes)):
        if not z < len(predicted_planes):
            raise SettingsError(
                f"plane {z} is outside {predicted.name}, whose planes are 0 to {len(predicted_planes) - 1}"
            )
        plane = f" plane {z}" if len(predicted_planes) > 1 else ""
        yield (
            predicted.name + plane,
            labels_from_image(predicted_planes[z], modes[0], n_classes, predicted.name + plane),
            labels_from_image(true_planes[z], modes[1], n_classes, truth.name + plane),
        )


def _measures_json(measures: Measures, names: Sequence[str]) -> dict[str, dict[str, float]]:
    return {name: {m: float(getattr(measures, m)[k]) for m in MEASURES} for k, name in enumerate(names)}
