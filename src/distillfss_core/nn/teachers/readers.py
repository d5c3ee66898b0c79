"""Readers of the 4-D correlation of queries with one shot: they fold the support's positions into a few numbers.

`PoolReader` has no order and no parameters. `AttentionReader` is dense cross-attention [1]_ with values of +1 and -1.
`CenterPivotReader` convolves in the query and in the support [2]_. `ScanReader` scans the support's raster, as in
UINO-FSS [3]_, whose blocks are not published in detail.

References
----------
.. [1] Shi, Wei, Zhang, Lu, Ning, Chen, Ma, Zheng, "Dense Cross-Query-and-Support Attention Weighted Mask
   Aggregation for Few-Shot Segmentation", ECCV 2022.
.. [2] Min, Kang, Cho, "Hypercorrelation Squeeze for Few-Shot Segmentation", ICCV 2021.
.. [3] Zhuo, Tang, Xue, Ding, Ji, Shen, "UINO-FSS: Unifying Representation Learning and Few-shot Segmentation via
   Hierarchical Distillation and Mamba-HyperCorrelation", arXiv:2504.15669, 2025.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.nn.teachers.correlation import Queries, Shot, hypercorrelation, strongest
from distillfss_core.nn.teachers.dcama import against_the_rest, attend, weigh_keys
from distillfss_core.nn.teachers.scan import SelectiveScan

STRONGEST = 16
"""Support positions whose correlations are averaged as the strongest."""


class Reader(nn.Module):
    """Interface of readers.

    Parameters
    ----------
    blocks : int
        Late blocks l.
    """

    numbers: int
    """Numbers that it gives for each class and query position."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks: int = blocks

    def forward(self, queries: Queries, shot: Shot) -> Float[Tensor, "b k f q"]:
        """Read one shot for all classes; the correlation is computed once, or not at all."""
        raise NotImplementedError


class _VolumeReader(Reader):
    """A reader of the volume in memory, class by class."""

    def forward(self, queries: Queries, shot: Shot) -> Float[Tensor, "b k f q"]:
        volume = hypercorrelation(queries, shot)
        return torch.stack([self.read(volume, k, queries, shot) for k in range(len(shot.signs))], 1)

    def read(self, volume: Float[Tensor, "b l q s"], k: int, queries: Queries, shot: Shot) -> Float[Tensor, "b f q"]:
        """The numbers of one class."""
        raise NotImplementedError


class PoolReader(_VolumeReader):
    """Mean of the strongest, maximum and mean, over the class and over the rest: six numbers a block."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.numbers = 6 * blocks

    def read(self, volume: Float[Tensor, "b l q s"], k: int, queries: Queries, shot: Shot) -> Float[Tensor, "b f q"]:
        """The numbers of one class."""
        numbers = [volume @ shot.side_weights(k).T.to(volume.dtype)]
        for sign in (1, -1):
            top, largest = strongest(volume, (sign * shot.signs[k]).clamp_min(0), STRONGEST)
            numbers.append(torch.stack([top, largest], -1))
        return torch.cat(numbers, -1).movedim(-1, 2).flatten(1, 2)


class AttentionReader(Reader):
    """Softmax over the support's positions, whose values are +1 and -1: one number a block, for all classes at once.

    The volume is never built. Background and K classes weigh the same, as in `DcamaTeacher`.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.numbers = blocks
        self.log_scale: nn.Parameter = nn.Parameter(torch.full((blocks,), math.log(10.0)))

    def forward(self, queries: Queries, shot: Shot) -> Float[Tensor, "b k f q"]:
        """Read one shot for all classes."""
        index, bias = weigh_keys(shot.inside, shot.share, shots=1, balance=1.0, max_keys=None)
        values = shot.inside[index]
        maps = []
        for scale, q, s in zip(self.log_scale.exp(), queries.blocks, shot.blocks, strict=True):
            m = attend(q[:, None] * (scale * math.sqrt(q.shape[-1])).to(q.dtype), s[index][None], values, bias)
            m = against_the_rest(m)
            maps.append(2 * m - 1 if shot.contrast else m)
        return torch.stack(maps, -1).permute(0, 2, 3, 1)


class CenterPivotReader(_VolumeReader):
    """Two center-pivot 4-D convolutions, then means over both sides of the support."""

    def __init__(self, blocks: int, *, width: int = 16) -> None:
        super().__init__(blocks)
        self.numbers = 2 * width
        self.query: nn.ModuleList = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1) for c in (blocks, width))
        self.support: nn.ModuleList = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1) for c in (blocks, width))

    def read(self, volume: Float[Tensor, "b l q s"], k: int, queries: Queries, shot: Shot) -> Float[Tensor, "b f q"]:
        """The numbers of one class."""
        x = volume * shot.signs[k].to(volume.dtype)
        for along_query, along_support in zip(self.query, self.support, strict=True):
            by_support = along_query(x.movedim(3, 1).flatten(0, 1).unflatten(2, queries.grid))  # (b s) c hq wq
            by_query = along_support(x.movedim(2, 1).flatten(0, 1).unflatten(2, shot.grid))  # (b q) c hs ws
            both = by_support.flatten(2).unflatten(0, (len(x), -1)).permute(0, 2, 3, 1)
            x = torch.relu(both + by_query.flatten(2).unflatten(0, (len(x), -1)).movedim(1, 2))
        return (x @ shot.side_weights(k).T.to(x.dtype)).movedim(-1, 2).flatten(1, 2)


class ScanReader(_VolumeReader):
    """A selective scan over the support's raster in both directions, for each query position."""

    def __init__(self, blocks: int, *, width: int = 16) -> None:
        super().__init__(blocks)
        self.numbers = 2 * width
        self.enter: nn.Linear = nn.Linear(blocks, width)
        self.ahead: SelectiveScan = SelectiveScan(width)
        self.back: SelectiveScan = SelectiveScan(width)

    def read(self, volume: Float[Tensor, "b l q s"], k: int, queries: Queries, shot: Shot) -> Float[Tensor, "b f q"]:
        """The numbers of one class."""
        x = (volume * shot.signs[k].to(volume.dtype)).permute(0, 2, 3, 1)  # b q s l
        x = self.enter(x).flatten(0, 1)
        y = F.silu(self.ahead(x) + self.back(x, reverse=True))  # (b q) s c
        sides = shot.side_weights(k).to(y.dtype) @ y  # (b q) 2 c
        numbers: Float[Tensor, "b f q"] = sides.flatten(1).unflatten(0, (len(volume), -1)).transpose(1, 2)
        return numbers


READERS: dict[str, type[Reader]] = {
    "pool": PoolReader,
    "attention": AttentionReader,
    "cp4d": CenterPivotReader,
    "scan": ScanReader,
}
"""Readers by the name that settings and files have for them."""
