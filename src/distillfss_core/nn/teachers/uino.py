"""UINO-FSS [1]_ for any backbone: prompts from a 4-D correlation adapt maps that are computed from the same features.

The published form has SAM's decoder, and SAM teaches its adapter. Here neither is needed: without them the adapter is
an ordinary neck that learns with the episodes, and the student's decoder reads coarse maps. There are coarse maps in
each case, so a student can be distilled.

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
from torch import Tensor, nn

from distillfss_core.nn.backbones.spec import BackboneSpec
from distillfss_core.nn.decoder import Decoder, resize_like
from distillfss_core.nn.features import CoarseMaps, EncodedSupport, FeaturePyramid
from distillfss_core.nn.sam_decoder import SamMaskDecoder
from distillfss_core.nn.teachers.correlation import (
    Queries,
    Shot,
    Sides,
    pooled_tokens,
    prototype_contrast,
    strongest,
    unit_tokens,
)
from distillfss_core.nn.teachers.dcama import weigh_keys
from distillfss_core.nn.teachers.evidence import Evidence
from distillfss_core.nn.teachers.protocol import LearnedKeys, LearnedTeacher, check_annotated, present_classes
from distillfss_core.nn.teachers.readers import READERS, STRONGEST, Reader

EARLY_STRIDE = 8
"""The adapter reads the first stage of this stride or more: fine enough for edges."""


@dataclass(frozen=True)
class UinoSettings:
    """Settings of the prompts.

    Parameters
    ----------
    reader : str
        What folds the support's positions of the correlation; a key of `READERS`.
    contrast : bool
        Whether support positions outside the class have a negative sign, or none at all.
    width : int
        Channels of adapter and prompts; half of them in its self-attention. Published: 256.
    heads : int
        Of the self-attention; see `uino_heads`.
    late : int
        Blocks of the mid and the deep stage that are correlated, the last ones of each.
    max_keys : int
        Positions of each shot, in each stage, with which the coarse maps compare a query.
    gain : float
        Log-odds at first for a difference of one between the cosines of both sides.
    decoder : str
        What the prompts go to: "default", inner products; or "sam", SAM's mask decoder, with a width of 256.
    """

    reader: str = "pool"
    contrast: bool = True
    width: int = 64
    heads: int = 4
    late: int = 4
    max_keys: int = 256
    gain: float = 20.0
    decoder: str = "default"


def uino_heads(width: int) -> int:
    """Heads of the adapter's self-attention: 8 with the published width of 256, 4 with 64."""
    return min(8, width // 16)


def early_stage(spec: BackboneSpec) -> int:
    """Index of the stage that the adapter reads."""
    return next(i for i, stride in enumerate(spec.strides) if stride >= EARLY_STRIDE)


def early_features(query: FeaturePyramid, stage: int) -> Float[Tensor, "b c h w"]:
    """What the adapter reads: the last block of a stage, on the grid of the mid stage."""
    early, grid = query.stages[stage][-1], _grid(query)
    is_finer = early.shape[-2] >= grid[0]
    return F.adaptive_avg_pool2d(early, grid) if is_finer else resize_like(early, query.coarse[1][0])


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalize maps."""
        normalized: Float[Tensor, "b c h w"] = super().forward(x.movedim(1, -1)).movedim(-1, 1)
        return normalized


class BottleneckAdapter(nn.Module):
    """Early features as an embedding that a prompted decoder reads.

    1x1 to ``width``, 3x3, 1x1 to half of it, two blocks of self-attention there, 1x1 to ``width``. With 768 channels
    and width 256 it has 1.25 million parameters, as published.
    """

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        inner = width // 2
        self.enter: nn.Sequential = nn.Sequential(
            ChannelNorm(channels),
            nn.Conv2d(channels, width, 1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            ChannelNorm(width),
            nn.GELU(),
            nn.Conv2d(width, inner, 1),
        )
        self.attention: nn.Sequential = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    inner, heads, 4 * inner, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(2)
            )
        )
        self.leave: nn.Conv2d = nn.Conv2d(inner, width, 1)

    def forward(self, early: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        """The embedding on the grid of ``early``."""
        x = self.enter(early)
        tokens = self.attention(x.flatten(2).transpose(1, 2))
        embedding: Float[Tensor, "b c2 h w"] = self.leave(tokens.transpose(1, 2).unflatten(2, x.shape[-2:]))
        return embedding


class SamPrompted(nn.Module):
    """SAM's mask decoder, prompted by a support; its mask moves the coarse maps too."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder: SamMaskDecoder = SamMaskDecoder()
        self.gain: nn.Parameter = nn.Parameter(torch.zeros(3))

    def forward(
        self,
        prompted: Float[Tensor, "bk c h w"],
        sparse: Float[Tensor, "k c"],
        grids: Sequence[Tensor],
        size: tuple[int, int],
    ) -> tuple[list[Float[Tensor, "b k _h _w"]], Float[Tensor, "b k 2 hq wq"]]:
        """What the mask adds to the log-odds of each stage, on its grid; and logits at a size."""
        classes = len(sparse)
        tokens = sparse.repeat(len(prompted) // classes, 1)[:, None]
        mask = self.decoder(prompted, tokens).reshape(-1, classes, 4 * prompted.shape[2], 4 * prompted.shape[3])
        added = [
            gain * F.adaptive_avg_pool2d(mask, (grid.shape[-2], grid.shape[-1]))
            for gain, grid in zip(self.gain, grids, strict=True)
        ]
        half = F.interpolate(mask, size, mode="bilinear", align_corners=False) / 2
        return added, torch.stack([-half, half], 2)


@dataclass(frozen=True, eq=False)
class StageShot:
    """The positions of one shot that a stage compares a query with, thinned out.

    Parameters
    ----------
    blocks : tuple of Tensor "s c"
        Unit tokens of every block of the stage.
    signs : Tensor "k s"
        As `Sides.signs` gives them, always with both sides.
    """

    blocks: tuple[Float[Tensor, "s _"], ...]
    signs: Float[Tensor, "k s"]


@dataclass(frozen=True, eq=False)
class UinoKeys(LearnedKeys):
    """A support set encoded for `UinoTeacher`.

    Parameters
    ----------
    weights : tuple of float
        Annotated share of each shot; they add up to one. Shots without annotations are left out.
    shots : tuple of Shot
    stages : tuple of tuples of StageShot
        For each shot the fine, mid and deep stage.
    inside, outside : tuple of Tensor "k c"
        Prototypes of every late block, of all shots together.
    sparse : Tensor "k c"
        The sparse prompt of each class.
    """

    weights: tuple[float, ...]
    shots: tuple[Shot, ...]
    stages: tuple[tuple[StageShot, ...], ...]
    inside: tuple[Float[Tensor, "k _"], ...]
    outside: tuple[Float[Tensor, "k _"], ...]
    sparse: Float[Tensor, "k c"]


class UinoTeacher(LearnedTeacher):
    """Signed correlations with the support, and prompts from them that move the coarse maps.

    The map of a block is sigmoid(gain (m_in - m_out) + offset + r), where m is the mean of the `STRONGEST` correlations
    with the class and with the rest. What the prompts add is r, one map a stage::

        early features -- adapter --+-- 3x3 -- ReLU -- (inner product) -- r
        late features -- reader ----'                         |
        mean of the class -- sparse prompt -- MLP ------------'

    SAM's mask decoder may take the place of the 3x3, the inner product and the MLP. Then r is a learned factor times
    its mask, and the mask gives the teacher's logits. The student keeps the decoder that it has.

    Before any training r is zero, whatever the reader is, and the dense prompt is zero too. Shots are read one at a
    time and averaged, weighted by their annotated pixels, so the memory for this does not grow with their number.
    The correlation is computed once for all classes, which differ in signs only.

    Parameters
    ----------
    spec : BackboneSpec
    decoder : Decoder
        Usually shared with the student.
    settings : UinoSettings
    """

    local = False  # the adapter attends to the whole tile

    def __init__(self, spec: BackboneSpec, decoder: Decoder, settings: UinoSettings) -> None:
        super().__init__(decoder)
        self.settings: UinoSettings = settings
        channels, blocks = spec.coarse_channels, spec.coarse_blocks
        self.early: int = early_stage(spec)
        self.late: tuple[int, ...] = tuple(min(settings.late, n) for n in blocks[1:])
        width, late = settings.width, sum(self.late)
        self.adapter: BottleneckAdapter = BottleneckAdapter(spec.channels[self.early], width, settings.heads)
        self.reader: Reader = READERS[settings.reader](late)
        self.dense: nn.Linear = nn.Linear(self.reader.numbers + late, width)
        self.sparse: nn.Sequential = nn.Sequential(nn.LayerNorm(sum(channels[1:])), nn.Linear(sum(channels[1:]), width))
        self.evidence: Evidence = Evidence(blocks, settings.gain)
        self.join: nn.Conv2d | None = None
        self.sam: SamPrompted | None = None
        if settings.decoder == "sam":
            self.sam = SamPrompted()
        else:
            self.join = nn.Conv2d(width, width, 3, padding=1)
            self.masks: nn.Sequential = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3 * width))
        for last in (self.dense, *(self.masks[-1:] if self.join is not None else ())):
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @property
    def own_modules(self) -> Sequence[nn.Module]:
        """Adapter, prompts, and what makes maps of them."""
        decoder = [self.join, self.masks] if self.join is not None else [self.sam]
        return (self.adapter, *self.prompt_modules, *(m for m in decoder if m is not None), self.evidence)

    @property
    def prompt_modules(self) -> Sequence[nn.Module]:
        """The reader with its projection, and the sparse prompt."""
        return (self.reader, self.dense, self.sparse)

    @property
    def max_keys(self) -> int | None:
        """That of the settings; it counts for each shot."""
        return self.settings.max_keys

    def encode(self, support: EncodedSupport, *, max_keys: int | None = None, offset: float = 0.0) -> UinoKeys:
        """Unit tokens and signs of each shot, and prototypes of all shots together."""
        check_annotated(support)
        support = support[torch.nonzero((support.valid > 0).flatten(1).any(1)).flatten()]
        annotated = support.valid.float().mean((1, 2))
        grid = _grid(support.features)
        sides = Sides.of(support, grid)
        signs, late = sides.signs(contrast=self.settings.contrast), self._late_tokens(support.features)
        shots = tuple(
            Shot(
                tuple(block[n] for block in late),
                signs[n],
                sides.inside[n].T,
                sides.share[n],
                grid,
                self.settings.contrast,
            )
            for n in range(len(signs))
        )
        inside, outside = (pooled_tokens(late, part * sides.share[:, None]) for part in (sides.inside, sides.outside))
        token = torch.cat([inside[self.late[0] - 1], inside[-1]], 1)
        stages = [self._stage_shots(blocks, support, max_keys, offset) for blocks in support.features.coarse]
        return UinoKeys(
            present_classes(support),
            tuple((annotated / annotated.sum()).tolist()),
            shots,
            tuple(zip(*stages, strict=True)),
            inside,
            outside,
            self.sparse(token),
        )

    def _stage_shots(
        self, blocks: tuple[Tensor, ...], support: EncodedSupport, max_keys: int | None, offset: float
    ) -> list[StageShot]:
        sides = Sides.of(support, blocks[0].shape[-2:])
        signs, tokens = sides.signs(contrast=True), [unit_tokens(block) for block in blocks]
        budget = min(max_keys or self.settings.max_keys, self.settings.max_keys)
        shots = []
        for n, share in enumerate(sides.share):
            index, _ = weigh_keys(sides.inside[n].T, share, shots=1, balance=0.0, max_keys=budget, offset=offset)
            shots.append(StageShot(tuple(block[n, index] for block in tokens), signs[n][:, index]))
        return shots

    def _late_tokens(self, features: FeaturePyramid) -> tuple[Float[Tensor, "b q _"], ...]:
        """Unit tokens of the last blocks of mid and deep stage, all on the grid of the mid stage."""
        _, mid, deep = features.coarse
        chosen = (*mid[-self.late[0] :], *deep[-self.late[1] :])
        return tuple(unit_tokens(resize_like(block, mid[0])) for block in chosen)

    def coarse(self, query: FeaturePyramid, keys: LearnedKeys) -> CoarseMaps:
        """Coarse maps of a batch of queries against one support; every value lies in [0, 1]."""
        return self.outputs(query, keys)[0]

    def outputs(self, query: FeaturePyramid, keys: LearnedKeys) -> tuple[CoarseMaps, Float[Tensor, "b k 2 h w"] | None]:
        """Coarse maps, and the logits of SAM's mask decoder where the teacher has it."""
        assert isinstance(keys, UinoKeys)
        added, logits = self._prompted(query, keys)
        maps = []
        for stage, (blocks, difference) in enumerate(zip(query.coarse, _differences(query, keys), strict=True)):
            odds = self.evidence(stage, difference).unflatten(-1, blocks[0].shape[-2:])
            maps.append(torch.sigmoid(odds + added[stage][:, :, None]))
        return CoarseMaps(*maps), logits

    def _prompted(
        self, query: FeaturePyramid, keys: UinoKeys
    ) -> tuple[list[Float[Tensor, "b k _h _w"]], Float[Tensor, "b k 2 h w"] | None]:
        """What the prompts add to the log-odds of each stage, on its grid; and logits at the size of the query."""
        prompted = (self.embedding(query)[:, None] + self.dense_prompt(query, keys)).flatten(0, 1)
        grids = [blocks[0] for blocks in query.coarse]
        if self.sam is not None:
            moved, logits = self.sam(prompted, keys.sparse, grids, query.size)
            return moved, logits
        assert self.join is not None
        pixels = torch.relu(self.join(prompted))
        tokens = self.masks(keys.sparse).unflatten(-1, (3, -1))  # k 3 c
        split = pixels.unflatten(0, (query.batch, -1))
        added = torch.einsum("bkchw,kmc->bkmhw", split, tokens.to(split.dtype))
        return [resize_like(added[:, :, stage], grid) for stage, grid in enumerate(grids)], None

    def embedding(self, query: FeaturePyramid) -> Float[Tensor, "b c h w"]:
        """Adapted early features on the grid of the mid stage."""
        result: Float[Tensor, "b c h w"] = self.adapter(early_features(query, self.early))
        return result

    def dense_prompt(self, query: FeaturePyramid, keys: UinoKeys) -> Float[Tensor, "b k c h w"]:
        """What the reader and the prototypes give for each class, on the grid of the mid stage."""
        queries = Queries(self._late_tokens(query), _grid(query))
        read = [w * self.reader(queries, shot) for w, shot in zip(keys.weights, keys.shots, strict=True)]
        prior = prototype_contrast(queries, keys.inside, keys.outside)
        numbers = torch.cat([torch.stack(read).sum(0), prior.to(read[0].dtype)], 2)  # b k f q
        prompt: Float[Tensor, "b k c h w"] = (
            self.dense(numbers.transpose(2, 3)).transpose(2, 3).unflatten(3, queries.grid)
        )
        return prompt


def _grid(features: FeaturePyramid) -> tuple[int, int]:
    """Height and width of the mid stage."""
    height, width = features.coarse[1][0].shape[-2:]
    return height, width


def _differences(query: FeaturePyramid, keys: UinoKeys) -> list[Float[Tensor, "b k n q"]]:
    """For each coarse stage and block: strongest correlations with the class, less those with the rest.

    Each side is averaged over the shots that have it.
    """
    differences = []
    for stage, blocks in enumerate(query.coarse):
        shots, signs = [shot[stage] for shot in keys.stages], [shot[stage].signs for shot in keys.stages]
        shares = [_shares_of_sides(side, keys.weights) for side in (signs, [-s for s in signs])]
        per_block = []
        for n, block in enumerate(blocks):
            tokens = unit_tokens(block)
            sums: list[Tensor] = []
            for number, shot in enumerate(shots):
                correlation = torch.relu(tokens @ shot.blocks[n].T.to(tokens.dtype))  # b q s
                rows = [
                    sign * share[number, k] * strongest(correlation, (sign * shot.signs[k]).clamp_min(0), STRONGEST)[0]
                    for k in range(len(shot.signs))
                    for sign, share in zip((1, -1), shares, strict=True)
                ]
                difference = torch.stack(rows, 1).unflatten(1, (-1, 2)).sum(2)  # b k q
                sums = [difference if not sums else sums[0] + difference]
            per_block.append(sums[0])
        differences.append(torch.stack(per_block, 2))
    return differences


def _shares_of_sides(signs: list[Float[Tensor, "k _"]], weights: tuple[float, ...]) -> Float[Tensor, "n k"]:
    """Weights of the shots for one side of each class: those that have cells there share it."""
    held = torch.stack([(s > 0).any(1) for s in signs]) * torch.tensor(weights, device=signs[0].device)[:, None]
    return held / held.sum(0).clamp_min(1e-6)
