"""How long a person takes to annotate a slice with the brush, with proposed outlines, and with outlines and evidence.

    python benchmarks/outlines.py [--kinds nuclei ...] [--ways brush ...] [--seeds 0 1 2] [-o FILE]

A script annotates a plane of each generated sample until the pooled IoU with the truth is 0.9. Its seconds are modeled
after the keystroke-level model (Card, Moran and Newell 1980):

- 1.1 s to aim and press, for a click and for the first stroke at another place;
- 0.3 s for a stroke of the brush beside the last one, and length / 60 pixels a second for any stroke;
- 0.3 s for a key: Enter, Escape, Shift, another size of the brush, another tool;
- 0.8 s to look at what has come of a proposal, or of an object that was painted.

*brush*: objects are painted one after another, the largest first. Of eight brushes the one is used that reaches an
IoU of 0.92 soonest: along the border and inwards, or along the border and filled by the bucket. It makes no mistakes.

*outlines*: a stroke is drawn along each object, nine tenths of its length, whose ends are 1 pixel off (standard
deviation). Enter takes a proposal with at most 1 wrong pixel of 10 that holds 85 % of the object. Otherwise up to two
clicks follow in the middle of the largest error. A proposal with an IoU below 0.7 is then dropped, and the object is
painted. What is missing in the end is repaired by the brush, the largest error first.

*clicks* and *clicks with evidence* count no seconds: one click in the middle of each object, the median IoU of what is
proposed, and how many proposals are by more than a fifth of other objects.

*evidence*: the same as *outlines*, with the probabilities of a probe that has learned from another plane of the
stack. The seconds for that plane are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.morphology import disk

from distillfss_core import (
    AnnotatedSlice,
    DistillFSSError,
    DistillSettings,
    SupportSet,
    distill,
    generate_sample,
    propose_object,
)

Mask = npt.NDArray[np.bool_]

AIM, PRESS, KEY, LOOK, SPEED = 1.1, 0.3, 0.3, 0.8, 60.0
BRUSHES = (1, 2, 3, 4, 6, 8, 12, 16)  # radii in pixels
TARGET, OF_OBJECT = 0.9, 0.92
WRONG, HELD, WORTH, CLICKS = 0.1, 0.85, 0.7, 2
SWALLOWED, SMALLEST = 0.2, 30
KINDS, WAYS = ("nuclei", "mitochondria", "nodules"), ("brush", "outlines", "evidence")
CLICK_WAYS = ("clicks", "clicks with evidence")
PLANES, PLANE, LEARNED = 12, 6, 2


@dataclass
class Work:
    """A slice that is being annotated."""

    truth: Mask
    done: Mask
    seconds: float = 0.0
    brush: int = 0
    proposals: int = 0
    strokes: int = 0
    dropped: int = 0
    repairs: int = 0
    waits: list[float] = field(default_factory=list)

    def iou(self) -> float:
        return float((self.truth & self.done).sum() / max(1, (self.truth | self.done).sum()))


def paint(work: Work, area: Mask, *, erase: bool = False) -> None:
    """Paint (or erase) an area with the brush that is fastest."""
    rows, columns = (slice(max(0, s.start - 17), s.stop + 17) for s in ndimage.find_objects(area.astype(np.uint8))[0])
    local = area[rows, columns]
    plans = [(radius, *plan) for radius in BRUSHES for plan in plans_of(local, radius)]
    good = [plan for plan in plans if plan[1] >= OF_OBJECT] or [max(plans, key=lambda plan: plan[1])]
    radius, _, seconds, strokes, painted = min(good, key=lambda plan: plan[2] + KEY * (plan[0] != work.brush))
    work.seconds += AIM + LOOK + seconds + KEY * (radius != work.brush) + KEY * erase
    work.strokes, work.brush = work.strokes + strokes, radius
    work.done[rows, columns] = work.done[rows, columns] & ~painted if erase else work.done[rows, columns] | painted


def plans_of(area: Mask, radius: int) -> Iterator[tuple[float, float, int, Mask]]:
    """IoU, seconds, number of strokes and pixels, of painting an area from its border inwards, and of filling it."""
    depth = ndimage.distance_transform_edt(np.pad(area, 1))[1:-1, 1:-1]
    painted, seconds, strokes, level = np.zeros_like(area), 0.0, 0, radius + 0.5
    while (level <= depth.max()) or not strokes:
        region = depth >= min(level, depth.max())
        ring = region & ~ndimage.binary_erosion(region)
        painted |= ndimage.binary_dilation(ring, disk(radius))
        seconds += PRESS * (strokes > 0) + float(ring.sum() - 1) / SPEED
        strokes += 1
        if strokes == 1:
            filled = ndimage.binary_fill_holes(painted)
            yield overlap(filled, area), seconds + 2 * KEY + AIM, 2, filled
        level += 1.8 * radius
    yield overlap(painted, area), seconds, strokes, painted


def overlap(a: Mask, b: Mask) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def components(mask: Mask) -> list[Mask]:
    """Connected parts of a mask, the largest first."""
    pieces, count = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel())
    return [pieces == n for n in sorted(range(1, count + 1), key=lambda n: -sizes[n])]


def brush_alone(truth: Mask) -> Work:
    work = Work(truth, np.zeros_like(truth))
    for part in components(truth):
        if work.iou() >= TARGET:
            break
        paint(work, part)
    repair(work)
    return work


def repair(work: Work) -> None:
    """Paint and erase the largest errors until the slice is good enough."""
    while work.iou() < TARGET:
        missing, wrong = components(work.truth & ~work.done), components(work.done & ~work.truth)
        erase = not missing or bool(wrong and wrong[0].sum() > missing[0].sum())
        paint(work, (wrong if erase else missing)[0], erase=erase)
        work.repairs += 1


def stroke_along(thing: Mask, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Ends y x of a stroke along an object."""
    points = np.argwhere(thing).astype(float)
    middle = points.mean(0)
    axis = np.linalg.svd(points - middle, full_matrices=False)[2][0] if len(points) > 1 else np.array([0.0, 1.0])
    along = (points - middle) @ axis
    ends = middle + 0.9 * np.array([[along.min()], [along.max()]]) * axis + rng.normal(0, 1, (2, 2))
    return np.asarray(np.clip(ends, 0, np.array(thing.shape) - 1))


def outline(work: Work, image: Any, thing: Mask, evidence: Any, rng: np.random.Generator) -> None:
    """Annotate an object by a proposal, or by the brush if none is good enough."""
    inside, mask = [stroke_along(thing, rng)], np.zeros_like(thing)
    outside: list[npt.NDArray[np.float64]] = []
    work.seconds += AIM + float(np.linalg.norm(inside[0][1] - inside[0][0])) / SPEED
    for clicks in range(CLICKS + 1):
        started = time.process_time()
        try:
            mask = propose_object(image, inside, outside=outside, taken=work.done, evidence=evidence).mask
        except DistillFSSError:
            break
        work.waits.append(time.process_time() - started)
        work.proposals += 1
        work.seconds += LOOK
        new = mask & ~work.done
        missing, wrong = thing & ~mask & ~work.done, new & ~work.truth
        if wrong.sum() <= WRONG * new.sum() and missing.sum() <= (1 - HELD) * thing.sum():
            work.seconds += KEY
            work.done |= mask
            return
        if clicks < CLICKS:
            errors = components(missing)[:1] + components(wrong)[:1]
            error = max(errors, key=lambda part: part.sum())
            depth = ndimage.distance_transform_edt(np.pad(error, 1))[1:-1, 1:-1]
            point = np.array([np.unravel_index(depth.argmax(), depth.shape)], float)
            is_missing = bool((error & missing).any())
            (inside if is_missing else outside).append(point)
            work.seconds += AIM + (0.0 if is_missing else KEY)
    work.seconds += KEY
    if overlap(mask & ~work.done, thing & ~work.done) >= WORTH:
        work.done |= mask
        return
    work.dropped += 1
    work.seconds += 2 * KEY  # to the brush and back
    paint(work, thing & ~work.done)


def with_outlines(image: Any, labels: Any, evidence: Any) -> Work:
    truth = labels > 0
    work, rng = Work(truth, np.zeros_like(truth)), np.random.default_rng(0)
    sizes = np.bincount(labels.ravel())
    for number in sorted(np.flatnonzero(sizes)[1:], key=lambda n: -sizes[n]):
        if work.iou() >= TARGET:
            break
        thing = components(labels == number)[0]
        if (thing & work.done).sum() < HELD * thing.sum():
            outline(work, image, thing, evidence, rng)
    repair(work)
    return work


def clicked(image: Any, labels: Any, evidence: Any) -> dict[str, Any]:
    """What is proposed of one click in the middle of each object."""
    ious, swallowed = [], 0
    for number in np.unique(labels)[1:]:
        thing = components(labels == number)[0]
        if thing.sum() < SMALLEST:
            continue
        depth = ndimage.distance_transform_edt(np.pad(thing, 1))[1:-1, 1:-1]
        point = np.array([np.unravel_index(depth.argmax(), depth.shape)], float)
        try:
            mask = propose_object(image, [point], evidence=evidence).mask
        except DistillFSSError:
            ious.append(0.0)
            continue
        ious.append(overlap(mask, thing))
        swallowed += int((mask & ~thing & (labels > 0)).sum() > SWALLOWED * mask.sum())
    good = float(np.mean(np.array(ious) >= WORTH))
    return {
        "objects": len(ious),
        "iou": round(statistics.median(ious), 3),
        "good": round(good, 3),
        "swallowed": swallowed,
    }


def evidence_of(sample: Any) -> npt.NDArray[np.float32]:
    """Probability of the class in the plane, by a probe of another plane."""
    learned = AnnotatedSlice(sample.image[LEARNED], (sample.labels[LEARNED] > 0).astype(np.uint8))
    model = distill(SupportSet([learned], ("object",)), DistillSettings(method="probe"))
    return np.asarray(model.predict(sample.image[PLANE]).probabilities[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=(*WAYS, *CLICK_WAYS))
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for kind in options.kinds:
        for seed in options.seeds:
            sample = generate_sample(kind, PLANES, options.size, seed)
            image, labels = sample.image[PLANE], sample.labels[PLANE]
            truth = labels > 0
            for way in options.ways:
                evidence = np.clip(evidence_of(sample), 0, 1) if way.endswith("evidence") else None
                if way in CLICK_WAYS:
                    rows.append({"sample": kind, "seed": seed, "way": way} | clicked(image, labels, evidence))
                    print(json.dumps(rows[-1]), flush=True)
                    continue
                work = brush_alone(truth) if way == "brush" else with_outlines(image, labels, evidence)
                row = {"sample": kind, "seed": seed, "way": way, "seconds": round(work.seconds, 1)}
                row |= {"iou": round(work.iou(), 3), "objects": len(np.unique(labels)) - 1}
                row |= {n: getattr(work, n) for n in ("proposals", "strokes", "dropped", "repairs")}
                row["ms"] = round(1000 * statistics.median(work.waits)) if work.waits else None
                row["iou_of_evidence"] = None if evidence is None else round(overlap(evidence > 0.5, truth), 3)
                rows.append(row)
                print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
