"""Commands for volumes larger than memory: segment to OME-Zarr, batches, instances."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distillfss_core.console import FAULT, FINE, INTERRUPTED, add_common, positive, print_json, progress, say
from distillfss_core.errors import OutputError, SettingsError

if TYPE_CHECKING:
    from tqdm import tqdm

    from distillfss_core.batch import BatchStep
    from distillfss_core.engine import ShardDone
    from distillfss_core.instances import InstanceStep
    from distillfss_core.labelstore import Part
    from distillfss_core.model import StudentModel
    from distillfss_core.types import Report, Step

_OPENING = ("level", "channel", "time", "series", "axes")
_VOLUMES_ONLY = (*_OPENING, "region", "mode", "cluster", "resume")


def is_label_folder(path: Path) -> bool:
    """Whether a name is that of labels in OME-Zarr: NAME.zarr, or IMAGE.zarr/labels/NAME."""
    return path.suffix.lower() == ".zarr" or (path.parent.name == "labels" and ".zarr" in path.parent.parent.suffixes)


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Options that say what of a volume is meant."""
    group = parser.add_argument_group(
        "volumes", "where labels go to OME-Zarr: OUT is NAME.ome.zarr or IMAGE.ome.zarr/labels/NAME"
    )
    group.add_argument(
        "--region", type=_region, metavar="Z0:Z1,Y0:Y1,X0:X1", help="voxels to segment, e.g. 0:100,:,512:1024"
    )
    group.add_argument("--level", type=_whole, metavar="N", help="resolution of a pyramid; 0 is the finest (default)")
    group.add_argument("--channel", type=_channel, metavar="C", help="number from 0, name, or all")
    group.add_argument("--time", type=_whole, metavar="T", help="time point, from 0")
    group.add_argument("--series", type=_whole, metavar="S", help="which image of a file that holds several, from 0")
    group.add_argument("--axes", metavar="LETTERS", help="one of tczyx a dimension, where the file does not say")
    group.add_argument(
        "--mode",
        choices=("planes", "smooth", "consensus"),
        help="planes on their own (default), with their neighbours, or three directions together (slow)",
    )
    group.add_argument(
        "--cluster",
        metavar="WHERE",
        help="local, local:N (processes here), slurm:N (jobs) or tcp://HOST:PORT; --device is that of its workers",
    )
    group.add_argument("--resume", action="store_true", help="go on where a run that was stopped or killed had come to")


def check_no_volume_options(args: argparse.Namespace) -> None:
    """Options of volumes have no meaning where labels go to images.

    Raises
    ------
    SettingsError
    """
    given = [name for name in _VOLUMES_ONLY if getattr(args, name) not in (None, False)]
    if given:
        raise SettingsError(f"--{given[0]} is for volumes; end the name of the output in .ome.zarr")


def load_model(args: argparse.Namespace) -> StudentModel:
    """The model that the options name, at the pixel size they name."""
    from distillfss_core.model import StudentModel

    device, precision = args.device, args.precision
    if args.cluster:
        device, precision = "cpu", "float32" if precision == "auto" else precision
    model = StudentModel.load(args.model, device=device, precision=precision, weights=args.weights, engine=args.engine)
    return model.at_pixel_size(args.pixel_size) if args.pixel_size else model


def segment_volume(args: argparse.Namespace) -> int:
    """``distillfss segment`` where the output is OME-Zarr."""
    from distillfss_core.engine import iter_segment
    from distillfss_core.volume import open_volume

    unable = [name for name in ("probabilities", "uncertainty") if getattr(args, name)]
    if unable:
        raise SettingsError(f"--{unable[0]} is not written for volumes; segment_lazy in Python computes it on demand")
    with ExitStack() as stack:
        volume = stack.enter_context(open_volume(args.input, **_opening(args)))
        run = iter_segment(volume, load_model(args), args.output, region=args.region, **_how(args, stack))
        report = _follow(run, volume.name, "shard", _show_shard, args.output)
    if report is None:
        return INTERRUPTED
    if args.json:
        print_json(
            {
                "labels": str(report.path),
                "shards_computed": report.computed,
                "shards_found": report.found,
                "missing_chunks": report.missing_chunks,
                "seconds": report.seconds,
            }
        )
        return FINE
    found = f", {report.found} found finished" if report.found else ""
    print(f"{report.path}: {report.computed} shards computed{found}, {report.seconds:.0f} s")
    return FINE


def add_batch(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "batch",
        help="segment many volumes to OME-Zarr",
        description="Segment the volumes of a folder, or of a CSV file with a column 'volume' (and, where wanted, "
        "output, region, level, channel, time, series, axes), one after another. One that fails does not stop the "
        "others; the report has a row for each.",
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="a folder of volumes, or a CSV file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="made if it is not there")
    parser.add_argument("--report", type=Path, metavar="FILE", help=".csv or .json (default: FOLDER/report.csv)")
    add_common(parser, _batch)
    return parser


def _batch(args: argparse.Namespace) -> int:
    from distillfss_core.batch import iter_batch, plan_batch
    from distillfss_core.types import drain

    jobs = plan_batch(args.input, args.output, _opening(args), args.region)
    report = args.report or args.output / "report.csv"
    model = load_model(args)
    try:
        args.output.mkdir(exist_ok=True)
    except OSError as fault:
        raise OutputError(f"cannot make {args.output}: {fault.strerror}; give another with -o") from fault
    try:
        with ExitStack() as stack, progress("batch", unit="shard") as bar:
            run = stack.enter_context(closing(iter_batch(jobs, model, report, **_how(args, stack))))
            rows = drain(run, lambda step: _show_batch(bar, step))
    except KeyboardInterrupt:
        say(f"interrupted; what is finished is kept, and --resume goes on; the volumes so far are in {report}")
        return INTERRUPTED
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed:
        say(f"error: {row['error']}")
    if args.json:
        print_json(rows)
    else:
        print(f"{len(rows) - len(failed)} of {len(rows)} volumes segmented: {report}")
    return FAULT if failed else FINE


def add_instances(commands: Any) -> None:
    parser = commands.add_parser(
        "instances",
        help="number the objects of a labelled volume and measure them",
        description="Number the objects of a labelled volume of any size, over the whole of it, and measure them.",
    )
    parser.add_argument("input", type=Path, metavar="LABELS", help="from distillfss segment, or any volume of labels")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="NAME.ome.zarr")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measures, a row an object: .csv or .parquet")
    parser.add_argument("--image", type=Path, metavar="VOLUME", help="whose mean over each object is measured, too")
    parser.add_argument("--image-level", type=_whole, default=0, metavar="N", help="resolution that was segmented (0)")
    parser.add_argument("--channel", type=_channel, metavar="C", help="of the image: number from 0, or name")
    parser.add_argument("--time", type=_whole, metavar="T", help="of the image: time point, from 0")
    parser.add_argument("--value", type=positive, metavar="N", help="label of the class (default: whatever is not 0)")
    parser.add_argument(
        "--watershed",
        type=float,
        metavar="RADIUS",
        help="cut touching objects apart: radius of a typical one, in micrometres (voxels where no scale is known)",
    )
    parser.add_argument(
        "--connectivity",
        type=int,
        choices=(6, 18, 26),
        default=6,
        help="with how many neighbours a voxel is connected, without --watershed (6)",
    )
    parser.add_argument("--min-voxels", type=positive, default=1, metavar="N", help="leave smaller objects out (1)")
    parser.add_argument(
        "--resume", action="store_true", help="go on where a run that was stopped or killed had come to"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there already")
    add_common(parser, _instances, threads=False)


def _instances(args: argparse.Namespace) -> int:
    from distillfss_core.instances import iter_instances
    from distillfss_core.volume import open_volume

    if not is_label_folder(args.output):
        raise OutputError(f"cannot write {args.output}: numbered objects are a volume; end its name in .ome.zarr")
    with ExitStack() as stack:
        labels = stack.enter_context(open_volume(args.input))
        image = None
        if args.image:
            how = {"level": args.image_level, "channel": args.channel, "time": args.time}
            image = stack.enter_context(open_volume(args.image, **how))
        run = iter_instances(
            labels,
            args.output,
            table=args.table,
            image=image,
            value=args.value,
            method="components" if args.watershed is None else "watershed",
            connectivity=args.connectivity,
            radius=args.watershed,
            min_voxels=args.min_voxels,
            resume=args.resume,
            overwrite=args.overwrite,
        )
        report = _follow(run, "instances", "block", _show_stage, args.output)
    if report is None:
        return INTERRUPTED
    if args.json:
        print_json({**asdict(report), "path": str(report.path)})
        return FINE
    small = f", {report.too_small} left out as too small" if report.too_small else ""
    print(f"{report.path}: {report.objects} objects{small}, {report.seconds:.0f} s")
    return FINE


def _show_stage(bar: tqdm[NoReturn], step: InstanceStep) -> None:
    if bar.total != step.total or step.index < bar.n:
        bar.reset(step.total)
    bar.set_description(step.stage, refresh=False)
    bar.update(step.index - bar.n)


def _opening(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _OPENING if getattr(args, name) is not None}


def _how(args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Options of `iter_segment`; a cluster is left with the stack."""
    cluster = None
    if args.cluster:
        from distillfss_core.cluster import connect

        cluster = stack.enter_context(connect(args.cluster, device=args.device, precision=args.precision))
    return {"resume": args.resume, "overwrite": args.overwrite, "mode": args.mode or "planes", "cluster": cluster}


def _follow(
    run: Generator[Step, None, Report], what: str, unit: str, show: Callable[[tqdm[NoReturn], Step], None], out: Path
) -> Report | None:
    """The report of a run that can be resumed; None if it was interrupted."""
    from distillfss_core.types import drain

    try:
        with progress(what, unit=unit) as bar:
            return drain(run, lambda step: show(bar, step))
    except KeyboardInterrupt:
        run.close()
        say(f"interrupted; what is finished is kept, and --resume goes on from {out}")
        return None


def _show_shard(bar: tqdm[NoReturn], step: ShardDone) -> None:
    if bar.total != step.total or step.index < bar.n:
        bar.reset(step.total)
    if not step.computed and not bar.n:
        bar.initial = step.index  # found finished: says nothing of the pace
    bar.update(step.index - bar.n)


def _show_batch(bar: tqdm[NoReturn], step: BatchStep) -> None:
    bar.set_description(f"{step.job.source.name} ({step.index} of {step.total})", refresh=False)
    if step.shard is not None:
        _show_shard(bar, step.shard)


def _region(text: str) -> Part:
    from distillfss_core.labelstore import parse_region

    try:
        return parse_region(text)
    except SettingsError as fault:
        raise argparse.ArgumentTypeError(str(fault)) from fault


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _channel(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
