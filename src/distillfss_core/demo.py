"""The demo: label a few planes, distill, segment the others, and say how good and how fast that was."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distillfss_core.errors import InputFileError, SettingsError, SupportSetError
from distillfss_core.io.images import READABLE
from distillfss_core.io.labels import labels_from_image
from distillfss_core.io.writing import make_folder, write_labels, write_stack
from distillfss_core.metrics import evaluate
from distillfss_core.models.segmenter import Segmenter
from distillfss_core.plotting import Panel, Row, draw_panels
from distillfss_core.process import peak_mb
from distillfss_core.samples import generate_sample
from distillfss_core.settings import DistillSettings, parse_zoom
from distillfss_core.support.slice_selection import suggest_planes
from distillfss_core.support.support_set import SupportSet, load_support
from distillfss_core.training import iter_distill, unrefined_teacher
from distillfss_core.types import AnnotatedSlice, Array, TrainStep, as_run, finish
from distillfss_core.volumes.source import UNITS

DEMO_STEPS = 150
"""Steps of the demo's distillation: all of it takes less than three minutes on two cores."""

DEMO_FOLDER = "distillfss-demo"
DEMO_SUPPORTS = 5
QUERY_SHARE = 1 / 3  # of the user's own slices: the last ones, kept to be judged on
SHOWN = 5  # slices in the picture's first row
MODEL, PICTURE, LABELS = "model.safetensors", "demo.png", "segmented"


@dataclass(frozen=True, eq=False)
class DemoData:
    """Slices to learn from and slices to be judged on, none of them both.

    Parameters
    ----------
    name : str
        For titles.
    support : SupportSet
    queries : tuple of AnnotatedSlice
        At least one, with truth.
    stack, truth : integer arrays (z, y, x), optional
        The generated stack that the slices are planes of.
    """

    name: str
    support: SupportSet
    queries: tuple[AnnotatedSlice, ...]
    stack: Array | None = None
    truth: Array | None = None


@dataclass(frozen=True)
class DemoScore:
    """How one model did on the queries: pooled IoU and Dice (mean over classes), milliseconds a plane."""

    name: str
    iou: float
    dice: float
    ms_per_plane: float


@dataclass(frozen=True)
class DemoReport:
    """What the demo found.

    Parameters
    ----------
    data : str
    supports, queries : tuple of str
        Names of the slices learned from and judged on.
    scores : tuple of DemoScore
        Prototype teacher, refined teacher (unless the method is "direct" or "probe"), student.
    steps : int
        Steps of the training done.
    seconds : float
        To make the student from the support set, loading the backbone included.
    model_mb, peak_mb : float
        Size of the model file; largest memory of the process so far (None where the system does not say).
    device : str
    folder : str
        Where the files are.
    files : tuple of str
        Model, picture and label images.
    """

    data: str
    supports: tuple[str, ...]
    queries: tuple[str, ...]
    scores: tuple[DemoScore, ...]
    steps: int
    seconds: float
    model_mb: float
    peak_mb: float | None
    device: str
    folder: str
    files: tuple[str, ...]


def generated_data(
    planes: int = 12, size: int = 384, supports: int = DEMO_SUPPORTS, seed: int = 0, kind: str = "nuclei"
) -> DemoData:
    """A generated stack: hierarchically uniform planes are the support, the others the queries.

    Raises
    ------
    SettingsError
        If a number is outside its limits, or no plane is left to be judged on.
    """
    if not 1 <= supports < planes:
        raise SettingsError(f"supports is {supports}; give 1 to {planes - 1}, so that a plane is left to be judged on")
    sample = generate_sample(kind, planes, size, seed)
    slices = [
        AnnotatedSlice(image, labels_from_image(labels), f"plane {z:02d}")
        for z, (image, labels) in enumerate(zip(sample.image, sample.labels, strict=True))
    ]
    chosen = suggest_planes(planes, supports)
    micrometers = UNITS.get(sample.unit)
    pixel = (sample.scale[1] * micrometers, sample.scale[2] * micrometers) if micrometers else None
    support = SupportSet(tuple(slices[z] for z in chosen), (sample.object_name,), pixel, True)
    queries = tuple(s for z, s in enumerate(slices) if z not in chosen)
    return DemoData(sample.name, support, queries, sample.image, sample.labels)


def own_data(
    images: str | Path,
    labels: str | Path | None = None,
    *,
    supports: int = DEMO_SUPPORTS,
    classes: Sequence[str] | None = None,
    scribbles: bool = False,
    binary_threshold: float | None = None,
) -> DemoData:
    """The user's labeled slices: the last third are the queries, of the others up to ``supports`` the support.

    Parameters
    ----------
    images, labels : path
        As for `distillfss_core.load_support`; without ``labels`` a folder that holds ``images`` and ``labels``.
    supports : int
        Slices to learn from at most, chosen evenly.
    classes, scribbles, binary_threshold
        As for `distillfss_core.load_support`.

    Raises
    ------
    InputFileError, ImageError, SupportSetError
        As `distillfss_core.load_support` does, or if there are fewer than two labeled slices.
    """
    source = Path(images)
    if labels is None:
        images, labels = source / "images", source / "labels"
        if not (images.is_dir() and labels.is_dir()):
            raise InputFileError(f"{source}: holds no folders images and labels; make them, or give two paths")
    own = load_support(images, labels, classes=classes, scribbles=scribbles, binary_threshold=binary_threshold)
    slices = own.slices
    if len(slices) < 2:
        raise SupportSetError(f"{source}: holds 1 labeled slice; give two, one to learn from and one to be judged on")
    if supports < 1:
        raise SettingsError(f"supports is {supports}; give 1 or more")
    kept = len(slices) - max(1, round(len(slices) * QUERY_SHARE))
    chosen = [slices[i] for i in suggest_planes(kept, min(supports, kept))]
    return DemoData(source.name or str(source), replace(own, slices=chosen), tuple(slices[kept:]))


@as_run
def iter_demo(
    data: DemoData, folder: str | Path = DEMO_FOLDER, settings: DistillSettings | None = None
) -> Generator[TrainStep, None, DemoReport]:
    """The demo, step by step; its result is the `DemoReport`.

    Raises
    ------
    OutputError
        If the files cannot be written; that is found out before the training where it can be.
    """
    settings = settings or DistillSettings(steps=DEMO_STEPS)
    folder = Path(folder)
    make_folder(folder / LABELS, parents=True)
    began = time.perf_counter()
    run = iter_distill(data.support, settings)
    yield from run
    student = run.result()
    seconds = time.perf_counter() - began
    student.save(folder / MODEL)

    fixed = replace(settings, zoom=parse_zoom(student.preprocess.zoom))  # not chosen a second time
    models: list[tuple[str, Segmenter]] = [
        ("prototype teacher", unrefined_teacher(data.support, fixed, kind="prototype"))
    ]
    if settings.method not in ("direct", "probe"):
        models.append(("teacher", run.teacher()))
    models.append(("student", student))
    scores: list[DemoScore] = []
    predictions: dict[str, list[Array]] = {}
    total = len(models) * len(data.queries)
    for name, model in models:
        model.predict_labels(data.queries[0].image)  # the first time is slower
        predictions[name], spent = [], 0.0
        for query in data.queries:
            started = time.perf_counter()
            predictions[name].append(model.predict_labels(query.image))
            spent += time.perf_counter() - started
            yield TrainStep(len(scores) * len(data.queries) + len(predictions[name]), total, stage="judge")
        scores.append(_score(name, predictions[name], data, 1000 * spent / len(data.queries)))

    files = demo_files(data, folder)
    _draw(data, predictions, folder / PICTURE)
    if data.stack is not None and data.truth is not None:
        write_stack(folder / "stack.tif", data.stack)
        write_labels(folder / "stack_truth.tif", data.truth)
    for path, labels in zip(files[-len(data.queries) :], predictions["student"], strict=True):
        write_labels(path, labels)
    return DemoReport(
        data=data.name,
        supports=tuple(s.source for s in data.support.slices),
        queries=tuple(q.source for q in data.queries),
        scores=tuple(scores),
        steps=student.training["steps"],
        seconds=seconds,
        model_mb=(folder / MODEL).stat().st_size / 1e6,
        peak_mb=peak_mb(),
        device=str(student.training["device"]),
        folder=str(folder),
        files=tuple(map(str, files)),
    )


def demo_files(data: DemoData, folder: Path) -> tuple[Path, ...]:
    """What the demo writes into its folder: model, picture, the stack if it was generated, labels."""
    stack = [] if data.stack is None or data.truth is None else [folder / "stack.tif", folder / "stack_truth.tif"]
    labels = [folder / LABELS / f"{_file_stem(query.source)}.tif" for query in data.queries]
    return (folder / MODEL, folder / PICTURE, *stack, *labels)


def run_demo(
    data: DemoData | None = None, folder: str | Path = DEMO_FOLDER, settings: DistillSettings | None = None
) -> DemoReport:
    """Run the demo, by default on the generated nuclei.

    Parameters
    ----------
    data : DemoData, optional
        From `generated_data` or `own_data`.
    folder : path
        Is made if it is not there; gets the model, a picture and the label images.
    settings : DistillSettings, optional
        By default those of `distillfss_core.distill`, with fewer steps.
    """
    return finish(iter_demo(data or generated_data(), folder, settings))


def _score(name: str, predictions: Sequence[Array], data: DemoData, ms: float) -> DemoScore:
    pairs = [(predicted, query.labels) for predicted, query in zip(predictions, data.queries, strict=True)]
    scores = evaluate(pairs, data.support.classes)
    return DemoScore(name, scores.iou, scores.dice, ms)


def _draw(data: DemoData, predictions: dict[str, list[Array]], path: Path) -> None:
    """The support on top, then two queries: image, truth, teacher, student, errors."""
    support = data.support.slices
    shown = [support[i] for i in suggest_planes(len(support), min(SHOWN, len(support)))]
    rows = [Row("labeled slices", [Panel(s.image, s.labels, "outline", caption=s.source) for s in shown])]
    last = len(data.queries) - 1
    for i in sorted({last // 3, last - last // 3}):
        query = data.queries[i]
        panels = [Panel(query.image, caption="image"), Panel(query.image, query.labels, "outline", caption="truth")]
        for name in ("teacher", "student"):
            if name in predictions:
                predicted = predictions[name][i]
                iou = evaluate([(predicted, query.labels)], data.support.classes).iou
                panels.append(Panel(query.image, predicted, "outline", caption=f"{name}, IoU {iou:.2f}"))
        errors = Panel(query.image, predictions["student"][i], "errors", query.labels, "errors of the student")
        rows.append(Row(query.source, [*panels, errors]))
    student = evaluate(
        [(predicted, q.labels) for predicted, q in zip(predictions["student"], data.queries, strict=True)],
        data.support.classes,
    )
    slices = "1 slice" if len(support) == 1 else f"{len(support)} slices"
    title = f"{data.name}: learned from {slices}, IoU {student.iou:.2f} on {len(data.queries)} others"
    draw_panels(rows, path, title=title, class_names=data.support.class_names)


def _file_stem(source: str) -> str:
    """A slice's name as the stem of a file: "a.tif plane 3" becomes "a_plane_3"."""
    for suffix in READABLE:
        source = re.sub(rf"{re.escape(suffix)}(?= plane \d+$|$)", "", source, flags=re.IGNORECASE)
    return re.sub(r"[^\w.-]+", "_", source)
