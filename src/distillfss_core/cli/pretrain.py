"""distillfss pretrain: meta-train a head."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillfss_core.cli.console import (
    FINE,
    INTERRUPTED,
    add_common,
    cell,
    print_json,
    print_table,
    progress,
    say,
    show_step,
)
from distillfss_core.cli.options import add_overwrite, add_settings, given_settings, parse_names
from distillfss_core.cli.stopping import hold_signals, is_stopped
from distillfss_core.errors import SettingsError
from distillfss_core.settings import PretrainSettings

if TYPE_CHECKING:
    from distillfss_core.types import TrainStep


def add_pretrain(commands: Any) -> None:
    """Add the command ``distillfss pretrain`` to the subparsers of the program."""
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
        "--holdout", type=parse_names, default=(), metavar="SET,SET,...", help="sets not trained on, but judged on"
    )
    parser.add_argument("--name", default="", metavar="TEXT", help="name and version for the card")
    add_overwrite(parser)
    add_settings(parser, PretrainSettings, "meta-training")
    add_common(parser, _pretrain)


def _pretrain(args: argparse.Namespace) -> int:
    settings = PretrainSettings(**given_settings(args, PretrainSettings))
    if args.holdout and not args.real:
        raise SettingsError("--holdout names sets of --real; give it too")
    from distillfss_core.io.writing import check_replaceable

    try:
        from distillfss_core.metatraining.run import CHECKPOINT, CURVES, HEAD, PretrainRun, sources
    except ModuleNotFoundError as error:
        raise SettingsError(f"meta-training needs {error.name}: pip install 'napari-distillfss[pretrain]'") from error

    from distillfss_core.io.writing import make_folder

    make_folder(args.output)
    goes_on = (args.output / CHECKPOINT).exists()
    check_replaceable(
        [args.output / name for name in (CURVES, HEAD)],
        [Path(settings.init_from), Path(settings.weights)],
        overwrite=args.overwrite or goes_on,
    )
    real, held_out = sources(args.real, args.holdout)
    run = PretrainRun(settings, args.output, real=real, held_out=held_out)
    step: TrainStep | None = None
    try:
        with progress("preparing") as bar:
            for step in run:
                show_step(bar, step)
    except (KeyboardInterrupt, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_stopped():  # workers end with the same signal
            raise
        hold_signals()
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
