"""distillfss distill: annotated slices to a student."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillfss_core.cli.console import (
    FINE,
    INTERRUPTED,
    add_common,
    format_mb,
    list_classes,
    print_json,
    progress,
    say,
    show_step,
)
from distillfss_core.cli.options import (
    add_label_options,
    add_overwrite,
    add_settings,
    add_volume_part,
    check_model_file,
    given_opening,
    given_settings,
    option_flag,
    parse_pixel_size,
    parse_planes,
)
from distillfss_core.cli.stopping import hold_signals
from distillfss_core.errors import NoStudentYetError, SettingsError
from distillfss_core.settings import FORMS, SIZES, DistillSettings, parse_zoom

if TYPE_CHECKING:
    from distillfss_core.models.student import StudentModel
    from distillfss_core.support.support_set import SupportSet
    from distillfss_core.training import DistillRun
    from distillfss_core.types import TrainStep, UnlabeledImage


def add_distill(commands: Any) -> None:
    """Add the command ``distillfss distill`` to the subparsers of the program."""
    parser = commands.add_parser(
        "distill",
        help="make a model from labeled slices",
        description="Make a model from labeled slices. Ctrl-C (or SIGTERM, or SIGHUP) stops the training and saves the "
        "best model so far.",
    )
    parser.usage = f"{parser.prog} IMAGES LABELS -o MODEL [options]"
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder, an image, a stack or a volume")
    parser.add_argument("labels", type=Path, metavar="LABELS", help="the same of labels; folders are paired by stem")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MODEL", help="model file to write")
    parser.add_argument(
        "--planes", type=parse_planes, metavar="Z,Z,...", help="labeled planes of a stack or volume, from 0"
    )
    add_label_options(parser)
    parser.add_argument(
        "--same-volume", action="store_true", help="the files are planes of one volume, as those of a stack are anyway"
    )
    parser.add_argument(
        "--pixel-size", type=parse_pixel_size, metavar="Y,X", help="micrometers, kept on the model's card"
    )
    parser.add_argument(
        "--unlabeled",
        default="auto",
        metavar="auto|none|PATH",
        help="images without labels that the model learns from as well: auto: other planes or files of IMAGES if "
        "--foundation or --specialize is given, else none; or a file, volume or folder, of which --channel, --time and "
        "the like choose as of IMAGES (default auto)",
    )
    parser.add_argument("--init-from", type=Path, metavar="MODEL", help="go on from this model with these slices")
    parser.add_argument(
        "--preset", choices=FORMS, default="default", help="form of student, decoder, teacher and loss (default)"
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        help="size of the model, which stands for its backbone: fast is about 2.4 times as fast as balanced, and less "
        "exact on some images (balanced)",
    )
    parser.add_argument("--without-backbone", action="store_true", help="leave the backbone's weights out of the file")
    add_overwrite(parser)
    add_volume_part(parser.add_argument_group("volumes", "which part of the image; its labels are one number a voxel"))
    add_settings(parser)
    add_common(parser, _distill)


def _distill(args: argparse.Namespace) -> int:
    options = given_settings(args)
    if args.size and options.setdefault("backbone", SIZES[args.size]) != SIZES[args.size]:
        raise SettingsError(f"--size {args.size} does not go with --backbone {options['backbone']}; leave one out")
    if args.init_from and args.preset != "default":
        raise SettingsError("--preset does not go with --init-from: the model has its form; leave the option out")
    settings = DistillSettings.preset(args.preset, **options)
    if settings.method == "probe" and not settings.specialize and args.unlabeled not in ("auto", "none"):
        raise SettingsError(
            f"--unlabeled {args.unlabeled} does not go with method probe, which learns from the slices alone; leave it "
            "out, or choose another method"
        )
    if args.without_backbone and settings.weights == "random":
        raise SettingsError("random backbone weights cannot be found again; leave --without-backbone out")
    if args.without_backbone and settings.specialize:
        raise SettingsError("a specialized backbone cannot be found again; leave --without-backbone out")
    reads = [args.images, args.labels, *filter(None, [args.init_from]), Path(settings.weights), Path(settings.head)]
    check_model_file(args.output, reads, overwrite=args.overwrite)

    from distillfss_core.models.student import KEEP_BACKBONE, StudentModel
    from distillfss_core.nn.pretrained import can_be_found_again
    from distillfss_core.support.support_set import load_support
    from distillfss_core.training import iter_distill
    from distillfss_core.training.preparation import match_head

    if args.size and (own := match_head(settings).backbone) != SIZES[args.size]:
        raise SettingsError(
            f"--size {args.size} does not go with --head {settings.head}, which is for {own}; leave one out"
        )
    start = None
    if args.init_from:
        start = StudentModel.load(args.init_from, device=settings.device, weights=settings.weights)
        settings = _settings_of(start, options, args.init_from)
    support = load_support(
        args.images,
        args.labels,
        planes=args.planes,
        classes=args.classes,
        scribbles=args.scribbles,
        pixel_size=args.pixel_size or (start.pixel_size if start else None),
        same_volume=args.same_volume,
        binary_threshold=args.binary_threshold,
        region=args.region,
        **given_opening(args),
    )
    step: TrainStep | None = None
    try:
        with progress("preparing") as bar:
            run = iter_distill(support, settings, init_from=start, unlabeled=_unlabeled_images(args, settings, support))
            if args.without_backbone and not can_be_found_again(run.backbone):
                raise SettingsError(KEEP_BACKBONE)
            for step in run:
                show_step(bar, step)
        model = run.result()
        hold_signals()
    except KeyboardInterrupt:
        hold_signals()
        if step is None or step.is_preparation:
            say("interrupted before the first step; nothing was saved")
            return INTERRUPTED
        return _save_best(args, run, step)
    model.save(args.output, with_backbone=not args.without_backbone)
    _print_model(args, model)
    return FINE


def _unlabeled_images(
    args: argparse.Namespace, settings: DistillSettings, support: SupportSet
) -> Sequence[UnlabeledImage]:
    """The images without labels that the options mean."""
    from distillfss_core.support.label_volumes import pair_volumes
    from distillfss_core.support.unlabeled import load_unlabeled

    if args.unlabeled == "none" or (args.unlabeled == "auto" and not settings.uses_unlabeled):
        return ()
    if args.unlabeled != "auto":
        return load_unlabeled(args.unlabeled, support, **given_opening(args))
    pairs = pair_volumes(args.images, args.labels)
    known = [path for pair in pairs for path in pair] if args.images.is_dir() else []
    return load_unlabeled(args.images, support, leave_out=known, region=args.region, **given_opening(args))


def _save_best(args: argparse.Namespace, run: DistillRun, step: TrainStep) -> int:
    """Save the best model of a training that was interrupted."""
    try:
        model = run.result(measure_halo=False)
    except NoStudentYetError as error:
        say(f"interrupted, and nothing was saved: {error}")
        return INTERRUPTED
    model.save(args.output, with_backbone=not args.without_backbone)
    best = model.training["best_step"]
    say(
        f"interrupted at step {step.index} of {step.total} ({step.stage}); "
        f"the best model so far, of step {best}, is saved in {args.output}"
    )
    _print_model(args, model)
    return INTERRUPTED


def _settings_of(start: StudentModel, options: dict[str, Any], path: Path) -> DistillSettings:
    """The settings given, with those that a model to start from has already decided."""
    decided = {
        "backbone": start.backbone.spec.name,
        **start.head.form.to_json(),
        "zoom": parse_zoom(start.preprocess.zoom),
        "normalization": f"per-{start.preprocess.scope}",
        "specialize": 0,
    }
    for name, value in decided.items():
        if options.get(name, value) != value:
            raise SettingsError(
                f"{option_flag(name)} {options[name]} does not go with --init-from: {path} has {value}; leave out "
                "the option"
            )
    return DistillSettings(**{**options, **decided})


def _print_model(args: argparse.Namespace, model: StudentModel) -> None:
    from distillfss_core.models.card import describe_expectation, describe_specialization

    size = args.output.stat().st_size
    if args.json:
        print_json({"model": str(args.output), "bytes": size, **model.card})
        return
    record = model.training
    print(f"{args.output}: {format_mb(size)}, {list_classes(model.class_names)}, zoom {model.preprocess.zoom}")
    made = f"{record['steps']} steps" if record["steps"] else record["method"]
    line = f"{made} in {record['seconds']:.0f} s on {record['device']}"
    if record.get("validation_iou") is not None:
        line += f"; best at step {record['best_step']}, IoU {record['validation_iou']:.3f} on the validation slice"
    for phrase in filter(None, (describe_specialization(record), describe_expectation(record))):
        line += f"; {phrase}"
    print(line)
