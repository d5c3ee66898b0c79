"""Tables of rows in Markdown: median and range over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from distillfss_core.bench.datasets import SETS
from distillfss_core.bench.jobs import Outcome
from distillfss_core.bench.peers import PEERS
from distillfss_core.bench.rows import Machine, Row
from distillfss_core.bench.supports import PUBLISHED

NONE = ""


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column leans left, the others right."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" + "---:|" * (len(headers) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Median, and smallest and largest where there are several; nothing where there are none."""
    finite = [v for v in values if v is not None and not math.isnan(v)]
    if not finite:
        return NONE
    middle = f"{statistics.median(finite):.{digits}f}"
    return middle if len(finite) == 1 else f"{middle} ({min(finite):.{digits}f} to {max(finite):.{digits}f})"


def accuracy_table(outcomes: Sequence[Outcome]) -> str:
    """Ours beside the published figures, a line a data set and number of shots. Pooled foreground IoU."""
    rows = [o.row for o in outcomes if o.row]
    lines = []
    for name, shots in dict.fromkeys((r["data"], r["shots"]) for r in rows):
        group = [r for r in rows if (r["data"], r["shots"]) == (name, shots)]
        teacher, student = SETS[name].published.get(shots, (None, None))
        own = [spread([r["pooled"] for r in group if r["peer"] == p]) for p in ("teacher", "transferfss", "distillfss")]
        cells = [*own[:2], spread([teacher], 4), own[2], spread([student], 4)]
        lines.append([SETS[name].title, str(shots), _supports(group), _tests(group), *cells])
    headers = ["data set", "shots", "supports", "test pictures", "teacher as it comes", "teacher refined"]
    return markdown([*headers, "TransferFSS, published", "student", "DistillFSS, published"], lines)


def peers_tables(outcomes: Sequence[Outcome]) -> str:
    """A table for each data set, number of shots and kind of annotation; a line a peer."""
    parts = []
    for name, shots, kind in dict.fromkeys((o.job.data, o.job.shots, o.job.annotation) for o in outcomes):
        group = [o for o in outcomes if (o.job.data, o.job.shots, o.job.annotation) == (name, shots, kind)]
        rows = [o.row for o in group if o.row]
        lines = []
        for peer in dict.fromkeys(o.job.peer for o in group):
            of_peer = [r for r in rows if r["peer"] == peer]
            if of_peer:
                lines.append([PEERS[peer].title, *_peer_cells(of_peer)])
            else:
                error = next(o.error for o in group if o.job.peer == peer)
                lines.append([PEERS[peer].title, f"skipped: {error}", *[NONE] * 6])
        head = f"{SETS[name].title}, {shots} shots, {kind}"
        if rows:
            share = spread([100 * share for share in {r["annotated"] for r in rows}], 1)
            head += f" ({share} % of the support annotated), supports {_supports(rows)}, {_tests(rows)} test pictures"
        headers = ["", "IoU, pooled", "IoU, mean", "Dice", "boundary F1", "s to learn", "s a megapixel", "peak MB"]
        parts.append(f"{head}\n\n{markdown(headers, lines)}")
    return "\n\n".join(parts)


def _peer_cells(rows: Sequence[Row]) -> list[str]:
    digits = {"pooled": 3, "mean": 3, "dice": 3, "boundary": 3, "seconds": 1, "seconds_per_megapixel": 2, "peak_mb": 0}
    return [spread([r[name] for r in rows], n) for name, n in digits.items()]


def _supports(rows: Sequence[Row]) -> str:
    """Which seeds drew the supports."""
    seeds = sorted({r["seed"] for r in rows})
    if seeds == [PUBLISHED]:
        return "the published choice"
    return "seed " + ", ".join(map(str, seeds))


def _tests(rows: Sequence[Row]) -> str:
    texts = {
        str(r["images"]) if r["images"] == r["test_pictures"] else f"{r['images']} of {r['test_pictures']}"
        for r in rows
    }
    return ", ".join(sorted(texts))


def note(machine: Machine) -> str:
    """What is measured how, under every table."""
    return (
        f"Measured on {machine}. IoU and Dice: foreground, mean of the classes; pooled over all test pixels, or mean "
        "over pictures. Boundary F1: tolerance 0.75 % of the diagonal (Csurka, Larlus, Perronnin, What is a good "
        "evaluation measure for semantic segmentation?, BMVC 2013). Each model in a process of its own; its peak holds "
        "Python, torch and the pictures too. Several seeds: median (range)."
    )


PUBLISHED_NOTE = (
    "Published: De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano, DistillFSS: Synthesizing Few-Shot Knowledge "
    "into a Lightweight Segmentation Model, arXiv:2512.05613, 2025; other backbones, and one choice of supports by a "
    "rule. How Nucleus, KVASIR-Seg and ISIC were split at random is not published to the last picture."
)
