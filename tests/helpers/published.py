"""Reads the published numbers that tests compare with."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from distillfss_core.nn.features import EncodedSupport, FeaturePyramid, cat_pyramids

STAGES = (range(2), range(2, 4), range(4, 7), range(7, 9))


class PublishedCase:
    """One file of published weights, inputs and answers."""

    def __init__(self, folder: Path, *, support_skip: bool) -> None:
        self.tensors = load_file(folder / f"dcama_head_pe1_skip{int(support_skip)}.safetensors")
        self.support_skip = support_skip

    def weights(self, prefix: str = "weights/") -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def pyramid(self, prefix: str) -> FeaturePyramid:
        return FeaturePyramid(tuple(tuple(self.tensors[f"{prefix}/{i}"] for i in stage) for stage in STAGES), (64, 64))

    def support(self, shots: int) -> EncodedSupport:
        features = cat_pyramids([self.pyramid(f"{shots}shot/support/{i}") for i in range(shots)])
        masks = self.tensors[f"{shots}shot/mask"][0][:, None]
        return EncodedSupport(features, masks, torch.ones_like(masks[:, 0]))
