"""The frozen teacher of a backbone: where it comes from, and its tokens, which are computed once and cached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from distillfss_core.errors import ModelFileError, SettingsError
from distillfss_core.nn.backbone_file import load_backbone_file
from distillfss_core.nn.backbones import SPECS, Backbone, BackboneSpec, load_backbone
from distillfss_core.nn.backbones.weights import BACKBONE_FILE
from distillfss_core.nn.checkpoint import kind_of
from distillfss_core.nn.device import Device
from distillfss_core.nn.features import FeaturePyramid
from distillfss_core.nn.pretrained import HEAD_FILE, load_head, packaged_head
from distillfss_core.training.backbone_views import Views

MAIN = 16  # stride of the tokens that every teacher gives
FITTED_VIEWS = 64
"""Views from which mean and deviation of a teacher's channels are taken."""
SMALLEST_DEVIATION = 0.01  # of the mean of all channels: what hardly varies in some views may be large in another

Maps = dict[int, Tensor]
"""Feature maps "b c h w" by their stride."""


def load_teacher(teacher: str, weights: str = "auto") -> Backbone:
    """The teacher of that name or file.

    Parameters
    ----------
    teacher : str
        A backbone, by its name here or in timm; or a file: a distilled backbone, or a head with its own backbone.
    weights : str
        Of a name: "auto" is the backbone of the packaged head where there is one; else as `load_backbone`.

    Raises
    ------
    SettingsError
        If there is no such backbone or file.
    ModelFileError, WeightsUnavailableError
        If its tensors cannot be read, are not installed, or cannot be downloaded.
    """
    names = {spec.timm_name: spec.name for spec in SPECS.values()} | {name: name for name in SPECS}
    if teacher in names:
        head = packaged_head(names[teacher]) if weights == "auto" else None
        return (head.trained_backbone() if head else None) or load_backbone(names[teacher], weights)
    if not Path(teacher).is_file():
        raise SettingsError(
            f"no backbone and no file is called {teacher!r}; choose one of {', '.join(SPECS)}, or a file"
        )
    if weights != "auto":
        raise SettingsError(f"teacher_weights is {weights!r}, but teacher {teacher} is a file; give auto")
    kind = kind_of(teacher)
    backbone = load_head(teacher).trained_backbone() if kind == HEAD_FILE.name else None
    if kind == BACKBONE_FILE.name:
        backbone = load_backbone_file(teacher)
    if backbone is None:
        raise ModelFileError(
            f"{teacher}: is no distilled backbone, and no head with a backbone; give the teacher's name, and this file "
            "as teacher_weights"
        )
    return backbone


def stage_of(spec: BackboneSpec, stride: int) -> int | None:
    """Index of the last stage with that stride; of a DINO with patches of 14 pixels, that of its patches is 16."""
    strides = [MAIN if spec.family == "vit" else s for s in spec.strides]
    return max((i for i, s in enumerate(strides) if s == stride), default=None)


def token_size(size: int, spec: BackboneSpec) -> int:
    """Side of an image that gives a grid of ``size`` / 16: smaller for a DINO with patches of 14 pixels."""
    return size // MAIN * spec.multiple if spec.family == "vit" else size


class TeacherTokens:
    """Feature maps of a frozen teacher for views, standardized, in half precision, cached within a byte budget.

    The maps of stride 16 are the last of that stride. Those of strides 8 and 32 are the teacher's own, or, where it has
    none (DINO), its map of stride 16 upsampled or averaged. Channels of teachers without a closing LayerNorm are
    standardized by `fit`. Cached and fresh maps are equal: both are rounded, and on the CPU each view is computed on
    its own.

    Parameters
    ----------
    backbone : Backbone
        On the device.
    views : Views
    strides : sequence of int
    device : Device
    budget : int
        Bytes of views and maps that are kept.
    """

    def __init__(self, backbone: Backbone, views: Views, strides: Sequence[int], device: Device, budget: int) -> None:
        self.backbone: Backbone = backbone
        self.views: Views = views
        self.strides: tuple[int, ...] = tuple(strides)
        self.device: Device = device
        self.left: int = budget
        own = [stride for stride in strides if stage_of(backbone.spec, stride) is not None]
        self._computed: tuple[int, ...] = tuple(dict.fromkeys(own if set(own) == set(strides) else [MAIN, *own]))
        self._norms: dict[int, tuple[Tensor, Tensor]] = {}
        self._cache: dict[int, tuple[UInt8[Tensor, "3 s s"], Maps]] = {}

    @property
    def cached(self) -> int:
        """Number of views in the cache."""
        return len(self._cache)

    @property
    def is_standardized(self) -> bool:
        """Whether channels are standardized: those of DINO have a closing LayerNorm."""
        return self.backbone.spec.family != "vit"

    def channels(self, stride: int) -> int:
        """Channels c_t of the maps of a stride."""
        spec = self.backbone.spec
        stage = stage_of(spec, stride)
        index = stage_of(spec, MAIN) if stage is None else stage
        assert index is not None
        return spec.channels[index]

    def fit(self) -> Iterator[tuple[int, int]]:
        """Take mean and deviation of every channel from some views; yields how many are done, and of how many."""
        if not self.is_standardized:
            return
        count = min(FITTED_VIEWS, len(self.views))
        sums: dict[int, list[Tensor]] = {}
        for i in range(count):
            maps = self._raw(self.views.view(i * len(self.views) // count)[None])
            for stride, x in maps.items():
                values = x[0].flatten(1).double()
                parts = [values.mean(1), (values**2).mean(1)]
                sums[stride] = [a + b for a, b in zip(sums[stride], parts, strict=True)] if stride in sums else parts
            yield i + 1, count
        for stride, (first, second) in sums.items():
            mean = first / count
            deviation = (second / count - mean**2).clamp_min(0).sqrt()
            smallest = max(1e-6, SMALLEST_DEVIATION * float(deviation.mean()))
            self._norms[stride] = (mean.float(), deviation.float().clamp_min(smallest))

    def norms(self) -> dict[str, Tensor]:
        """Mean and deviation by stride, as a checkpoint holds them."""
        return {f"{s}.{i}": pair[i] for s, pair in self._norms.items() for i in (0, 1)}

    def restore(self, norms: Mapping[str, Tensor]) -> None:
        """Take `norms` from a checkpoint."""
        strides = sorted({int(name.partition(".")[0]) for name in norms})
        self._norms = {
            s: (norms[f"{s}.0"].to(self.device.torch), norms[f"{s}.1"].to(self.device.torch)) for s in strides
        }

    def batch(self, indices: Sequence[int]) -> tuple[Float[Tensor, "b 3 s s"], Maps]:
        """Images in [0, 1] and teacher maps, float32 on the device, of some views."""
        missing = [i for i in dict.fromkeys(indices) if i not in self._cache]
        fresh = dict(zip(missing, self._compute(missing), strict=True))
        for index, entry in fresh.items():
            image, maps = entry
            nbytes = image.nbytes + sum(x.nbytes for x in maps.values())
            if nbytes <= self.left:
                self.left -= nbytes
                self._cache[index] = entry
        entries = [fresh[i] if i in fresh else self._cache[i] for i in indices]
        images = self.device.upload(torch.stack([image for image, _ in entries])) / 255.0
        stacked = {s: self.device.upload(torch.stack([maps[s] for _, maps in entries])).float() for s in self._computed}
        return images, {stride: self._at(stride, stacked, images.shape[-1]) for stride in self.strides}

    def _at(self, stride: int, maps: Maps, size: int) -> Float[Tensor, "b c h w"]:
        """The map of a stride, from that of stride 16 where the teacher has none."""
        if stride in maps:
            return maps[stride]
        if stride > MAIN:
            return F.avg_pool2d(maps[MAIN], stride // MAIN)
        return F.interpolate(maps[MAIN], (size // stride, size // stride), mode="bilinear", align_corners=False)

    def _compute(self, indices: Sequence[int]) -> list[tuple[UInt8[Tensor, "3 s s"], Maps]]:
        images = [self.views.view(i) for i in indices]
        step = 1 if self.device.kind == "cpu" else 32
        entries = []
        for start in range(0, len(images), step):
            part = torch.stack(images[start : start + step])
            maps = {s: self.standardized(s, x).half().cpu() for s, x in self._raw(part).items()}
            entries += [(image, {s: x[k].clone() for s, x in maps.items()}) for k, image in enumerate(part)]
        return entries

    def _raw(self, images: UInt8[Tensor, "b 3 s s"]) -> Maps:
        """The teacher's maps; it sees images of a size that gives it the same grid."""
        spec = self.backbone.spec
        x = self.device.upload(images) / 255.0
        if spec.family == "vit" and spec.multiple != MAIN:
            side = token_size(images.shape[-1], spec)
            x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        with self.device.autocast():
            pyramid = self.backbone(x)
        return {stride: last_map(pyramid, spec, stride).float() for stride in self._computed}

    def standardized(self, stride: int, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """A map on the scale of the teacher's, as `fit` took it."""
        if stride not in self._norms:
            return x
        mean, deviation = self._norms[stride]
        return (x - mean[:, None, None]) / deviation[:, None, None]


def last_map(pyramid: FeaturePyramid, spec: BackboneSpec, stride: int) -> Float[Tensor, "b c h w"]:
    """Output of the last block of the last stage with a stride, which the backbone must have."""
    stage = stage_of(spec, stride)
    assert stage is not None
    result: Tensor = pyramid.stages[stage][-1]
    return result
