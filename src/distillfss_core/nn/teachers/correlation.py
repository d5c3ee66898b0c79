"""Correlations of queries with a support whose positions carry a sign: contrast, prototypes and the 4-D volume [1]_.

References
----------
.. [1] Zhuo, Tang, Xue, Ding, Ji, Shen, "UINO-FSS: Unifying Representation Learning and Few-shot Segmentation via
   Hierarchical Distillation and Mamba-HyperCorrelation", arXiv:2504.15669, 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distillfss_core.nn.features import EncodedSupport


def unit_tokens(block: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l c"]:
    """Tokens in raster order, minus their mean over the channels, of length one.

    Their products are cosines, and a positive factor on the features changes nothing.
    """
    tokens = block.float().flatten(2).transpose(1, 2).contiguous()  # fused attention needs this layout
    return F.normalize(tokens - tokens.mean(-1, keepdim=True), dim=-1)


@dataclass(frozen=True, eq=False)
class Sides:
    """What the cells of a grid over the support are worth.

    Parameters
    ----------
    inside, outside : Tensor "n k s"
        Share of the class, and of everything else, in the annotated part of a cell; zero where nothing is annotated.
    share : Tensor "n s"
        Annotated part of a cell.
    """

    inside: Float[Tensor, "n k s"]
    outside: Float[Tensor, "n k s"]
    share: Float[Tensor, "n s"]

    @classmethod
    def of(cls, support: EncodedSupport, grid: Sequence[int]) -> Sides:
        """Mean masks over the cells of a grid (height, width)."""
        size = (grid[0], grid[1])
        valid, masks = support.valid.float()[:, None], support.masks.float()
        share = F.adaptive_avg_pool2d(valid, size)
        inside, outside = (
            F.adaptive_avg_pool2d(part * valid, size) / share.clamp_min(1e-6) for part in (masks, 1 - masks)
        )
        return cls(inside.flatten(2), outside.flatten(2), share[:, 0].flatten(1))

    def signs(self, *, contrast: bool) -> Float[Tensor, "n k s"]:
        """Sign and weight of every cell; 2 M - 1 where masks M are 0 or 1.

        Each side is relative to its largest share in the support, so that objects smaller than a cell have a side too.
        If mask and complement are exchanged, every sign changes exactly.

        Parameters
        ----------
        contrast : bool
            False leaves out the side outside: its cells are zero.
        """
        sides = (self.inside, self.outside)
        inside, outside = (part / part.amax((0, 2), keepdim=True).clamp_min(1e-6) for part in sides)
        return inside - outside if contrast else (inside - outside).clamp_min(0)


@dataclass(frozen=True, eq=False)
class Shot:
    """One shot on the grid of the volume.

    Parameters
    ----------
    blocks : tuple of Tensor "s c"
        Unit tokens of every late block.
    signs : Tensor "k s"
        As `Sides.signs` gives them.
    inside : Tensor "s k"
        As in `Sides`.
    share : Tensor "s"
        As in `Sides`.
    grid : (int, int)
        Height and width; s is their product.
    contrast : bool
        Whether cells outside the class have a sign, or are zero.
    """

    blocks: tuple[Float[Tensor, "s _"], ...]
    signs: Float[Tensor, "k s"]
    inside: Float[Tensor, "s k"]
    share: Float[Tensor, " s"]
    grid: tuple[int, int]
    contrast: bool = True

    def side_weights(self, k: int) -> Float[Tensor, "2 s"]:
        """Weights of a mean over the cells of a class, and over those outside; zero for a side without cells."""
        sides = torch.stack([self.signs[k].clamp_min(0), (-self.signs[k]).clamp_min(0)]) * self.share
        return sides / sides.sum(1, keepdim=True).clamp_min(1e-6)


@dataclass(frozen=True, eq=False)
class Queries:
    """A batch of queries on the grid of the volume: unit tokens "b q c" of every late block."""

    blocks: tuple[Float[Tensor, "b q _"], ...]
    grid: tuple[int, int]


def hypercorrelation(queries: Queries, shot: Shot) -> Float[Tensor, "b l q s"]:
    """ReLU of the cosine of every query position with every support position, for all late blocks."""
    return torch.stack([torch.relu(q @ s.T.to(q.dtype)) for q, s in zip(queries.blocks, shot.blocks, strict=True)], 1)


def strongest(
    correlation: Float[Tensor, "*rows s"], weights: Float[Tensor, " s"], count: int
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Mean of the ``count`` largest correlations times weights, and the largest; zero where all weights are zero.

    Parameters
    ----------
    weights : tensor
        From 0 (not counted) to 1.
    """
    columns = torch.nonzero(weights > 0).flatten()
    if not len(columns):
        zero = correlation.new_zeros(correlation.shape[:-1])
        return zero, zero
    weighed = correlation[..., columns] * weights[columns].to(correlation.dtype)
    top = weighed.topk(min(count, len(columns)), -1).values
    return top.mean(-1), top[..., 0]


def pooled_tokens(
    blocks: Sequence[Float[Tensor, "n s _"]], weights: Float[Tensor, "n k s"]
) -> tuple[Float[Tensor, "k _"], ...]:
    """Weighted means of tokens over all shots at once, of length one; one tensor for each block."""
    return tuple(F.normalize(torch.einsum("nks,nsc->kc", weights, tokens), dim=-1) for tokens in blocks)


def prototype_contrast(
    queries: Queries, inside: Sequence[Float[Tensor, "k _"]], outside: Sequence[Float[Tensor, "k _"]]
) -> Float[Tensor, "b k l q"]:
    """Cosine with the prototype of a class, less that with the prototype of everything else."""
    return torch.stack(
        [(q @ (i - o).T.to(q.dtype)).transpose(1, 2) for q, i, o in zip(queries.blocks, inside, outside, strict=True)],
        2,
    )
