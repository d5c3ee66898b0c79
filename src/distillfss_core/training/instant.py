"""A model of what is annotated so far, which follows every stroke: the probe, refitted on stored features.

The backbone is frozen, so a part of a plane goes through it once, whether it is learned from or predicted. A stroke
changes only the pixels that are drawn and the weights of a logistic regression.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distillfss_core.errors import NoStudentYetError, SupportSetError
from distillfss_core.models.preprocess import Preprocess, fit_preprocess
from distillfss_core.models.segmenter import Segmenter
from distillfss_core.models.tiling import Tile
from distillfss_core.nn.device import choose_device
from distillfss_core.nn.features import FeaturePyramid
from distillfss_core.nn.probe import Probe
from distillfss_core.settings import DistillSettings
from distillfss_core.support.support_set import count_labels
from distillfss_core.training.crops import encode_images, spread
from distillfss_core.training.preparation import load_start
from distillfss_core.training.probe import ProbePoints, fit_probe
from distillfss_core.training.zoom import point_features
from distillfss_core.types import IGNORE, AnnotatedSlice, Array, check_image, evenly

MEMORY = 256 << 20  # bytes of features and drawn pixels
DENSE = 0.5  # share of annotated pixels from which on the rest of a plane may count as background
POINTS = 600  # pixels of each class and slice, at most
ALL_POINTS = 8_000  # pixels of all, at most
WINDOWS = 16  # of each slice that are learned from, at most
FEW_WINDOWS = 2  # likewise, for a first answer
MANY_WINDOWS = 4  # that go through the backbone from which on a first answer comes before
WARM_ITERATIONS = 30  # of a fit that starts from the last one
_TILE, _HALO = 512, 128  # pixels after zooming


@runtime_checkable
class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_Value = TypeVar("_Value", bound=_Sized)


class ContentCache:
    """Values by the hash of what they are computed from, within a memory limit; the least recently used go first.

    Parameters
    ----------
    memory : int
        Bytes of all values at most. A larger value is returned and not kept.

    Attributes
    ----------
    nbytes, hits, misses : int
        Bytes that are held, values that were there, and values that had to be made.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self.memory: int = memory
        self.nbytes = self.hits = self.misses = 0
        self._values: OrderedDict[bytes, _Sized] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def get(self, key: bytes, make: Callable[[], _Value], *, store: bool = True) -> _Value:
        """The value of a key, made now if it is not there; what was made is stored, unless it is not to be."""
        held = self._values.get(key)
        if held is not None:
            self.hits += 1
            self._values.move_to_end(key)
            return held  # type: ignore[return-value]
        self.misses += 1
        value = make()
        if store and value.nbytes <= self.memory:
            self._values[key] = value
            self.nbytes += value.nbytes
        while self.nbytes > self.memory:
            self.nbytes -= self._values.popitem(last=False)[1].nbytes
        return value


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Drawn pixels of a slice: columns of the probe on the CPU, and labels."""

    columns: Float[Tensor, "n f"]
    labels: Int[Tensor, " n"]

    @property
    def nbytes(self) -> int:
        return self.columns.nbytes + self.labels.nbytes


@dataclass(frozen=True, eq=False)
class _Plan:
    """A slice, its labels with background as far as that counts, and the tiles that are learned from."""

    labeled: AnnotatedSlice
    labels: Array
    tiles: list[Tile]


class InstantModel(Segmenter):
    """The probe of what is annotated so far, for planes of one volume; `fit` follows a stroke within a fraction of a
    second.

    It is logistic regression on the features of the frozen backbone and on intensities, as a student of method "probe"
    is. It learns from fewer pixels, at one zoom, and it exists in memory only. One thread at a time may use it.

    Parameters
    ----------
    sample : array, shape (y, x) or (y, x, c)
        Pixels of the volume, in any arrangement, by which the intensity limits are fitted once and for all: limits that
        followed the annotations would change all features.
    settings : DistillSettings, optional
        Backbone, head, zoom ("auto" is 1), normalization ("auto" is per volume), seed, device and precision count.
    memory : int
        Bytes of stored features at most; those of drawn pixels take a quarter more at most.

    Raises
    ------
    ImageError
        If the sample has no finite pixel.
    SettingsError, WeightsUnavailableError
    """

    tile: int = _TILE
    """Inner side of the tiles that it learns from, in pixels after zooming. Predicted in such tiles, a plane that was
    learned from is not encoded again."""

    def __init__(self, sample: Array, settings: DistillSettings | None = None, *, memory: int = MEMORY) -> None:
        settings = settings or DistillSettings()
        device = choose_device(settings.device, settings.precision)
        backbone, _ = load_start(settings)
        super().__init__(backbone.to(device.torch), _fit_preprocess(sample, settings), (), device=device, halo=_HALO)
        self.cache: ContentCache = ContentCache(memory)
        self.probe: Probe | None = None
        self._drawn: dict[tuple[bytes, int], _Drawn] = {}  # apart from features, which would push them out
        self._window_bytes = 0  # of the features of a window
        self._seed = settings.seed
        self._reader = Probe(backbone.spec, 1, self.preprocess.inputs).to(device.torch)
        self._digests: weakref.WeakKeyDictionary[AnnotatedSlice, bytes] = weakref.WeakKeyDictionary()
        self._counts: weakref.WeakKeyDictionary[AnnotatedSlice, Array] = weakref.WeakKeyDictionary()

    @property
    def local(self) -> bool:
        """Whether tiles agree: the backbone does not depend on the whole tile."""
        return self.backbone.spec.local

    def fit(self, slices: Sequence[AnnotatedSlice], class_names: Sequence[str] = ("object",)) -> None:
        """Fit the probe to the slices as they are now, from the weights of the last fit.

        A class without a pixel is never predicted. Without any pixel of background, the rest of slices that are
        annotated by half or more counts as background.

        Parameters
        ----------
        slices : sequence of AnnotatedSlice
            Labels: 0 background, 1..K classes, IGNORE not annotated. Slices that were there before are not read again.
        class_names : sequence of str
            Names of the classes 1..K.

        Raises
        ------
        SupportSetError
            If no pixel of any class is annotated, or none of background. The model stays as it was.
        ImageError
            If a slice has other channels than the volume.
        """
        for _ in self.iter_fit(slices, class_names):
            pass

    def iter_fit(
        self, slices: Sequence[AnnotatedSlice], class_names: Sequence[str] = ("object",), *, quickly: bool = False
    ) -> Generator[None, None, None]:
        """As `fit`; it yields after each part of a plane that went through the backbone.

        Stopped before its end, the model is as before, and what was drawn from these parts is stored. So are their
        features, unless there are so many that those of other planes would go.

        Parameters
        ----------
        quickly : bool
            For a first answer, learn from two parts of each slice, but one for each class at least. What was drawn
            from all parts before counts.
        """
        names, windows = tuple(class_names), FEW_WINDOWS if quickly else WINDOWS
        keys, plans, totals = self._plan(slices, names, windows)
        self._drawn = {(key, limit): held for (key, limit), held in self._drawn.items() if key in keys}
        is_stored = sum(len(plan.tiles) for plan in plans.values()) * self._window_bytes <= self.cache.memory // 2
        parts: list[_Drawn] = []
        for key in keys:
            held = self._held(key, windows)
            if held is None:
                held = yield from self._iter_draw(plans[key], len(names), is_stored)
                self._keep(key, windows, held)
            parts.append(held)
        origins = torch.repeat_interleave(torch.tensor([len(part.labels) for part in parts]))
        new = Probe(self.backbone.spec, len(names), self.preprocess.inputs)
        shares = torch.from_numpy(totals / totals.sum()).float()
        columns, labels = torch.cat([part.columns for part in parts]), torch.cat([part.labels for part in parts])
        chosen = evenly(len(labels), ALL_POINTS)
        points = ProbePoints(columns[chosen], labels[chosen], origins[chosen], shares, new)
        if self.probe is not None and names == self.class_names:
            probe = fit_probe(points, alone=True, start=self.probe, iterations=WARM_ITERATIONS)
        else:
            probe = fit_probe(points, alone=True)
        self.class_names: tuple[str, ...] = names
        self.probe = probe.to(self.device.torch)

    def takes_long(
        self, slices: Sequence[AnnotatedSlice], class_names: Sequence[str] = ("object",), *, windows: int = MANY_WINDOWS
    ) -> bool:
        """Whether more than so many parts of planes would go through the backbone; errors are those of `fit`."""
        _, plans, _ = self._plan(slices, tuple(class_names), WINDOWS)
        if sum(len(plan.tiles) for plan in plans.values()) <= windows:
            return False
        new = (
            None
            for plan in plans.values()
            for image, _ in self._images(plan)
            if self._window_key(image) not in self.cache
        )
        return sum(1 for _ in islice(new, windows + 1)) > windows

    def _plan(
        self, slices: Sequence[AnnotatedSlice], names: Sequence[str], windows: int
    ) -> tuple[list[bytes], dict[bytes, _Plan], Array]:
        """Keys of the slices, what is to be drawn of those that are not stored, and the pixels of each class."""
        for labeled in slices:
            if labeled not in self._counts:
                self._counts[labeled] = count_labels(labeled.labels)
        counts = np.stack([self._counts[s] for s in slices]) if slices else np.zeros((0, IGNORE + 1), int)
        with_rest = _dense(counts) if not counts[:, 0].sum() else np.zeros(len(slices), bool)
        counts[with_rest, 0] = counts[with_rest, IGNORE]
        totals = counts[:, : len(names) + 1].sum(0)
        _check_totals(totals, counts[:, len(names) + 1 : IGNORE])
        keys = [self._slice_key(s, bool(rest), len(names)) for s, rest in zip(slices, with_rest, strict=True)]
        plans = {}
        for labeled, rest, key in zip(slices, with_rest, keys, strict=True):
            if self._held(key, windows) is None:
                labels = np.where(labeled.labels == IGNORE, 0, labeled.labels) if rest else labeled.labels
                tiles = self._tiles_to_learn_from(labels, len(names), max(windows, len(names) + 1))
                plans[key] = _Plan(labeled, labels, tiles)
        return keys, plans, totals

    def _held(self, key: bytes, windows: int) -> _Drawn | None:
        """What is stored of a slice, drawn from so many windows or from more."""
        return self._drawn.get((key, WINDOWS)) or self._drawn.get((key, windows))

    def _keep(self, key: bytes, windows: int, drawn: _Drawn) -> None:
        if drawn.nbytes + sum(held.nbytes for held in self._drawn.values()) <= self.cache.memory // 4:
            self._drawn[key, windows] = drawn

    def _margins(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hg wg"]:
        if self.probe is None:
            raise NoStudentYetError("the instant model has learned nothing yet; fit it to annotated slices first")
        return self.probe.margins(self._inputs_of(image))

    def _inputs_of(self, image: Float[Tensor, "b 3 h w"], *, store: bool = True) -> FeaturePyramid:
        """What the probe reads of an image, from the cache if it was encoded before."""
        stored = self.cache.get(self._window_key(image), lambda: self._encode(image), store=store)
        self._window_bytes = stored.nbytes
        inputs: FeaturePyramid = stored.map(Tensor.float)
        return inputs

    def _window_key(self, image: Float[Tensor, "b 3 h w"]) -> bytes:
        pixels = image[:, : self.preprocess.inputs].contiguous().cpu().numpy()
        return self._key("inputs", str(pixels.shape).encode(), pixels.data)

    def _encode(self, image: Float[Tensor, "b 3 h w"]) -> FeaturePyramid:
        """With features in half precision; intensities are not rounded."""
        with torch.no_grad():
            features = encode_images(self.backbone, self.device, image).map(Tensor.half)
            return self._reader.inputs_of(features, image)

    def _key(self, kind: str, *contents: bytes | memoryview) -> bytes:
        """Hash of contents and of all else that their values depend on."""
        sha = hashlib.blake2b(digest_size=32)
        parts = (kind, self.backbone.digest(), str(self.device), str(self.preprocess))
        for part in (*map(str.encode, parts), *contents):
            sha.update(part)
        return sha.digest()

    def _slice_key(self, labeled: AnnotatedSlice, with_rest: bool, classes: int) -> bytes:
        if labeled not in self._digests:
            arrays = (labeled.image, labeled.labels)
            digests = [hashlib.blake2b(np.ascontiguousarray(array).data).digest() for array in arrays]
            kinds = [f"{array.dtype}{array.shape}".encode() for array in arrays]
            self._digests[labeled] = b"".join((*digests, *kinds))
        return self._key("drawn", f"{classes} {with_rest}".encode(), self._digests[labeled])

    def _images(self, plan: _Plan) -> Iterator[tuple[Float[Tensor, "1 3 h w"], tuple[int, int]]]:
        """What the network gets of each tile of a plan, and the size before the zoom."""
        plane = self.preprocess.as_channels(plan.labeled.image, plan.labeled.source)
        limits = self.preprocess.limits(plane)
        for tile in plan.tiles:
            yield self._network_input(self.preprocess.to_tensor(plane[tile.outer], limits))

    def _iter_draw(self, plan: _Plan, classes: int, is_stored: bool) -> Generator[None, None, _Drawn]:
        drawn = _draw_pixels(plan.labels, [tile.inner for tile in plan.tiles], classes, self._seed)
        columns, values = [], []
        for tile, pixels, (image, size) in zip(plan.tiles, drawn, self._images(plan), strict=True):
            if len(pixels):
                before = self.cache.misses
                inputs = FeaturePyramid(self._inputs_of(image, store=is_stored).stages, size)  # before the zoom
                corner = [span.start for span in tile.outer]
                with torch.no_grad():
                    columns.append(point_features(inputs, torch.from_numpy(pixels - corner)).cpu())
                values.append(torch.from_numpy(plan.labels[pixels[:, 0], pixels[:, 1]]).long())
                if self.cache.misses > before:
                    yield
        return _Drawn(torch.cat(columns), torch.cat(values))

    def _tiles_to_learn_from(self, labels: Array, classes: int, limit: int) -> list[Tile]:
        tiles = self.tiles((labels.shape[0], labels.shape[1]), tile=self.tile)
        tiles = [tile for tile in tiles if (labels[tile.inner] != IGNORE).any()]
        return [tiles[i] for i in spread([labels[tile.inner] for tile in tiles], classes + 1, limit)]

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from sorted(self.probe.state_dict().items() if self.probe is not None else ())


def _fit_preprocess(sample: Array, settings: DistillSettings) -> Preprocess:
    scope = "image" if settings.normalization == "per-image" else "volume"
    zoom = 1 if settings.zoom == "auto" else settings.zoom
    pixels = sample.reshape(-1, 1, *sample.shape[2:])
    if pixels.dtype.kind == "f":
        pixels = pixels[np.isfinite(pixels).reshape(len(pixels), -1).all(axis=1)]
    check_image(pixels, "sample")
    fitted = fit_preprocess([pixels], scope=scope, zoom=zoom)
    return replace(fitted, intensities=None)  # which would only be compared with the volume that they are from


def _dense(counts: Array) -> Array:
    """Which slices are annotated by `DENSE` or more, from their counts of the 256 labels."""
    result: Array = counts[:, :IGNORE].sum(1) >= DENSE * counts.sum(1)
    return result


def _check_totals(totals: Array, beyond: Array) -> None:
    """Raise SupportSetError where nothing can be learned from these pixels of each class, background first."""
    if beyond.any():
        label = int(np.flatnonzero(beyond.sum(0))[0]) + len(totals)
        raise SupportSetError(f"label {label} has no class name; there are {len(totals) - 1} classes")
    if not totals[1:].sum():
        raise SupportSetError("no pixel of a class is labeled; paint an object")
    if not totals[0]:
        raise SupportSetError("no pixel is labeled background; scribble some, or label half of a plane or more")


def _draw_pixels(
    labels: Array, parts: Sequence[tuple[slice, slice]], classes: int, seed: int
) -> list[Int[Array, "n 2"]]:
    """Of parts of a plane of labels, up to `POINTS` pixels (y, x) of each class in all: those of every part.

    Every pixel has its place in one order, so a stroke changes few of them.
    """
    order = np.random.default_rng(seed).random(labels.shape, np.float32)
    is_chosen = np.zeros(labels.shape, bool)
    for value in range(classes + 1):
        masks = [labels[part] == value for part in parts]
        count = sum(int(mask.sum()) for mask in masks)
        if count > 8 * POINTS:  # four times as many as wanted are looked at
            early = [mask & (order[part] < 4 * POINTS / count) for mask, part in zip(masks, parts, strict=True)]
            masks = early if sum(int(mask.sum()) for mask in early) >= POINTS else masks
        pixels = np.concatenate(
            [np.argwhere(m) + [s.start for s in part] for m, part in zip(masks, parts, strict=True)]
        )
        if len(pixels) > POINTS:
            pixels = pixels[np.argpartition(order[tuple(pixels.T)], POINTS)[:POINTS]]
        is_chosen[tuple(pixels.T)] = True
    return [np.argwhere(is_chosen[part]) + [s.start for s in part] for part in parts]
