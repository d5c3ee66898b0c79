"""DCAMA [1]_, the teacher of DistillFSS [2]_: dense cross-attention between query and support.

The masks of the support are the values of the attention.

References
----------
.. [1] Shi, Wei, Zhang, Lu, Ning, Chen, Ma, Zheng, "Dense Cross-Query-and-Support Attention Weighted Mask
   Aggregation for Few-Shot Segmentation", ECCV 2022.
.. [2] De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano, "DistillFSS: Synthesizing Few-Shot Knowledge into a
   Lightweight Segmentation Model", arXiv:2512.05613, 2025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from distillfss_core.nn.decoder import Decoder
from distillfss_core.nn.features import CoarseMaps, EncodedSupport, FeaturePyramid, Prediction
from distillfss_core.nn.teachers.protocol import (
    LearnedKeys,
    LearnedTeacher,
    SupportKeys,
    check_annotated,
    hide_absent,
    present_classes,
)


@dataclass(frozen=True)
class DcamaSettings:
    """Settings of the attention.

    `PUBLISHED` is the published configuration.

    Parameters
    ----------
    heads : int
        Attention heads H; a stage's channels must be a multiple of it.
    normalize : bool
        LayerNorm (without parameters) of every token before the projections.
    identity : float or None
        W_q and W_k start as this multiple of the identity, so that attention compares features before any
        training; None keeps PyTorch's random start.
    position : bool
        Sinusoidal encoding of the flattened token index, restarted for every shot.
    dropout : float
        Dropout of the encoded tokens in training.
    balance : float
        How far a key's weight is divided by the number of keys of its class, 0 (published: every key counts
        the same, so a rare object weighs little) to 1 (object and background weigh the same).
    max_keys : int or None
        At most so many keys a stage; more are thinned out evenly, object and background apart, and the kept
        ones weigh as much more. None keeps all.
    area : bool
        The mask value of a key is the mean over the annotated pixels of its cell, and a cell counts with the
        share of it that is annotated (thin scribbles stay keys); False resizes the mask bilinearly with
        align_corners and drops cells that are mostly unannotated, as published.

    Notes
    -----
    Signed values (+1 object, -1 background), the contrastive enhancement of UINO-FSS [1]_, are not an option of their
    own. Rows of the attention add up to one, so they give 2 m - 1, and the default decoder reads m minus 1/2.

    References
    ----------
    .. [1] Zhuo, Tang, Xue, Ding, Ji, Shen, "UINO-FSS: Unifying Representation Learning and Few-shot Segmentation via
       Hierarchical Distillation and Mamba-HyperCorrelation", arXiv:2504.15669, 2025.
    """

    heads: int = 4
    normalize: bool = True
    identity: float | None = 1.6
    position: bool = False
    dropout: float = 0.0
    balance: float = 1.0
    max_keys: int | None = 1024
    area: bool = True


PUBLISHED = DcamaSettings(
    heads=8, normalize=False, identity=None, position=True, dropout=0.5, balance=0.0, max_keys=None, area=False
)


SMALL = 1 << 21
"""Elements of an attention matrix (all queries and heads) up to which a CPU may build it."""
SMALL_WITH_GRADIENTS = 1 << 23
"""The same where gradients are wanted."""
SMALL_ON_GPU = 1 << 27
"""The same on a GPU, where gradients must be reproducible: those of its fused kernels are not."""


def attend(
    q: Float[Tensor, "b heads lq c"],
    k: Float[Tensor, "heads lk c"],
    values: Float[Tensor, "lk columns"],
    bias: Float[Tensor, " lk"] | None = None,
) -> Float[Tensor, "b lq columns"]:
    """Attention-weighted mean of ``values``, averaged over heads: mean_h softmax(q k^T / sqrt(c) + bias) values.

    All columns share one attention. PyTorch's fused kernel never builds the lq x lk matrix, on the CPU only if values
    are as wide as keys: the narrower of the two is padded with zeros, which changes nothing. Small problems on the CPU
    build the matrix: forward and backward then take 0.5 to 0.7 of the time. A GPU builds it where gradients are wanted
    and deterministic algorithms are required.

    Parameters
    ----------
    bias : tensor, optional
        Added to the scores of a key; -inf hides it. At least one key of every row must be visible.
    """
    (b, heads, length, channels), columns = q.shape, values.shape[-1]
    if q.shape[:3].numel() * len(values) <= _buildable(q):
        shift = q.new_zeros(()) if bias is None else bias - bias.max()
        flat, turned = q.transpose(0, 1).flatten(1, 2), k.transpose(1, 2).to(q.dtype)
        scores = torch.baddbmm(shift.expand(1, 1, k.shape[1]).to(q), flat, turned, alpha=1 / math.sqrt(channels))
        attended: Tensor = (scores.softmax(-1) @ values.to(q.dtype)).mean(0)
        rows: Tensor = attended.unflatten(0, (b, length))
        return rows
    width = max(channels, columns)
    if q.is_cuda:
        width += -width % 8  # as its fused kernels want it
    v = F.pad(values, (0, width - columns)).expand(b, heads, -1, -1).to(q.dtype)
    q, k = F.pad(q, (0, width - channels)), F.pad(k, (0, width - channels)).expand(b, -1, -1, -1).to(q.dtype)
    mask = None if bias is None else (bias - bias.max()).expand(b, heads, q.shape[2], -1).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0 / math.sqrt(channels))
    return out[..., :columns].mean(1)


def _buildable(q: Tensor) -> int:
    """Elements of an attention matrix up to which it is built."""
    if q.device.type == "cpu":
        return SMALL_WITH_GRADIENTS if torch.is_grad_enabled() else SMALL
    return SMALL_ON_GPU if torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled() else 0


def position_encoding(length: int, channels: int, like: Tensor) -> Float[Tensor, "length channels"]:
    """Encode positions by sines on even and cosines on odd channels, base 10000 [1]_ (section 3.5).

    References
    ----------
    .. [1] Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin, "Attention Is All You Need",
       NeurIPS 2017.
    """
    position = torch.arange(length, dtype=torch.float32, device=like.device)[:, None]
    even = torch.arange(0, channels, 2, dtype=torch.float32, device=like.device)
    rate = torch.exp(even * (-math.log(10000.0) / channels))
    code = torch.zeros(length, channels, device=like.device)
    code[:, 0::2] = torch.sin(position * rate)
    code[:, 1::2] = torch.cos(position * rate[: channels // 2])
    return code.to(like)


class CrossAttention(nn.Module):
    """W_q and W_k of one stage; there is no value and no output projection."""

    def __init__(self, channels: int, settings: DcamaSettings) -> None:
        super().__init__()
        if channels % settings.heads:
            raise ValueError(f"{channels} channels do not split into {settings.heads} heads")
        self.settings: DcamaSettings = settings
        self.linears: nn.ModuleList = nn.ModuleList([nn.Linear(channels, channels), nn.Linear(channels, channels)])
        self.dropout: nn.Dropout = nn.Dropout(settings.dropout)
        if settings.identity is not None:
            for linear in self.linears:
                assert isinstance(linear, nn.Linear)
                nn.init.eye_(linear.weight)
                with torch.no_grad():
                    linear.weight.mul_(settings.identity)
                nn.init.zeros_(linear.bias)

    def tokens(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l c"]:
        """One token for each position in raster order, normalized and with positions as the settings demand."""
        tokens = features.flatten(2).transpose(1, 2)
        if self.settings.normalize:
            tokens = F.layer_norm(tokens, tokens.shape[-1:])
        if self.settings.position:
            tokens = tokens + position_encoding(tokens.shape[1], tokens.shape[2], tokens)
        result: Float[Tensor, "b l c"] = self.dropout(tokens)
        return result

    def queries(self, tokens: Float[Tensor, "b l c"]) -> Float[Tensor, "b heads l d"]:
        """Project tokens of the query by W_q and split them into heads."""
        return self._split(self.linears[0](tokens))

    def keys(self, tokens: Float[Tensor, "b l c"]) -> Float[Tensor, "b heads l d"]:
        """Project tokens of the support by W_k and split them into heads."""
        return self._split(self.linears[1](tokens))

    def _split(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b heads l d"]:
        result: Float[Tensor, "b heads l d"] = x.unflatten(-1, (self.settings.heads, -1)).transpose(1, 2)
        return result


@dataclass(frozen=True, eq=False)
class StageKeys:
    """Keys of every block of a stage, with the mask values and weights of the keys.

    ``keys`` holds one tensor "heads l d" a block; ``values`` "l k" the masks at the keys; ``bias`` "l" the
    logarithm of their weights.
    """

    keys: tuple[Float[Tensor, "heads l d"], ...]
    values: Float[Tensor, "l k"]
    bias: Float[Tensor, " l"] | None


@dataclass(frozen=True, eq=False)
class DcamaKeys(LearnedKeys):
    """A support set encoded for `DcamaTeacher`, for use with many queries."""

    stages: tuple[StageKeys, ...]
    features: FeaturePyramid | None


class DcamaTeacher(LearnedTeacher):
    """Dense cross-attention over three coarse stages, and a decoder.

    Parameters
    ----------
    channels : (int, int, int)
        Channels of the fine, mid and deep stage.
    decoder : Decoder
        Usually shared with the student.
    settings : DcamaSettings
    """

    def __init__(self, channels: tuple[int, int, int], decoder: Decoder, settings: DcamaSettings) -> None:
        super().__init__(decoder)
        self.settings: DcamaSettings = settings
        self.DCAMA_blocks: nn.ModuleList = nn.ModuleList(CrossAttention(c, settings) for c in channels)  # one a stage

    @property
    def local(self) -> bool:
        """Whether tiles agree; positions and the published decoder depend on the whole tile."""
        return self.decoder.local and not self.settings.position

    @property
    def own_modules(self) -> Sequence[nn.Module]:
        """The attention."""
        return (self.DCAMA_blocks,)

    @property
    def max_keys(self) -> int | None:
        """That of the settings."""
        return self.settings.max_keys

    def encode(self, support: EncodedSupport, *, max_keys: int | None = None, offset: float = 0.0) -> DcamaKeys:
        """Project the support's tokens and keep them with their mask values.

        IGNORE pixels are no keys. A class without an example in this support is marked absent. Parameters and errors
        are those of `LearnedTeacher.encode`.
        """
        check_annotated(support)
        budget = max_keys or self.settings.max_keys
        stages = tuple(
            self._encode_stage(attention, blocks, support, budget, offset)
            for attention, blocks in zip(self.DCAMA_blocks, support.features.coarse, strict=True)
        )
        features = support.features if self.decoder.support_skip else None
        return DcamaKeys(present_classes(support), stages, features)

    def _encode_stage(
        self,
        attention: nn.Module,
        blocks: tuple[Tensor, ...],
        support: EncodedSupport,
        max_keys: int | None,
        offset: float,
    ) -> StageKeys:
        assert isinstance(attention, CrossAttention)
        values, weights = mask_tokens(support, blocks[0].shape[-2:], area=self.settings.area)
        shots, balance = support.features.batch, self.settings.balance
        index, bias = weigh_keys(values, weights, shots=shots, balance=balance, max_keys=max_keys, offset=offset)
        keys = []
        for block in blocks:
            tokens = attention.tokens(block).flatten(0, 1)[index]  # (n l) c, thinned out
            keys.append(attention.keys(tokens[None])[0])
        return StageKeys(tuple(keys), values[index], bias)

    def coarse(self, query: FeaturePyramid, keys: LearnedKeys) -> CoarseMaps:
        """Coarse maps of a batch of queries against one support; every value lies in [0, 1]."""
        assert isinstance(keys, DcamaKeys)
        maps = []
        for attention, blocks, stage in zip(self.DCAMA_blocks, query.coarse, keys.stages, strict=True):
            assert isinstance(attention, CrossAttention)
            coarse_maps = []
            for block, k in zip(blocks, stage.keys, strict=True):
                q = attention.queries(attention.tokens(block))  # b heads l d
                m = attend(q, k, stage.values, stage.bias)  # b l k
                m = against_the_rest(m) if self.settings.balance else m
                coarse_maps.append(m.transpose(1, 2).unflatten(2, block.shape[-2:]))
            maps.append(torch.stack(coarse_maps, 2))  # b k n h w
        return CoarseMaps(*maps)

    def forward(self, query: FeaturePyramid, keys: SupportKeys) -> Prediction:
        """Coarse maps and logits; the foreground of an absent class is -inf."""
        assert isinstance(keys, DcamaKeys)
        coarse = self.coarse(query, keys)
        logits = self.decoder(coarse, query, keys.features)
        return Prediction(coarse, hide_absent(logits, keys.present))


def against_the_rest(m: Float[Tensor, "b l k"]) -> Float[Tensor, "b l k"]:
    """Maps of balanced keys, as if a class and all others together weighed the same.

    Balanced keys give background and K classes the same weight, so a class has 1 to K against all others. Weighed 1 to
    1 instead, an undecided query gets 1/2 whatever K is, as the decoder expects.
    """
    k = m.shape[-1]
    return k * m / (1 + (k - 1) * m) if k > 1 else m


def mask_tokens(
    support: EncodedSupport, size: Sequence[int], *, area: bool
) -> tuple[Float[Tensor, "l k"], Float[Tensor, " l"]]:
    """Mask value and weight (0: not annotated) of every support token, shots concatenated."""
    masks, valid, grid = support.masks.float(), support.valid.float()[:, None], (size[0], size[1])
    if area:
        share = F.adaptive_avg_pool2d(valid, grid)
        values = F.adaptive_avg_pool2d(masks * valid, grid) / share.clamp_min(1e-6)
    else:
        share = (F.interpolate(valid, grid, mode="bilinear", align_corners=True) > 0.5).float()
        values = F.interpolate(masks, grid, mode="bilinear", align_corners=True)
        if not bool(share.any()):  # thin scribbles only: better a doubtful key than none
            share = F.adaptive_max_pool2d(valid, grid)
    return values.flatten(2).transpose(1, 2).flatten(0, 1), share.flatten()


def class_shares(values: Float[Tensor, "l k"]) -> Float[Tensor, "l k1"]:
    """Mask values with what is left for the background before them."""
    return torch.cat([(1 - values.sum(1, keepdim=True)).clamp_min(0), values], 1)


def weigh_keys(
    values: Float[Tensor, "l k"],
    weights: Float[Tensor, " l"],
    *,
    shots: int,
    balance: float,
    max_keys: int | None,
    offset: float = 0.0,
) -> tuple[Int[Tensor, " kept"], Float[Tensor, " kept"] | None]:
    """Choose the keys of a stage and the logarithm of their weights (None: all weigh the same).

    Keys are thinned out evenly in raster order, each class and each shot apart, so that the order of shots does not
    matter; every class keeps its total weight.

    Parameters
    ----------
    shots : int
        The l tokens are those of so many shots, one after another.
    offset : float
        0..1, where the even spacing begins.
    """
    shares = class_shares(values)
    visible = weights > 0
    plain = balance == 0 and bool((weights[visible] == 1).all())
    if balance:
        totals = (shares * weights[:, None]).sum(0).clamp_min(1e-6)
        weights = weights * (shares / totals**balance).sum(1)
    kept = visible
    if max_keys is not None and int(visible.sum()) > max_keys:
        plain = False
        groups = F.one_hot(shares.argmax(1), shares.shape[1]) * visible[:, None]  # l k+1
        counts = groups.sum(0)
        rate = _quotas(counts.tolist(), max_keys).to(values) / counts.clamp_min(1)
        rank = groups.unflatten(0, (shots, -1)).cumsum(1).flatten(0, 1)
        kept = ((torch.floor(rank * rate + offset) > torch.floor((rank - 1) * rate + offset)) & (groups > 0)).any(1)
        lost = (groups * kept[:, None]).sum(0) == 0  # a class so thinly spread keeps its first token of every shot
        kept = kept | ((groups > 0) & (rank == 1) & lost).any(1)
        before, after = (groups * weights[:, None]).sum(0), (groups * (weights * kept)[:, None]).sum(0)
        weights = weights * (groups * (before / after.clamp_min(1e-12))).sum(1)
    index = torch.nonzero(kept).flatten()
    return index, None if plain else weights[index].clamp_min(1e-12).log()


def _quotas(counts: list[int], budget: int) -> Float[Tensor, " groups"]:
    """Share a budget among groups evenly; what a small group does not need goes to the larger ones."""
    quotas = [0] * len(counts)
    for left, group in zip(range(len(counts), 0, -1), sorted(range(len(counts)), key=lambda g: counts[g]), strict=True):
        quotas[group] = min(counts[group], budget // left)
        budget -= quotas[group]
    return torch.tensor(quotas, dtype=torch.float32)
