"""Decoders, which turn coarse maps and skip features into logits; teacher and student share one.

Both decoders are class-agnostic: classes ride in the batch, so a decoder trained on one task serves another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.nn.features import NEUTRAL, CoarseMaps, FeaturePyramid, margins

RATIOS = (2, 4, 8, 16)
"""Of the sides of grids of a backbone; in ONNX no tensor is unpacked to ask its size then."""


def _fold(maps: Float[Tensor, "b k n h w"]) -> Float[Tensor, "bk n h w"]:
    return maps.flatten(0, 1)


def _split(x: Float[Tensor, "bk c h w"], classes: int) -> Float[Tensor, "b k c h w"]:
    """The classes out of the batch again; unlike ``unflatten``, of any size when it is traced."""
    return x.reshape(-1, classes, x.shape[1], x.shape[2], x.shape[3])


class Decoder(nn.Module):
    """Interface of decoders, as teacher and student use it."""

    support_skip = False  # whether it reads the support's features too
    local = True  # whether the answer at a pixel depends on a bounded neighborhood only

    def forward(
        self, coarse: CoarseMaps, query: FeaturePyramid, support: FeaturePyramid | None = None
    ) -> Float[Tensor, "b k 2 h w"]:
        """Logits (background, foreground) of each class at ``query.size``."""
        raise NotImplementedError

    def on_grid(
        self, coarse: CoarseMaps, query: FeaturePyramid, support: FeaturePyramid | None = None
    ) -> Float[Tensor, "b k 2 hg wg"]:
        """The logits as they are before they are enlarged to ``query.size``, where this is bilinear and the last step.

        So that what comes after can enlarge them once, to the size that it needs.
        """
        result: Float[Tensor, "b k 2 hg wg"] = self(coarse, query, support)
        return result

    def margins(self, coarse: CoarseMaps, query: FeaturePyramid) -> Float[Tensor, "b k hg wg"]:
        """`margins` of the logits of `on_grid`."""
        return margins(self.on_grid(coarse, query))


class PublishedDecoder(Decoder):
    """Decoder of DCAMA [1]_, with the layers and names of the published implementation.

    Parameters
    ----------
    blocks : (int, int, int)
        Blocks of the fine, mid and deep stage.
    skip_channels : (int, int)
        Channels of the last blocks of the stride-4 stage and of the fine stage.
    support_skip : bool
        Whether the support's skip features (maximum over shots) are concatenated too.
    grid : int or None
        Side of the square grid before the last two doublings; published: 96, i.e. 384 x 384 logits.
        None takes a quarter of the input (the size of a stage of stride 4), and logits come out at ``query.size``.

    References
    ----------
    .. [1] Shi, Wei, Zhang, Lu, Ning, Chen, Ma, Zheng, "Dense Cross-Query-and-Support Attention Weighted Mask
       Aggregation for Few-Shot Segmentation", ECCV 2022.
    """

    local = False  # GroupNorm and align_corners look at the whole tile

    def __init__(
        self,
        blocks: tuple[int, int, int],
        skip_channels: tuple[int, int],
        *,
        support_skip: bool = False,
        grid: int | None = None,
    ) -> None:
        super().__init__()
        fine, mid, deep = blocks
        self.support_skip: bool = support_skip
        self.grid: int | None = grid
        self.conv1: nn.Sequential = _conv_block(deep, (16, 64, 128), (3, 3, 3))
        self.conv2: nn.Sequential = _conv_block(mid, (16, 64, 128), (5, 3, 3))
        self.conv3: nn.Sequential = _conv_block(fine, (16, 64, 128), (5, 5, 3))
        self.conv4: nn.Sequential = _conv_block(128, (128, 128, 128), (3, 3, 3))
        self.conv5: nn.Sequential = _conv_block(128, (128, 128, 128), (3, 3, 3))
        skips = sum(skip_channels) * (2 if support_skip else 1)
        self.mixer1: nn.Sequential = nn.Sequential(_conv(128 + skips, 128), nn.ReLU(), _conv(128, 64), nn.ReLU())
        self.mixer2: nn.Sequential = nn.Sequential(_conv(64, 64), nn.ReLU(), _conv(64, 16), nn.ReLU())
        self.mixer3: nn.Sequential = nn.Sequential(_conv(16, 16), nn.ReLU(), _conv(16, 2))

    def forward(
        self, coarse: CoarseMaps, query: FeaturePyramid, support: FeaturePyramid | None = None
    ) -> Float[Tensor, "b k 2 h w"]:
        """Logits (background, foreground) of each class.

        Their size is ``query.size``, or four times `grid` where `grid` is given.

        Raises
        ------
        ValueError
            If the decoder reads the support's features and ``support`` is missing.
        """
        k = coarse.deep.shape[1]
        x = self.conv1(_fold(coarse.deep))
        mid = self.conv2(_fold(coarse.mid))
        x = self.conv4(_corner_resize(x, mid.shape[-2:]) + mid)
        fine = self.conv3(_fold(coarse.fine))
        x = self.conv5(_corner_resize(x, fine.shape[-2:]) + fine)

        for skip, shots in zip(reversed(query.skips[-2:]), self._support_skips(query, support), strict=True):
            x = _corner_resize(x, skip.shape[-2:])
            x = torch.cat([x, skip.repeat_interleave(k, 0), *(s.repeat_interleave(k, 0) for s in shots)], 1)
        x = _corner_resize(x, (2 * fine.shape[-2], 2 * fine.shape[-1]))
        x = _corner_resize(x, (query.size[0] // 4, query.size[1] // 4) if self.grid is None else (self.grid, self.grid))
        x = self.mixer1(x)
        x = self.mixer2(_corner_resize(x, (2 * x.shape[-2], 2 * x.shape[-1])))
        x = self.mixer3(_corner_resize(x, (2 * x.shape[-2], 2 * x.shape[-1])))
        if self.grid is None:
            x = _corner_resize(x, query.size)
        return _split(x, k)

    def _support_skips(self, query: FeaturePyramid, support: FeaturePyramid | None) -> list[list[Tensor]]:
        if not self.support_skip:
            return [[], []]
        if support is None:
            raise ValueError("this decoder has a support skip connection: it needs the support's features")
        b = query.batch
        shots = [s.unflatten(0, (b, -1)).amax(1) for s in support.skips[-2:]]  # (b n) c h w -> b c h w
        return [[s] for s in reversed(shots)]


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def _conv_block(inputs: int, outputs: Sequence[int], kernels: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, kernel in zip(outputs, kernels, strict=True):
        layers += [_conv(inputs, width, kernel), nn.GroupNorm(4, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


def _corner_resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


class SkipProjection(nn.Conv2d):
    """A 1x1 convolution of standardized features, in one step.

    Mean and deviation of the channels are fitted once and then part of the model, so the output at a pixel depends on
    that pixel alone. Before `fit` they change nothing.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "b c h w"]) -> None:
        """Take mean and deviation of each channel from features."""
        self.mean.copy_(x.float().mean((0, 2, 3)))
        self.scale.copy_(1.0 / (x.float().std((0, 2, 3)) + 1e-4))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        """Standardize and project features."""
        assert self.bias is not None
        weight = self.weight * self.scale[:, None, None]
        return F.conv2d(x, weight, self.bias - (weight[:, :, 0, 0] @ self.mean))


class SlimDecoder(Decoder):
    """The default decoder: its output at a pixel depends on a bounded neighborhood only.

    It has no GroupNorm and no align_corners, so tiles agree with the whole plane. The skip features of the finest stage
    are used (stride 2 where the backbone has it: small objects need it). Operations on the query alone run once for all
    classes::

        deep --conv--up--+--conv--up--+--conv--+--conv--up--+--conv--conv--up--+--1x1-- logits
        mid  ------conv--'            |        |            |                  |
        fine ------------------conv---'        |            |                  |
        skips (query only) -------------------1x1----------1x1----------------1x1

    Before any training, its output is the mean of the coarse maps against `NEUTRAL` (its last layer starts at zero), so
    a teacher whose attention means something already segments.

    Parameters
    ----------
    blocks : (int, int, int)
        Blocks of the fine, mid and deep stage.
    skip_channels : sequence of int
        Channels of ``FeaturePyramid.skips``, fine to coarse.
    width : int
        Channels at the strides of the coarse stages; each detail stage, with four times the pixels of the one below,
        has half of it.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int],
        skip_channels: Sequence[int],
        *,
        width: int = 32,
    ) -> None:
        super().__init__()
        fine, mid, deep = blocks
        self.deep: nn.Conv2d = _conv(deep, width)
        self.mid: nn.Conv2d = _conv(mid, width)
        self.fine: nn.Conv2d = _conv(fine, width)
        self.join_mid: nn.Conv2d = _conv(width, width)
        self.join_fine: nn.Conv2d = _conv(width, width)
        # finest first, as in FeaturePyramid.skips
        widths = [max(2, width >> (len(skip_channels) - 1 - level)) for level in range(len(skip_channels))]
        above = [*widths[1:], width]
        self.skips: nn.ModuleList = nn.ModuleList(
            SkipProjection(c, w) for c, w in zip(skip_channels, widths, strict=True)
        )
        kernels = [3 if level == 0 else 1 for level in range(len(widths))]
        self.mixers: nn.ModuleList = nn.ModuleList(
            _conv(a, w, k) for a, w, k in zip(above, widths, kernels, strict=True)
        )
        # No refinement at the finest level: costly, no gain.
        self.refine: nn.ModuleList = nn.ModuleList(_conv(w, w) for w in widths[1:])
        self.out: nn.Conv2d = _conv(widths[0], 2, 1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)
        self.gain: nn.Parameter = nn.Parameter(torch.full((3,), 4.0))

    def fit_norms(self, features: FeaturePyramid) -> None:
        """Fit the skip standardization on the features of a few support crops."""
        for project, skip in zip(self.skips, features.skips, strict=True):
            assert isinstance(project, SkipProjection)
            project.fit(skip)

    def forward(
        self, coarse: CoarseMaps, query: FeaturePyramid, support: FeaturePyramid | None = None
    ) -> Float[Tensor, "b k 2 h w"]:
        """Logits (background, foreground) of each class at ``query.size``; ``support`` is not used."""
        x = self.on_grid(coarse, query).flatten(0, 1)
        return _split(F.interpolate(x, query.size, mode="bilinear", align_corners=False), coarse.deep.shape[1])

    def on_grid(
        self, coarse: CoarseMaps, query: FeaturePyramid, support: FeaturePyramid | None = None
    ) -> Float[Tensor, "b k 2 hg wg"]:
        """Logits on the grid of the finest skip features, before they are enlarged; ``support`` is not used."""
        x, evidence = self._features(coarse, query)
        return _split(self.out(x) + torch.cat([-evidence, evidence], 1), coarse.deep.shape[1])

    def margins(self, coarse: CoarseMaps, query: FeaturePyramid) -> Float[Tensor, "b k hg wg"]:
        """`margins` of the logits on the grid of the finest skip features; of one class in one convolution."""
        if coarse.deep.shape[1] > 1:
            return super().margins(coarse, query)
        x, evidence = self._features(coarse, query)
        assert self.out.bias is not None
        background, foreground = self.out.weight.split(1)
        return F.conv2d(x, foreground - background, self.out.bias[1:] - self.out.bias[:1]) + 2 * evidence

    def _features(
        self, coarse: CoarseMaps, query: FeaturePyramid
    ) -> tuple[Float[Tensor, "bk c hg wg"], Float[Tensor, "bk 1 hg wg"]]:
        """What the logits are made of: features, and half of the margin that the coarse maps alone give."""
        k = coarse.deep.shape[1]
        deep, mid, fine = _fold(coarse.deep), _fold(coarse.mid), _fold(coarse.fine)
        x = F.relu(self.deep(deep - NEUTRAL))
        x = F.relu(self.join_mid(resize_like(x, mid) + self.mid(mid - NEUTRAL)))
        x = F.relu(self.join_fine(resize_like(x, fine) + self.fine(fine - NEUTRAL)))
        skips = query.skips
        for level in reversed(range(len(skips))):
            from_query = self.skips[level](skips[level])
            x = resize_like(self.mixers[level](x), skips[level])  # the cheap order: narrow first, then enlarge
            x = F.relu_(x + from_query if k == 1 else (_split(x, k) + from_query[:, None]).flatten(0, 1))
            if level > 0:
                x = F.relu_(x + self.refine[level - 1](x))
        means = (resize_like((maps - NEUTRAL).mean(1, keepdim=True), fine) for maps in (fine, mid, deep))
        evidence = torch.stack([g * m for g, m in zip(self.gain, means, strict=True)]).sum(0)
        return x, resize_like(evidence, x)


def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """Maps "b c h w" brought to the height and width of others, bilinearly."""
    height, width = like.shape[-2:]
    if x.shape[-2:] == (height, width):
        return x
    for ratio in RATIOS:
        if (height, width) == (ratio * x.shape[-2], ratio * x.shape[-1]):
            if x.shape[1] == 1 and torch.onnx.is_in_onnx_export():
                return enlarge_by_convolution(x, ratio)
            return F.interpolate(x, scale_factor=float(ratio), mode="bilinear", align_corners=False)
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)


def enlarge_by_convolution(x: Float[Tensor, "b 1 h w"], ratio: int) -> Float[Tensor, "b 1 rh rw"]:
    """Bilinear enlargement: a convolution makes ``ratio`` x ``ratio`` values of each position and its neighbors.

    For other engines than torch, whose own enlargement of a single channel is slower.
    """
    offsets = [(2 * i + 1 - ratio) / (2 * ratio) for i in range(ratio)]
    line = x.new_tensor([[max(-offset, 0), 1 - abs(offset), max(offset, 0)] for offset in offsets])
    weight = (line[:, None, :, None] * line[:, None, :]).reshape(-1, 1, 3, 3)
    return F.pixel_shuffle(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight), ratio)


def sum_on_finest(maps: Sequence[Float[Tensor, "b c _h _w"]]) -> Float[Tensor, "b c h w"]:
    """The sum of maps on the grid of the first, which is the finest; maps of one grid are added, then enlarged once."""
    grids: dict[tuple[int, ...], Tensor] = {}
    for part in maps:
        grid = tuple(int(n) for n in part.shape[-2:])
        grids[grid] = grids[grid] + part if grid in grids else part
    total, *coarser = grids.values()
    for part in coarser:
        single = resize_like(_fold(part[:, :, None]), total)
        total = total + _split(single, part.shape[1])[:, :, 0]
    return total
