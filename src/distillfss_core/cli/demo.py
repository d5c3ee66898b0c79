"""distillfss demo: learn a generated stack, segment the rest."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillfss_core.cli.console import FINE, add_common, cell, positive, print_json, print_table, progress, show_step
from distillfss_core.cli.options import add_label_options, add_overwrite, add_settings, given_settings
from distillfss_core.errors import SettingsError
from distillfss_core.settings import SAMPLES, DistillSettings

if TYPE_CHECKING:
    from distillfss_core.demo import DemoReport


# demo


def add_demo(commands: Any) -> None:
    """Add the command ``distillfss demo`` to the subparsers of the program."""
    parser = commands.add_parser(
        "demo",
        help="learn from a few slices, segment others, say how good that is",
        description="Learn from a few slices of a generated stack, or of your own, segment others, and say how good "
        "and how fast that is. Fewer steps are taken than by distill.",
    )
    parser.usage = f"{parser.prog} [options]"
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="where to (default: distillfss-demo)")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="a folder that holds images and labels, or IMAGES LABELS as for distill; the last third is judged on",
    )
    parser.add_argument("--sample", choices=SAMPLES, help="what to generate, unless there is --data (default: nuclei)")
    parser.add_argument("--supports", type=positive, metavar="N", help="slices to learn from (default: 5)")
    parser.add_argument("--planes", type=positive, metavar="N", help="planes to generate (default: 12)")
    parser.add_argument("--size", type=positive, metavar="N", help="their side in pixels (default: 384)")
    add_label_options(parser)
    add_overwrite(parser)
    add_settings(parser)
    add_common(parser, _demo)


def _demo(args: argparse.Namespace) -> int:
    options = given_settings(args)
    DistillSettings(**options)  # errors are told before torch is loaded
    if args.data and len(args.data) > 2:
        raise SettingsError(f"--data has {len(args.data)} paths; give a folder, or images and labels")
    if not args.data and (args.classes or args.scribbles or args.binary_threshold is not None):
        raise SettingsError("--classes, --scribbles and --binary-threshold are for your own data; give it with --data")
    generated = {"planes": args.planes, "size": args.size, "kind": args.sample}
    generated = {name: value for name, value in generated.items() if value is not None}
    if args.data and generated:
        raise SettingsError("--planes, --size and --sample are for generated data; leave them out, or --data")

    from distillfss_core.demo import (
        DEMO_FOLDER,
        DEMO_STEPS,
        DEMO_SUPPORTS,
        demo_files,
        generated_data,
        iter_demo,
        own_data,
    )
    from distillfss_core.io.writing import check_folder_name, check_replaceable
    from distillfss_core.types import finish

    settings = DistillSettings(**{"steps": DEMO_STEPS, **options})
    supports = args.supports or DEMO_SUPPORTS
    if args.data:
        data = own_data(
            *args.data,
            supports=supports,
            classes=args.classes,
            scribbles=args.scribbles,
            binary_threshold=args.binary_threshold,
        )
    else:
        data = generated_data(supports=supports, seed=settings.seed, **generated)
    folder = args.output or Path(DEMO_FOLDER)
    check_folder_name(folder)
    reads = [inner for path in args.data or () for inner in (path, path / "images", path / "labels")]
    check_replaceable(demo_files(data, folder), reads, overwrite=args.overwrite)
    with progress("preparing") as bar:
        report = finish(iter_demo(data, folder, settings), lambda step: show_step(bar, step))
    if args.json:
        print_json(asdict(report))
    else:
        _print_report(report)
    return FINE


def _print_report(report: DemoReport) -> None:
    print(f"{report.data}: learned from {', '.join(report.supports)}")
    print(f"{' ' * len(report.data)}  judged on {', '.join(report.queries)}\n")
    rows = [[s.name, cell(s.iou), cell(s.dice), f"{s.ms_per_plane:.0f}"] for s in report.scores]
    print_table(["", "IoU", "Dice", "ms a plane"], rows, left=1)
    print()
    print(f"{'distilled in':14}{report.seconds:.0f} s, {report.steps} steps, on {report.device}")
    print(f"{'model':14}{report.files[0]}, {report.model_mb:.1f} MB")
    if report.peak_mb is not None:
        print(f"{'memory':14}{report.peak_mb:.0f} MB at most")
    print(f"{'picture':14}{report.files[1]}")
    print(f"{'all files':14}{report.folder}")
