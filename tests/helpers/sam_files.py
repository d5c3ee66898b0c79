"""Checkpoints of SAM and MobileSAM with random values: published names and shapes, and what their encoders compute.

The networks are written anew, from the published names and shapes, and take nothing from timm.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def filled(shapes: Shapes, seed: int = 0) -> Tensors:
    """Random values: variances are positive, and normalization layers are near the identity."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        fan = max(1, value[0].numel()) if value.ndim else 1
        tensors[name] = 0.1 * value if value.ndim < 2 else value / fan**0.5
        if name.endswith("running_var"):
            tensors[name] = 0.5 + value.abs()
        elif name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(7)
        elif value.ndim == 1 and name.endswith("weight"):
            tensors[name] = 1 + 0.1 * value
    return tensors


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def neck(width: int) -> Shapes:
    name = "image_encoder.neck"
    kernels: Shapes = {f"{name}.0.weight": (256, width, 1, 1), f"{name}.2.weight": (256, 256, 3, 3)}
    return kernels | norm(f"{name}.1", 256) | norm(f"{name}.3", 256)


def vit_shapes(
    width: int, depth: int, heads: int, global_blocks: tuple[int, ...], *, grid: int = 64, window: int = 14
) -> Shapes:
    """The image encoder of segment-anything."""
    name = "image_encoder"
    shapes: Shapes = {
        f"{name}.pos_embed": (1, grid, grid, width),
        f"{name}.patch_embed.proj.weight": (width, 3, 16, 16),
        f"{name}.patch_embed.proj.bias": (width,),
    }
    for number in range(depth):
        block, side = f"{name}.blocks.{number}", grid if number in global_blocks else window
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        shapes |= {f"{block}.attn.rel_pos_{axis}": (2 * side - 1, width // heads) for axis in "hw"}
        shapes |= linear(f"{block}.attn.qkv", width, 3 * width) | linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.lin1", width, 4 * width) | linear(f"{block}.mlp.lin2", 4 * width, width)
    return shapes | neck(width)


SMALL_VIT = vit_shapes(32, 3, 2, (1,), grid=5, window=3)
"""A SAM for images of 80 pixels: two windowed blocks around a global one."""

MOBILE_WIDTHS, MOBILE_DEPTHS, MOBILE_HEADS, MOBILE_WINDOWS = (
    (64, 128, 160, 320),
    (2, 2, 6, 2),
    (0, 4, 5, 10),
    (0, 7, 14, 7),
)


def conv_norm(name: str, inputs: int, outputs: int, kernel: int) -> Shapes:
    own = norm(f"{name}.bn", outputs) | {f"{name}.bn.running_{what}": (outputs,) for what in ("mean", "var")}
    return own | {f"{name}.c.weight": (outputs, inputs, kernel, kernel), f"{name}.bn.num_batches_tracked": ()}


def mobile_shapes() -> Shapes:
    """The image encoder of MobileSAM, with the classifier that its file holds too."""
    name = "image_encoder"
    shapes = conv_norm(f"{name}.patch_embed.seq.0", 3, 32, 3) | conv_norm(f"{name}.patch_embed.seq.2", 32, 64, 3)
    for layer, (width, depth) in enumerate(zip(MOBILE_WIDTHS, MOBILE_DEPTHS, strict=True)):
        for number in range(depth):
            block = f"{name}.layers.{layer}.blocks.{number}"
            if layer == 0:
                shapes |= conv_norm(f"{block}.conv1", width, 4 * width, 1)
                shapes |= conv_norm(f"{block}.conv2", 1, 4 * width, 3) | conv_norm(
                    f"{block}.conv3", 4 * width, width, 1
                )
                continue
            shapes |= norm(f"{block}.attn.norm", width) | linear(f"{block}.attn.qkv", width, 3 * width)
            shapes |= linear(f"{block}.attn.proj", width, width) | norm(f"{block}.mlp.norm", width)
            shapes |= linear(f"{block}.mlp.fc1", width, 4 * width) | linear(f"{block}.mlp.fc2", 4 * width, width)
            shapes |= {f"{block}.attn.attention_biases": (MOBILE_HEADS[layer], MOBILE_WINDOWS[layer] ** 2)}
            shapes |= conv_norm(f"{block}.local_conv", 1, width, 3)
        if layer < 3:
            down, wider = f"{name}.layers.{layer}.downsample", MOBILE_WIDTHS[layer + 1]
            shapes |= conv_norm(f"{down}.conv1", width, wider, 1) | conv_norm(f"{down}.conv2", 1, wider, 3)
            shapes |= conv_norm(f"{down}.conv3", wider, wider, 1)
    return shapes | neck(320) | norm(f"{name}.norm_head", 320) | linear(f"{name}.head", 320, 1000)


def decoder_shapes() -> Shapes:
    """Prompt encoder and mask decoder, which are the same in all of them."""
    name, shapes = (
        "mask_decoder",
        {"mask_decoder.iou_token.weight": (1, 256), "mask_decoder.mask_tokens.weight": (4, 256)},
    )

    def attention(block: str, inner: int) -> Shapes:
        inward = [linear(f"{block}.{part}_proj", 256, inner) for part in "qkv"]
        return inward[0] | inward[1] | inward[2] | linear(f"{block}.out_proj", inner, 256)

    for number in range(2):
        layer = f"{name}.transformer.layers.{number}"
        shapes |= attention(f"{layer}.self_attn", 256)
        shapes |= attention(f"{layer}.cross_attn_token_to_image", 128)
        shapes |= attention(f"{layer}.cross_attn_image_to_token", 128)
        shapes |= linear(f"{layer}.mlp.lin1", 256, 2048) | linear(f"{layer}.mlp.lin2", 2048, 256)
        for k in range(1, 5):
            shapes |= norm(f"{layer}.norm{k}", 256)
    shapes |= attention(f"{name}.transformer.final_attn_token_to_image", 128)
    shapes |= norm(f"{name}.transformer.norm_final_attn", 256)
    shapes |= {f"{name}.output_upscaling.0.weight": (256, 64, 2, 2), f"{name}.output_upscaling.0.bias": (64,)}
    shapes |= norm(f"{name}.output_upscaling.1", 64)
    shapes |= {f"{name}.output_upscaling.3.weight": (64, 32, 2, 2), f"{name}.output_upscaling.3.bias": (32,)}
    heads = [(f"{name}.output_hypernetworks_mlps.{k}", 32) for k in range(4)] + [(f"{name}.iou_prediction_head", 4)]
    for head, outputs in heads:
        for k, width in enumerate((256, 256, outputs)):
            shapes |= linear(f"{head}.layers.{k}", 256, width)
    shapes |= {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128)}
    singles = [*(f"point_embeddings.{k}" for k in range(4)), "not_a_point_embed", "no_mask_embed"]
    shapes |= {f"prompt_encoder.{single}.weight": (1, 256) for single in singles}
    for k, (inputs, outputs, kernel) in {0: (1, 4, 2), 3: (4, 16, 2), 6: (16, 256, 1)}.items():
        place = f"prompt_encoder.mask_downscaling.{k}"
        shapes |= {f"{place}.weight": (outputs, inputs, kernel, kernel), f"{place}.bias": (outputs,)}
    return shapes | norm("prompt_encoder.mask_downscaling.1", 4) | norm("prompt_encoder.mask_downscaling.4", 16)


def small_sam(seed: int = 0) -> Tensors:
    """A whole checkpoint with a small encoder."""
    return filled(SMALL_VIT | decoder_shapes(), seed)


# what they compute


class Reader:
    """Layers whose weights are looked up by their names."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = {name.removeprefix("image_encoder."): value.double() for name, value in tensors.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        """Over the last axis."""
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def conv_norm(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = self.tensors[f"{name}.c.weight"]
        groups = x.shape[1] if kernel.shape[1] == 1 else 1
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
        mean, var, weight, bias = (
            self.tensors[f"{name}.bn.{p}"] for p in ("running_mean", "running_var", "weight", "bias")
        )
        scale = weight / (var + 1e-5).sqrt()
        return x * scale[:, None, None] + (bias - mean * scale)[:, None, None]

    def neck(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.tensors["neck.0.weight"])
        x = self.norm("neck.1", x.movedim(1, -1), 1e-6).movedim(-1, 1)
        x = F.conv2d(x, self.tensors["neck.2.weight"], padding=1)
        return self.norm("neck.3", x.movedim(1, -1), 1e-6).movedim(-1, 1)


def windows(grid: int, side: int) -> list[tuple[slice, slice]]:
    starts = range(0, grid, side)
    return [(slice(y, y + side), slice(x, x + side)) for y, x in product(starts, starts)]


def by_windows(x: Tensor, side: int, attend) -> Tensor:
    """``attend`` on each window "side side c" of "h w c"; beyond the last row and column there are zeros."""
    grid = x.shape[0]
    beyond = -grid % side
    padded = F.pad(x, (0, 0, 0, beyond, 0, beyond))
    result = torch.zeros_like(padded)
    for window in windows(grid, side):
        result[window] = attend(padded[window])
    return result[:grid, :grid]


def reference_vit(tensors: Tensors, image: Tensor, heads: int) -> Tensor:
    """Embedding "256 g g" of a normalized image "3 s s" by segment-anything's encoder, in double precision."""
    read = Reader(tensors)
    own = read.tensors
    x = F.conv2d(image.double()[None], own["patch_embed.proj.weight"], own["patch_embed.proj.bias"], stride=16)
    x = x[0].movedim(0, -1) + own["pos_embed"][0]
    grid, width = x.shape[0], x.shape[-1]

    def attention(block: str, side: int, tokens: Tensor) -> Tensor:
        q, k, v = read.linear(f"{block}.attn.qkv", tokens).reshape(side, side, 3, heads, width // heads).unbind(2)
        offset = torch.arange(side)[:, None] - torch.arange(side) + side - 1
        rows, columns = (own[f"{block}.attn.rel_pos_{axis}"][offset] for axis in "hw")
        scores = torch.einsum("yxnc,ijnc->nyxij", q, k) * (width // heads) ** -0.5
        scores = scores + torch.einsum("yxnc,yic->nyxi", q, rows)[..., None]
        scores = scores + torch.einsum("yxnc,xjc->nyxj", q, columns)[..., None, :]
        weights = scores.flatten(3).softmax(-1).reshape(scores.shape)
        return read.linear(f"{block}.attn.proj", torch.einsum("nyxij,ijnc->yxnc", weights, v).flatten(2))

    for number in range(sum(name.endswith("qkv.bias") for name in own)):
        block = f"blocks.{number}"
        side = (own[f"{block}.attn.rel_pos_h"].shape[0] + 1) // 2
        y = read.norm(f"{block}.norm1", x, 1e-6)
        x = x + by_windows(y, side, lambda part, b=block, s=side: attention(b, s, part))
        hidden = F.gelu(read.linear(f"{block}.mlp.lin1", read.norm(f"{block}.norm2", x, 1e-6)))
        x = x + read.linear(f"{block}.mlp.lin2", hidden)
    assert x.shape[0] == grid
    return read.neck(x.movedim(-1, 0)[None])[0]


def reference_mobile(tensors: Tensors, image: Tensor) -> Tensor:
    """Embedding "256 g g" of a normalized image "3 s s" by MobileSAM's encoder, in double precision."""
    read = Reader(tensors)
    x = F.gelu(read.conv_norm("patch_embed.seq.0", image.double()[None], 2))
    x = read.conv_norm("patch_embed.seq.2", x, 2)

    def attention(block: str, heads: int, tokens: Tensor) -> Tensor:
        side, width = tokens.shape[0], tokens.shape[-1]
        q, k, v = (
            read.linear(f"{block}.qkv", read.norm(f"{block}.norm", tokens, 1e-5))
            .reshape(side * side, heads, 3, width // heads)
            .unbind(2)
        )
        cells = torch.tensor(list(product(range(side), range(side))))
        apart = (cells[:, None] - cells).abs()
        bias = read.tensors[f"{block}.attention_biases"][:, apart[..., 0] * side + apart[..., 1]]
        weights = (torch.einsum("qnc,knc->nqk", q, k) * (width // heads) ** -0.5 + bias).softmax(-1)
        joined = torch.einsum("nqk,knc->qnc", weights, v).flatten(1)
        return read.linear(f"{block}.proj", joined).reshape(side, side, width)

    for layer, depth in enumerate(MOBILE_DEPTHS):
        for number in range(depth):
            block = f"layers.{layer}.blocks.{number}"
            if layer == 0:
                y = F.gelu(read.conv_norm(f"{block}.conv1", x))
                y = F.gelu(read.conv_norm(f"{block}.conv2", y))
                x = F.gelu(x + read.conv_norm(f"{block}.conv3", y))
                continue
            own = f"{block}.attn"
            tokens, heads = x[0].movedim(0, -1), MOBILE_HEADS[layer]
            tokens = tokens + by_windows(tokens, MOBILE_WINDOWS[layer], lambda p, o=own, h=heads: attention(o, h, p))
            x = read.conv_norm(f"{block}.local_conv", tokens.movedim(-1, 0)[None])
            tokens = x.movedim(1, -1)
            hidden = F.gelu(read.linear(f"{block}.mlp.fc1", read.norm(f"{block}.mlp.norm", tokens, 1e-5)))
            x = (tokens + read.linear(f"{block}.mlp.fc2", hidden)).movedim(-1, 1)
        if layer < 3:
            down = f"layers.{layer}.downsample"
            x = F.gelu(read.conv_norm(f"{down}.conv1", x))
            x = F.gelu(read.conv_norm(f"{down}.conv2", x, 2 if layer < 2 else 1))  # the last one keeps the grid
            x = read.conv_norm(f"{down}.conv3", x)
    return read.neck(x)[0]


def reference_mask(tensors: Tensors, embedding: Tensor, prompts: Tensor) -> Tensor:
    """Logits "4h 4w" of the first mask, of an embedding "256 h w" and prompt tokens "n 256", in double precision."""
    read = Reader({name.removeprefix("mask_decoder."): value for name, value in tensors.items()})
    own, (_, height, width) = read.tensors, embedding.shape
    pixels = embedding.double() + own["prompt_encoder.no_mask_embed.weight"].reshape(256, 1, 1)
    pixels = pixels.reshape(256, -1).T
    gaussian = own["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    places = []
    for row, column in product(range(height), range(width)):
        x, y = 2 * (column + 0.5) / width - 1, 2 * (row + 0.5) / height - 1
        phase = 2 * torch.pi * (x * gaussian[0] + y * gaussian[1])
        places.append(torch.cat([phase.sin(), phase.cos()]))
    where = torch.stack(places)
    start = torch.cat([own["iou_token.weight"], own["mask_tokens.weight"], prompts.double()])

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (read.linear(f"{name}.{part}_proj", x) for part, x in (("q", q), ("k", k), ("v", v)))
        size = q.shape[1] // 8
        heads = []
        for head in range(8):
            part = slice(head * size, (head + 1) * size)
            heads.append((q[:, part] @ k[:, part].T / size**0.5).softmax(1) @ v[:, part])
        return read.linear(f"{name}.out_proj", torch.cat(heads, 1))

    tokens = start
    for number in range(2):
        layer = f"transformer.layers.{number}"
        if number == 0:
            tokens = attend(f"{layer}.self_attn", tokens, tokens, tokens)
        else:
            tokens = tokens + attend(f"{layer}.self_attn", tokens + start, tokens + start, tokens)
        tokens = read.norm(f"{layer}.norm1", tokens, 1e-5)
        found = attend(f"{layer}.cross_attn_token_to_image", tokens + start, pixels + where, pixels)
        tokens = read.norm(f"{layer}.norm2", tokens + found, 1e-5)
        hidden = read.linear(f"{layer}.mlp.lin1", tokens).clamp_min(0)
        tokens = read.norm(f"{layer}.norm3", tokens + read.linear(f"{layer}.mlp.lin2", hidden), 1e-5)
        found = attend(f"{layer}.cross_attn_image_to_token", pixels + where, tokens + start, tokens)
        pixels = read.norm(f"{layer}.norm4", pixels + found, 1e-5)
    found = attend("transformer.final_attn_token_to_image", tokens + start, pixels + where, pixels)
    token = read.norm("transformer.norm_final_attn", tokens + found, 1e-5)[1]
    fine = pixels.T.reshape(1, 256, height, width)
    fine = F.conv_transpose2d(fine, own["output_upscaling.0.weight"], own["output_upscaling.0.bias"], stride=2)
    fine = F.gelu(read.norm("output_upscaling.1", fine.movedim(1, -1), 1e-6).movedim(-1, 1))
    fine = F.conv_transpose2d(fine, own["output_upscaling.3.weight"], own["output_upscaling.3.bias"], stride=2)
    for layer in range(3):
        token = read.linear(f"output_hypernetworks_mlps.0.layers.{layer}", token)
        token = token.clamp_min(0) if layer < 2 else token
    return (token[:, None, None] * F.gelu(fine)[0]).sum(0)
