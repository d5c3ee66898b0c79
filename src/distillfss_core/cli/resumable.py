"""Commands that keep their state in a checkpoint, and go on from it when they are given again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillfss_core.cli.console import progress, say, show_step
from distillfss_core.cli.stopping import hold_signals

if TYPE_CHECKING:
    from distillfss_core.types import Run, TrainStep


def add_unlabeled_images(parser: argparse.ArgumentParser) -> None:
    """Add the images without labels that such a command learns from."""
    parser.add_argument(
        "images",
        type=Path,
        nargs="+",
        metavar="IMAGES",
        help="image files, volumes, folders of images, or folders of sets (with images/)",
    )


def follow(run: Run[TrainStep, Any], checkpoint: Path) -> bool:
    """Iterate a run, showing its steps; whether it came to its end, or was interrupted and is closed."""
    step: TrainStep | None = None
    try:
        with progress("preparing") as bar:
            for step in run:
                show_step(bar, step)
        hold_signals()
    except KeyboardInterrupt:
        hold_signals()
        run.close()
        if checkpoint.exists() and step is not None:
            say(f"interrupted at step {step.index} of {step.total}; the same command goes on from {checkpoint}")
        else:
            say("interrupted before the first state was kept; nothing was saved")
        return False
    return True
