"""Families of image regions: a layer, a phase, an organ, cells of a sheet, or all their walls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from distillfss_core.metatraining.painting import (
    FILL_CUES,
    Canvas,
    Fill,
    Recipe,
    Rng,
    Scene,
    Shape,
    Style,
    alike,
    cloud,
    draw_fill,
    draw_ground,
    draw_shape,
    draw_share,
    draw_texture,
    fit_for_cue,
    line_cover,
    other_fill,
    paint_kinds,
    paint_objects,
    random_walks,
    region,
    smooth_noise,
    stamp,
    streaks,
    voronoi,
)
from distillfss_core.metatraining.task import F32


def membranes(rng: Rng) -> Recipe:
    """The walls between cells, or a net without cells, as the object."""
    net = rng.random() < 0.35
    dark = rng.random() < 0.5
    ground = replace(
        draw_fill(rng, ("fine", "grain", "cloud", "dots")),
        value=float(rng.uniform(0.55, 0.8) if dark else rng.uniform(0.1, 0.4)),
    )
    line = float(rng.uniform(0.1, 0.25) if dark else rng.uniform(0.65, 0.95))
    spacing, half, warp = float(rng.uniform(22, 60)), float(rng.uniform(1.2, 2.8)), float(rng.uniform(0, 1))
    inner = Style(
        draw_shape(rng, ("ellipse", "lobed", "bean")), spacing * 0.2, replace(ground, value=(ground.value + line) / 2)
    )
    share = float(rng.choice((0.0, 0.06, 0.12)))
    contrast = float(rng.uniform(0.0, 0.08))
    back = draw_ground(rng, ground)

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        if share:
            paint_kinds(rng, scene, replace(canvas, density=1), [(inner, share)])
            scene.mask[:] = False
        if not canvas.density:
            return scene
        if net:
            gap = spacing * canvas.unit
            field = smooth_noise(rng, canvas.size, gap * 0.8)
            steep = np.hypot(*np.gradient(field)) + np.float32(0.5 / gap)
            edge = np.abs(field) / steep
        else:
            edge, ids, n = voronoi(rng, canvas, spacing, warp)
            scene.value += rng.normal(0, contrast, n).astype(np.float32)[ids]
        cover = np.clip(np.float32(max(0.9, half * canvas.unit)) + np.float32(0.5) - edge, 0, 1)
        value = np.float32(line) + np.float32(0.06) * smooth_noise(rng, canvas.size, 12 * canvas.unit)
        scene.lay(cover, value, 1 - ground.hue, True)
        return scene

    return Recipe(paint, flips=net)


def cells(rng: Rng) -> Recipe:
    """A confluent sheet of cells in which some are meant: by texture, gray, grain, direction or hue."""
    cue = str(rng.choice(FILL_CUES))
    other = fit_for_cue(rng, draw_fill(rng), cue)
    fill = other_fill(rng, other, cue)
    third = other_fill(rng, other, cue) if cue == "value" and rng.random() < 0.3 else None
    if third and abs(third.value - fill.value) < 0.15:
        third = None
    spacing, warp = float(rng.uniform(30, 64)), float(rng.uniform(0, 1))
    part, border = float(rng.uniform(0.12, 0.5)), float(rng.choice((-0.4, 0.4, 0, 0)))
    half = float(rng.uniform(0.8, 2.2))

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        edge, ids, n = voronoi(rng, canvas, spacing, warp)
        kind = (rng.random(n) < np.clip(part * canvas.density, 0, 0.75)).astype(np.int16)
        if third:
            kind[(kind == 0) & (rng.random(n) < 0.4)] = 2
        own = rng.normal(0, 0.02, n).astype(np.float32)[ids]
        scene = Scene(other.render(rng, canvas) + own, other.hue)
        kinds = kind[ids]
        scene.lay((kinds == 1).astype(np.float32), fill.render(rng, canvas) + own, fill.hue, True)
        if third:
            scene.lay((kinds == 2).astype(np.float32), third.render(rng, canvas) + own, third.hue, False)
        if border:
            line = np.clip(np.float32(max(0.7, half * canvas.unit) + 0.5) - edge, 0, 1)
            scene.lay(line, float(np.clip(other.value + border, 0, 1)), other.hue, None)
        return scene

    return Recipe(paint, "color" if cue == "hue" else "any", cue != "value", cue != "angle", cue != "grain")


def layers(rng: Rng) -> Recipe:
    """Layered tissue: bands in a fixed order, one of which is meant."""
    n = int(rng.integers(3, 7))
    cue = str(rng.choice(("value", "texture", "all")))
    thickness = rng.uniform(18, 60, n)
    meant = int(rng.integers(1, n - 1))
    thickness[meant] = max(30.0, thickness[meant])
    fills = [draw_fill(rng) for _ in range(n)]
    fills[meant] = fit_for_cue(rng, fills[meant], "texture" if cue == "texture" else "")
    for i in range(n):
        if i != meant:
            base = other_fill(rng, fills[meant], "texture" if cue == "texture" else "value")
            fills[i] = base if cue != "all" else replace(base, texture=fills[i].texture, hue=fills[i].hue)
    if rng.random() < 0.5:  # nothing lies beyond the tissue
        fills[0] = Fill(0.04 if fills[meant].value > 0.4 else 0.96, 0.01, fills[0].texture, fills[0].hue)
    slope, rolling = float(rng.uniform(0, np.pi)), float(rng.uniform(4, 26))
    lines, soft = rng.random() < 0.3, float(rng.uniform(1, 5))

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        size = canvas.size
        widths = thickness * canvas.unit * np.exp(rng.normal(0, 0.12, n))
        widths[meant] *= np.clip(canvas.density, 0.5, 1.4) if canvas.density else 0
        borders = np.concatenate([[0], np.cumsum(widths[1:-1])])
        middle = borders[meant - 1] + widths[meant] / 2
        angle = slope + canvas.angle
        axis = np.arange(size, dtype=np.float32) - size / 2
        depth = axis[:, None] * np.float32(np.sin(angle)) + axis[None] * np.float32(np.cos(angle))
        depth += np.float32(rolling * canvas.unit) * smooth_noise(rng, size, 80 * canvas.unit)
        depth += np.float32(middle + rng.uniform(-0.3, 0.3) * size)
        scene = Scene(fills[0].render(rng, canvas), fills[0].hue)
        blur = np.float32(1 / (soft * canvas.unit))
        for i in range(1, n):
            if i < n - 1 and widths[i] == 0:
                continue
            ripple = np.float32(1.5 * canvas.unit) * smooth_noise(rng, size, 12 * canvas.unit)
            cover = np.clip((depth + ripple - np.float32(borders[i - 1])) * blur + np.float32(0.5), 0, 1)
            scene.lay(cover, fills[i].render(rng, canvas), fills[i].hue, i == meant)
            if lines:
                scene.value -= np.float32(0.2) * np.exp(
                    -np.square((depth + ripple - np.float32(borders[i - 1])) / (2 * canvas.unit))
                )
        return scene

    return Recipe(paint, flips=cue == "texture")


def lesions(rng: Rng) -> Recipe:
    """One or a few lesions with soft, ragged borders on textured tissue, under hairs and bubbles."""
    cue = str(rng.choice(("value", "texture", "hue", "all")))
    ground = fit_for_cue(rng, draw_fill(rng, ("cloud", "grain", "fibers", "threads")), cue)
    fill = ground
    for own in ("value", "texture", "hue") if cue == "all" else (cue,):
        fill = other_fill(rng, fill, own)
    radius = float(rng.uniform(22, 60))
    style = Style(Shape("lobed", float(rng.uniform(1, 1.6)), float(rng.uniform(0.05, 0.2))), radius, fill, spread=0.3)
    style = replace(
        style, soft=float(rng.uniform(2, 14)), rim=float(rng.choice((0, 0, 0.12, -0.12))) if cue != "texture" else 0.0
    )
    hairs, bubbles = int(rng.choice((0, 0, 4, 10))), rng.random() < 0.3
    bubble = Style(Shape("ellipse"), 7.0, replace(ground, value=0.9), rim=-0.2, wall=2.0)
    share, back = draw_share(rng, 0.05, 0.3), draw_ground(rng, ground)

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        paint_kinds(rng, scene, canvas, [(style, share)], 0.8)
        if bubbles:
            inside = scene.mask.copy()
            paint_kinds(rng, scene, replace(canvas, density=1), [(bubble, 0.02)])
            scene.mask = inside
        if hairs:
            cover = line_cover(random_walks(rng, canvas, hairs, 0.8, 0.03), canvas.size, 1.8 * canvas.unit)
            scene.lay(cover, 0.08, ground.hue, None)
        return scene

    return Recipe(paint, "color" if cue == "hue" else "any", cue in ("texture", "hue"))


def organs(rng: Rng) -> Recipe:
    """Large smooth regions inside a body, as in CT or MRI; one organ is meant, by its gray and place."""
    n = int(rng.integers(2, 6))
    flesh = float(rng.uniform(0.35, 0.55))
    plain = draw_texture(rng, ("fine", "cloud", "grain"))
    values = flesh + rng.permutation([-0.3, -0.17, 0.14, 0.27, 0.4])[:n]
    places = np.stack([rng.uniform(-0.55, 0.55, n), rng.uniform(-0.6, 0.6, n)], 1)
    for _ in range(20):  # push the organs apart
        gap = places[:, None] - places[None]
        distance = np.sqrt((gap**2).sum(-1)) + np.eye(n)
        places = np.clip(places + (0.06 * gap / distance[..., None] * (distance < 0.6)[..., None]).sum(1), -0.6, 0.6)
    radii = rng.uniform(18, 44, n)
    shapes = [Shape("lobed", float(rng.uniform(1, 1.8)), float(rng.uniform(0.02, 0.12))) for _ in range(n)]
    body = Shape("lobed", float(rng.uniform(1.05, 1.3)), 0.02)
    bone, noise = rng.random() < 0.4, float(rng.uniform(0.01, 0.05))
    meant = int(rng.integers(n)) if rng.random() < 0.85 else -1  # -1: the flesh round the organs
    radii[meant] *= 1.3

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        size = canvas.size
        scene = Scene(np.float32(0.03) + np.zeros((size, size), np.float32), 0.0)
        flank = 118 * canvas.unit
        center = np.full((1, 2), size / 2) + rng.normal(0, 0.04 * size, (1, 2))
        trunk = _trunk(rng, canvas, center[0], flank, body)
        skin = np.clip(0.5 - trunk, 0, 1)
        scene.lay(skin, 0.75, 0.0, None)
        if meant >= 0 or canvas.density:
            scene.lay(np.clip(0.5 - trunk - 7 * canvas.unit, 0, 1), flesh, 0.0, meant < 0)
        if bone:
            scene.lay(np.clip(4 * canvas.unit - np.abs(trunk + 14 * canvas.unit), 0, 1), 0.95, 0.0, False)
        c, s = np.cos(canvas.angle), np.sin(canvas.angle)
        for i in range(n):
            if i == meant and not canvas.density:
                continue
            y, x = places[i] + rng.normal(0, 0.05, 2)
            place = center + flank * np.array([[s * x + c * y, c * x - s * y]])
            grown = np.array(
                [radii[i] * canvas.unit * (np.clip(canvas.density, 0.6, 1.4) if i == meant else 1)], np.float32
            )
            layer = stamp(rng, size, place, grown * np.float32(np.exp(rng.normal(0, 0.12))), shapes[i])
            scene.lay(layer.cover(2.5 * canvas.unit), float(values[i]), i / n, i == meant)
        scene.value += np.float32(noise) * plain.render(rng, canvas)
        return scene

    return Recipe(paint, "gray" if rng.random() < 0.8 else "any", turns=False)


def _trunk(rng: Rng, canvas: Canvas, center: npt.NDArray[np.float64], radius: float, shape: Shape) -> F32:
    """Distance (y x) from the outline of a body about as large as the image, inside negative."""
    size = canvas.size
    axis = np.arange(size, dtype=np.float32)
    y, x = axis[:, None] - np.float32(center[0]), axis[None] - np.float32(center[1])
    c, s = np.float32(np.cos(canvas.angle)), np.float32(np.sin(canvas.angle))
    u, v = (c * x - s * y) / np.float32(shape.stretch), s * x + c * y
    distance = np.sqrt(u * u + v * v) * (1 + np.float32(shape.rough) * smooth_noise(rng, size, size / 3))
    result: F32 = distance - np.float32(radius)
    return result


def camouflage(rng: Rng) -> Recipe:
    """Patches as bright as what surrounds them: only kind, grain or direction of the texture tells."""
    cue = str(rng.choice(("texture", "grain", "angle")))
    ground = fit_for_cue(rng, draw_fill(rng), cue)
    fill = other_fill(rng, ground, cue)
    third = other_fill(rng, ground, "texture") if cue == "texture" and rng.random() < 0.3 else None
    if third and (alike(third.texture.kind, fill.texture.kind)):
        third = None
    patches, grain, share, soft = (
        rng.random() < 0.5,
        float(rng.uniform(40, 80)),
        draw_share(rng, 0.08, 0.5),
        float(rng.uniform(1, 4)),
    )
    style = Style(
        draw_shape(rng, ("ellipse", "lobed", "polygon", "bean")), float(rng.uniform(22, 45)), fill, vary=0.0, soft=soft
    )

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = Scene(ground.render(rng, canvas), ground.hue)
        if third:
            cover = region(rng, canvas, 0.25, grain, soft)
            scene.lay(cover, third.render(rng, canvas), ground.hue, False)
        if patches:
            paint_kinds(rng, scene, canvas, [(style, share)], 1.1)
        elif canvas.density:
            cover = region(rng, canvas, min(0.65, share * canvas.density), grain, soft)
            scene.lay(cover, fill.render(rng, canvas), fill.hue, True)
        scene.value += np.float32(0.04) * smooth_noise(rng, canvas.size, 90 * canvas.unit)
        return scene

    return Recipe(paint, flips=True, turns=cue != "angle", zooms=cue != "grain")


def phases(rng: Rng) -> Recipe:
    """Materials of two or three phases that interlock; one of them is meant."""
    cue = str(rng.choice(("value", "texture", "all")))
    other = fit_for_cue(
        rng, draw_fill(rng, ("fine", "grain", "stripes", "plain", "dots")), "texture" if cue == "texture" else ""
    )
    fill = other_fill(rng, other, "texture" if cue == "texture" else "value")
    if cue == "all":
        fill = other_fill(rng, fill, "texture")
    third = rng.random() < 0.4
    pores = Fill(0.06 if min(fill.value, other.value) > 0.25 else 0.95, 0.02, other.texture, 0.5)
    grain, share, angle = float(rng.uniform(10, 34)), float(rng.uniform(0.12, 0.5)), float(rng.uniform(0, np.pi))
    drawn_out = float(rng.choice((1, 1, 2.5)))

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = Scene(other.render(rng, canvas), other.hue)
        if canvas.density:
            size, width = canvas.size, grain * canvas.unit
            field = (
                streaks(rng, size, width, angle + canvas.angle, drawn_out)
                if drawn_out > 1
                else cloud(rng, size, 1.6 * width)
            )
            level = np.float32(np.quantile(field[::4, ::4], 1 - np.clip(share * canvas.density, 0.04, 0.65)))
            cover = np.clip((field - level) * np.float32(0.5 * width) + np.float32(0.5), 0, 1)
            scene.lay(cover, fill.render(rng, canvas), fill.hue, True)
        if third:
            scene.lay(region(rng, canvas, 0.07, 0.7 * grain, 1), pores.render(rng, canvas), pores.hue, False)
        return scene

    return Recipe(paint, flips=cue == "texture")


def colonies(rng: Rng) -> Recipe:
    """A dense sheet of small bodies beside bare ground (colonies, wounds, nests): the sheet or the gap is meant."""
    gap_meant = rng.random() < 0.35
    ground = replace(draw_fill(rng, ("fine", "cloud", "fibers", "grain")), depth=float(rng.uniform(0.02, 0.06)))
    fill = other_fill(rng, ground, "value")
    radius = float(rng.uniform(4.5, 8))
    style = Style(draw_shape(rng, ("ellipse", "lobed", "rod")), radius, fill, spread=0.15, vary=0.05)
    style = replace(style, halo=float(rng.choice((0, 0.15))), rim=float(rng.choice((0, 0.15, -0.15))))
    grain, share, tint = float(rng.uniform(60, 110)), float(rng.uniform(0.15, 0.5)), float(rng.uniform(0, 0.08))
    strays, back = float(rng.choice((0, 0.03))), draw_ground(rng, ground)

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        gap = (1 - share) * canvas.density if gap_meant else 1 - share * canvas.density
        sheet = region(rng, canvas, 1 - min(0.8, gap), grain, 3) if gap < 1 else np.zeros_like(scene.value)
        scene.value += np.float32(tint) * sheet
        spacing = 2.3 * radius * canvas.unit
        side = int(canvas.size / spacing) + 2
        grid = (np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2)).astype(float)
        centers = (grid + rng.uniform(-0.3, 0.3, grid.shape)) * spacing
        inside = centers.astype(int).clip(0, canvas.size - 1)
        kept = centers[(sheet[inside[:, 0], inside[:, 1]] > 0.5) | (rng.random(len(centers)) < strays)]
        radii = (radius * canvas.unit * np.exp(rng.normal(0, style.spread, len(kept)))).astype(np.float32)
        layer = stamp(rng, canvas.size, kept, radii, style.shape, 6 * canvas.unit)
        if len(kept):
            paint_objects(rng, scene, layer, style, canvas, None)
        scene.mask = (sheet < 0.5) if gap_meant else (sheet > 0.5)
        if gap_meant and not canvas.density:
            scene.mask[:] = False
        return scene

    return Recipe(paint, flips=True)
