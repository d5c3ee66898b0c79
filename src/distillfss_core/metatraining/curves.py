"""Plot of loss and scores over the steps of a meta-training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distillfss_core.io.writing import atomic_path

LOSSES = ("teacher", "attention")


def draw_curves(history: Sequence[dict[str, float]], path: Path) -> None:
    """Draw every loss and every score of a history (one dictionary with ``step`` a line) into a PNG file."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = sorted({name for line in history for name in line} - {"step"})
    for name in names:
        steps = [line["step"] for line in history if name in line]
        values = [line[name] for line in history if name in line]
        axes = left if name in LOSSES else right
        axes.plot(steps, values, label=name.replace("_", " "), linewidth=1.2)
    for axes, title in ((left, "loss"), (right, "IoU on held-out tasks")):
        axes.set_xlabel("step")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    right.set_ylim(0, 1)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
