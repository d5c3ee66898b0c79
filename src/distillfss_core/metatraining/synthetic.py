"""Generated tasks: scenes as in microscopy, with one kind of object to segment.

A *family* draws the recipe of a task (what the object is, what lies around it, by what the two differ); the recipe
paints any number of images. Targets and distractors often differ by a single *cue*, so that only the support set
defines the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from distillfss_core.errors import SettingsError
from distillfss_core.metatraining import families_objects as objects
from distillfss_core.metatraining import families_regions as regions
from distillfss_core.metatraining.optics import degrade, draw_light
from distillfss_core.metatraining.painting import Canvas, Family, Recipe, Rng, Scene
from distillfss_core.metatraining.task import U8, Task

SMALLEST_SHARE = 0.003
"""Below this share of the pixels an image says too little about the object; at most every second image may."""

FAMILIES: dict[str, Family] = {
    "particles": objects.particles,
    "nuclei": objects.nuclei,
    "tubes": objects.tubes,
    "filaments": objects.filaments,
    "membranes": regions.membranes,
    "cells": regions.cells,
    "organelles": objects.organelles,
    "spots": objects.spots,
    "layers": regions.layers,
    "lesions": regions.lesions,
    "organs": regions.organs,
    "glands": objects.glands,
    "cracks": objects.cracks,
    "camouflage": regions.camouflage,
    "phases": regions.phases,
    "colonies": regions.colonies,
    "whole cells": objects.whole_cells,
    "axons": objects.axons,
}
"""A family more is a function more."""


def synthetic_task(seed: int | Sequence[int], *, n_images: int = 4, size: int = 256, family: str | None = None) -> Task:
    """Generate a task; the same arguments give the same bytes.

    Parameters
    ----------
    seed : int or sequence of int
        Which of the many, not negative.
    n_images : int
        Number of images, 2..64. At most one in eight (one at least is allowed) holds no object.
    size : int
        Height and width of an image in pixels, 64..1024, a multiple of 32.
    family : str, optional
        One of ``FAMILIES``; without it the seed chooses.

    Returns
    -------
    Task
        Images (images, size, size, 3) uint8, labels (images, size, size) uint8 in {0, 1}, source "synthetic/<family>".

    Raises
    ------
    SettingsError
        If a number is outside its limits or the family is unknown.
    """
    if not 2 <= n_images <= 64:
        raise SettingsError(f"n_images is {n_images}; give a number from 2 to 64")
    if not 64 <= size <= 1024 or size % 32:
        raise SettingsError(f"size is {size}; give a multiple of 32 from 64 to 1024")
    if family is not None and family not in FAMILIES:
        raise SettingsError(f"there is no family {family!r}; choose one of: {', '.join(FAMILIES)}")
    rng = np.random.default_rng(seed)
    chosen = str(rng.choice(list(FAMILIES)))
    family = family or chosen
    recipe = FAMILIES[family](rng)
    light = draw_light(rng, recipe.light)
    wear = rng.uniform(0.15, 1.2)
    zoom = rng.uniform(0.8, 1.3)
    empty = set(rng.permutation(n_images)[: rng.binomial(max(1, n_images // 8), min(0.5, 0.08 * n_images))].tolist())
    images = np.empty((n_images, size, size, 3), np.uint8)
    labels = np.empty((n_images, size, size), np.uint8)
    for i, own in enumerate(rng.spawn(n_images)):
        scene = _paint_scene(own, recipe, zoom, size, empty=i in empty)
        exposure = light.varied(own, flip=recipe.flips and own.random() < 0.1)
        picture = degrade(exposure.expose(scene.value, scene.hue), own, strength=wear)
        pixels: U8 = np.rint(picture * 255).astype(np.uint8)
        mask: npt.NDArray[np.bool_] = scene.mask
        if recipe.turns:
            turns, mirrored = int(own.integers(4)), own.random() < 0.5
            pixels, mask = np.rot90(pixels, turns), np.rot90(mask, turns)
            if mirrored:
                pixels, mask = pixels[:, ::-1], mask[:, ::-1]
        images[i], labels[i] = pixels, mask
    return Task(images, labels, f"synthetic/{family}")


def _paint_scene(rng: Rng, recipe: Recipe, zoom: float, size: int, *, empty: bool) -> Scene:
    """An image with the object, or without it; too little of it is painted anew, denser."""
    spread = 0.28 if recipe.zooms else 0.08
    own = float(np.clip(zoom * np.exp(rng.normal(0, spread)), 0.6, 1.7))
    angle = rng.uniform(0, 2 * np.pi) if recipe.turns else rng.normal(0, 0.15)
    density = 0.0 if empty else float(np.clip(np.exp(rng.normal(-0.15, 0.55)), 0.15, 1.8))
    canvas = Canvas(size, own * size / 256, angle, density)
    scene = recipe.paint(rng, canvas)
    for _ in range(3):
        if empty or SMALLEST_SHARE <= scene.mask.mean() <= 0.75:
            break
        density = max(0.5, density * 2) if not scene.mask.mean() > 0.5 else density / 2
        canvas = replace(canvas, density=density)
        scene = recipe.paint(rng, canvas)
    return scene
