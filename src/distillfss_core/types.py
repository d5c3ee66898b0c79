"""Values at the door: numpy arrays with names, checked when they are made. No torch in here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from distillfss_core.errors import ImageError, NotFiniteError, UnfinishedError

IGNORE = 255
"""Label of a pixel that nobody annotated: it teaches nothing and is no key of the attention."""

MAX_CLASSES = 254

SAMPLE = 1 << 20
"""Pixels of a plane at most from which its intensity limits are taken."""

Rgb = tuple[int, int, int]

CLASS_COLORS: tuple[Rgb, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
)
"""Colors of the classes 1, 2, ...: those of Okabe and Ito, distinct with every common kind of color blindness."""

PREPARATION = (
    "load",
    "zoom",
    "orientation",
    "images",
    "teacher",
    "specialize",
    "compare",
    "probe",
    "fit",
    "encode",
    "embed",
)
"""Stages of a run before its first training step."""

_STAGES = {
    "load": "loading the backbone",
    "zoom": "choosing the zoom",
    "orientation": "choosing the orientation",
    "probe": "drawing pixels for the probe",
    "fit": "fitting the probe",
    "encode": "preparing augmented crops",
    "images": "looking at images",
    "teacher": "fitting the scale of the teacher's features",
    "embed": "embedding images with SAM",
    "specialize": "specializing the backbone",
    "compare": "comparing it with the backbone before",
    "refine": "training the teacher",
    "joint": "training",
    "direct": "training",
    "distill": "distilling",
    "foundation": "fitting a probe on the foundation model",
    "label": "segmenting unlabeled images",
    "unlabeled": "training on unlabeled images",
    "pretrain": "meta-training",
    "looking": "looking at planes",
    "judge": "comparing with the truth",
}
_FOLLOWING = {"load": "zoom", "probe": "fit", "fit": "encode"}

Array = npt.NDArray[Any]

P = ParamSpec("P")
Step = TypeVar("Step")
Result = TypeVar("Result")
Step_co = TypeVar("Step_co", covariant=True)
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True, eq=False)
class AnnotatedSlice:
    """A plane with labels.

    Parameters
    ----------
    image : array, shape (y, x) or (y, x, c)
        Intensities, any integer, bool or floating dtype; finite.
    labels : array, shape (y, x)
        uint8: 0 background, 1..K classes, ``IGNORE`` (255) not annotated.
    source : str
        Where it came from, for messages and for the training record.

    Raises
    ------
    ImageError
        If shapes do not fit, a pixel is not finite, or labels are not uint8.
    """

    image: Array
    labels: Array
    source: str = "slice"

    def __post_init__(self) -> None:
        check_image(self.image, self.source)
        if self.labels.dtype != np.uint8:
            raise ImageError(
                f"{self.source}: labels have dtype {self.labels.dtype}; give uint8 classes (0 background, 1..K, "
                f"{IGNORE} not annotated), e.g. by distillfss_core.io.labels.labels_from_image"
            )
        if self.labels.shape != self.image.shape[:2]:
            raise ImageError(
                f"{self.source}: the image is {_size(self.image)} but its labels are {_size(self.labels)} (y x x); "
                "give a label image of the same size"
            )


@dataclass(frozen=True, eq=False)
class UnlabeledImage:
    """An image without labels, or a window of one.

    Parameters
    ----------
    pixels : array, shape (y, x) or (y, x, c)
        Any integer, bool or floating dtype; finite.
    sample : array, shape (y, x) or (y, x, c)
        Every `sample_step`-th row and column of the whole image, from which its intensity limits are taken.
    """

    pixels: Array
    sample: Array


def check_image(image: Array, source: str = "image") -> None:
    """Raise ImageError unless ``image`` is a finite, non-empty array of shape (y, x) or (y, x, c)."""
    if image.ndim not in (2, 3):
        raise ImageError(f"{source}: an image has axes y x or y x c, this array has shape {image.shape}")
    if 0 in image.shape:
        raise ImageError(f"{source}: the image is empty (shape {image.shape})")
    if image.dtype.kind not in "buif":
        raise ImageError(f"{source}: cannot use pixels of dtype {image.dtype}; give integers, floats or bool")
    if image.dtype.kind == "f" and not (usable := is_usable(image)).all():
        bad = image.size - int(usable.sum())
        raise NotFiniteError(
            f"{source}: {bad} of {image.size} pixels are NaN or infinite (or beyond 3e38); replace them, or open the "
            "volume with replace_nan 0"
        )


def is_usable(values: Array) -> Array:
    """Where floating values are finite and within 3e38, so that sums of them in float32 are finite."""
    result: Array = np.isfinite(values) if values.dtype.itemsize == 2 else np.abs(values) < 3e38  # false for NaN
    return result


def _size(array: Array) -> str:
    return " x ".join(str(n) for n in array.shape[:2]) if array.ndim >= 2 else str(array.shape)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a model says of one plane.

    Parameters
    ----------
    labels : uint8 array, shape (y, x)
        0 background, 1..K classes.
    probabilities : float32 array, shape (k + 1, y, x)
        Channel 0 is the background; they add up to one.
    """

    labels: npt.NDArray[np.uint8]
    probabilities: npt.NDArray[np.float32]

    @classmethod
    def of(cls, probabilities: npt.NDArray[np.float32]) -> Segmentation:
        """With the likeliest class as label.

        Examples
        --------
        >>> foreground = np.array([[0.2, 0.9, 0.6]], np.float32)
        >>> Segmentation.of(np.stack([1 - foreground, foreground])).labels
        array([[0, 1, 1]], dtype=uint8)
        """
        return cls(likeliest(probabilities), probabilities)

    @property
    def uncertainty(self) -> npt.NDArray[np.float32]:
        """Entropy of the probabilities over its maximum, log(k + 1): 0 sure, 1 no idea. Shape (y, x), float32."""
        p = np.clip(self.probabilities, 1e-7, 1.0)
        result: npt.NDArray[np.float32] = (-(p * np.log(p)).sum(0) / np.log(len(p))).astype(np.float32)
        return result

    @property
    def margin(self) -> npt.NDArray[np.float32]:
        """Largest probability minus the second largest. Shape (y, x), float32, 0..1; small means unsure."""
        top = np.partition(self.probabilities, -2, axis=0)
        result: npt.NDArray[np.float32] = top[-1] - top[-2]
        return result


def likeliest(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Of "k+1 ...", for each place the class of the largest value; of equal ones the first."""
    if len(probabilities) == 2:  # argmax along the first axis takes 20 times as long
        is_foreground: npt.NDArray[np.bool_] = probabilities[1] > probabilities[0]
        return is_foreground.astype(np.uint8)
    classes: npt.NDArray[np.intp] = probabilities.argmax(0)
    return classes.astype(np.uint8)


@dataclass(frozen=True)
class TrainStep:
    """One step of a training, as its generator yields it.

    Parameters
    ----------
    index, total : int
        Steps done (1..total) and steps planned.
    losses, metrics : mapping of str to float
        Loss terms of this step; scores measured at it (e.g. ``iou`` on the validation slice), often empty.
    stage : str
        Preparation: "load", "zoom", "orientation", "probe", "fit" (the last one of method probe) or "encode";
        of a backbone "images" and "teacher", and if it is specialized "specialize" and "compare"; of an adapter
        "images" and "embed".
        Training: "refine", "joint", "distill" or "direct"; then "foundation", "label" and "unlabeled", where there are
        images without labels.
    """

    index: int
    total: int
    losses: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    stage: str = "distill"

    @property
    def is_preparation(self) -> bool:
        """Whether the step precedes the training, so that no weights have changed yet."""
        return self.stage in PREPARATION


def describe_step(step: TrainStep) -> str:
    """A phrase for what a run is doing and how far it is, such as "training, 120 of 300, loss 0.21".

    After the last step of a stage of the preparation, it is the name of the stage that follows, where that is certain.

    Parameters
    ----------
    step : TrainStep
        A stage without a text of its own is called by its name.

    Examples
    --------
    >>> describe_step(TrainStep(2, 3, stage="zoom"))
    'choosing the zoom, 2 of 3'
    >>> describe_step(TrainStep(120, 300, {"student": 0.16, "teacher": 0.05}, stage="joint"))
    'training, 120 of 300, loss 0.21'
    >>> describe_step(TrainStep(8, 8, stage="probe"))
    'fitting the probe'
    """
    if step.stage in _FOLLOWING and step.index == step.total:
        return _STAGES[_FOLLOWING[step.stage]]
    phrase = f"{_STAGES.get(step.stage, step.stage)}, {step.index} of {step.total}"
    return f"{phrase}, loss {sum(step.losses.values()):.2g}" if step.losses else phrase


def evenly(length: int, limit: int) -> list[int]:
    """Up to ``limit`` of the indices below ``length``, the first and the last among them."""
    return [int(i) for i in np.linspace(0, length - 1, min(limit, length)).round()]


def sample_step(shape: tuple[int, int], limit: int = SAMPLE) -> int:
    """The step at which rows and columns of a plane (y, x) are taken, so that about ``limit`` pixels are."""
    return max(1, math.ceil(math.sqrt(shape[0] * shape[1] / max(limit, 1))))


@runtime_checkable
class Run(Protocol[Step_co, Result_co]):
    """Long work: iterate it for its progress, then take its result.

    Nothing is computed before the first step. Ctrl-C, `close` and the end of a ``with`` block stop the work, and lose
    nothing that is finished. After a loop that was left, the run can be iterated further.

    Examples
    --------
    >>> import numpy as np
    >>> from distillfss_core import iter_diverse_planes, open_volume
    >>> run = iter_diverse_planes(open_volume(np.zeros((4, 8, 8), np.uint8)), 2)
    >>> [step.index for step in run]
    [1, 2, 3, 4]
    >>> len(run.result())
    2
    """

    def __iter__(self) -> Iterator[Step_co]: ...

    def __next__(self) -> Step_co: ...

    def close(self) -> None:
        """Stop; what is finished is kept."""

    def result(self) -> Result_co:
        """What the work has made. A run that has a result only at its end raises `UnfinishedError` before."""


class GeneratorRun(Generic[Step, Result]):
    """A `Run` whose steps a generator yields, and whose result the generator returns."""

    def __init__(self, steps: Generator[Step, None, Result]) -> None:
        self._steps = steps
        self._result: tuple[Result] | None = None

    def __iter__(self) -> GeneratorRun[Step, Result]:
        return self

    def __next__(self) -> Step:
        is_over = self._steps.gi_frame is None  # type: ignore[attr-defined]  # ended before, closed or failed
        try:
            return next(self._steps)
        except StopIteration as end:
            if not is_over:
                self._result = (end.value,)
            raise

    def close(self) -> None:
        """Stop; what is finished is kept."""
        self._steps.close()

    def __enter__(self) -> GeneratorRun[Step, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def result(self) -> Result:
        """What the generator returned.

        Raises
        ------
        UnfinishedError
            Before the last step.
        """
        if self._result is None:
            raise UnfinishedError("the run has not ended, so it has no result yet; iterate it to its end")
        return self._result[0]


def as_run(steps: Callable[P, Generator[Step, None, Result]]) -> Callable[P, GeneratorRun[Step, Result]]:
    """Decorator: a function that yields steps and returns a result becomes one that returns a `Run`."""

    @functools.wraps(steps)
    def start(*args: P.args, **kwargs: P.kwargs) -> GeneratorRun[Step, Result]:
        return GeneratorRun(steps(*args, **kwargs))

    return start


def finish(run: Run[Step, Result], show: Callable[[Step], object] = lambda _: None) -> Result:
    """Iterate a run to its end, show each step, and return the result."""
    for step in run:
        show(step)
    return run.result()
