"""The probe: a linear classifier of pixels on the frozen features and on the intensities themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.nn.backbones import BackboneSpec
from distillfss_core.nn.decoder import resize_like
from distillfss_core.nn.features import FeaturePyramid

KNOTS = 8
"""Intensities of a map at which the slope of its part in the margin may change."""

WINDOWS = (5, 17)
"""Cells of the finest stage over which intensities are averaged, odd."""


class Probe(nn.Module):
    """Margins of each class over background, linear in the features and piecewise linear in the intensities.

    Features of a flat patch carry little of its gray value, which a threshold needs. So the probe reads the image too:
    its intensities on the grid of the finest stage, their means over two windows, and the deviations in these::

        last block of each stage ------------------1x1--up--+
        intensities, two local means --hinges------1x1------+-- sum: margins on the grid of the finest stage
        two local deviations ----------------------1x1------'

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
        Whether it is a student of its own; otherwise its margins are added to those of a head.
    """

    knots: Tensor

    def __init__(self, spec: BackboneSpec, classes: int, inputs: int, *, alone: bool = True) -> None:
        super().__init__()
        self.alone: bool = alone
        self.stride: int = spec.strides[0]
        self.inputs: int = inputs
        self.stages: nn.ModuleList = nn.ModuleList(nn.Conv2d(c, classes, 1, bias=False) for c in spec.channels)
        means, deviations = inputs * (1 + len(WINDOWS)), inputs * len(WINDOWS)
        self.intensities: nn.Conv2d = nn.Conv2d(means * (1 + KNOTS) + deviations, classes, 1)
        self.register_buffer("knots", torch.zeros(means, KNOTS))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: FeaturePyramid, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hg wg"]:
        """Margins of a batch of images in [0, 1], on the grid of the finest stage."""
        means, deviations = self.maps(image)
        result: Float[Tensor, "b k hg wg"] = self.intensities(torch.cat([self.hinges(means), deviations], 1))
        for layer, stage in zip(self.stages, features.stages, strict=True):
            result = result + resize_like(layer(stage[-1]), result)
        return result

    def maps(self, image: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b m hg wg"], Float[Tensor, "b d hg wg"]]:
        """Intensities and their means over `WINDOWS`, and the deviations from those means, on the finest grid."""
        pixels = F.avg_pool2d(image[:, : self.inputs], self.stride)
        means = [_local_mean(pixels, window) for window in WINDOWS]
        deviations = [
            _local_mean((pixels - mean) ** 2, window).clamp_min(1e-8).sqrt()
            for mean, window in zip(means, WINDOWS, strict=True)
        ]
        return torch.cat([pixels, *means], 1), torch.cat(deviations, 1)

    def _layers(self) -> list[nn.Conv2d]:
        """Those of the stages, then that of the intensities."""
        return [layer for layer in (*self.stages, self.intensities) if isinstance(layer, nn.Conv2d)]

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

    def hinges(self, means: Float[Tensor, "b m h w"]) -> Float[Tensor, "b m9 h w"]:
        """Each map, followed by its excess over each of its knots (0 below the knot)."""
        excess = F.relu(means[:, None] - self.knots.T[:, :, None, None])
        return torch.cat([means, excess.flatten(1, 2)], 1)


def _local_mean(maps: Tensor, window: int) -> Tensor:
    """Mean over a square window, less what of it lies outside: along the rows, then along the columns."""
    for kernel in ((1, window), (window, 1)):
        padding = (kernel[0] // 2, kernel[1] // 2)
        maps = F.avg_pool2d(maps, kernel, 1, padding, count_include_pad=False)
    return maps
