"""Draw episodes from tasks: queries, supports and their annotated share. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from distillfss_core.metatraining.real import RealSource
from distillfss_core.metatraining.synthetic import synthetic_task
from distillfss_core.metatraining.task import U8, Task
from distillfss_core.types import IGNORE

SHOTS = (1, 1, 1, 2, 3, 4, 5, 5, 7, 10)
"""Numbers of shots, drawn alike: one often, since it is hardest; five, since people annotate about so many."""

QUERIES = 2  # queries of one support
SPARSE = 0.2  # share of supports that are annotated in part only

TRAINING, HELD_OUT = 0, 1
"""Streams of seeds that share no task."""


@dataclass(frozen=True, eq=False)
class Question:
    """Query images, and support images with their annotations.

    Parameters
    ----------
    queries, support : tuple of int
        Views of the task.
    annotated : uint8 array, shape (n, size, size)
        Labels of the support as the teacher gets them: IGNORE where nothing was annotated.
    """

    queries: tuple[int, ...]
    support: tuple[int, ...]
    annotated: U8


@dataclass(frozen=True, eq=False)
class Episode:
    """A task and its episodes; the backbone encodes the images of the task once for all episodes."""

    task: Task
    questions: tuple[Question, ...]


class EpisodeMix:
    """Episodes by number.

    An episode depends on its number alone, so any worker may draw it, and a training can resume anywhere.

    Parameters
    ----------
    real : RealSource, optional
    synthetic : float
        Share of generated tasks; without a real source all are.
    size : int
        Side of an image in pixels.
    shots : int
        Largest number of support images.
    seed : int
    """

    def __init__(self, real: RealSource | None, *, synthetic: float, size: int, shots: int, seed: int) -> None:
        self.real: RealSource | None = real
        self.synthetic: float = synthetic
        self.size: int = size
        self.seed: int = seed
        self.shots: tuple[int, ...] = tuple(min(n, shots) for n in SHOTS)

    def __getitem__(self, number: int) -> Episode:
        """Episode ``number`` of the training."""
        rng = np.random.default_rng([self.seed, TRAINING, number])
        shots = self.shots[rng.integers(len(self.shots))]
        generated = self.real is None or rng.random() < self.synthetic
        n_images, seed = shots + QUERIES, [self.seed, TRAINING, number, 1]
        if generated or self.real is None:
            task = synthetic_task(seed, n_images=n_images, size=self.size)
        else:
            task = self.real.task(seed, n_images=n_images, size=self.size)
        return Episode(task, tuple(_questions(task, shots, rng)))


def held_out_task(source: RealSource | None, number: int, *, n_images: int, size: int, seed: int) -> Task:
    """Task ``number`` of those that training never sees; None takes generated ones."""
    numbers = [seed, HELD_OUT, number]
    if source is None:
        return synthetic_task(numbers, n_images=n_images, size=size)
    return source.task(numbers, n_images=n_images, size=size)


def _questions(task: Task, shots: int, rng: np.random.Generator) -> list[Question]:
    """Draw about half as many episodes as images, each with its own queries and supports."""
    held = [bool((labels == 1).any()) for labels in task.labels]
    questions = []
    for _ in range(max(2, len(task) // 2)):
        order = [int(i) for i in rng.permutation(len(task))]
        # a support without the object says nothing of it
        first = next((i for i in order if held[i]), order[0])
        order.remove(first)
        support = (first, *order[: shots - 1])
        queries = tuple(order[shots - 1 :][: QUERIES if shots > 1 else 1])
        annotated = task.labels[list(support)]
        if rng.random() < SPARSE:
            annotated = np.stack([sparsely(labels, rng) for labels in annotated])
        if (annotated == 1).any() and (annotated == 0).any():
            questions.append(Question(queries, support, annotated))
    return questions or [Question((0,), (1,), task.labels[[1]])]


def sparsely(labels: U8, rng: np.random.Generator) -> U8:
    """What a hurried person annotates: a few strokes, or everything within a rectangle; IGNORE elsewhere.

    Parameters
    ----------
    labels : uint8 array, shape (y, x)
    """
    h, w = labels.shape
    drawn = Image.new("1", (w, h))
    pen = ImageDraw.Draw(drawn)
    if rng.random() < 0.4:
        y, x = rng.integers(0, h // 2), rng.integers(0, w // 2)
        pen.rectangle((int(x), int(y), int(x + rng.integers(w // 3, w)), int(y + rng.integers(h // 3, h))), fill=1)
    else:
        for value in (0, 1):
            points = np.argwhere(labels == value)
            for _ in range(int(rng.integers(2, 6)) if len(points) else 0):
                y, x = points[rng.integers(len(points))]
                path = np.cumsum(np.vstack([[x, y], rng.normal(0, 0.05 * w, (5, 2))]), 0)
                pen.line([tuple(map(float, p)) for p in path], fill=1, width=int(rng.integers(1, 7)))
    return np.where(np.asarray(drawn), labels, IGNORE).astype(np.uint8)


def with_foreign_masks(tasks: list[Task]) -> list[Task]:
    """The same images, each with the masks of the task after it: what a teacher says of them is worth nothing."""
    following = [*tasks[1:], *tasks[:1]]
    return [replace(task, labels=other.labels) for task, other in zip(tasks, following, strict=True)]
