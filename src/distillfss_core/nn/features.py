"""Values of torch that backbone, teacher, student and decoder exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from distillfss_core.types import IGNORE

NEUTRAL = 0.5
"""Value of a coarse map that says nothing either way."""


@dataclass(frozen=True, eq=False)
class FeaturePyramid:
    """Outputs of every block of a backbone, for a batch of images.

    Parameters
    ----------
    stages : tuple of tuples of tensors
        Fine to coarse; each stage holds one tensor "b c h w" a block. The last three stages feed attention
        and ConvDist; the ones before ("detail stages") only give skip features to the decoder.
    size : (int, int)
        Height and width in pixels of the input that the maps stand for, padding included.
    """

    stages: tuple[tuple[Tensor, ...], ...]
    size: tuple[int, int]

    @property
    def coarse(self) -> tuple[tuple[Tensor, ...], ...]:
        """The three coarser stages: fine, mid, deep (published: strides 8, 16, 32)."""
        return self.stages[-3:]

    @property
    def skips(self) -> tuple[Tensor, ...]:
        """Last block of each detail stage and of the first coarse stage, fine to coarse."""
        return tuple(stage[-1] for stage in self.stages[:-2])

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.stages[-1][-1].shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> FeaturePyramid:
        """The same pyramid with ``function`` applied to every block."""
        return FeaturePyramid(tuple(tuple(function(b) for b in stage) for stage in self.stages), self.size)

    def lean(self) -> FeaturePyramid:
        """Without the blocks that nothing reads: of each detail stage only the last is kept."""
        return FeaturePyramid(tuple((s[-1],) for s in self.stages[:-3]) + self.stages[-3:], self.size)

    def __getitem__(self, index: slice | Tensor) -> FeaturePyramid:
        return self.map(lambda block: block[index])

    @property
    def nbytes(self) -> int:
        """Bytes that all maps occupy."""
        return sum(b.numel() * b.element_size() for stage in self.stages for b in stage)


def cat_pyramids(pyramids: list[FeaturePyramid]) -> FeaturePyramid:
    """Concatenate along the batch; all must be of one size and one backbone."""
    first = pyramids[0]
    stages = tuple(
        tuple(torch.cat([p.stages[s][i] for p in pyramids]) for i in range(len(stage)))
        for s, stage in enumerate(first.stages)
    )
    return FeaturePyramid(stages, first.size)


@dataclass(frozen=True, eq=False)
class EncodedSupport:
    """Features and masks of support crops.

    Parameters
    ----------
    features : FeaturePyramid
        Batch = shots.
    masks : Tensor "n k h w"
        One binary mask (0..1) a class at input resolution.
    valid : Tensor "n h w"
        1 where a pixel is annotated, 0 where it is IGNORE.
    """

    features: FeaturePyramid
    masks: Float[Tensor, "n k h w"]
    valid: Float[Tensor, "n h w"]

    @classmethod
    def of(cls, features: FeaturePyramid, labels: UInt8[Tensor, "n h w"], classes: int) -> EncodedSupport:
        """From labels: 0 background, 1..classes, IGNORE not annotated."""
        return cls(features, class_masks(labels, classes), (labels != IGNORE).float())

    @property
    def labels(self) -> Int[Tensor, "n h w"]:
        """Labels of all pixels: 0 background, 1..k, IGNORE not annotated."""
        numbers = torch.arange(1, self.masks.shape[1] + 1, device=self.masks.device)
        labels = (self.masks * numbers[:, None, None]).sum(1).long()
        return labels.where(self.valid > 0, IGNORE)

    def __getitem__(self, index: slice | Tensor) -> EncodedSupport:
        return EncodedSupport(self.features[index], self.masks[index], self.valid[index])


@dataclass(frozen=True, eq=False)
class CoarseMaps:
    """Maps of each class from every block of the three coarser stages.

    Each is "b k n h w": batch, class, block of the stage, grid. Values of attention lie in [0, 1].
    """

    fine: Float[Tensor, "b k n8 h8 w8"]
    mid: Float[Tensor, "b k n16 h16 w16"]
    deep: Float[Tensor, "b k n32 h32 w32"]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.fine, self.mid, self.deep))


@dataclass(frozen=True, eq=False)
class Prediction:
    """Coarse maps, and the logits "b k 2 h w" (background, foreground of each class) that a decoder made of them."""

    coarse: CoarseMaps
    logits: Float[Tensor, "b k 2 h w"]


def strongest(maps: Float[Tensor, "b k h w"]) -> Int[Tensor, "b h w"]:
    """Which map is the largest at each pixel; of equal ones the first.

    (``argmax`` along this axis takes 16 times as long on a CPU.)
    """
    return maps.max(1).indices


def merge_classes(logits: Float[Tensor, "b k 2 h w"]) -> Float[Tensor, "b k+1 h w"]:
    """Merge the binary logits of each class [1]_: the background of the pixel's strongest class, then each foreground.

    References
    ----------
    .. [1] De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano, "DistillFSS: Synthesizing Few-Shot Knowledge into a
       Lightweight Segmentation Model", arXiv:2512.05613, 2025.
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    foreground = logits[:, :, 1]
    background = logits[:, :, 0].gather(1, strongest(foreground)[:, None])
    return torch.cat([background, foreground], 1)


def margins(logits: Float[Tensor, "b k 2 h w"]) -> Float[Tensor, "b k h w"]:
    """Subtract the merged logit of the background from that of each class.

    The softmax of zero and these is that of `merge_classes`; where none is above zero it is background.
    """
    merged = merge_classes(logits)
    return merged[:, 1:] - merged[:, :1]


def class_masks(labels: UInt8[Tensor, "n h w"], classes: int) -> Float[Tensor, "n k h w"]:
    """One binary mask a class."""
    values = torch.arange(1, classes + 1, device=labels.device, dtype=labels.dtype)
    return (labels[:, None] == values[:, None, None]).float()
