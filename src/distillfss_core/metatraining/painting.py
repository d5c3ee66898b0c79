"""Drawing tools with which the families of generated tasks paint their images.

A recipe paints a scene: grounds and fills with their textures, objects of a shape stamped where there is room, curves,
networks and patches. Lengths are in units of the scene unless pixels are said; what is drawn is an array (y x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from distillfss_core.metatraining.task import F32

Rng = np.random.Generator

ANGLES = 256
FAR = np.float32(1e4)


@dataclass(frozen=True)
class Canvas:
    """Size, scale, orientation and object density of one image of a scene.

    Parameters
    ----------
    size : int
        Height and width in pixels.
    unit : float
        Pixels a unit of the scene takes; at zoom 1 an image is 256 units wide, whatever its size.
    angle : float
        Turn of everything that has a direction, radians.
    density : float
        How much of the object there is: 1 is usual, 0 none.
    """

    size: int
    unit: float
    angle: float
    density: float


class Scene:
    """Image of a recipe: gray ``value`` (y x), ``hue`` (y x) and ``mask`` (y x), true on the object."""

    def __init__(self, value: F32, hue: float) -> None:
        self.value: F32 = value
        self.hue: F32 = np.full(value.shape, hue, np.float32)
        self.mask: npt.NDArray[np.bool_] = np.zeros(value.shape, bool)

    def lay(self, cover: F32, value: F32 | float, hue: float, target: bool | None) -> None:
        """Put something on top where ``cover`` (y x) is 1; ``target`` None leaves the mask as it is."""
        self.value += cover * (value - self.value)
        self.hue += cover * (np.float32(hue) - self.hue)
        if target is not None:
            self.mask[cover > 0.5] = target


@dataclass(frozen=True)
class Recipe:
    """A task before its images are painted.

    Parameters
    ----------
    paint : callable
        Paints an image.
    light : str
        Mode of the light, see ``draw_light``.
    flips : bool
        Whether an image may exchange dark and bright: not where brightness alone tells the object.
    turns : bool
        Whether images may be turned and mirrored at will: not where direction or position tells the object.
    zooms : bool
        Whether images may differ much in zoom: not where size alone tells the object.
    """

    paint: Callable[[Rng, Canvas], Scene]
    light: str = "any"
    flips: bool = False
    turns: bool = True
    zooms: bool = True


Family = Callable[[Rng], Recipe]


# --- fields and textures ----------------------------------------------------------------------------------------------


def enlarge(few: F32, size: int, box: tuple[float, float, float, float] | None = None) -> F32:
    """Few values (y x), or a ``box`` of them (left, top, right, bottom), as a smooth field of ``size`` pixels."""
    return np.array(Image.fromarray(few).resize((size, size), Image.Resampling.BICUBIC, box), np.float32)


def _standard(values: F32) -> F32:
    values -= values.mean()
    values /= max(float(values.std()), 1e-6)
    return values


def smooth_noise(rng: Rng, size: int, grain: float) -> F32:
    """Smooth noise (y x) of mean 0 and deviation 1 whose grains are ``grain`` pixels wide."""
    if grain < 3:
        noise = rng.standard_normal((size, size), np.float32)
        return noise if grain < 1.2 else _standard(ndimage.gaussian_filter(noise, 0.4 * grain, truncate=3.0))
    # Two knots a grain, smoothed: with one, the knots' grid would show.
    span = 2 * size / grain
    few = rng.standard_normal((int(span) + 5, int(span) + 5), np.float32)
    few = ndimage.gaussian_filter(few, 0.8, mode="wrap", truncate=3.0)
    y, x = rng.uniform(1.5, 2.5, 2)
    return _standard(enlarge(few, size, (x, y, x + span, y + span)))


def cloud(rng: Rng, size: int, grain: float) -> F32:
    """Noise of three octaves (y x), mean 0, deviation 1."""
    octaves = ((1.0, grain), (0.5, grain / 2.1), (0.3, grain / 4.3))
    return _standard(sum((w * smooth_noise(rng, size, g) for w, g in octaves), np.zeros((size, size), np.float32)))


def streaks(rng: Rng, size: int, grain: float, angle: float, stretch: float) -> F32:
    """Noise (y x) drawn out along ``angle`` by ``stretch``, mean 0, deviation 1."""
    span = max(2.0, grain)
    short, long = size * 1.5 / span, size * 1.5 / (span * stretch)
    few = rng.standard_normal((int(short) + 4, int(long) + 4), np.float32)
    c, s = np.cos(angle), np.sin(angle)
    middle = size / 2
    kx, ky = 1 / (span * stretch), 1 / span
    across = few.shape[1] / 2 - (c + s) * middle * kx
    down = few.shape[0] / 2 - (c - s) * middle * ky
    matrix = (c * kx, s * kx, across, -s * ky, c * ky, down)
    drawn = Image.fromarray(few).transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return _standard(np.array(drawn, np.float32))


def _waves(rng: Rng, canvas: Canvas, period: float, angle: float, warp: float = 1.2) -> F32:
    """Wavering stripes (y x) in -1..1."""
    axis = np.arange(canvas.size, dtype=np.float32) * np.float32(2 * np.pi / period)
    phase = axis[:, None] * np.float32(np.sin(angle)) + axis[None] * np.float32(np.cos(angle))
    phase += np.float32(warp) * smooth_noise(rng, canvas.size, period * 5)
    return np.sin(phase + np.float32(rng.uniform(0, 6.3)))


TEXTURES = ("fine", "grain", "cloud", "stripes", "fibers", "dots", "threads", "plain")


@dataclass(frozen=True)
class Texture:
    """Unevenness of a surface: ``grain`` in units, ``angle`` in radians where it has a direction."""

    kind: str
    grain: float
    angle: float

    def render(self, rng: Rng, canvas: Canvas) -> F32:
        """The texture over a whole image (y x), mean 0, deviation 1 (0 if plain)."""
        size, grain, angle = canvas.size, self.grain * canvas.unit, self.angle + canvas.angle
        match self.kind:
            case "plain":
                return np.zeros((size, size), np.float32)
            case "fine":
                return smooth_noise(rng, size, max(1.0, 0.45 * grain))
            case "grain":
                return smooth_noise(rng, size, max(2.0, grain))
            case "cloud":
                return cloud(rng, size, 4 * grain)
            case "stripes":
                return _standard(_waves(rng, canvas, max(4.0, 1.6 * grain), angle))
            case "fibers":
                return streaks(rng, size, max(2.0, 0.6 * grain), angle, 6.0)
            case "dots":
                return _standard(np.clip(smooth_noise(rng, size, max(2.0, grain)) - np.float32(0.4), 0, 1.0))
            case _:  # the zero line of a smooth field is a curve; a second field lets it fade
                line = np.exp(-np.square(smooth_noise(rng, size, max(3.0, 2 * grain)) / np.float32(0.3)))
                return _standard(line * np.clip(np.float32(0.5) + smooth_noise(rng, size, 5 * grain), 0.05, 1.5))


def draw_texture(rng: Rng, kinds: Sequence[str] = TEXTURES) -> Texture:
    """A texture of one of the ``kinds``."""
    return Texture(str(rng.choice(kinds)), float(rng.uniform(4, 8)), float(rng.uniform(0, np.pi)))


@dataclass(frozen=True)
class Fill:
    """Appearance of the inside of a shape: mean gray, texture and its depth, hue."""

    value: float
    depth: float
    texture: Texture
    hue: float

    def render(self, rng: Rng, canvas: Canvas) -> F32:
        """Gray values over a whole image (y x)."""
        if self.depth == 0 or self.texture.kind == "plain":
            return np.full((canvas.size, canvas.size), self.value, np.float32)
        return np.float32(self.value) + np.float32(self.depth) * self.texture.render(rng, canvas)


def draw_fill(rng: Rng, kinds: Sequence[str] = TEXTURES) -> Fill:
    """A fill whose texture is one of the ``kinds``."""
    return Fill(
        float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.03, 0.14)), draw_texture(rng, kinds), float(rng.random())
    )


FILL_CUES = ("value", "texture", "angle", "grain", "hue")


def other_fill(rng: Rng, fill: Fill, cue: str) -> Fill:
    """A fill that differs from ``fill`` by the cue alone; its texture may have to be made visible first."""
    match cue:
        case "value":
            step = rng.uniform(0.17, 0.4)
            up = fill.value + step < 0.9 and (fill.value - step < 0.1 or rng.random() < 0.5)
            return replace(fill, value=fill.value + (step if up else -step))
        case "texture":
            kinds = [k for k in TEXTURES if not alike(k, fill.texture.kind)]
            return replace(fill, texture=draw_texture(rng, kinds))
        case "angle":
            turn = np.pi / 2 + rng.uniform(-0.5, 0.5)
            return replace(fill, texture=replace(fill.texture, angle=fill.texture.angle + turn))
        case "grain":
            factor = rng.uniform(2.0, 3.0)
            finer = fill.texture.grain / factor > 2.2
            return replace(
                fill, texture=replace(fill.texture, grain=fill.texture.grain * (1 / factor if finer else factor))
            )
        case "hue":
            return replace(fill, hue=1 - fill.hue)
        case _:
            return fill


def alike(first: str, other: str) -> bool:
    """Whether two textures are hard to tell apart at low depth."""
    pairs = ({"cloud", "plain"}, {"fine", "plain"}, {"fine", "grain"}, {"grain", "dots"}, {"cloud", "grain"})
    return first == other or {first, other} in pairs


def fit_for_cue(rng: Rng, fill: Fill, cue: str) -> Fill:
    """The fill with whatever the cue needs in order to be seen."""
    if cue in ("texture", "angle", "grain"):
        fill = replace(fill, depth=float(rng.uniform(0.12, 0.22)), value=float(np.clip(fill.value, 0.3, 0.7)))
    if cue == "angle":
        fill = replace(fill, texture=draw_texture(rng, ("stripes", "fibers")))
    if cue == "grain":
        fill = replace(fill, texture=draw_texture(rng, ("grain", "stripes", "threads", "dots")))
    if cue == "hue":
        fill = replace(fill, hue=float(rng.random() < 0.5), value=float(np.clip(fill.value, 0.35, 0.65)))
    if cue == "value":
        fill = replace(fill, depth=min(fill.depth, 0.06))
    return fill


# --- shapes -----------------------------------------------------------------------------------------------------------


OUTLINES = ("ellipse", "lobed", "polygon", "star", "rod", "bean")


@dataclass(frozen=True)
class Shape:
    """Outlines of one kind: their ``stretch`` (long by short axis), roughness, corners, bend along the long axis."""

    outline: str
    stretch: float = 1.0
    rough: float = 0.0
    corners: int = 4
    bend: float = 0.0

    def radial(self, rng: Rng, n: int) -> F32:
        """Distance from center to outline at ANGLES angles for n objects (n angles); the area is pi."""
        angle = np.linspace(0, 2 * np.pi, ANGLES, endpoint=False, dtype=np.float32)
        stretch = np.sqrt(np.maximum(1, self.stretch * np.exp(rng.normal(0, 0.1, (n, 1))))).astype(np.float32)
        c, s = np.abs(np.cos(angle)) / stretch, np.abs(np.sin(angle)) * stretch
        power = 5.0 if self.outline == "rod" else 2.0
        radius = (c**power + s**power) ** (-1 / power)
        if self.outline == "polygon":
            wedge = 2 * np.pi / self.corners
            radius = radius / np.cos(angle % wedge - wedge / 2)
        if self.outline == "star":
            radius = radius * (1 + 0.42 * np.cos(self.corners * angle))
        if self.rough:
            for k in range(2, 8):
                swing = rng.normal(0, self.rough / k**0.7, (n, 1)).astype(np.float32)
                radius = radius * (1 + swing * np.cos(k * angle + rng.uniform(0, 6.3, (n, 1)).astype(np.float32)))
        radius = np.maximum(radius, 0.15)
        result: F32 = (radius / np.sqrt(np.mean(radius**2, axis=1, keepdims=True))).astype(np.float32)
        return result


def draw_shape(rng: Rng, outlines: Sequence[str] = OUTLINES) -> Shape:
    """A shape with one of the ``outlines``."""
    outline = str(rng.choice(outlines))
    stretch = {"rod": rng.uniform(2, 3.5), "bean": rng.uniform(1.8, 2.8), "star": 1.0}.get(outline, rng.uniform(1, 1.7))
    rough = rng.uniform(0.1, 0.22) if outline == "lobed" else rng.uniform(0, 0.05)
    bend = rng.uniform(0.3, 0.6) if outline == "bean" else 0.0
    return Shape(outline, float(stretch), float(rough), int(rng.integers(3, 7)), float(bend))


@dataclass(frozen=True, eq=False)
class Layer:
    """Objects of one kind in an image.

    ``edge`` (y x) is about how far the outline is in pixels, inside negative; ``ids`` (y x) whose outline it is;
    ``along`` (y x) where on that object's long axis the pixel lies, in pixels from its center.
    """

    edge: F32
    ids: npt.NDArray[np.int16]
    along: F32

    def cover(self, soft: float = 1.0) -> F32:
        """1 inside, 0 outside (y x), over ``soft`` pixels."""
        result: F32 = np.clip(np.float32(0.5) - self.edge / np.float32(soft), 0, 1)
        return result


def stamp(rng: Rng, size: int, centers: npt.NDArray[np.float64], radii: F32, shape: Shape, reach: float = 4) -> Layer:
    """Draw the objects into a layer; where two overlap, a pixel is of the one it lies deeper in."""
    n = len(centers)
    if n == 0:
        far = np.full((size, size), FAR, np.float32)
        return Layer(far, np.zeros((size, size), np.int16), far)
    table = shape.radial(rng, n) * radii[:, None].astype(np.float32)
    half = int(np.ceil(min(float(table.max()) * (1 + shape.bend) + reach, size)))
    corner = np.floor(centers).astype(int)
    offset = (centers - corner).astype(np.float32)
    axis = np.arange(-half, half + 1, dtype=np.float32)
    turn = rng.uniform(0, 2 * np.pi, n).astype(np.float32)
    c, s = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
    y, x = axis[None, :, None] - offset[:, :1, None], axis[None, None, :] - offset[:, 1:, None]
    u, v = c * x + s * y, c * y - s * x  # n w w
    if shape.bend:
        v += (np.float32(shape.bend) / radii[:, None, None]) * (u * u) - np.float32(shape.bend) * radii[
            :, None, None
        ] / 2
    sector = (np.arctan2(v, u) * np.float32(ANGLES / (2 * np.pi))).astype(np.int16) % ANGLES
    outline = np.take(table.ravel(), sector + (np.arange(n, dtype=np.int32) * ANGLES)[:, None, None])
    edges = np.sqrt(u * u + v * v) - outline
    pad = half + 1
    edge = np.full((size + 2 * pad, size + 2 * pad), FAR, np.float32)
    ids, along = np.zeros(edge.shape, np.int16), np.zeros(edge.shape, np.float32)
    width = 2 * half + 1
    for i, (top, left) in enumerate(np.clip(corner + pad - half, 0, size + 2 * pad - width)):
        box = (slice(top, top + width), slice(left, left + width))
        closer = edges[i] < edge[box]
        np.copyto(edge[box], edges[i], where=closer)
        np.copyto(ids[box], i, where=closer)
        np.copyto(along[box], u[i], where=closer)
    inner = slice(pad, pad + size)
    return Layer(edge[inner, inner], ids[inner, inner], along[inner, inner])


def _scatter(rng: Rng, size: int, radii: F32, room: float, clusters: int = 0) -> npt.NDArray[np.float64]:
    """Centers (n 2) at least ``room`` times the sum of radii apart; those that find no place are left out (nan)."""
    n = len(radii)
    tries = 8
    margin = 0.3 * float(radii.max(initial=0))
    spots = rng.uniform(-margin, size + margin, (n, tries, 2))
    if clusters:
        middles = rng.uniform(0, size, (clusters, 2))
        near = middles[rng.integers(clusters, size=(n, tries))] + rng.normal(0, size / 7, (n, tries, 2))
        spots = np.where(rng.random((n, 1, 1)) < 0.75, near, spots)
    placed = np.full((n, 2), np.nan)
    for i in range(n):
        gap = ((placed[None, :i] - spots[i][:, None]) ** 2).sum(-1) < (room * (radii[:i] + radii[i])) ** 2
        free = np.flatnonzero(~gap.any(1) & (np.abs(spots[i] - size / 2).max(1) < size / 2 + margin))
        if len(free):
            placed[i] = spots[i, free[0]]
    return placed


def _count(share: float, radius: float, canvas: Canvas, limit: int = 140) -> int:
    """How many objects of ``radius`` units cover ``share`` of the image."""
    return int(np.clip(round(share * canvas.size**2 / (np.pi * (radius * canvas.unit) ** 2)), 1, limit))


@dataclass(frozen=True)
class Style:
    """Appearance of objects of one kind: outline, size (units) and its spread, fill, and edge.

    ``rim`` is how much brighter the edge is inside, ``halo`` outside; ``wall`` > 0 leaves the middle open (units);
    ``bars`` > 0 are stripes across the long axis of each (period in units), as deep as the fill's texture.
    """

    shape: Shape
    radius: float
    fill: Fill
    spread: float = 0.12
    vary: float = 0.03
    rim: float = 0.0
    halo: float = 0.0
    wall: float = 0.0
    bars: float = 0.0
    soft: float = 1.2


def paint_objects(rng: Rng, scene: Scene, layer: Layer, style: Style, canvas: Canvas, target: bool | None) -> None:
    """Paint a layer of objects; an open middle shows what lies behind, yet belongs to the object."""
    value = style.fill.render(rng, canvas)
    if style.vary:
        own = rng.normal(0, style.vary, int(layer.ids.max()) + 1).astype(np.float32)
        value += own[layer.ids]
    if style.bars:
        phase = layer.along * np.float32(2 * np.pi / max(3.5, style.bars * canvas.unit))
        value += np.float32(style.fill.depth) * np.sin(
            phase + np.float32(1.5) * smooth_noise(rng, canvas.size, 14 * canvas.unit)
        )
    width = np.float32(max(1.0, 1.6 * canvas.unit))
    if style.rim:
        value += np.float32(style.rim) * np.exp(-np.square((layer.edge + width) / width))
    cover = layer.cover(max(0.8, style.soft * canvas.unit))
    if style.halo:
        wide = np.float32(3.0 * canvas.unit)
        outside = np.clip(layer.edge, 0, 60)
        scene.value += np.float32(style.halo) * np.exp(-outside / wide) * (outside < 50)
    if style.wall:
        ring = cover * np.clip(layer.edge / np.float32(canvas.unit) + np.float32(style.wall + 0.5), 0, 1)
        scene.lay(ring, value, style.fill.hue, None)
        if target is not None:
            scene.mask[cover > 0.5] = target
    else:
        scene.lay(cover, value, style.fill.hue, target)


def paint_kinds(
    rng: Rng, scene: Scene, canvas: Canvas, kinds: Sequence[tuple[Style, float]], room: float = 1.05, clusters: int = 0
) -> list[Layer]:
    """Scatter objects of several kinds, each with its share of the image, so that none hides another.

    The first kind is the object.
    """
    counts = [
        _count(share * (canvas.density if i == 0 else 1), style.radius, canvas)
        if share and (i or canvas.density)
        else 0
        for i, (style, share) in enumerate(kinds)
    ]
    owner = np.repeat(np.arange(len(kinds)), counts)
    rng.shuffle(owner)
    if counts[0] and len(owner):  # the object finds its places first where it is rare
        first = int(np.flatnonzero(owner == 0)[0])
        owner[[0, first]] = owner[[first, 0]]
    base = np.array([style.radius for style, _ in kinds], np.float32)[owner]
    spread = np.array([style.spread for style, _ in kinds], np.float32)[owner]
    radii = (base * np.exp(spread * rng.standard_normal(len(owner), np.float32)) * np.float32(canvas.unit)).astype(
        np.float32
    )
    centers = _scatter(rng, canvas.size, radii, room, clusters)
    placed = ~np.isnan(centers[:, 0])
    layers = []
    for i, (style, _) in enumerate(kinds):
        mine = placed & (owner == i)
        reach = 10 * canvas.unit if style.halo else 3
        layers.append(stamp(rng, canvas.size, centers[mine], radii[mine], style.shape, reach))
    for i in range(len(kinds) - 1, -1, -1):
        if layers[i].edge.min() < 0:
            paint_objects(rng, scene, layers[i], kinds[i][0], canvas, i == 0)
    return layers


# --- curves and networks ----------------------------------------------------------------------------------------------


def random_walks(
    rng: Rng, canvas: Canvas, n: int, length: float, wiggle: float, angle: float | None = None, jag: float = 0.0
) -> list[npt.NDArray[np.float64]]:
    """Random walks (points 2), in pixels (x, y).

    ``length`` in images; ``wiggle`` turns the heading for good, ``jag`` for one step (radians a step).
    """
    step = 5 * canvas.unit
    steps = max(4, int(length * canvas.size / step / 2))
    heading = rng.uniform(0, 2 * np.pi, n) if angle is None else rng.normal(angle, 0.12, n)
    bends = np.cumsum(1.8 * ndimage.gaussian_filter1d(rng.normal(0, wiggle, (n, 2, steps)), 2.0, axis=-1), axis=-1)
    bends += rng.normal(0, jag, bends.shape) + heading[:, None, None] + np.array([0, np.pi])[:, None]
    start = rng.uniform(0.1, 0.9, (n, 1, 2)) * canvas.size
    ways = start[:, None] + np.cumsum(step * np.stack([np.cos(bends), np.sin(bends)], -1), axis=2)  # n 2 steps 2
    return list(np.concatenate([ways[:, 1, ::-1], start, ways[:, 0]], axis=1))


def branched(rng: Rng, canvas: Canvas, n: int, wiggle: float, jag: float = 0.0) -> list[list[npt.NDArray[np.float64]]]:
    """n stems, their branches, and theirs: each a list of paths."""
    out = [random_walks(rng, canvas, n, 1.8, wiggle, None, jag)]
    for length in (0.9, 0.5):
        twigs = []
        for stem in out[-1]:
            for joint in rng.integers(len(stem) // 5, len(stem), 2):
                twig = random_walks(rng, canvas, 1, length, wiggle, None, jag)[0]
                twig = twig[len(twig) // 2 :]
                twigs.append(twig - twig[0] + stem[joint])
        out.append(twigs)
    return out


def line_cover(paths: Sequence[npt.NDArray[np.float64]], size: int, width: float) -> F32:
    """Smooth lines of ``width`` pixels as cover (y x) in 0..1."""
    canvas = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(canvas)
    for path in paths:
        draw.line((2 * path).ravel().tolist(), fill=255, width=max(1, round(2 * width)), joint="curve")
    return np.asarray(canvas.reduce(2), np.float32) / np.float32(255)


def line_edge(groups: Sequence[tuple[Sequence[npt.NDArray[np.float64]], float]], size: int) -> F32:
    """Distance (y x) in pixels from the outline of lines, inside negative; each group has its half width.

    Measured at half the resolution: distance is smooth.
    """
    edge = np.full((size // 2, size // 2), FAR, np.float32)
    for paths, half in groups:
        if not len(paths):
            continue
        canvas = Image.new("1", (size // 2, size // 2), 1)
        draw = ImageDraw.Draw(canvas)
        for path in paths:
            draw.line((path / 2).ravel().tolist(), fill=0)
        if not np.asarray(canvas).all():
            np.minimum(edge, 2 * ndimage.distance_transform_edt(np.asarray(canvas)) - half, out=edge, casting="unsafe")
    return enlarge(edge, size)


def voronoi(rng: Rng, canvas: Canvas, spacing: float, warp: float) -> tuple[F32, npt.NDArray[np.int16], int]:
    """Cells: distance (y x) in pixels to the border, whose the pixel is (y x), and how many there are.

    ``spacing`` in units; ``warp`` bends the borders (share of the spacing).
    """
    size, gap = canvas.size, spacing * canvas.unit
    side = int(np.ceil(size / gap)) + 2
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2) - 0.5
    seeds = ((grid + rng.uniform(-0.42, 0.42, grid.shape)) * gap).astype(np.float32)
    axis = np.arange(size, dtype=np.float32)
    y, x = np.broadcast_to(axis[:, None], (size, size)), np.broadcast_to(axis[None], (size, size))
    if warp:
        y = y + np.float32(warp * gap * 0.35) * smooth_noise(rng, size, 0.9 * gap)
        x = x + np.float32(warp * gap * 0.35) * smooth_noise(rng, size, 0.9 * gap)
    first = np.full((size, size), FAR, np.float32)
    second = first.copy()
    ids = np.zeros((size, size), np.int16)
    reach = int(2.1 * gap) + 1
    for i, (cy, cx) in enumerate(seeds):
        box = (
            slice(max(0, int(cy) - reach), max(0, int(cy) + reach)),
            slice(max(0, int(cx) - reach), max(0, int(cx) + reach)),
        )
        if first[box].size == 0:
            continue
        distance = np.square(y[box] - cy)
        distance += np.square(x[box] - cx)
        closer = distance < first[box]
        np.minimum(second[box], np.maximum(first[box], distance), out=second[box])
        np.minimum(first[box], distance, out=first[box])
        np.copyto(ids[box], i, where=closer)
    return np.float32(0.5) * (np.sqrt(second) - np.sqrt(first)), ids, len(seeds)


def region(rng: Rng, canvas: Canvas, share: float, grain: float, soft: float) -> F32:
    """Cover (y x) of smooth patches ``grain`` units wide over about ``share`` of the image."""
    field = smooth_noise(rng, canvas.size, grain * canvas.unit) + np.float32(0.15) * smooth_noise(
        rng, canvas.size, grain * canvas.unit / 4
    )
    level = np.float32(np.quantile(field[::4, ::4], 1 - min(share, 0.95)))
    slope = np.float32(grain * canvas.unit / (1.6 * max(soft * canvas.unit, 0.8)))
    result: F32 = np.clip(np.float32(0.5) + (field - level) * slope, 0, 1)
    return result


def draw_ground(rng: Rng, fill: Fill) -> Callable[[Rng, Canvas], Scene]:
    """What lies behind: a fill, slowly uneven."""
    uneven = rng.uniform(0.01, 0.07)

    def paint(rng: Rng, canvas: Canvas) -> Scene:
        value = fill.render(rng, canvas)
        value += np.float32(uneven) * smooth_noise(rng, canvas.size, 90 * canvas.unit)
        return Scene(value, fill.hue)

    return paint


def draw_share(rng: Rng, low: float, high: float) -> float:
    """A share of the image, as often between 1 and 2 % as between 10 and 20 %."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
