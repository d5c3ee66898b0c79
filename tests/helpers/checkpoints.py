"""Checkpoints with the names and shapes of the published ones, and what the equations make of them.

Nothing here calls the networks of this package: names, shapes and the forward pass follow the description of DCAMA and
ConvDist (https://arxiv.org/abs/2512.05613), so that an import can be compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

RESNET18 = ((64, 128, 256, 512), (2, 2, 2, 2))
RESNET50 = ((256, 512, 1024, 2048), (3, 4, 6, 3))
SWIN = ((128, 256, 512, 1024), (2, 2, 18, 2))
DINOV3 = ((1024,) * 4, (3, 7, 7, 7))
Sizes = tuple[tuple[int, ...], tuple[int, ...]]
Stages = Sequence[Sequence[Tensor]]


def head_tensors(sizes: Sizes, *, seed: int = 0, positions: int = 300, support_skip: bool = False) -> dict[str, Tensor]:
    """A head for a backbone with these channels and blocks in its four stages, without prefix."""
    (c4, c8, *rest), (_, fine, mid, deep) = sizes
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def put(name: str, *shape: int) -> None:
        scale = 1 / math.sqrt(math.prod(shape[1:]))
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    for stage, c in enumerate((c8, *rest)):
        for i in range(2):
            put(f"DCAMA_blocks.{stage}.linears.{i}", c, c)
        tensors[f"pe.{stage}.pe"] = torch.from_numpy(sines(positions, c))[None]
    blocks = {
        1: (deep, (16, 64, 128), (3, 3, 3)),
        2: (mid, (16, 64, 128), (5, 3, 3)),
        3: (fine, (16, 64, 128), (5, 5, 3)),
        4: (128, (128, 128, 128), (3, 3, 3)),
        5: (128, (128, 128, 128), (3, 3, 3)),
    }
    for number, (inputs, widths, kernels) in blocks.items():
        for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            put(f"conv{number}.{3 * i}", width, inputs, kernel, kernel)
            tensors[f"conv{number}.{3 * i + 1}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
            tensors[f"conv{number}.{3 * i + 1}.bias"] = 0.1 * torch.randn(width, generator=generator)
            inputs = width
    skips = (c4 + c8) * (2 if support_skip else 1)
    for name, inputs, width in (
        ("mixer1.0", 128 + skips, 128),
        ("mixer1.2", 128, 64),
        ("mixer2.0", 64, 64),
        ("mixer2.2", 64, 16),
        ("mixer3.0", 16, 16),
        ("mixer3.2", 16, 2),
    ):
        put(name, width, inputs, 3, 3)
    return tensors


def student_tensors(sizes: Sizes, classes: int, *, seed: int = 1) -> dict[str, Tensor]:
    """The students of so many classes, without prefix."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for k in range(classes):
        for stage, c in enumerate(sizes[0][1:]):
            name = f"{k}.coarse_extractor.{stage}"
            tensors[f"{name}.0.weight"] = torch.randn(c, c, 3, 3, generator=generator) / math.sqrt(9 * c)
            tensors[f"{name}.0.bias"] = torch.randn(c, generator=generator) * 0.1
            tensors[f"{name}.2.weight"] = torch.randn(1, c, 1, 1, generator=generator) / math.sqrt(c)
            tensors[f"{name}.2.bias"] = torch.randn(1, generator=generator) * 0.1
    return tensors


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def resnet(depth: int, *, seed: int = 2) -> torchvision.models.ResNet:
    """A ResNet in evaluation mode whose BatchNorm has statistics of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = getattr(torchvision.models, f"resnet{depth}")(weights=None)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def dcama(depth: int, sizes: Sizes, **options: int | bool) -> dict[str, Tensor]:
    """A checkpoint of DCAMA on a ResNet."""
    return prefixed("feature_extractor.", dict(resnet(depth).state_dict())) | prefixed(
        "model.", head_tensors(sizes, **options)
    )


def distilled(depth: int, sizes: Sizes, classes: int) -> dict[str, Tensor]:
    """A checkpoint of DistillFSS on a ResNet."""
    return prefixed("teacher.", dcama(depth, sizes)) | prefixed("student.", student_tensors(sizes, classes))


def swin_tensors(seed: int = 3) -> dict[str, Tensor]:
    """Swin-B of 384 x 384 with windows of 12, under the names of its authors, without prefix."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def put(name: str, *shape: int, bias: bool = True) -> None:
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.02 + (len(shape) == 1)
        if bias:
            tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.02

    put("patch_embed.proj", 128, 3, 4, 4)
    put("patch_embed.norm", 128)
    for stage, (c, depth, heads, side) in enumerate(
        zip(SWIN[0], SWIN[1], (4, 8, 16, 32), (96, 48, 24, 12), strict=True)
    ):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            if block % 2 and side > 12:
                tensors[f"{name}.attn_mask"] = torch.zeros((side // 12) ** 2, 144, 144)
            put(f"{name}.norm1", c)
            tensors[f"{name}.attn.relative_position_bias_table"] = torch.randn(529, heads, generator=generator) * 0.02
            tensors[f"{name}.attn.relative_position_index"] = torch.zeros(144, 144, dtype=torch.int64)
            put(f"{name}.attn.qkv", 3 * c, c)
            put(f"{name}.attn.proj", c, c)
            put(f"{name}.norm2", c)
            put(f"{name}.mlp.fc1", 4 * c, c)
            put(f"{name}.mlp.fc2", c, 4 * c)
        if stage < 3:
            put(f"layers.{stage}.downsample.reduction", 2 * c, 4 * c, bias=False)
            put(f"layers.{stage}.downsample.norm", 4 * c)
    put("norm", 1024)
    put("head", 1000, 1024)
    return tensors


def sines(length: int, channels: int) -> np.ndarray:
    """Sinusoidal encoding (Vaswani et al. 2017, section 3.5), computed in double precision."""
    angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, channels, 2) / channels)
    code = np.empty((length, channels))
    code[:, 0::2], code[:, 1::2] = np.sin(angle), np.cos(angle)
    return code.astype(np.float32)


# what the equations make of them


@torch.no_grad()
def resnet_blocks(net: torchvision.models.ResNet, image: Tensor) -> list[list[Tensor]]:
    """Output of every block before its last ReLU, for RGB images in 0..1."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (image - mean[:, None, None]) / std[:, None, None]
    x = net.maxpool(F.relu(net.bn1(net.conv1(x))))
    stages = []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        outputs = []
        for block in layer:
            y = F.relu(block.bn1(block.conv1(x)))
            y = block.bn2(block.conv2(y))
            if hasattr(block, "conv3"):
                y = block.bn3(block.conv3(F.relu(y)))
            y = y + (x if block.downsample is None else block.downsample(x))
            outputs.append(y)
            x = F.relu(y)
        stages.append(outputs)
    return stages


@torch.no_grad()
def attention_maps(head: dict[str, Tensor], query: Stages, support: Stages, mask: Tensor) -> list[Tensor]:
    """m = mean over heads of softmax(q k^T / sqrt(c / 8)) v, of the three coarse stages: "b n h w" each.

    Queries "b c h w" a block, supports "n c h w", mask "n h w".
    """
    maps = []
    for stage in range(3):
        rows = []
        for q_block, k_block in zip(query[stage + 1], support[stage + 1], strict=True):
            (b, c, h, w), n = q_block.shape, len(k_block)
            code = torch.from_numpy(sines(h * w, c))
            q, k = (
                F.linear(
                    block.flatten(2).transpose(1, 2) + code,
                    head[f"DCAMA_blocks.{stage}.linears.{i}.weight"],
                    head[f"DCAMA_blocks.{stage}.linears.{i}.bias"],
                )
                for i, block in enumerate((q_block, k_block))
            )
            v = F.interpolate(mask[:, None], (h, w), mode="bilinear", align_corners=True).reshape(-1)
            q = q.reshape(b, h * w, 8, c // 8)
            k = k.reshape(n * h * w, 8, c // 8)
            weights = torch.einsum("bqhd,khd->bhqk", q, k).div(math.sqrt(c / 8)).softmax(-1)
            rows.append((weights @ v).mean(1).reshape(b, h, w))
        maps.append(torch.stack(rows, 1))
    return maps


@torch.no_grad()
def student_maps(student: dict[str, Tensor], k: int, query: Stages) -> list[Tensor]:
    """m = Conv1x1(ReLU(Conv3x3(f))) of class k, of the three coarse stages: "b n h w" each."""
    maps = []
    for stage in range(3):
        name = f"{k}.coarse_extractor.{stage}"
        rows = []
        for block in query[stage + 1]:
            hidden = F.relu(F.conv2d(block, student[f"{name}.0.weight"], student[f"{name}.0.bias"], padding=1))
            rows.append(F.conv2d(hidden, student[f"{name}.2.weight"], student[f"{name}.2.bias"])[:, 0])
        maps.append(torch.stack(rows, 1))
    return maps


@torch.no_grad()
def decoded(head: dict[str, Tensor], maps: Sequence[Tensor], query: Stages, size: tuple[int, int]) -> Tensor:
    """Logits "b 2 h w" of the mixer, whose last stage is a quarter of ``size`` before it is doubled twice."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = head[f"{name}.weight"]
        return F.conv2d(x, weight, head[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def block(x: Tensor, name: str) -> Tensor:
        for i in (0, 3, 6):
            x = conv(x, f"{name}.{i}")
            x = F.relu(F.group_norm(x, 4, head[f"{name}.{i + 1}.weight"], head[f"{name}.{i + 1}.bias"]))
        return x

    def resized(x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)

    fine, mid, deep = maps
    x = block(deep, "conv1")
    y = block(mid, "conv2")
    x = block(resized(x, y.shape[-2:]) + y, "conv4")
    y = block(fine, "conv3")
    x = block(resized(x, y.shape[-2:]) + y, "conv5")
    x = torch.cat([x, query[1][-1]], 1)
    doubled = [2 * side for side in x.shape[-2:]]
    x = torch.cat([resized(x, doubled), resized(query[0][-1], doubled)], 1)
    x = resized(x, [side // 4 for side in size])
    x = F.relu(conv(F.relu(conv(x, "mixer1.0")), "mixer1.2"))
    x = resized(x, [2 * side for side in x.shape[-2:]])
    x = F.relu(conv(F.relu(conv(x, "mixer2.0")), "mixer2.2"))
    x = resized(x, [2 * side for side in x.shape[-2:]])
    return conv(F.relu(conv(x, "mixer3.0")), "mixer3.2")


def merged(logits: Sequence[Tensor]) -> Tensor:
    """Probabilities "b k+1 h w": the background is that of the class with the largest foreground logit there."""
    stacked = torch.stack(list(logits), 1)
    foreground = stacked[:, :, 1]
    background = stacked[:, :, 0].gather(1, foreground.argmax(1, keepdim=True))
    return torch.cat([background, foreground], 1).softmax(1)
