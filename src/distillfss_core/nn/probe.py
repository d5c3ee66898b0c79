"""The probe: a linear classifier of pixels on the frozen features and on the intensities themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.nn.backbones import BackboneSpec
from distillfss_core.nn.decoder import sum_on_finest
from distillfss_core.nn.features import FeaturePyramid

KNOTS = 8
"""Intensities of a map at which the slope of its part in the margin may change."""

BOUND = 2.0
"""Margins that evidence for a student approaches but never reaches: log-odds of 7 to 1."""

WINDOWS = (3, 9)
"""Cells over which intensities are averaged, odd; a cell is two of the finest stage, which costs a quarter of one."""


class PiecewiseLinear(nn.Conv2d):
    """A 1x1 convolution of maps and of their excess over `KNOTS` knots (0 below the knot).

    Parameters
    ----------
    maps, others : int
        Input channels that have knots, and those after them that have none.
    classes : int
        Output channels.
    """

    knots: Tensor
    copies: Tensor

    def __init__(self, maps: int, others: int, classes: int, *, bias: bool) -> None:
        super().__init__(maps * (1 + KNOTS) + others, classes, 1, bias=bias)
        self.maps: int = maps
        self.read: int = maps + others
        self.register_buffer("knots", torch.zeros(maps, KNOTS))
        copies = torch.eye(self.read)[[*range(self.read), *(m for m in range(maps) for _ in range(KNOTS))]]
        self.register_buffer("copies", copies[:, :, None, None], persistent=False)

    def columns(self, x: Float[Tensor, "n c"]) -> Float[Tensor, "n f"]:
        """What the weights are for: the inputs, then the excess of each map over each of its knots."""
        excess = F.relu(x[:, : self.maps, None] - self.knots)
        return torch.cat([x, excess.flatten(1)], 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """The same of maps that are not negative: inputs and excess are one convolution, which engines fuse."""
        below = torch.cat([self.knots.new_zeros(self.read), -self.knots.flatten()])
        result: Tensor = super().forward(F.relu(F.conv2d(x, self.copies, below)))
        return result


class Probe(nn.Module):
    """Margins of each class over background, linear in the features and piecewise linear in the intensities.

    Features of a flat patch carry little of its gray value, which a threshold needs. So the probe reads the image too:
    its intensities on the grid of the finest stage, and on one twice as coarse their means over two windows and the
    deviations in these::

        last block of each stage --------------1x1----------up--+
        intensities ---------------------------hinges, 1x1------+-- sum: margins on the grid of the finest stage
        two local means and deviations --------hinges, 1x1--up--'

    The output at a pixel depends on a bounded neighborhood only, if that of the backbone does. A new probe answers zero
    everywhere.

    Parameters
    ----------
    spec : BackboneSpec
    classes : int
        K, without background.
    inputs : {1, 3}
        Channels of the image that are read; 1 where all three are alike.
    alone : bool
        Whether it is a student of its own; otherwise its margins are evidence, which is added to those of a head.
    bound : float, optional
        Of evidence: a margin m becomes bound tanh(m / bound). In images unlike all supports margins are extrapolated.
        Bounded, they cannot overrule the head.
    """

    def __init__(
        self, spec: BackboneSpec, classes: int, inputs: int, *, alone: bool = True, bound: float | None = None
    ) -> None:
        super().__init__()
        self.alone: bool = alone
        self.bound: float | None = bound
        self.stride: int = spec.strides[0]
        self.inputs: int = inputs
        means = inputs * len(WINDOWS)
        self.stages: nn.ModuleList = nn.ModuleList(nn.Conv2d(c, classes, 1, bias=False) for c in spec.channels)
        self.intensities: PiecewiseLinear = PiecewiseLinear(inputs, 0, classes, bias=True)
        self.surroundings: PiecewiseLinear = PiecewiseLinear(means, means, classes, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: FeaturePyramid, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hg wg"]:
        """Margins of a batch of images in [0, 1], on the grid of the finest stage; bounded where they are evidence."""
        margins = self.margins(self.inputs_of(features, image))
        return margins if self.bound is None else self.bound * torch.tanh(margins / self.bound)

    def inputs_of(self, features: FeaturePyramid, image: Float[Tensor, "b 3 h w"]) -> FeaturePyramid:
        """All maps that it reads, which do not depend on its weights: the last block of each stage, then `maps`."""
        stages = tuple((stage[-1],) for stage in features.stages)
        return FeaturePyramid((*stages, *((part,) for part in self.maps(image))), features.size)

    def margins(self, inputs: FeaturePyramid) -> Float[Tensor, "b k hg wg"]:
        """Margins from `inputs_of` a batch of images, not bounded."""
        *stages, pixels, around = (stage[-1] for stage in inputs.stages)
        parts = [self.intensities(pixels), self.surroundings(around)]
        parts += [layer(block) for layer, block in zip(self.stages, stages, strict=True)]
        result: Float[Tensor, "b k hg wg"] = sum_on_finest(parts)
        return result

    def maps(self, image: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b i hg wg"], Float[Tensor, "b s h2 w2"]]:
        """Intensities on the finest grid; their means over `WINDOWS` and the deviations from these, twice as coarse."""
        # Engines copy even what they read whole through a slice.
        pixels = F.avg_pool2d(image if image.shape[1] == self.inputs else image[:, : self.inputs], self.stride)
        cells = F.avg_pool2d(pixels, 2)
        means = [_local_mean(cells, window) for window in WINDOWS]
        deviations = [
            _local_mean((cells - mean) ** 2, window).clamp_min(1e-8).sqrt()
            for mean, window in zip(means, WINDOWS, strict=True)
        ]
        return pixels, torch.cat([*means, *deviations], 1)

    def columns(self, x: Float[Tensor, "n c"]) -> Float[Tensor, "n f"]:
        """What `weights` are for, from features and `maps` at points, side by side."""
        pixels, around = self.intensities.read, self.surroundings.read
        features, pixels_read, around_read = x.split([x.shape[1] - pixels - around, pixels, around], 1)
        return torch.cat([features, self.intensities.columns(pixels_read), self.surroundings.columns(around_read)], 1)

    def _layers(self) -> list[nn.Conv2d]:
        layers = (*self.stages, self.intensities, self.surroundings)
        return [layer for layer in layers if isinstance(layer, nn.Conv2d)]

    def weights(self) -> tuple[Float[Tensor, "k f"], Float[Tensor, " k"]]:
        """Weights of all layers side by side, and the bias."""
        assert self.intensities.bias is not None
        return torch.cat([layer.weight[:, :, 0, 0] for layer in self._layers()], 1), self.intensities.bias

    @torch.no_grad()
    def set_weights(self, weights: Float[Tensor, "k f"], bias: Float[Tensor, " k"]) -> None:
        """Set what `weights` returns."""
        sizes = [layer.in_channels for layer in self._layers()]
        for layer, part in zip(self._layers(), weights.split(sizes, 1), strict=True):
            layer.weight.copy_(part[:, :, None, None])
        assert self.intensities.bias is not None
        self.intensities.bias.copy_(bias)

    def scale(self, gain: float, offsets: Float[Tensor, " k"]) -> None:
        """Multiply the margins by a gain, then add an offset to those of each class."""
        weights, bias = self.weights()
        self.set_weights(gain * weights, gain * bias + offsets)


def _local_mean(maps: Tensor, window: int) -> Tensor:
    """Mean over a square window, less what of it lies outside: along the rows, then along the columns."""
    for kernel in ((1, window), (window, 1)):
        padding = (kernel[0] // 2, kernel[1] // 2)
        maps = F.avg_pool2d(maps, kernel, 1, padding, count_include_pad=False)
    return maps
