"""A teacher that needs no training: it compares queries with prototypes by cosine similarity.

The first prototype of a class is a masked average [1]_. The others are clusters, as in mixtures of prototypes [2]_,
here made by k-means.

References
----------
.. [1] Zhang, Wei, Yang, Huang, "SG-One: Similarity Guidance Network for One-Shot Semantic Segmentation",
   IEEE Transactions on Cybernetics 50 (9), 2020.
.. [2] Yang, Liu, Li, Jiao, Ye, "Prototype Mixture Models for Few-shot Semantic Segmentation", ECCV 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from distillfss_core.nn.features import CoarseMaps, EncodedSupport, FeaturePyramid, Prediction
from distillfss_core.nn.teachers.dcama import class_shares, mask_tokens
from distillfss_core.nn.teachers.protocol import SupportKeys, hide_absent, present_classes


@dataclass(frozen=True, eq=False)
class PrototypeKeys(SupportKeys):
    """Unit-length prototypes: for each stage and block one tensor "k+1 p c" (background first)."""

    stages: tuple[tuple[Float[Tensor, ...], ...], ...]
    present: Bool[Tensor, " k"]


class PrototypeTeacher:
    """Compares each query token with a few mean directions of each class.

    A coarse map is sigmoid((s_class - s_rest) / temperature), where s is the largest cosine with any
    prototype of the class (of everything else), so it lies in (0, 1) and 0.5 means undecided.

    Parameters
    ----------
    prototypes : int
        Prototypes a class; the first is the masked average, the others are k-means centers (spherical).
    temperature : float
        Difference of cosines that counts as one unit of log-odds.
    """

    local = True

    def __init__(self, prototypes: int = 5, temperature: float = 0.05) -> None:
        self.prototypes = prototypes
        self.temperature = temperature

    @torch.no_grad()
    def encode(self, support: EncodedSupport) -> PrototypeKeys:
        """Compute the prototypes of background and classes, for each block of the coarse stages."""
        stages = []
        for blocks in support.features.coarse:
            values, weights = mask_tokens(support, blocks[0].shape[-2:], area=True)
            shares = class_shares(values) * weights[:, None]
            stages.append(tuple(self._prototypes(_directions(block).flatten(0, 1), shares) for block in blocks))
        return PrototypeKeys(tuple(stages), present_classes(support))

    def _prototypes(self, tokens: Float[Tensor, "l c"], shares: Float[Tensor, "l k1"]) -> Float[Tensor, "k1 p c"]:
        per_class = []
        for share in shares.T:
            mean = F.normalize(share @ tokens, dim=0)
            inside = tokens[share >= 0.5 * share.max().clamp_min(1e-6)]
            per_class.append(torch.cat([mean[None], cluster(inside, self.prototypes - 1, mean)]))
        return torch.stack(per_class)

    @torch.no_grad()
    def __call__(self, query: FeaturePyramid, keys: SupportKeys) -> Prediction:
        """Segment by the prototypes of `encode`; see `Teacher`."""
        assert isinstance(keys, PrototypeKeys)
        maps, evidence = [], []
        for blocks, prototypes in zip(query.coarse, keys.stages, strict=True):
            odds = torch.stack(
                [self._log_odds(block, p) for block, p in zip(blocks, prototypes, strict=True)], 2
            )  # b k n h w
            maps.append(torch.sigmoid(odds))
            evidence.append(F.interpolate(odds.mean(2), query.size, mode="bilinear", align_corners=False))
        score = torch.stack(evidence).mean(0)
        logits = torch.stack([-score / 2, score / 2], 2)
        return Prediction(CoarseMaps(*maps), hide_absent(logits, keys.present))

    def _log_odds(self, block: Float[Tensor, "b c h w"], prototypes: Float[Tensor, "k1 p c"]) -> Tensor:
        cosine = torch.einsum("blc,kpc->bklp", _directions(block), prototypes).amax(-1)  # b k+1 l
        odds = []
        for k in range(1, cosine.shape[1]):
            rest = torch.cat([cosine[:, :k], cosine[:, k + 1 :]], 1).amax(1)
            odds.append((cosine[:, k] - rest) / self.temperature)
        result: Tensor = torch.stack(odds, 1).unflatten(2, block.shape[-2:])
        return result


def _directions(block: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l c"]:
    tokens = block.float().flatten(2).transpose(1, 2)
    return F.normalize(F.layer_norm(tokens, tokens.shape[-1:]), dim=-1)


def cluster(
    tokens: Float[Tensor, "l c"], count: int, mean: Float[Tensor, " c"], *, steps: int = 10
) -> Float[Tensor, "count c"]:
    """Centers of unit vectors by spherical k-means.

    It starts evenly along the vectors sorted by likeness to their mean: no randomness.
    """
    if len(tokens) < 2 * count or count == 0:
        return mean.expand(count, -1)
    order = (tokens @ mean).argsort()
    centers = tokens[order[torch.linspace(0, len(tokens) - 1, count, device=tokens.device).long()]]
    for _ in range(steps):
        nearest = (tokens @ centers.T).argmax(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, tokens)
        centers = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centers)
    return centers
