"""Options that several commands have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillfss_core.errors import OutputError, SettingsError
from distillfss_core.process import leave_triton_out
from distillfss_core.settings import DistillSettings, format_setting

if TYPE_CHECKING:
    from distillfss_core.labelstore.layout import Part
    from distillfss_core.models.student import StudentModel

MODEL_SUFFIX = ".safetensors"


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add ``--overwrite``."""
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there already")


def check_model_file(output: Path, reads: Iterable[Path], *, overwrite: bool) -> None:
    """Find out before the work that a model cannot be written, or would take the place of something.

    Raises
    ------
    OutputError
        Nothing was written.
    """
    from distillfss_core.io.images import READABLE
    from distillfss_core.io.writing import check_output, check_replaceable

    suffix = output.suffix.lower()
    if suffix in READABLE:
        raise OutputError(f"cannot write {output}: a model is no image; end its name in .safetensors")
    if suffix not in ("", MODEL_SUFFIX) and not output.is_dir():
        raise OutputError(f"cannot write {output}: {suffix} is no suffix of a model; end its name in .safetensors")
    check_output(output)
    check_replaceable([output], reads, overwrite=overwrite)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the model, its pixel size, device, precision and engine, and ``--overwrite``."""
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="MODEL", help="from distillfss distill")
    parser.add_argument(
        "--pixel-size",
        type=parse_pixel_size,
        metavar="Y,X",
        help="micrometers of a pixel here: zooms as the model needs, which must have been given its own",
    )
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation: the mean of eight turned and mirrored copies; better, but eight times as slow",
    )
    add_overwrite(parser)
    add_engine_options(parser)
    parser.add_argument("--weights", default="auto", help="backbone weights, if the model was saved without (auto)")


def add_engine_options(parser: argparse._ActionsContainer) -> None:
    """Add device, precision and engine."""
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
        "the fastest that is installed: timed once, before a long run (default)",
    )


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Add how labels are read: ``--classes``, ``--scribbles`` and ``--binary-threshold``."""
    parser.add_argument(
        "--classes",
        type=parse_names,
        metavar="NAME,NAME,...",
        help="what the label values 1, 2, ... mean; by default every value but 0 is the one class",
    )
    parser.add_argument(
        "--scribbles",
        action="store_true",
        help="labels are 0 where not annotated, 1 for background, 2, 3, ... for the classes",
    )
    add_threshold(parser)


def add_threshold(parser: argparse.ArgumentParser) -> None:
    """Add ``--binary-threshold``, for labels that are masks of gray values."""
    parser.add_argument(
        "--binary-threshold",
        type=float,
        metavar="X",
        help="labels are black and white masks with edges of other grays, e.g. JPEG: object from this value on (128)",
    )


def add_settings(parser: argparse.ArgumentParser, kind_of: type = DistillSettings, title: str = "distillation") -> None:
    """An option for every field of the settings; those not given stay out of the namespace."""
    group = parser.add_argument_group(f"settings of the {title}")
    for setting in fields(kind_of):
        details = setting.metadata
        kind = {"int": int, "float": float}.get(str(setting.type), str)
        group.add_argument(
            option_flag(setting.name),
            type=_argument_type(details["parse"]) if "parse" in details else kind,
            default=argparse.SUPPRESS,
            choices=details.get("choices"),
            **({"nargs": "?", "const": details["alone"]} if "alone" in details else {}),
            metavar=None if "choices" in details else {int: "N", float: "X"}.get(kind, "TEXT"),
            help=f"{details['help']} Default: {format_setting(setting.default)}.".replace("%", "%%"),
        )


def _argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The parser of a setting, with the error that argparse expects."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except SettingsError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def given_settings(args: argparse.Namespace, kind_of: type = DistillSettings) -> dict[str, Any]:
    """The settings that were given as options, by name; the others are left to their defaults."""
    values = vars(args)
    return {setting.name: values[setting.name] for setting in fields(kind_of) if setting.name in values}


def option_flag(name: str) -> str:
    """The option of a setting.

    Examples
    --------
    >>> option_flag("crop_size")
    '--crop-size'
    """
    return "--" + name.replace("_", "-")


def parse_planes(text: str) -> tuple[int, ...]:
    """Numbers of planes, from 0, divided by commas; the type of an option.

    Raises
    ------
    argparse.ArgumentTypeError
        If a part is no whole number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of plane numbers, e.g. 0,5,10")
    return tuple(map(int, parts))


def parse_names(text: str) -> tuple[str, ...]:
    """Names divided by commas; the type of an option.

    Raises
    ------
    argparse.ArgumentTypeError
        If one is empty or occurs twice.
    """
    names = tuple(part.strip() for part in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of differing names, e.g. nucleus,debris")
    return names


def parse_pixel_size(text: str) -> tuple[float, float]:
    """Height and width of a pixel in micrometers, divided by a comma; the type of an option.

    Raises
    ------
    argparse.ArgumentTypeError
        If the text is anything but two positive numbers.
    """
    try:
        y, x = (float(part) for part in text.split(","))
    except ValueError:
        y = x = math.nan
    if not (0 < y < math.inf and 0 < x < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is no pair of sizes in micrometers, e.g. 0.25,0.25")
    return y, x


_OPENING = ("level", "channel", "time", "series", "axes", "replace_nan")
_VOLUMES_ONLY = (*_OPENING, "region", "mode", "cluster", "resume")


def is_label_folder(path: Path) -> bool:
    """Whether a name is that of labels in OME-Zarr: NAME.zarr, or IMAGE.zarr/labels/NAME."""
    return path.suffix.lower() == ".zarr" or (path.parent.name == "labels" and ".zarr" in path.parent.parent.suffixes)


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Options that say what of a volume is meant, and how it is segmented."""
    group = parser.add_argument_group(
        "volumes", "where labels go to OME-Zarr: OUT is NAME.ome.zarr or IMAGE.ome.zarr/labels/NAME"
    )
    add_volume_part(group)
    group.add_argument(
        "--mode",
        choices=("planewise", "smoothed", "consensus"),
        help="planes on their own (default), with their neighbors, or three directions together (slow)",
    )
    group.add_argument(
        "--cluster",
        metavar="WHERE",
        help="local, local:N (processes here), slurm:N (jobs) or tcp://HOST:PORT; --device is that of its workers",
    )
    group.add_argument("--resume", action="store_true", help="go on where a run that was stopped or killed had come to")


def add_volume_part(group: argparse._ArgumentGroup) -> None:
    """Options that say what of a volume is meant."""
    group.add_argument(
        "--region", type=parse_region_option, metavar="Z0:Z1,Y0:Y1,X0:X1", help="voxels, e.g. 0:100,:,512:1024"
    )
    group.add_argument(
        "--level", type=parse_whole, metavar="N", help="resolution of a pyramid; 0 is the finest (default)"
    )
    group.add_argument("--channel", type=parse_channel, metavar="C", help="number from 0, name, or all")
    group.add_argument("--time", type=parse_whole, metavar="T", help="time point, from 0")
    group.add_argument(
        "--series", type=parse_whole, metavar="S", help="which image of a file that holds several, from 0"
    )
    group.add_argument("--axes", metavar="LETTERS", help="one of tczyx a dimension, where the file does not say")
    add_replace_nan(group)


def add_replace_nan(group: argparse._ActionsContainer) -> None:
    """Option for volumes with values that are not finite."""
    group.add_argument(
        "--replace-nan", type=float, metavar="X", help="read voxels that are NaN or infinite as this number, e.g. 0"
    )


def check_no_volume_options(args: argparse.Namespace) -> None:
    """Options of volumes have no meaning where labels go to images.

    Raises
    ------
    SettingsError
    """
    used = [name for name in _VOLUMES_ONLY if getattr(args, name) is not None and getattr(args, name) is not False]
    if used:
        raise SettingsError(f"{option_flag(used[0])} is for volumes; end the name of the output in .ome.zarr")


def load_model(args: argparse.Namespace) -> StudentModel:
    """The model that the options name, at the pixel size they name."""
    from distillfss_core.models.student import StudentModel
    from distillfss_core.nn.device import choose_device

    device, precision = args.device, args.precision
    if args.cluster:
        device, precision = "cpu", "float32" if precision == "auto" else precision
    if choose_device(device, precision).kind == "cpu" and args.engine != "torch-compiled":
        leave_triton_out()
    model = StudentModel.load(args.model, device=device, precision=precision, weights=args.weights, engine=args.engine)
    model = model.at_pixel_size(args.pixel_size) if args.pixel_size else model
    return model.with_tta(args.tta)


def given_opening(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `open_volume` that were given; the others are left to its defaults."""
    return {name: getattr(args, name) for name in _OPENING if getattr(args, name) is not None}


def opening_options(args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Options of `iter_segment`; a cluster is left with the stack."""
    cluster = None
    if args.cluster:
        from distillfss_core.segmentation.cluster import connect

        cluster = stack.enter_context(connect(args.cluster, device=args.device, precision=args.precision))
    return {"resume": args.resume, "overwrite": args.overwrite, "mode": args.mode or "planewise", "cluster": cluster}


def parse_region_option(text: str) -> Part:
    """A part of a volume, Z0:Z1,Y0:Y1,X0:X1; the type of an option.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is no such text.
    """
    from distillfss_core.labelstore.layout import parse_region

    try:
        return parse_region(text)
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_whole(text: str) -> int:
    """The whole number from 0 in a text; the type of an option.

    Raises
    ------
    argparse.ArgumentTypeError
        If the text is anything else.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def parse_channel(text: str) -> int | str:
    """A channel: its number where the text is a whole number, else its name."""
    return int(text) if text.isdecimal() else text
