"""distillfss segment: images, stacks, folders and volumes."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distillfss_core.cli.console import (
    ERROR,
    FINE,
    INTERRUPTED,
    add_common,
    fail,
    print_json,
    progress,
    say,
    source_named,
)
from distillfss_core.cli.options import (
    add_model_options,
    add_opening,
    check_no_volume_options,
    given_opening,
    is_label_folder,
    load_model,
    opening_options,
)
from distillfss_core.cli.stopping import check_stopped, hold_signals
from distillfss_core.errors import ImageError, InputFileError, OutputError, SettingsError

if TYPE_CHECKING:
    from tqdm import tqdm

    from distillfss_core.models.segmenter import Segmenter
    from distillfss_core.models.student import StudentModel
    from distillfss_core.segmentation.to_zarr import ShardDone
    from distillfss_core.types import Array, Result, Run, Step


_COMPARED, _PIXELS = 8, 1 << 17  # files of a folder that are compared with the support, and pixels of each


def add_segment(commands: Any) -> None:
    """Add the command ``distillfss segment`` to the subparsers of the program."""
    parser = commands.add_parser(
        "segment",
        help="segment an image, a stack, a folder or a volume",
        description="Segment with a model: a folder gives a folder of label images of the same stems, a stack a "
        "stack, an image an image; where OUT ends in .ome.zarr the input is a volume of any size. Labels are 0 for "
        "background and 1, 2, ... for the classes.",
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="an image, a stack, a folder, or a volume")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder, .tif or .png file, or NAME.ome.zarr"
    )
    parser.add_argument("--probabilities", action="store_true", help="write them too (float32 TIFF, a channel a class)")
    parser.add_argument("--uncertainty", action="store_true", help="write it too (float32 TIFF, 0 sure to 1 no idea)")
    add_model_options(parser)
    add_opening(parser)
    add_common(parser, _segment)


def _segment(args: argparse.Namespace) -> int:
    from distillfss_core.io.writing import check_replaceable

    if is_label_folder(args.output):
        return segment_volume(args)
    check_no_volume_options(args)
    extras = [name for name in ("probabilities", "uncertainty") if getattr(args, name)]
    jobs = _plan_folder(args, extras) if args.input.is_dir() else [_plan_file(args, extras)]
    written = [path for _, outputs in jobs for path in outputs.values()]
    check_replaceable(written, [args.input, args.model, Path(args.weights)], overwrite=args.overwrite)
    done, failed = _segment_files(load_model(args), jobs, written, make_folders=args.input.is_dir())
    if args.json:
        print_json({"written": [str(path) for path in done], "failed": failed})
    elif done:
        what = f"{len(jobs) - failed} of {len(jobs)} files segmented" if failed or len(jobs) > 1 else "segmented"
        print(f"{what}: {args.output}")
    return ERROR if failed else FINE


_FileJob = tuple[Path, dict[str, Path]]
"""A file, and by what they are the files to write for it."""


def _segment_files(
    model: StudentModel, jobs: Sequence[_FileJob], written: Sequence[Path], *, make_folders: bool
) -> tuple[list[Path], int]:
    """The files that were written, and how many of the jobs failed."""
    from distillfss_core.io.writing import check_output, make_folder

    if make_folders:
        for folder in sorted({path.parent for path in written}):
            make_folder(folder)
    for path in written:
        check_output(path)
    done: list[Path] = []
    failed = 0
    segmenter = _matched_to_files(model, [source for source, _ in jobs])
    with progress("segmenting", len(jobs), "file") as bar:
        for source, outputs in jobs:
            check_stopped()
            try:
                _segment_file(segmenter, source, outputs, in_folder=make_folders)
            except (InputFileError, ImageError) as error:  # the other files can still be done
                failed += 1
                fail(error)
            else:
                done += outputs.values()
            bar.update()
    return done, failed


def _matched_to_files(model: StudentModel, sources: Sequence[Path]) -> Segmenter:
    """Planes of one volume in files of their own may be empty, so some of them are compared with the support together.

    Files of different types, or that cannot be read, are compared each on its own.
    """
    import numpy as np

    from distillfss_core.models.preprocess import sample_pixels
    from distillfss_core.types import evenly

    preprocess = model.preprocess
    if preprocess.scope == "image" or preprocess.intensities is None or len(sources) == 1:
        return model
    parts: list[Array] = []
    for index in evenly(len(sources), _COMPARED):
        with suppress(InputFileError, ImageError):
            planes = preprocess.stack_channels(_read_planes(sources[index], in_folder=True))
            parts += [sample_pixels(plane, _PIXELS // len(planes)) for plane in planes]
    if len({part.dtype for part in parts}) != 1:
        return model
    sample = np.concatenate(parts)[None, :, None]
    is_other_scale = preprocess.matched_to(sample, "")[0] != preprocess
    return model.matched_to(sample, str(sources[0].parent)) if is_other_scale else model


def _plan_folder(args: argparse.Namespace, extras: Sequence[str]) -> list[_FileJob]:
    """Each readable file of the folder with the files to write for it; extras go into folders of their own."""
    from distillfss_core.io.writing import check_folder_name
    from distillfss_core.volumes.zarr import is_zarr

    if is_zarr(args.input):
        raise OutputError(f"{args.output} is no name for its labels: {args.input} is a volume; end OUT in .ome.zarr")
    if args.output.exists() and not args.output.is_dir():
        raise OutputError(f"{args.output} is a file, but {args.input} is a folder; give a folder with -o")
    check_folder_name(args.output)
    if args.output.resolve() == args.input.resolve():
        raise OutputError(f"{args.output} is the folder of the images, which would be lost; give another with -o")
    jobs: list[_FileJob] = []
    taken: dict[str, Path] = {}
    for path in _images_in(args.input):
        stem = path.stem.removesuffix(".ome")
        if stem in taken:
            raise InputFileError(
                f"{args.input}: {taken[stem].name} and {path.name} have the same stem, so their results would have "
                "one name; rename one of them"
            )
        taken[stem] = path
        outputs = {"labels": args.output / f"{stem}.tif"}
        outputs |= {extra: args.output / extra / f"{stem}.tif" for extra in extras}
        jobs.append((path, outputs))
    return jobs


def _images_in(folder: Path) -> list[Path]:
    """The readable files of a folder; a line in the log names others."""
    from distillfss_core.io.images import KINDS_READ, READABLE

    paths = [path for path in sorted(folder.iterdir()) if not path.is_dir() and not path.name.startswith(".")]
    images = [path for path in paths if path.suffix.lower() in READABLE]
    if not images:
        raise InputFileError(f"{folder}: holds no image; put {KINDS_READ} files there")
    others = [path.name for path in paths if path not in images]
    if others:
        names = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        logging.getLogger(__name__).warning(
            "%d file(s) of other kinds in %s are left out: %s", len(others), folder, names
        )
    return images


def _plan_file(args: argparse.Namespace, extras: Sequence[str]) -> _FileJob:
    """The one file and what to write for it."""
    from distillfss_core.io.images import TIFF_SUFFIXES
    from distillfss_core.volumes.remote import address_of

    address = address_of(args.input)
    if address:
        raise OutputError(f"{args.output} is no name for its labels: {address} is a volume; end OUT in .ome.zarr")
    if not args.input.exists():
        raise InputFileError(f"{args.input}: no such file or folder; check the name")
    if args.output.is_dir():
        raise OutputError(f"{args.output} is a folder, but {args.input} is a file; give the name of a file with -o")
    if args.output.suffix.lower() not in (*TIFF_SUFFIXES, ".png"):
        raise OutputError(f"cannot write {args.output}: end its name in .tif or .png")
    outputs = {"labels": args.output}
    outputs |= {extra: args.output.with_name(f"{args.output.stem}_{extra}.tif") for extra in extras}
    return args.input, outputs


def _segment_file(model: Segmenter, source: Path, outputs: dict[str, Path], *, in_folder: bool = False) -> None:
    """Segment one file, plane by plane; each result is written whole or not at all."""
    from distillfss_core.io.writing import write_float_tiff, write_labels

    planes = _read_planes(source, in_folder)
    with source_named(str(source)):
        model = model.matched_to(planes, str(source))
    if len(planes) > 1:
        if outputs["labels"].suffix.lower() == ".png":
            raise OutputError(f"{outputs['labels']}: a PNG holds one plane, {source} has {len(planes)}; end it in .tif")
        _segment_stack(model, planes, source, outputs)
        return
    with source_named(str(source)):
        if len(outputs) == 1:
            labels = model.predict_labels(planes[0])
        else:
            predicted = model.predict(planes[0])
            labels = predicted.labels
            if "probabilities" in outputs:
                write_float_tiff(outputs["probabilities"], predicted.probabilities)
            if "uncertainty" in outputs:
                write_float_tiff(outputs["uncertainty"], predicted.uncertainty)
    write_labels(outputs["labels"], labels)


def _segment_stack(model: Segmenter, planes: Array, source: Path, outputs: dict[str, Path]) -> None:
    """Write as soon as segmented: of the results, no more than one plane is held."""
    import numpy as np
    import tifffile

    from distillfss_core.io.writing import atomic_path

    channels = {"probabilities": len(model.class_names) + 1, "uncertainty": 1}
    shape: tuple[int, int, int] = planes.shape[:3]
    with ExitStack() as stack:
        writers = {}
        for name, path in outputs.items():
            big = math.prod(shape) * 4 * channels.get(name, 1) > 2**31
            temporary = stack.enter_context(atomic_path(path))
            writers[name] = stack.enter_context(tifffile.TiffWriter(temporary, bigtiff=big))

        def label_planes() -> Iterator[Array]:
            with progress(source.name, len(planes), "plane") as bar:
                for z, plane in enumerate(planes):
                    with source_named(f"{source} plane {z}"):
                        if len(outputs) == 1:
                            labels = model.predict_labels(plane)
                        else:
                            predicted = model.predict(plane)
                            labels = predicted.labels
                    # Floats hardly shrink: uncompressed, planes can follow one another in one series.
                    plain: dict[str, Any] = {"contiguous": True, "photometric": "minisblack"}
                    if "probabilities" in outputs:
                        writers["probabilities"].write(
                            predicted.probabilities, planarconfig="separate", metadata={"axes": "ZCYX"}, **plain
                        )
                    if "uncertainty" in outputs:
                        writers["uncertainty"].write(predicted.uncertainty, metadata={"axes": "ZYX"}, **plain)
                    bar.update()
                    check_stopped()
                    yield labels

        writers["labels"].write(
            label_planes(),
            shape=shape,
            dtype=np.uint8,
            photometric="minisblack",
            compression="zlib",
            metadata={"axes": "ZYX"},
        )


def _read_planes(path: Path, in_folder: bool) -> Array:
    """The planes (z y x) or (z y x c) of a file; an image is a stack of one.

    In a folder, each file of an OME-TIFF of several files stands for its own planes.
    """
    from distillfss_core.io.images import read_image, read_stack

    if path.suffix.lower() == ".npy":  # does not say what its axes are: few values in the last one are channels
        with suppress(ImageError):
            return read_image(path)[None]
    return read_stack(path, own_planes=in_folder)


def segment_volume(args: argparse.Namespace) -> int:
    """``distillfss segment`` where the output is OME-Zarr."""
    from distillfss_core.labelstore.store import check_apart
    from distillfss_core.segmentation.to_zarr import iter_segment
    from distillfss_core.volumes.volume import open_volume

    unable = [name for name in ("probabilities", "uncertainty") if getattr(args, name)]
    if unable:
        raise SettingsError(f"--{unable[0]} is not written for volumes; segment_lazy in Python computes it on demand")
    check_apart(args.output, args.model)
    with ExitStack() as stack:
        volume = stack.enter_context(open_volume(args.input, **given_opening(args)))
        run = iter_segment(volume, load_model(args), args.output, region=args.region, **opening_options(args, stack))
        report = follow_steps(run, volume.name, "shard", show_shard, args.output)
    if report is None:
        return INTERRUPTED
    if args.json:
        print_json(
            {
                "labels": str(report.path),
                "shards_computed": report.computed,
                "shards_found": report.finished,
                "missing_chunks": report.missing_chunks,
                "seconds": report.seconds,
                "engine": report.engine,
                "warning": report.warning,
            }
        )
        return FINE
    finished = f", {report.finished} found finished" if report.finished else ""
    print(f"{report.path}: {report.computed} shards computed{finished}, {report.seconds:.0f} s, {report.engine}")
    return FINE


def follow_steps(
    run: Run[Step, Result], what: str, unit: str, show: Callable[[tqdm[NoReturn], Step], None], out: Path
) -> Result | None:
    """The report of a run that can be resumed; None if it was interrupted."""
    from distillfss_core.types import finish

    try:
        with progress(what, unit=unit) as bar:
            return finish(run, lambda step: show(bar, step))
    except KeyboardInterrupt:
        hold_signals()
        run.close()
        say(f"interrupted; what is finished is kept, and --resume goes on from {out}")
        return None


def show_shard(bar: tqdm[NoReturn], step: ShardDone) -> None:
    """Move a bar to the present shard.

    Raises
    ------
    KeyboardInterrupt
        If a signal has stopped the command.
    """
    check_stopped()
    if bar.total != step.total or step.index < bar.n:
        bar.reset(step.total)
    if not step.computed and not bar.n:
        bar.initial = step.index  # found finished: says nothing of the pace
    bar.update(step.index - bar.n)
