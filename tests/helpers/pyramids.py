"""Random features of a backbone, without one."""

from __future__ import annotations

import torch

from distillfss_core.nn.backbones import BackboneSpec
from distillfss_core.nn.features import FeaturePyramid

SMALL_SPEC = BackboneSpec(
    name="small",
    timm_name="small",
    family="efficientnet",
    hub_id="",
    license="",
    strides=(2, 4, 8, 16, 32),
    channels=(4, 6, 32, 48, 64),
    blocks=(1, 1, 2, 3, 2),
)
"""Of the backbone that `random_pyramid` stands for by default."""


def random_pyramid(
    side: int, batch: int = 1, seed: int = 0, channels: tuple[int, int, int, int, int] = (4, 6, 32, 48, 64)
) -> FeaturePyramid:
    """Stages of strides 2 to 32 with these channels; the last three of 2, 3 and 2 blocks."""
    generator = torch.Generator().manual_seed(seed)
    stages = []
    for stride, width, blocks in zip((2, 4, 8, 16, 32), channels, (1, 1, 2, 3, 2), strict=True):
        shape = (batch, width, side // stride, side // stride)
        stages.append(tuple(torch.randn(shape, generator=generator) for _ in range(blocks)))
    return FeaturePyramid(tuple(stages), (side, side))
