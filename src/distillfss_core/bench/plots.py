"""Plot of speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distillfss_core.bench.speed import SpeedReport, Timing
from distillfss_core.io.writing import atomic_path


def draw_speed(reports: Sequence[SpeedReport], paths: Sequence[Path]) -> None:
    """Times as ratios, growth with the plane, memory, and volumes; a row of four plots a device.

    Parameters
    ----------
    paths : sequence of path
        What the name ends in says whether PNG or SVG is written.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2 * len(reports)), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(len(reports), 4, squeeze=False)
    for row, report in zip(grid, reports, strict=True):
        _draw_ratios(row[0], report)
        _draw_sides(row[1], report)
        _draw_memory(row[2], report)
        _draw_volumes(row[3], report)
        row[0].set_ylabel(str(report.machine), fontsize=7)
    for path in paths:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=110)


def _base(report: SpeedReport) -> list[Timing]:
    return [t for t in report.timings if t.case.side == report.plan.side]


def _draw_ratios(axes: Any, report: SpeedReport) -> None:
    timings = _base(report)[::-1]
    bars = axes.barh([t.case.title for t in timings], [t.ratio for t in timings], color="#4477aa")
    axes.bar_label(bars, [f"{t.ratio:.2f}" for t in timings], padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    _plain_log(axes)
    axes.set_title(f"time, backbone alone = 1 ({report.plan.side} x {report.plan.side})", fontsize=9)
    axes.tick_params(labelsize=8)


def _draw_sides(axes: Any, report: SpeedReport) -> None:
    for what, color in (("backbone", "#888888"), ("student", "#228833")):
        rows = sorted(
            (t for t in report.timings if t.case.what == what and t.case.classes == 1), key=lambda t: t.case.side
        )
        axes.plot([t.case.side**2 / 1e6 for t in rows], [t.ms for t in rows], "o-", color=color, label=what)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("megapixels a plane")
    axes.set_ylabel("ms")
    axes.set_title("time with the plane", fontsize=9)
    axes.legend(fontsize=8)


def _draw_memory(axes: Any, report: SpeedReport) -> None:
    cases = report.memories[::-1]
    bars = axes.barh([m.case.title for m in cases], [m.mb for m in cases], color="#ee8866")
    axes.bar_label(bars, [f"{m.mb:.0f}" for m in cases], padding=3, fontsize=8)
    _plain_log(axes)
    axes.set_title("MB for one plane", fontsize=9)
    axes.tick_params(labelsize=8)


def _plain_log(axes: Any) -> None:
    """A logarithmic axis with a number at every power of ten only, and room for the labels of bars."""
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.4)


def _draw_volumes(axes: Any, report: SpeedReport) -> None:
    for way in dict.fromkeys(v.way for v in report.volumes):
        cases = [v for v in report.volumes if v.way == way]
        axes.plot([v.planes for v in cases], [v.megavoxels_per_second for v in cases], "o-", label=way)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("planes of a volume")
    axes.set_ylabel("megavoxels/s")
    axes.set_title("volumes", fontsize=9)
    axes.legend(fontsize=8)
