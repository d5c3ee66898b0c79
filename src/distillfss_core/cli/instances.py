"""distillfss instances: objects numbered over a whole volume."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distillfss_core.cli.console import FINE, INTERRUPTED, add_common, positive, print_json
from distillfss_core.cli.options import (
    add_overwrite,
    add_replace_nan,
    add_threshold,
    is_label_folder,
    parse_channel,
    parse_whole,
)
from distillfss_core.cli.segment import follow_steps
from distillfss_core.cli.stopping import check_stopped
from distillfss_core.errors import OutputError

if TYPE_CHECKING:
    from tqdm import tqdm

    from distillfss_core.objects.instances import InstanceStep


def add_instances(commands: Any) -> None:
    """Add the command ``distillfss instances`` to the subparsers of the program."""
    parser = commands.add_parser(
        "instances",
        help="number the objects of a labeled volume and measure them",
        description="Number the objects of a labeled volume of any size, over the whole of it, and measure them.",
    )
    parser.add_argument("input", type=Path, metavar="LABELS", help="from distillfss segment, or any volume of labels")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="NAME.ome.zarr")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measures, a row an object: .csv or .parquet")
    parser.add_argument("--image", type=Path, metavar="VOLUME", help="whose mean over each object is measured, too")
    parser.add_argument(
        "--image-level", type=parse_whole, default=0, metavar="N", help="resolution that was segmented (0)"
    )
    parser.add_argument("--channel", type=parse_channel, metavar="C", help="of the image: number from 0, or name")
    parser.add_argument("--time", type=parse_whole, metavar="T", help="of the image: time point, from 0")
    add_replace_nan(parser)
    parser.add_argument(
        "--class-id", type=positive, metavar="N", help="label of the class (default: whatever is not 0)"
    )
    parser.add_argument(
        "--method",
        choices=("components", "watershed", "numbered"),
        default="components",
        help="components: connected voxels are an object (default); watershed: touching objects are cut apart; "
        "numbered: every number in the labels is an object already",
    )
    parser.add_argument(
        "--radius",
        type=float,
        metavar="R",
        help="of a typical object, in micrometers (voxels where no scale is known), for --method watershed",
    )
    parser.add_argument(
        "--connectivity",
        type=int,
        choices=(6, 18, 26),
        default=6,
        help="with how many neighbors a voxel is connected, for --method components (6)",
    )
    add_threshold(parser)
    parser.add_argument("--min-voxels", type=positive, default=1, metavar="N", help="leave smaller objects out (1)")
    parser.add_argument(
        "--resume", action="store_true", help="go on where a run that was stopped or killed had come to"
    )
    add_overwrite(parser)
    add_common(parser, _instances, threads=False)


def _instances(args: argparse.Namespace) -> int:
    from distillfss_core.objects.instances import iter_instances
    from distillfss_core.volumes.volume import open_volume

    if not is_label_folder(args.output):
        raise OutputError(f"cannot write {args.output}: numbered objects are a volume; end its name in .ome.zarr")
    with ExitStack() as stack:
        labels = stack.enter_context(open_volume(args.input, labels=True))
        image = None
        if args.image:
            opening = {
                "level": args.image_level,
                "channel": args.channel,
                "time": args.time,
                "replace_nan": args.replace_nan,
            }
            image = stack.enter_context(open_volume(args.image, **opening))
        run = iter_instances(
            labels,
            args.output,
            table=args.table,
            image=image,
            class_id=args.class_id,
            method=args.method,
            connectivity=args.connectivity,
            radius=args.radius,
            min_voxels=args.min_voxels,
            binary_threshold=args.binary_threshold,
            resume=args.resume,
            overwrite=args.overwrite,
        )
        report = follow_steps(run, "instances", "block", _show_stage, args.output)
    if report is None:
        return INTERRUPTED
    if args.json:
        print_json({**asdict(report), "path": str(report.path)})
        return FINE
    small = f", {report.too_small} left out as too small" if report.too_small else ""
    print(f"{report.path}: {report.objects} objects{small}, {report.seconds:.0f} s")
    return FINE


def _show_stage(bar: tqdm[NoReturn], step: InstanceStep) -> None:
    check_stopped()
    if bar.total != step.total or step.index < bar.n:
        bar.reset(step.total)
    bar.set_description(step.stage, refresh=False)
    bar.update(step.index - bar.n)
