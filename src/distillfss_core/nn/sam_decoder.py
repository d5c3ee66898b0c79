"""SAM's mask decoder [1]_ for prompts that are computed from a support, with the names of the published checkpoints.

References
----------
.. [1] Kirillov et al., "Segment Anything", ICCV 2023, arXiv:2304.02643.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.errors import ModelFileError
from distillfss_core.nn.sam import DECODER, ENCODER, PROMPTS, WIDTH, open_sam
from distillfss_core.nn.tensor_files import match_tensors

HEADS = 8
_HIDDEN = 2048
_NAMES = {
    "positions": f"{PROMPTS}pe_layer.positional_encoding_gaussian_matrix",
    "no_mask.weight": f"{PROMPTS}no_mask_embed.weight",
}
_UNUSED = (
    ENCODER,
    *(f"{PROMPTS}{part}." for part in ("point_embeddings", "not_a_point_embed", "mask_downscaling")),
    *(f"{DECODER}output_hypernetworks_mlps.{number}." for number in (1, 2, 3)),  # of masks that SAM chooses from
    f"{DECODER}iou_prediction_head.",
)


class Attention(nn.Module):
    """Attention between tokens, at a width of its own."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.q_proj: nn.Linear = nn.Linear(WIDTH, inner)
        self.k_proj: nn.Linear = nn.Linear(WIDTH, inner)
        self.v_proj: nn.Linear = nn.Linear(WIDTH, inner)
        self.out_proj: nn.Linear = nn.Linear(inner, WIDTH)

    def forward(
        self, q: Float[Tensor, "b n c"], k: Float[Tensor, "b m c"], v: Float[Tensor, "b m c"]
    ) -> Float[Tensor, "b n c"]:
        """What each of n tokens finds in m others."""
        parts = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        found: Float[Tensor, "b n c"] = self.out_proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return found


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves and to the pixels, then pixels to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn: Attention = Attention(WIDTH)
        self.cross_attn_token_to_image: Attention = Attention(WIDTH // 2)
        self.cross_attn_image_to_token: Attention = Attention(WIDTH // 2)
        self.mlp: nn.ModuleDict = nn.ModuleDict({"lin1": nn.Linear(WIDTH, _HIDDEN), "lin2": nn.Linear(_HIDDEN, WIDTH)})
        self.norm1: nn.LayerNorm = nn.LayerNorm(WIDTH)
        self.norm2: nn.LayerNorm = nn.LayerNorm(WIDTH)
        self.norm3: nn.LayerNorm = nn.LayerNorm(WIDTH)
        self.norm4: nn.LayerNorm = nn.LayerNorm(WIDTH)

    def forward(
        self,
        tokens: Float[Tensor, "b n c"],
        pixels: Float[Tensor, "b p c"],
        prompts: Float[Tensor, "b n c"],
        places: Float[Tensor, "p c"],
        *,
        is_first: bool,
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b p c"]]:
        """Tokens and pixels after the block; ``prompts`` and ``places`` are added to queries and keys."""
        if is_first:
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens))
        else:
            asked = tokens + prompts
            tokens = self.norm1(tokens + self.self_attn(asked, asked, tokens))
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + prompts, pixels + places, pixels))
        tokens = self.norm3(tokens + self.mlp["lin2"](F.relu(self.mlp["lin1"](tokens))))
        pixels = self.norm4(pixels + self.cross_attn_image_to_token(pixels + places, tokens + prompts, tokens))
        return tokens, pixels


class Transformer(nn.Module):
    """Two blocks, and a last look of the tokens at the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(TwoWayBlock() for _ in range(2))
        self.final_attn_token_to_image: Attention = Attention(WIDTH // 2)
        self.norm_final_attn: nn.LayerNorm = nn.LayerNorm(WIDTH)

    def forward(
        self, pixels: Float[Tensor, "b p c"], places: Float[Tensor, "p c"], prompts: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b p c"]]:
        """Tokens and pixels after the last block."""
        tokens = prompts
        for number, layer in enumerate(self.layers):
            tokens, pixels = layer(tokens, pixels, prompts, places, is_first=number == 0)
        last = self.final_attn_token_to_image(tokens + prompts, pixels + places, pixels)
        return self.norm_final_attn(tokens + last), pixels


class SamMaskDecoder(nn.Module):
    """A mask from SAM's embedding, a dense and a sparse prompt: SAM's decoder as for one mask of one prompt.

    Parts of the published decoder that this mask does not depend on are left out: the heads of its three other masks,
    and its estimate of the IoU.
    """

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import LayerNorm2d

        quarter, eighth = WIDTH // 4, WIDTH // 8
        self.iou_token: nn.Embedding = nn.Embedding(1, WIDTH)
        self.mask_tokens: nn.Embedding = nn.Embedding(4, WIDTH)
        self.no_mask: nn.Embedding = nn.Embedding(1, WIDTH)
        self.transformer: Transformer = Transformer()
        self.output_upscaling: nn.Sequential = nn.Sequential(
            nn.ConvTranspose2d(WIDTH, quarter, 2, stride=2),
            LayerNorm2d(quarter),
            nn.GELU(),
            nn.ConvTranspose2d(quarter, eighth, 2, stride=2),
            nn.GELU(),
        )
        layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, eighth)])
        self.output_hypernetworks_mlps: nn.ModuleList = nn.ModuleList([nn.ModuleDict({"layers": layers})])
        self.register_buffer("positions", torch.randn(2, WIDTH // 2))

    def forward(
        self, embedding: Float[Tensor, "b 256 h w"], sparse: Float[Tensor, "b n 256"]
    ) -> Float[Tensor, "b 1 4*h 4*w"]:
        """Logits of the mask; the dense prompt is part of ``embedding``."""
        grid = embedding.shape[-2:]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(len(sparse), -1, -1)
        pixels = (embedding + self.no_mask.weight[0, :, None, None]).flatten(2).transpose(1, 2)
        tokens, pixels = self.transformer(pixels, self.places(grid[0], grid[1]), torch.cat([own, sparse], 1))
        fine = self.output_upscaling(pixels.transpose(1, 2).unflatten(2, grid))
        token = tokens[:, 1]
        first, second, last = self.output_hypernetworks_mlps[0]["layers"]  # type: ignore[index]
        token = last(F.relu(second(F.relu(first(token)))))
        return torch.einsum("bc,bchw->bhw", token, fine)[:, None]

    def places(self, height: int, width: int) -> Float[Tensor, "p 256"]:
        """Sines and cosines of random projections of the centers of all cells."""
        y, x = ((torch.arange(n, device=self.positions.device) + 0.5) / n for n in (height, width))
        cells = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)
        phases = 2 * math.pi * ((2 * cells - 1) @ self.positions.float())
        return torch.cat([phases.sin(), phases.cos()], -1).flatten(0, 1)


def load_sam_decoder(path: str | Path, decoder: SamMaskDecoder) -> None:
    """Start a decoder from a checkpoint of SAM or MobileSAM, as `read_sam` takes it.

    Raises
    ------
    WeightsUnavailableError
        If there is no such file; it tells where the published ones are.
    ModelFileError
        If the file is damaged, of another kind, or a tensor does not fit; one line with the name of the first one.
    """
    tensors = {key: value for key, value in open_sam(path).items() if not key.startswith(_UNUSED)}
    if not tensors:
        raise ModelFileError(f"{path}: holds no mask decoder; give a whole checkpoint of SAM or MobileSAM")
    wanted = decoder.state_dict()
    names = {name: _NAMES.get(name, f"{DECODER}{name}") for name in wanted}
    decoder.load_state_dict(match_tensors(tensors, names, wanted, "", str(path)))
