"""distillfss batch: many volumes, one report."""

from __future__ import annotations

import argparse
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distillfss_core.cli.console import ERROR, FINE, INTERRUPTED, add_common, print_json, progress, say
from distillfss_core.cli.options import add_model_options, add_opening, given_opening, load_model, opening_options
from distillfss_core.cli.segment import show_shard
from distillfss_core.cli.stopping import check_stopped, hold_signals
from distillfss_core.errors import SettingsError

if TYPE_CHECKING:
    from tqdm import tqdm

    from distillfss_core.segmentation.batch import BatchStep


def add_batch(commands: Any) -> None:
    """Add the command ``distillfss batch`` to the subparsers of the program."""
    parser = commands.add_parser(
        "batch",
        help="segment many volumes to OME-Zarr",
        description="Segment the volumes of a folder, or of a CSV file with a column 'volume' (and, where wanted, "
        "output, region, level, channel, time, series, axes; delimited by commas, semicolons or tabs), one after "
        "another. One that fails does not stop the others; the report has a row for each.",
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="a folder of volumes, or a CSV file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="made if it is not there")
    parser.add_argument("--report", type=Path, metavar="FILE", help=".csv or .json (default: FOLDER/report.csv)")
    parser.add_argument(
        "--all-times", action="store_true", help="segment each time point of a volume, to NAME_t0.ome.zarr and so on"
    )
    add_common(parser, _batch)
    add_model_options(parser)
    add_opening(parser)


def _batch(args: argparse.Namespace) -> int:
    from distillfss_core.io.writing import check_folder_name, check_replaceable, make_folder
    from distillfss_core.segmentation.batch import iter_batch, plan_jobs
    from distillfss_core.types import finish

    reads = [args.model]
    opening = given_opening(args)
    if args.all_times and "time" in opening:
        raise SettingsError("--time chooses one time point; leave it or --all-times out")
    jobs = plan_jobs(args.input, args.output, opening, args.region, all_times=args.all_times, reads=reads)
    report = args.report or args.output / "report.csv"
    check_folder_name(args.output)
    check_replaceable([report], [*reads, *([args.input] if args.input.is_file() else [])], overwrite=True)
    model = load_model(args)
    make_folder(args.output)
    try:
        with ExitStack() as stack, progress("batch", unit="shard") as bar:
            run = stack.enter_context(closing(iter_batch(jobs, model, report, **opening_options(args, stack))))
            rows = finish(run, lambda step: _show_batch(bar, step))
    except KeyboardInterrupt:
        hold_signals()
        say(f"interrupted; what is finished is kept, and --resume goes on; the volumes so far are in {report}")
        return INTERRUPTED
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed:
        say(f"error: {row['error']}")
    if args.json:
        print_json(rows)
    else:
        print(f"{len(rows) - len(failed)} of {len(rows)} volumes segmented: {report}")
    return ERROR if failed else FINE


def _show_batch(bar: tqdm[NoReturn], step: BatchStep) -> None:
    check_stopped()
    bar.set_description(f"{step.job.source.name} ({step.index} of {step.total})", refresh=False)
    if step.shard is not None:
        show_shard(bar, step.shard)
