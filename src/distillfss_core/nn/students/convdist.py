"""ConvDist: small convolutions that give the attention maps of a teacher without its support set [1]_.

References
----------
.. [1] De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano, "DistillFSS: Synthesizing Few-Shot Knowledge into a
   Lightweight Segmentation Model", arXiv:2512.05613, 2025.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.nn.features import NEUTRAL, CoarseMaps, FeaturePyramid


class Student(nn.Module):
    """Interface of students, which compute coarse maps from the query alone."""

    def forward(self, query: FeaturePyramid) -> CoarseMaps:
        """Coarse maps of all classes, one map for each block of the coarse stages."""
        raise NotImplementedError


class CoarseExtractor(nn.Module):
    """Published maps of one class: Conv3x3, ReLU and Conv1x1 for each stage, shared by its blocks."""

    def __init__(self, channels: tuple[int, int, int]) -> None:
        super().__init__()
        self.coarse_extractor: nn.ModuleList = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, 1, 1)) for c in channels
        )

    def forward(self, query: FeaturePyramid) -> list[Float[Tensor, "b n h w"]]:
        """Maps of the fine, mid and deep stage, one channel for each block."""
        return [
            torch.cat([extract(block) for block in blocks], 1)
            for extract, blocks in zip(self.coarse_extractor, query.coarse, strict=True)
        ]


class ConvDist(Student):
    """The published form: one `CoarseExtractor` for each class; cost and size grow with the number of classes."""

    def __init__(self, channels: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.classes: nn.ModuleList = nn.ModuleList(CoarseExtractor(channels) for _ in range(classes))

    def forward(self, query: FeaturePyramid) -> CoarseMaps:
        """Coarse maps of all classes, each from its own extractor."""
        per_class = [extract(query) for extract in self.classes]
        return CoarseMaps(*(torch.stack(stage, 1) for stage in zip(*per_class, strict=True)))


class LightConvDist(Student):
    """The default student: classes share a trunk, and each further class costs one 1x1 filter for each block.

    In each stage, the blocks are standardized at each position and reduced together to ``width`` channels. A 3x3
    convolution follows, then one 1x1 convolution for all classes and blocks::

        blocks -- LayerNorm -- 1x1 -- ReLU -- 3x3 -- ReLU -- 1x1 --> K maps for each of the n blocks

    Parameters
    ----------
    channels, blocks : (int, int, int)
        Channels and number of blocks of the fine, mid and deep stage.
    classes : int
    width : int
        Channels of the trunk.
    """

    def __init__(
        self,
        channels: tuple[int, int, int],
        blocks: tuple[int, int, int],
        classes: int,
        *,
        width: int = 48,
    ) -> None:
        super().__init__()
        self.classes: int = classes
        self.normalize: nn.ModuleList = nn.ModuleList(ChannelNorm(c) for c in channels)
        self.reduce: nn.ModuleList = nn.ModuleList(
            nn.Conv2d(c * n, width, 1) for c, n in zip(channels, blocks, strict=True)
        )
        self.look: nn.ModuleList = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.read: nn.ModuleList = nn.ModuleList(nn.Conv2d(width, classes * n, 1) for n in blocks)
        for read in self.read:
            assert isinstance(read, nn.Conv2d)
            assert read.bias is not None
            nn.init.constant_(read.bias, NEUTRAL)

    def forward(self, query: FeaturePyramid) -> CoarseMaps:
        """Coarse maps of all classes from the shared trunk."""
        maps = []
        layers = zip(self.normalize, self.reduce, self.look, self.read, query.coarse, strict=True)
        for normalize, reduce, look, read, blocks in layers:
            x = torch.cat([normalize(block) for block in blocks], 1)
            x = torch.relu(look(torch.relu(reduce(x))))
            logits = read(x)  # not unflatten: traced, it would hold for one size only
            maps.append(logits.reshape(-1, self.classes, len(blocks), logits.shape[2], logits.shape[3]))
        return CoarseMaps(*maps)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each position, without weights.

    The means are convolutions, as ONNX Runtime reduces channels ten times as slowly. Their weight is a power of two, so
    it is exact in half precision, and no sum overflows.
    """

    weight: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        power = 1 << (channels - 1).bit_length()
        self.rest: float = power / channels
        self.register_buffer("weight", torch.full((1, channels, 1, 1), 1 / power), persistent=False)

    def forward(self, block: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Mean 0 and variance 1 at each position."""
        centered = block - F.conv2d(block, self.weight) * self.rest
        variance = F.conv2d(centered.square(), self.weight) * self.rest
        return centered * torch.rsqrt(variance + 1e-5)
