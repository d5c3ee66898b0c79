"""Trunks: parts of models that give the output of every block, up to the last one needed.

Models are timm's, but EfficientNet-Lite is built here. A trunk takes what it needs of one, under timm's own attribute
names, and nothing else: what it does not take is neither run nor kept, and its tensors keep timm's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.nn.backbones.lite import EfficientNetLite
from distillfss_core.nn.backbones.spec import BackboneSpec, Family

Image = Float[Tensor, "b 3 h w"]
Stages = tuple[tuple[Tensor, ...], ...]
"""Fine to coarse; a tensor "b c h w" a block."""

STEM = -1
_TAPS: dict[Family, tuple[int, ...]] = {
    "efficientnet": (0, 1, 2, 4, 5),
    "mobilenetv4": (STEM, 0, 1, 2, 3),
    "lcnet": (0, 1, 2, 4, 5),
}
_TIMM_ARGS: dict[Family, dict[str, Any]] = {
    "swin": {"strict_img_size": False},
    "vit": {"dynamic_img_size": True, "num_classes": 0},
}


class EfficientNetTrunk(nn.Module):
    """EfficientNet-Lite, MobileNetV4 and LCNet: the last blocks of some of timm's stages, or the stem."""

    def __init__(self, net: Any, spec: BackboneSpec) -> None:
        super().__init__()
        self.taps: tuple[int, ...] = _TAPS[spec.family]
        self.counts: tuple[int, ...] = spec.blocks
        self.conv_stem: nn.Module = net.conv_stem
        self.bn1: nn.Module = net.bn1
        self.blocks: Any = net.blocks[: self.taps[-1] + 1]

    def forward(self, x: Image) -> Stages:
        """Outputs "b c h w" of the blocks of each stage, fine to coarse, for normalized images "b 3 h w"."""
        x = self.bn1(self.conv_stem(x))
        outputs = {STEM: [x]}
        for index, stage in enumerate(self.blocks):
            outputs[index] = []
            for block in stage:
                x = block(x)
                outputs[index].append(x)
        return tuple(tuple(outputs[tap][-count:]) for tap, count in zip(self.taps, self.counts, strict=True))


class ResNetTrunk(nn.Module):
    """ResNet: the stem after its ReLU, then every block *before* its last ReLU (the published form of DCAMA).

    The last ReLU of a block is taken out of it and applied on the way to the next block, so that what was given out
    is not overwritten.
    """

    def __init__(self, net: Any, spec: BackboneSpec) -> None:
        super().__init__()
        self.conv1: nn.Module = net.conv1
        self.bn1: nn.Module = net.bn1
        self.act1: nn.Module = net.act1
        self.maxpool: nn.Module = net.maxpool
        self.layer1: nn.Sequential = net.layer1
        self.layer2: nn.Sequential = net.layer2
        self.layer3: nn.Sequential = net.layer3
        self.layer4: nn.Sequential = net.layer4
        for layer in self._layers():
            for block in layer:
                setattr(block, "act3" if hasattr(block, "act3") else "act2", nn.Identity())

    def _layers(self) -> tuple[nn.Sequential, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward(self, x: Image) -> Stages:
        """Outputs "b c h w" of the blocks of each stage, fine to coarse, for normalized images "b 3 h w"."""
        stem = self.act1(self.bn1(self.conv1(x)))
        stages = [(stem,)]
        x = self.maxpool(stem)
        for layer in self._layers():
            outputs = []
            for block in layer:
                outputs.append(block(x))
                x = F.relu(outputs[-1])
            stages.append(tuple(outputs))
        return tuple(stages)


class ConvNeXtTrunk(nn.Module):
    """ConvNeXt: every block of the four stages."""

    def __init__(self, net: Any, spec: BackboneSpec) -> None:
        super().__init__()
        self.stem: nn.Module = net.stem
        self.stages: Any = net.stages

    def forward(self, x: Image) -> Stages:
        """Outputs "b c h w" of the blocks of each stage, fine to coarse, for normalized images "b 3 h w"."""
        x = self.stem(x)
        stages = []
        for stage in self.stages:
            outputs = list(_chain(stage.blocks, stage.downsample(x)))
            x = outputs[-1]
            stages.append(tuple(outputs))
        return tuple(stages)


class SwinTrunk(nn.Module):
    """Swin: every block of the four stages, turned from "b h w c" to "b c h w".

    Windows and shifts stay those of 384 x 384 whatever the input's size: the last stage never shifts its windows.
    """

    def __init__(self, net: Any, spec: BackboneSpec) -> None:
        super().__init__()
        self.patch_embed: nn.Module = net.patch_embed
        self.layers: Any = net.layers

    def forward(self, x: Image) -> Stages:
        """Outputs "b c h w" of the blocks of each stage, fine to coarse, for normalized images "b 3 h w"."""
        x = self.patch_embed(x)  # b h w c
        stages = []
        for layer in self.layers:
            outputs = list(_chain(layer.blocks, layer.downsample(x)))
            x = outputs[-1]
            stages.append(tuple(y.permute(0, 3, 1, 2) for y in outputs))
        return tuple(stages)


class VitTrunk(nn.Module):
    """DINOv2 and DINOv3: every block's patch tokens, normalized by the final LayerNorm, in groups.

    The model is used as a whole, since its position code (absolute or rotary) is spread over it.
    """

    def __init__(self, net: Any, spec: BackboneSpec) -> None:
        super().__init__()
        self.net: Any = net
        self.patch: int = spec.multiple
        self.counts: tuple[int, ...] = spec.blocks

    def forward(self, x: Image) -> Stages:
        """Outputs "b c h w" of the blocks of each stage, fine to coarse, for normalized images "b 3 h w"."""
        grid = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        tokens = self.net.forward_intermediates(x, norm=True, output_fmt="NLC", intermediates_only=True)
        maps = iter([y.unflatten(1, grid).permute(0, 3, 1, 2) for y in tokens])  # b h*w c -> b c h w
        return tuple(tuple(next(maps) for _ in range(count)) for count in self.counts)


_TRUNKS: dict[Family, type[nn.Module]] = {
    "efficientnet": EfficientNetTrunk,
    "mobilenetv4": EfficientNetTrunk,
    "lcnet": EfficientNetTrunk,
    "resnet": ResNetTrunk,
    "convnext": ConvNeXtTrunk,
    "swin": SwinTrunk,
    "vit": VitTrunk,
}


def create_net(spec: BackboneSpec, seed: int = 0) -> nn.Module:
    """The whole model with random tensors that follow from ``seed``; torch's own random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.layout:
            return EfficientNetLite(spec)
        import timm

        return timm.create_model(spec.timm_name, pretrained=False, **_TIMM_ARGS.get(spec.family, {}))


def create_trunk(net: nn.Module, spec: BackboneSpec) -> nn.Module:
    """The part of ``net`` that gives ``spec``'s features; it shares (and changes) ``net``'s modules."""
    return _TRUNKS[spec.family](net, spec)


def trunk_tensors(trunk: nn.Module) -> dict[str, Tensor]:
    """The tensors of a trunk under timm's names, not copied; BatchNorm's batch counters are no part of them."""
    tensors = {key.removeprefix("net."): tensor for key, tensor in trunk.state_dict().items()}
    return {key: tensor for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")}


def _chain(blocks: nn.Sequential, x: Tensor) -> Iterator[Tensor]:
    for block in blocks:
        x = block(x)
        yield x
