"""Families of separate objects: bodies, spots and lines on a ground."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image
from scipy import ndimage

from distillfss_core.metatraining.painting import (
    FILL_CUES,
    OUTLINES,
    Canvas,
    Fill,
    Recipe,
    Rng,
    Scene,
    Shape,
    Style,
    Texture,
    branched,
    draw_fill,
    draw_ground,
    draw_shape,
    draw_share,
    draw_texture,
    enlarge,
    fit_for_cue,
    line_cover,
    line_edge,
    other_fill,
    paint_kinds,
    random_walks,
    smooth_noise,
    stamp,
    voronoi,
)
from distillfss_core.metatraining.task import F32


def particles(rng: Rng) -> Recipe:
    """Objects among objects that differ from them by one cue, or by several."""
    cue = str(rng.choice(("shape", "size", "rim", "wall", *FILL_CUES, "all")))
    ground = fit_for_cue(rng, draw_fill(rng, ("fine", "grain", "cloud", "fibers", "plain")), "")
    ground = replace(ground, depth=min(ground.depth, 0.07))
    fill = fit_for_cue(rng, replace(other_fill(rng, ground, "value"), depth=float(rng.uniform(0.02, 0.08))), cue)
    fill = replace(fill, texture=draw_texture(rng) if cue not in ("texture", "angle", "grain") else fill.texture)
    if abs(fill.value - ground.value) < 0.15:
        ground = replace(ground, value=0.15 if fill.value > 0.5 else 0.85)
    fine = cue in ("texture", "angle", "grain")
    style = Style(
        draw_shape(rng),
        float(
            rng.uniform(*{"shape": (12, 22), "wall": (11, 22), "rim": (10, 20)}.get(cue, (15, 24) if fine else (8, 20)))
        ),
        fill,
        spread=float(rng.uniform(0.05, 0.2)) if cue != "size" else 0.07,
        vary=0.02 if cue in ("value", "hue") else float(rng.uniform(0.01, 0.07)),
        rim=float(rng.choice((0, 0, -0.2, 0.2))),
        soft=float(rng.uniform(0.8, 3)),
    )
    others = [_other_style(rng, style, cue)]
    while len(others) < 3 and rng.random() < 0.4:
        others.append(_other_style(rng, style, str(rng.choice((cue, "all"))) if cue != "size" else "all"))
    share, crowd = draw_share(rng, 0.03, 0.3), draw_share(rng, 0.05, 0.25)
    back, room, clusters = draw_ground(rng, ground), rng.uniform(0.95, 1.3), int(rng.choice((0, 0, 3)))

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        kinds = [(style, share), *((other, crowd / len(others) * rng.uniform(0.5, 1.5)) for other in others)]
        paint_kinds(rng, scene, canvas, kinds, room, clusters)
        return scene

    return Recipe(
        paint,
        "color" if cue == "hue" else "any",
        cue not in ("value", "rim"),
        cue != "angle",
        cue not in ("size", "grain"),
    )


def _other_style(rng: Rng, style: Style, cue: str) -> Style:
    """Objects that differ by the cue alone, or ("all") in most respects."""
    match cue:
        case "shape":
            far = [o for o in OUTLINES if o != style.shape.outline and {o, style.shape.outline} != {"ellipse", "lobed"}]
            shape = draw_shape(rng, far)
            if style.shape.stretch < 1.4:
                shape = replace(shape, stretch=max(shape.stretch, 1.8) if shape.outline != "star" else 1.0)
            elif shape.outline in ("polygon", "ellipse", "lobed"):
                shape = replace(shape, stretch=1.0)
            return replace(style, shape=shape)
        case "size":
            factor = rng.uniform(1.8, 2.4)
            bigger = style.radius * factor < 34 and (style.radius / factor < 4 or rng.random() < 0.5)
            return replace(style, radius=style.radius * (factor if bigger else 1 / factor))
        case "rim":
            return replace(style, rim=-style.rim if style.rim else float(rng.choice((-0.3, 0.3))))
        case "wall":
            return replace(style, wall=0.0 if style.wall else style.radius * float(rng.uniform(0.25, 0.4)))
        case "all":
            fill = style.fill
            for own in ("value", "texture", "hue"):
                fill = other_fill(rng, fill, own)
            return replace(
                style,
                shape=draw_shape(rng),
                radius=float(rng.uniform(4, 20)),
                fill=fill,
                rim=float(rng.uniform(-0.2, 0.2)),
            )
        case _:
            return replace(style, fill=other_fill(rng, style.fill, cue))


_Look = tuple[Fill, Style, list[tuple[Style, float]], str]
"""Ground, style of the objects, others with their shares, and light."""


def _fluorescent(rng: Rng, shape: Shape, radius: float, tiny: Texture, share: float) -> _Look:
    """Bright nuclei with haze, debris, and those of the other channel."""
    others: list[tuple[Style, float]] = []
    ground = Fill(
        float(rng.uniform(0.03, 0.15)), float(rng.uniform(0.01, 0.05)), draw_texture(rng, ("cloud", "threads")), 0
    )
    style = Style(shape, radius, Fill(float(rng.uniform(0.45, 0.75)), float(rng.uniform(0.04, 0.12)), tiny, 0.0))
    style = replace(style, vary=0.12, soft=float(rng.uniform(1, 3)), spread=0.18)
    if rng.random() < 0.5:  # debris and grains of dye
        others.append((replace(style, radius=radius * 0.25, fill=replace(style.fill, value=0.9), spread=0.4), 0.006))
    if rng.random() < 0.35:  # the same in the other channel
        others.append((replace(style, fill=replace(style.fill, hue=1.0)), share / 2))
    light = "fluorescence" if len(others) < 2 and not any(o.fill.hue for o, _ in others) else "color"
    return ground, style, others, light


def _stained(rng: Rng, shape: Shape, radius: float, tiny: Texture) -> _Look:
    """Dark nuclei in stroma, among red cells and lymphocytes."""
    others: list[tuple[Style, float]] = []
    stroma = draw_texture(rng, ("fibers", "cloud", "threads"))
    ground = Fill(float(rng.uniform(0.6, 0.8)), float(rng.uniform(0.04, 0.1)), stroma, 1.0)
    style = Style(shape, radius, Fill(float(rng.uniform(0.25, 0.45)), float(rng.uniform(0.04, 0.1)), tiny, 0.0))
    style = replace(style, vary=0.05, rim=float(rng.choice((0, -0.12))), spread=0.2)
    if rng.random() < 0.6:  # red cells
        red = Fill(0.5, 0.02, tiny, 1.0)
        others.append((Style(Shape("ellipse", 1.2), radius * 0.8, red, rim=-0.08), 0.05))
    if rng.random() < 0.5:  # small dark lymphocytes
        dark = replace(style.fill, value=0.15)
        others.append((replace(style, shape=Shape("ellipse"), radius=radius * 0.55, fill=dark), 0.03))
    return ground, style, others, "histology"


def _in_phase_contrast(rng: Rng, shape: Shape, radius: float, tiny: Texture, texture: Texture) -> _Look:
    """Gray cells with halos, among rounded, dead ones."""
    others: list[tuple[Style, float]] = []
    ground = Fill(float(rng.uniform(0.45, 0.6)), 0.02, draw_texture(rng, ("fine", "cloud")), 0.0)
    inside = Fill(float(ground.value + rng.uniform(-0.2, -0.05)), float(rng.uniform(0.05, 0.12)), texture, 0.0)
    style = Style(shape, radius * 1.1, inside, rim=float(rng.choice((-0.2, 0.15))), halo=float(rng.uniform(0.12, 0.35)))
    style = replace(style, shape=replace(shape, rough=float(rng.uniform(0.05, 0.2))), spread=0.2)
    if rng.random() < 0.6:  # rounded, dead cells
        others.append((Style(Shape("ellipse"), radius * 0.6, Fill(0.85, 0.03, tiny, 0.0), halo=0.2), 0.03))
    return ground, style, others, "gray" if rng.random() < 0.8 else "color"


def nuclei(rng: Rng) -> Recipe:
    """Packed nuclei or cells: in fluorescence with haze, stained with hematoxylin, in phase contrast with halos."""
    stain = str(rng.choice(("fluorescence", "histology", "phase")))
    radius = float(rng.uniform(7, 18))
    shape = Shape("lobed", float(rng.uniform(1.0, 1.7)), float(rng.uniform(0.02, 0.08)))
    texture = draw_texture(rng, ("grain", "fine", "dots", "cloud"))
    tiny = replace(texture, grain=float(rng.uniform(2.5, 4)))
    share, room, clusters = draw_share(rng, 0.06, 0.5), rng.uniform(0.72, 1.05), int(rng.choice((0, 2, 4)))
    if stain == "fluorescence":
        ground, style, others, light = _fluorescent(rng, shape, radius, tiny, share)
    elif stain == "histology":
        ground, style, others, light = _stained(rng, shape, radius, tiny)
    else:
        ground, style, others, light = _in_phase_contrast(rng, shape, radius, tiny, texture)
    if others and rng.random() < 0.2:  # the others are meant
        (rare, _), *rest = others
        others, style, share = [(style, share), *rest], rare, max(0.03, others[0][1])
    back = draw_ground(rng, ground)
    haze = rng.uniform(0.0, 0.3) if stain == "fluorescence" else 0.0

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        paint_kinds(rng, scene, canvas, [(style, share), *others], room, clusters)
        if haze:
            few = np.asarray(Image.fromarray(scene.value).reduce(8))
            scene.value += np.float32(haze) * enlarge(ndimage.gaussian_filter(few, 1.5 * canvas.unit), canvas.size)
        return scene

    return Recipe(paint, light)


def tubes(rng: Rng) -> Recipe:
    """Vessels and tubes with branches or without, among thinner or differently filled ones."""
    cue = str(rng.choice(("value", "texture", "size", "hue", "none")))
    ground = replace(draw_fill(rng, ("fine", "grain", "cloud", "fibers")), depth=float(rng.uniform(0.02, 0.1)))
    fill = fit_for_cue(rng, other_fill(rng, ground, "value"), cue)
    if abs(fill.value - ground.value) < 0.15:
        ground = replace(ground, value=0.2 if fill.value > 0.5 else 0.8)
    half, wiggle = float(rng.uniform(3, 9)), float(rng.uniform(0.03, 0.18))
    trees, n, others = rng.random() < 0.4, int(rng.integers(2, 6)), int(rng.integers(1, 5))
    other, thin = other_fill(rng, fill, cue), half * (float(rng.uniform(0.25, 0.4)) if cue == "size" else 1.0)
    wall, round_, beads = (
        float(rng.choice((0, 0, -0.2, 0.2))),
        float(rng.choice((0, 0.15, -0.1))),
        float(rng.uniform(0, 0.25)),
    )
    back = draw_ground(rng, ground)

    def draw(rng: Rng, scene: Scene, canvas: Canvas, fill: Fill, half: float, number: int, target: bool) -> None:
        width = half * canvas.unit
        if trees and number:
            groups = [
                (p, width * w)
                for p, w in zip(branched(rng, canvas, max(1, number // 2), wiggle), (1, 0.65, 0.4), strict=True)
            ]
        else:
            groups = [(random_walks(rng, canvas, number, 1.6, wiggle), width)]
        edge = line_edge(groups, canvas.size)
        if beads:
            edge += np.float32(beads * width) * smooth_noise(rng, canvas.size, 4 * width)
        value = fill.render(rng, canvas)
        depth = np.clip(-edge / np.float32(width), 0, 1)
        if round_:
            value += np.float32(round_) * (depth - np.float32(0.5))
        if wall:
            value += np.float32(wall) * (depth < 0.4)
        scene.lay(np.clip(0.5 - edge / 1.5, 0, 1), value, fill.hue, target)

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        if cue != "none":
            draw(rng, scene, canvas, other, thin, others, False)
        if canvas.density:
            draw(rng, scene, canvas, fill, half, max(1, round(n * canvas.density)), True)
        return scene

    return Recipe(paint, "color" if cue == "hue" else "any", cue in ("texture", "size", "hue"), True, cue != "size")


def filaments(rng: Rng) -> Recipe:
    """Thin fibers, neurites, flagella: bright or dark lines over haze, among spots and bodies."""
    ground = Fill(
        float(rng.uniform(0.1, 0.35)),
        float(rng.uniform(0.02, 0.08)),
        draw_texture(rng, ("cloud", "grain", "fine")),
        0.0,
    )
    value, width = float(rng.uniform(0.6, 0.95)), float(rng.uniform(2.2, 4))
    wiggle, n, length = float(rng.uniform(0.02, 0.3)), int(rng.integers(4, 16)), float(rng.uniform(0.4, 1.6))
    aligned = float(rng.uniform(0, np.pi)) if rng.random() < 0.3 else None
    bodies = Style(
        draw_shape(rng), float(rng.uniform(5, 14)), replace(ground, value=value, hue=float(rng.random())), soft=2.5
    )
    share = draw_share(rng, 0.01, 0.08) if rng.random() < 0.7 else 0.0
    dashed, back = rng.random() < 0.3, draw_ground(rng, ground)

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        if share:
            paint_kinds(rng, scene, replace(canvas, density=1), [(bodies, share)])
            scene.mask[:] = False
        if canvas.density:
            turned = None if aligned is None else aligned + canvas.angle
            number = max(2, round(n * canvas.density))
            cover = line_cover(
                random_walks(rng, canvas, number, length, wiggle, turned), canvas.size, max(1.3, width * canvas.unit)
            )
            shine = np.float32(value) + np.float32(0.12) * smooth_noise(rng, canvas.size, 6 * canvas.unit)
            if dashed:
                shine = np.maximum(
                    shine - np.float32(0.25) * (smooth_noise(rng, canvas.size, 8 * canvas.unit) > 0.6),
                    ground.value + 0.15,
                )
            scene.lay(cover, shine.astype(np.float32), 0.5, True)
        return scene

    return Recipe(paint)


def organelles(rng: Rng) -> Recipe:
    """Electron microscopy: mitochondria with cristae, vesicles, dense bodies, membranes; one of them is meant."""
    meant = str(rng.choice(("mitochondria", "vesicles", "dense bodies", "membranes"), p=(0.5, 0.2, 0.15, 0.15)))
    paper = float(rng.uniform(0.55, 0.75))
    ground = Fill(paper, float(rng.uniform(0.05, 0.1)), draw_texture(rng, ("fine", "grain", "dots")), 0.0)
    matrix = Fill(paper - float(rng.uniform(0.12, 0.25)), float(rng.uniform(0.06, 0.14)), Texture("plain", 4, 0), 0.0)
    stretch, radius = float(rng.uniform(1.2, 2.4)), float(rng.uniform(13, 26))
    mitochondria = Style(Shape("lobed", stretch, 0.04), radius, matrix, rim=-0.28, spread=0.25, vary=0.03)
    mitochondria = replace(mitochondria, bars=float(rng.uniform(5, 9)))
    clear = Fill(min(0.9, paper + 0.12), 0.03, ground.texture, 0.0)
    vesicles = Style(Shape("ellipse", 1.15), float(rng.uniform(4.5, 8)), clear, rim=-0.4, spread=0.2)
    dense = Style(
        Shape("lobed", 1.2, 0.08), float(rng.uniform(6, 13)), Fill(0.18, 0.03, ground.texture, 0.0), spread=0.3, soft=2
    )
    spacing = float(rng.uniform(70, 130))
    styles = {
        "mitochondria": (mitochondria, draw_share(rng, 0.05, 0.25)),
        "vesicles": (vesicles, 0.04),
        "dense bodies": (dense, 0.035),
    }
    back, light = draw_ground(rng, ground), "gray"

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        lines = meant != "membranes" or canvas.density > 0
        if lines:
            edge, ids, n = voronoi(rng, canvas, spacing, 1.0)
            scene.value += rng.normal(0, 0.04, n).astype(np.float32)[ids]
            thick = max(1.0, 1.5 * canvas.unit)
            gap = np.float32(2.2 * thick)  # two membranes with a cleft between
            cover = np.clip(np.float32(thick) - np.abs(edge - gap) + np.float32(0.5), 0, 1)
            scene.lay(cover, paper - 0.42, 0.0, None)
        first = meant if meant in styles else "mitochondria"
        kinds = [styles[first], *(style for name, style in styles.items() if name != first)]
        layers = paint_kinds(rng, scene, canvas if meant in styles else replace(canvas, density=1), kinds, 1.1)
        if meant == "membranes":
            scene.mask[:] = False
            if lines:
                scene.mask |= edge < gap + thick
                for layer in layers:
                    scene.mask &= layer.edge > 0
        return scene

    return Recipe(paint, light)


def spots(rng: Rng) -> Recipe:
    """Puncta over a hazy, structured background, among larger or longer bodies."""
    ground = Fill(
        float(rng.uniform(0.08, 0.3)),
        float(rng.uniform(0.03, 0.08)),
        draw_texture(rng, ("cloud", "fibers", "threads")),
        0.0,
    )
    value = float(rng.uniform(0.6, 0.95))
    dot = Fill(value, 0.0, ground.texture, float(rng.random() < 0.5))
    radius = float(rng.uniform(2.6, 5))
    style = Style(Shape("ellipse"), radius, dot, spread=0.15, vary=0.05, soft=float(rng.uniform(1.5, 3.5)))
    long = Style(Shape("rod", 4.0), radius * 2, dot, soft=2)
    large = replace(
        style, radius=radius * float(rng.uniform(2.5, 4)), fill=replace(dot, value=(value + ground.value) / 2 + 0.05)
    )
    other = [(long, 0.02), (large, 0.05)][int(rng.integers(2))]
    share, clusters, back = draw_share(rng, 0.01, 0.05), int(rng.choice((0, 3))), draw_ground(rng, ground)

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        paint_kinds(rng, scene, canvas, [(style, share), other], 1.3, clusters)
        return scene

    return Recipe(paint, "any" if rng.random() < 0.6 else "fluorescence")


def glands(rng: Rng) -> Recipe:
    """Rings with an open middle: the whole gland, its wall or its lumen is meant, among holes without a wall."""
    meant = str(rng.choice(("gland", "wall", "lumen")))
    stroma = Fill(
        float(rng.uniform(0.55, 0.75)),
        float(rng.uniform(0.04, 0.1)),
        draw_texture(rng, ("fibers", "cloud", "threads")),
        1.0,
    )
    wall_fill = Fill(
        stroma.value - float(rng.uniform(0.2, 0.35)),
        float(rng.uniform(0.06, 0.14)),
        Texture("dots", float(rng.uniform(4, 7)), 0.0),
        0.0,
    )
    radius, wall = float(rng.uniform(20, 44)), float(rng.uniform(0.3, 0.5))
    shape = Shape("lobed", float(rng.uniform(1, 1.6)), float(rng.uniform(0.03, 0.12)))
    white = float(min(0.97, stroma.value + rng.uniform(0.17, 0.3)))
    hole = Style(Shape("lobed", 1.3, 0.1), radius * 0.5, Fill(white, 0.01, stroma.texture, 1.0), spread=0.3)
    share, holes = draw_share(rng, 0.12, 0.45), float(rng.choice((0, 0.04, 0.08)))
    style = Style(shape, radius, wall_fill, spread=0.25, vary=0.02)
    light = "histology" if rng.random() < 0.6 else "any"
    back = draw_ground(rng, stroma)

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        layer = paint_kinds(rng, scene, canvas, [(style, share), (hole, holes)], 1.02)[0]
        if layer.edge.min() < 0:
            lumen = np.clip(
                0.5
                - layer.edge
                - np.float32(wall * radius * canvas.unit)
                + np.float32(2) * smooth_noise(rng, canvas.size, 5 * canvas.unit),
                0,
                1,
            )
            inside = {"gland": None, "wall": False, "lumen": True}[meant]
            if meant == "lumen":
                scene.mask[:] = False
            scene.lay(lumen, white, 1.0, inside)
        return scene

    return Recipe(paint, light)


def cracks(rng: Rng) -> Recipe:
    """Jagged cracks in a surface, among straight scratches, stains and pores; or the scratches are meant."""
    ground = replace(draw_fill(rng, ("grain", "fine", "cloud", "dots")), value=float(rng.uniform(0.45, 0.75)))
    scratched = rng.random() < 0.3
    dark, half = float(rng.uniform(0.02, 0.2)), float(rng.uniform(1.0, 2.6))
    n, others = int(rng.integers(1, 4)), int(rng.integers(0, 5))
    pores = Style(
        Shape("lobed", 1.2, 0.1), float(rng.uniform(3, 8)), replace(ground, value=dark + 0.1, depth=0.02), spread=0.4
    )
    share, back = float(rng.choice((0, 0.01, 0.03))), draw_ground(rng, ground)

    def crack(rng: Rng, canvas: Canvas, number: int) -> F32:
        trees = branched(rng, canvas, number, 0.06, 0.55)
        return np.clip(
            0.5
            - line_edge([(p, half * canvas.unit * w) for p, w in zip(trees, (1.3, 0.9, 0.6), strict=True)], canvas.size)
            + np.float32(0.8) * smooth_noise(rng, canvas.size, 5 * canvas.unit),
            0,
            1,
        )

    def scratch(rng: Rng, canvas: Canvas, number: int) -> F32:
        return line_cover(
            random_walks(rng, canvas, number, 1.2, 0.003), canvas.size, max(1.5, 1.7 * half * canvas.unit)
        )

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        if share:
            paint_kinds(rng, scene, replace(canvas, density=1), [(pores, share)])
            scene.mask[:] = False
        meant, other = (scratch, crack) if scratched else (crack, scratch)
        if others:
            scene.lay(other(rng, canvas, max(1, others // 2)), dark, ground.hue, False)
        if canvas.density:
            scene.lay(
                meant(rng, canvas, max(1, round(n * canvas.density * (2 if scratched else 1)))), dark, ground.hue, True
            )
        return scene

    return Recipe(paint, "gray" if rng.random() < 0.7 else "any")


def whole_cells(rng: Rng) -> Recipe:
    """Cells with cytoplasm and a nucleus: the whole cell, its nucleus or its cytoplasm is meant."""
    meant = str(rng.choice(("cell", "nucleus", "cytoplasm")))
    bright = rng.random() < 0.5
    ground = Fill(0.08 if bright else 0.85, float(rng.uniform(0.01, 0.05)), draw_texture(rng, ("cloud", "fine")), 1.0)
    away = 1 if bright else -1
    body = Fill(
        ground.value + away * float(rng.uniform(0.18, 0.3)), float(rng.uniform(0.03, 0.08)), draw_texture(rng), 1.0
    )
    core = Fill(
        body.value + away * float(rng.uniform(0.2, 0.4)), 0.05, draw_texture(rng, ("grain", "dots", "fine")), 0.0
    )
    radius = float(rng.uniform(18, 36))
    style = Style(
        draw_shape(rng, ("lobed", "ellipse", "bean")), radius, body, spread=0.2, rim=float(rng.choice((0, 0.1 * away)))
    )
    nucleus, share = Shape("lobed", float(rng.uniform(1, 1.5)), 0.05), draw_share(rng, 0.12, 0.55)
    debris = Style(Shape("lobed", 1.2, 0.1), radius * 0.22, replace(core, hue=0.5), spread=0.3)
    light, back, part = "histology" if not bright else "any", draw_ground(rng, ground), float(rng.uniform(0.4, 0.6))

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        cells, _ = paint_kinds(rng, scene, canvas, [(style, share), (debris, 0.01)], 0.95)
        if not cells.edge.min() < 0:
            return scene
        # A nucleus lies where its cell is deepest.
        n = int(cells.ids.max()) + 1
        deepest = np.array(ndimage.minimum_position(cells.edge, cells.ids, np.arange(n)), np.float64)
        depth = -cells.edge[tuple(deepest.astype(int).T)]
        kept = depth > 0.4 * radius * canvas.unit
        nuclei = stamp(rng, canvas.size, deepest[kept] + 0.01, (part * depth[kept]).astype(np.float32), nucleus)
        inside = {"cell": None, "cytoplasm": False, "nucleus": True}[meant]
        if meant == "nucleus":
            scene.mask[:] = False
        scene.lay(nuclei.cover(1.5 * canvas.unit), core.render(rng, canvas), core.hue, inside)
        return scene

    return Recipe(paint, light)


def axons(rng: Rng) -> Recipe:
    """Bundles of axons in electron or light microscopy: the axon or its dark myelin is meant, among vacuoles."""
    meant = str(rng.choice(("axon", "myelin")))
    ground = Fill(
        float(rng.uniform(0.45, 0.65)),
        float(rng.uniform(0.04, 0.09)),
        draw_texture(rng, ("grain", "fine", "threads")),
        1.0,
    )
    radius, wall = float(rng.uniform(9, 24)), float(rng.uniform(0.22, 0.42))
    myelin = Fill(float(rng.uniform(0.08, 0.22)), 0.03, ground.texture, 0.0)
    inside = Fill(
        float(ground.value + rng.uniform(0.05, 0.25)),
        float(rng.uniform(0.02, 0.06)),
        draw_texture(rng, ("fine", "dots")),
        1.0,
    )
    style = Style(
        Shape("lobed", float(rng.uniform(1, 1.5)), float(rng.uniform(0.03, 0.1))), radius, myelin, spread=0.35
    )
    hole = Style(Shape("ellipse", 1.2), radius * 0.5, inside, spread=0.3, rim=-0.1)
    share, holes, back = draw_share(rng, 0.15, 0.6), float(rng.choice((0, 0.04))), draw_ground(rng, ground)

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        scene = back(rng, canvas)
        layer = paint_kinds(rng, scene, canvas, [(style, share), (hole, holes)], 0.98)[0]
        if layer.edge.min() < 0:
            if meant == "axon":
                scene.mask[:] = False
            thick = rng.uniform(0.7, 1.2, int(layer.ids.max()) + 1) * wall * radius * canvas.unit
            cover = np.clip(np.float32(0.5) - layer.edge - thick.astype(np.float32)[layer.ids], 0, 1)
            scene.lay(cover, inside.render(rng, canvas), inside.hue, meant == "axon")
        return scene

    return Recipe(paint, "gray" if rng.random() < 0.7 else "histology")
