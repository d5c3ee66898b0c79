"""Prototypes that learn: projected features, several prototypes a class, and a support that is segmented in turn.

The support segments the query, and the predicted labels of the query segment the support: the alignment of PANet [1]_.
The prototypes of a class are its masked average and clusters, as in `PrototypeTeacher`, whose maps it begins with.

References
----------
.. [1] Wang, Liew, Zou, Zhou, Feng, "PANet: Few-Shot Image Semantic Segmentation with Prototype Alignment", ICCV 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from distillfss_core.nn.backbones.spec import BackboneSpec
from distillfss_core.nn.decoder import Decoder
from distillfss_core.nn.features import CoarseMaps, EncodedSupport, FeaturePyramid, class_masks
from distillfss_core.nn.losses import map_loss
from distillfss_core.nn.teachers.dcama import class_shares, mask_tokens
from distillfss_core.nn.teachers.evidence import Evidence
from distillfss_core.nn.teachers.protocol import LearnedKeys, LearnedTeacher, check_annotated, present_classes
from distillfss_core.nn.teachers.prototype import cluster

STEPS = 10
"""Steps of the clustering; a gradient passes through the last one."""


@dataclass(frozen=True)
class AlignmentSettings:
    """Settings of the learned prototypes.

    Parameters
    ----------
    prototypes : int
        For the background and for each class; the first is the masked average, the others are centers of clusters.
    gain : float
        Log-odds at first for a difference of one between cosines; the inverse of the temperature.
    """

    prototypes: int = 5
    gain: float = 20.0


@dataclass(frozen=True, eq=False)
class AlignmentKeys(LearnedKeys):
    """Unit-length prototypes: for each stage and block one tensor "k+1 p c", background first."""

    stages: tuple[tuple[Float[Tensor, "k1 p _"], ...], ...]


class AlignmentTeacher(LearnedTeacher):
    """Compares projected tokens of a query with the prototypes of each class and of everything else.

    The map of a block is sigmoid(gain (s_class - s_rest) + offset), where s is the largest cosine with a prototype. All
    classes are compared at once. Each stage has one projection without bias, which begins as the identity.

    Parameters
    ----------
    spec : BackboneSpec
    decoder : Decoder
        Usually shared with the student.
    settings : AlignmentSettings
    """

    def __init__(self, spec: BackboneSpec, decoder: Decoder, settings: AlignmentSettings) -> None:
        super().__init__(decoder)
        self.settings: AlignmentSettings = settings
        self.project: nn.ModuleList = nn.ModuleList(nn.Linear(c, c, bias=False) for c in spec.coarse_channels)
        for linear in self.project:
            assert isinstance(linear, nn.Linear)
            nn.init.eye_(linear.weight)
        self.evidence: Evidence = Evidence(spec.coarse_blocks, settings.gain)

    @property
    def own_modules(self) -> Sequence[nn.Module]:
        """Projections, gains and offsets."""
        return (self.project, self.evidence)

    @property
    def max_keys(self) -> int | None:
        """None: a few prototypes stand for all positions of the support."""
        return None

    def encode(self, support: EncodedSupport, *, max_keys: int | None = None, offset: float = 0.0) -> AlignmentKeys:
        """Prototypes of background and classes for every block; neither ``max_keys`` nor ``offset`` is used."""
        check_annotated(support)
        stages = []
        for stage, blocks in enumerate(support.features.coarse):
            values, weights = mask_tokens(support, blocks[0].shape[-2:], area=True)
            shares = class_shares(values) * weights[:, None]
            tokens = [self._tokens(stage, block).flatten(0, 1) for block in blocks]
            with _in_float32(shares):
                stages.append(tuple(class_prototypes(part, shares, self.settings.prototypes) for part in tokens))
        return AlignmentKeys(present_classes(support), tuple(stages))

    def _tokens(self, stage: int, block: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l c"]:
        tokens = block.float().flatten(2).transpose(1, 2)
        with _in_float32(block):
            projected: Tensor = self.project[stage](F.layer_norm(tokens, tokens.shape[-1:]))
        return F.normalize(projected, dim=-1)

    def coarse(self, query: FeaturePyramid, keys: LearnedKeys) -> CoarseMaps:
        """Coarse maps of a batch of queries against one support; every value lies in [0, 1]."""
        assert isinstance(keys, AlignmentKeys)
        maps = []
        for stage, (blocks, prototypes) in enumerate(zip(query.coarse, keys.stages, strict=True)):
            differences = [
                _against_others(self._tokens(stage, block), p) for block, p in zip(blocks, prototypes, strict=True)
            ]
            odds = self.evidence(stage, torch.stack(differences, 2))
            maps.append(torch.sigmoid(odds).unflatten(-1, blocks[0].shape[-2:]))
        return CoarseMaps(*maps)

    def alignment(
        self, query: FeaturePyramid, predicted: Int[Tensor, "b h w"], support: EncodedSupport
    ) -> Float[Tensor, ""] | None:
        """Loss of the support's coarse maps, from the prototypes of the queries where they are predicted."""
        masks = class_masks(predicted.to(torch.uint8), support.masks.shape[1])
        keys = self.encode(EncodedSupport(query, masks, torch.ones_like(masks[:, 0])))
        return map_loss(self.coarse(support.features, keys), support.labels, keys.present & present_classes(support))


def _in_float32(like: Tensor) -> torch.autocast:
    """Leave autocast: in half precision, tokens change their clusters."""
    return torch.autocast(like.device.type, enabled=False)


def class_prototypes(
    tokens: Float[Tensor, "l c"], shares: Float[Tensor, "l k1"], count: int
) -> Float[Tensor, "k1 count c"]:
    """Masked average and cluster centers of unit vectors, for background and classes.

    A gradient reaches the tokens through the averages; which token belongs to which cluster is taken as given.
    """
    per_class = []
    for share in shares.T:
        mean = F.normalize(share @ tokens, dim=0)
        inside = tokens[share >= 0.5 * share.max().clamp_min(1e-6)]
        centers = mean.expand(count - 1, -1)
        if count > 1 and len(inside) >= 2 * (count - 1):
            with torch.no_grad():
                centers = cluster(inside, count - 1, mean, steps=STEPS - 1)
                nearest = F.one_hot((inside @ centers.T).argmax(1), count - 1).to(inside)
            sums = nearest.T @ inside
            centers = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centers)
        per_class.append(torch.cat([mean[None], centers]))
    return torch.stack(per_class)


def _against_others(tokens: Float[Tensor, "b l c"], prototypes: Float[Tensor, "k1 p c"]) -> Float[Tensor, "b k l"]:
    """Largest cosine with a prototype of each class, less the largest with those of all others."""
    cosine = torch.einsum("blc,kpc->bklp", tokens, prototypes.to(tokens.dtype)).amax(-1)
    rest = [torch.cat([cosine[:, :k], cosine[:, k + 1 :]], 1).amax(1) for k in range(1, cosine.shape[1])]
    return cosine[:, 1:] - torch.stack(rest, 1)
