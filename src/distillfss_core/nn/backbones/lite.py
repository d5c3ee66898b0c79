"""EfficientNet-Lite, with timm's names of tensors and its results bit for bit.

It is the one family that is built here. The packaged backbones are of it, and importing timm also imports torchvision
and ``torch._dynamo``: 2.5 s and 0.19 GB.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.nn.backbones.spec import BackboneSpec, LiteStage

_EPS = 1e-3
_FEATURES, _CLASSES = 1280, 1000


class SameConv2d(nn.Conv2d):
    """A convolution that pads by zeros as TensorFlow's SAME does: to ceil(side / stride), the odd row behind."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Pad, then convolve."""
        (top, bottom), (left, right) = (
            _padding(side, kernel, stride)
            for side, kernel, stride in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True)
        )
        return super().forward(F.pad(x, (left, right, top, bottom)))


class NormAct(nn.BatchNorm2d):
    """BatchNorm and what follows it."""

    def __init__(self, channels: int, *, active: bool = True) -> None:
        super().__init__(channels, eps=_EPS)
        self.act: nn.Module = nn.ReLU6(inplace=True) if active else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Norm, then activation."""
        y: Tensor = self.act(super().forward(x))
        return y


class SeparableBlock(nn.Module):
    """A depthwise and a pointwise convolution."""

    def __init__(self, inputs: int, stage: LiteStage, stride: int) -> None:
        super().__init__()
        self.has_skip: bool = stride == 1 and inputs == stage.channels
        self.conv_dw: nn.Conv2d = _conv(inputs, inputs, stage.kernel, stride, groups=inputs)
        self.bn1: nn.Module = NormAct(inputs)
        self.conv_pw: nn.Conv2d = _conv(inputs, stage.channels)
        self.bn2: nn.Module = NormAct(stage.channels, active=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """The block's output, with its input added where their shapes are equal."""
        y: Tensor = self.bn2(self.conv_pw(self.bn1(self.conv_dw(x))))
        return y + x if self.has_skip else y


class InvertedResidual(nn.Module):
    """A pointwise convolution to more channels, a depthwise one, and a pointwise one to fewer."""

    def __init__(self, inputs: int, stage: LiteStage, stride: int) -> None:
        super().__init__()
        inner = inputs * stage.expansion
        self.has_skip: bool = stride == 1 and inputs == stage.channels
        self.conv_pw: nn.Conv2d = _conv(inputs, inner)
        self.bn1: nn.Module = NormAct(inner)
        self.conv_dw: nn.Conv2d = _conv(inner, inner, stage.kernel, stride, groups=inner)
        self.bn2: nn.Module = NormAct(inner)
        self.conv_pwl: nn.Conv2d = _conv(inner, stage.channels)
        self.bn3: nn.Module = NormAct(stage.channels, active=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """The block's output, with its input added where their shapes are equal."""
        y: Tensor = self.bn3(self.conv_pwl(self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))))
        return y + x if self.has_skip else y


class EfficientNetLite(nn.Module):
    """Stem and blocks; the published sizes also have a classifier, as their files have it [1]_.

    It is a holder of modules for a trunk, and is not run itself.

    References
    ----------
    .. [1] Tan and Le, "EfficientNet", ICML 2019; the Lite sizes are of TensorFlow's model garden, 2020.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.conv_stem: nn.Conv2d = _conv(3, spec.stem, 3, 2)
        self.bn1: nn.Module = NormAct(spec.stem)
        channels, stages = spec.stem, []
        for stage in spec.layout:
            kind = SeparableBlock if stage.expansion == 1 else InvertedResidual
            blocks = []
            for index in range(stage.repeats):
                blocks.append(kind(channels, stage, stage.stride if index == 0 else 1))
                channels = stage.channels
            stages.append(nn.Sequential(*blocks))
        self.blocks: nn.Sequential = nn.Sequential(*stages)
        if spec.pruned_from is None:
            self.conv_head: nn.Conv2d = _conv(channels, _FEATURES)
            self.bn2: nn.Module = NormAct(_FEATURES)
            self.classifier: nn.Linear = nn.Linear(_FEATURES, _CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.weight[:, 0].numel() / module.groups)))


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride == 1:
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and behind."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2
